"""Sweep for an hour with checkpoints; watch memory, descriptors, threads and speed.

python hour.py FOLDER [SECONDS]: writes FOLDER/hour.csv every ten seconds, and FOLDER/hour.svg.
"""

import csv
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import optax

import optjax as oj
from optjax.report.style import COLOURS, figure, save

EVERY = 10.0
FIELDS = ("seconds", "MiB", "descriptors", "threads", "run-steps")


def main(folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    begin, steps, over = time.monotonic(), [0], threading.Event()

    def counted(records):
        steps[0] += int(np.isfinite(records.loss.values).sum()) * 500

    def watch():
        with (folder / "hour.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(FIELDS)
            while not over.wait(EVERY):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                held = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
                descriptors = len(os.listdir("/proc/self/fd"))
                threads = len(os.listdir("/proc/self/task"))  # JAX's own, too
                now = time.monotonic() - begin
                rows.writerow([f"{now:.1f}", f"{held:.1f}", descriptors, threads, steps[0]])
                file.flush()

    watching = threading.Thread(target=watch)
    watching.start()
    rng = np.random.default_rng(0)
    problem = oj.least_squares(rng.normal(size=(256, 64)), rng.normal(size=256))
    run = oj.make_run(problem, optax.adam, 400_000, max_batch_size=32, record_every=500)
    count = 0
    while time.monotonic() - begin < seconds:
        oj.sweep(
            run,
            {"learning_rate": list(np.geomspace(1e-4, 3e-1, 8)), "batch_size": [8, 32]},
            range(16 * count, 16 * (count + 1)),
            stop=oj.Plateau(patience=200_000),
            out=folder / f"sweep-{count}",
            checkpoint_seconds=1,
            on_records=counted,
            progress=lambda *_: None,
        )
        count += 1
    over.set()
    watching.join()
    draw(folder, count)


def draw(folder: Path, count: int) -> None:
    """Draw what was watched, and print how much it grew after the first sixth."""
    rows = np.genfromtxt(folder / "hour.csv", delimiter=",", skip_header=1)
    minutes, (held, descriptors, threads, steps) = rows[:, 0] / 60, rows[:, 1:].T
    speed = np.diff(steps) / np.diff(rows[:, 0])
    fig, axes = figure("wide", 1, 3)
    kinds = (
        (minutes, held, "memory held (MiB)"),
        (minutes, descriptors, "open files, threads"),
        (minutes, steps / 1e9, "steps of runs (billions)"),
    )
    for ax, (x, y, label) in zip(axes, kinds, strict=True):
        ax.plot(x, y, color=COLOURS[0])
        ax.set(xlabel="time (minutes)", ylabel=label)
        ax.set_ylim(bottom=0)
    axes[1].plot(minutes, threads, color=COLOURS[1], ls="--")
    save(fig, folder / "hour")
    late = slice(len(rows) // 6, None)
    for name, values in zip(FIELDS[1:4], (held, descriptors, threads), strict=True):
        some = values[late]
        slope = np.polyfit(minutes[late], some, 1)[0] * 60
        print(f"{name}: {some.min():g} to {some.max():g}, {slope:+.2g} an hour")
    third = len(speed) // 3
    print(f"{count} sweeps; speed of the last third over the first's, medians: "
          f"{np.median(speed[-third:]) / np.median(speed[:third]):.3f}")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3600)
