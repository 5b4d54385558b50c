"""What a sweep on a pod would wait for: its schedule, simulated from what is measured here.

Command: python -m optjax.experiments.bench.pod
Measured on this machine: how much the time of a chunk varies, how fast the log takes records, how
long processes take to agree (`agreed` of two and four processes on one machine). Assumed: eight
devices a host, a network of 10 GB/s into each host, and that agreeing grows with the logarithm of
the number of hosts. The schedule is the executor's: after a chunk all agree, all get the records,
process 0 writes them, and the devices wait; a checkpoint, which all wait for too, takes at most a
twentieth of the time.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import optax

import optjax as oj
from optjax.sweeps.store import Store

PER_HOST, NETWORK, RUNS = 8, 10e9, 64
"""Devices of a host; bytes a second into it; runs of a device."""

CHUNK, RECORDS, METRICS, BETWEEN = 1.0, 10, 2, 30.0
"""Seconds and records of a chunk, values of a record, least seconds between checkpoints."""


class PodTimes(NamedTuple):
    """What the simulation rests on."""

    times: np.ndarray  # of a chunk, over their median
    log: float  # bytes a second
    agree: tuple[float, float]  # seconds: of two processes, and of a doubling


class Schedule(NamedTuple):
    """Shares of the time, and what a checkpoint takes."""

    computing: float
    straggling: float  # waiting for the slowest device
    agreeing: float
    records: float  # gathering and writing them
    saving: float
    apart: float  # seconds from checkpoint to checkpoint
    held: float  # bytes that every host holds of it


def measure() -> PodTimes:
    """Time chunks, appends to a log and agreements."""
    rng = np.random.default_rng(0)
    problem = oj.least_squares(rng.normal(size=(256, 64)), rng.normal(size=256))
    run = oj.make_run(problem, optax.adam, 1_200_000, max_batch_size=32, record_every=2000)
    ends: list[float] = []
    oj.sweep(
        run, {"learning_rate": [0.01]}, 16, layout="vmap", chunk_steps=20_000,
        progress=lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    times = np.diff(ends[5:])
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        rows = {"values": np.ones((1 << 20, RECORDS), np.float32)}
        took = min(_took(lambda: store.append("records", rows)) for _ in range(5))
        store.close()
    two, four = _agreeing(2), _agreeing(4)
    return PodTimes(times / np.median(times), rows["values"].nbytes / took, (two, four - two))


def _took(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


_AGREE = """
import sys, time
from optjax.sweeps.processes import agreed, join
join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
times = []
for _ in range(200):
    begin = time.perf_counter()
    agreed(0, 1)
    times.append(time.perf_counter() - begin)
print("median", sorted(times)[100])
"""


def _agreeing(count: int) -> float:
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _AGREE, address, str(count), str(me)],
            stdout=subprocess.PIPE, text=True,
        )
        for me in range(count)
    ]  # fmt: skip
    said = [one.communicate()[0] for one in started]
    return float(said[0].split()[-1])


def simulate(measured: PodTimes, devices: int, state: float, chunks: int = 40_000) -> Schedule:
    """Go through the schedule of so many devices, whose runs have states of so many bytes."""
    rng = np.random.default_rng(devices)
    hosts, runs = max(1, devices // PER_HOST), devices * RUNS
    first, doubling = measured.agree
    agree = 0.0 if hosts == 1 else first + doubling * np.log2(hosts / 2)
    told = runs * RECORDS * METRICS * 4
    records = told / NETWORK * (hosts > 1) + told / measured.log
    held = runs * state
    cost = held / NETWORK * (hosts > 1) + held / measured.log
    straggling = saving = total = saved = 0.0
    saves = 0
    for _ in range(chunks):
        slowest = CHUNK * rng.choice(measured.times, devices).max()
        straggling += slowest - CHUNK
        total += slowest + records + agree
        if total - saved >= max(BETWEEN, 20 * cost):
            saving, total, saves = saving + cost, total + cost, saves + 1
            saved = total
    apart = total / saves if saves else np.inf
    shares = (chunks * CHUNK, straggling, chunks * agree, chunks * records, saving)
    return Schedule(*(float(share) / total for share in shares), apart, held)


def main() -> None:
    measured = measure()
    low, high = np.quantile(measured.times, [0.05, 0.99])
    print(
        f"measured: a chunk takes {low:.2f} to {high:.2f} of its median (5 to 99 %); the log takes "
        f"{measured.log / 1e6:.0f} MB/s; two processes agree in {1e3 * measured.agree[0]:.2f} ms, "
        f"each doubling adds {1e3 * measured.agree[1]:.2f} ms"
    )
    for what, state in (("2 kB (100 parameters, Adam)", 2e3), ("600 kB (50,000, Adam)", 6e5)):
        print(f"\nstate of a run: {what}")
        print("devices  computing  straggling  agreeing  records  saving   apart (s)  held (GB)")
        for devices in (8, 64, 512, 4096):
            found = simulate(measured, devices, state)
            shares = "".join(f"{100 * share:9.2f} %" for share in found[:5])
            print(f"{devices:7,}{shares}{found.apart:11.0f}{found.held / 1e9:11.2f}")


if __name__ == "__main__":
    main()
