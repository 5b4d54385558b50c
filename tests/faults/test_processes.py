"""Sweeps of several processes: the result is that of one, whoever is killed on the way."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import optjax as oj

WORDS = (
    "least-squares --optimizer adam --learning-rate 1e-3:1e-1:log:4 --batch-size 4,8 --seeds 6 "
    "--steps 20000 --record-every 100 --stop plateau:4000 --chunk-seconds 0.1 "
    "--checkpoint-seconds 0 --distributed"
)
WITHIN = 60.0
"""Seconds in which the others end."""


def _start(folder, count):
    """Start so many processes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "optjax.cli.main", "sweep", *WORDS.split()]
    where = ["--out", str(folder), "--coordinator", f"localhost:{port}", "--processes", str(count)]
    flags = {"XLA_FLAGS": "", "JAX_ENABLE_X64": "0", "JAX_NUM_CPU_DEVICES": "2"}
    return [
        subprocess.Popen(
            [*command, *where, "--process", str(me)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **flags},
        )
        for me in range(count)
    ]  # fmt: skip


def _whole(folder, count):
    """Let so many processes end a sweep; return its result."""
    started = _start(folder, count)
    said = [one.communicate(timeout=300)[1] for one in started]
    assert [one.returncode for one in started] == [0] * count, said
    return oj.load_sweep(folder)


def _same(found, other):
    """Records to the bit; of other numbers of devices the loss over all data rounds otherwise."""
    for name, values in other.variables.items():
        if name == "final_loss":
            np.testing.assert_allclose(found[name], values, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=str(name))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The result of one process."""
    return _whole(tmp_path_factory.mktemp("alone") / "a", 1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_find_what_one_finds(count, alone, tmp_path):
    found = _whole(tmp_path / "a", count)
    assert found.attrs["devices"] == 2 * count
    _same(found, alone)
    assert set(os.listdir(tmp_path)) == {"a"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "signal", "then"),
    [(2, 1, 9, 2), (2, 0, 9, 1), (4, 2, 9, 2), (2, 1, 9, 4), (2, 1, 19, 2), (2, 1, 15, 2)],
)
def test_the_others_end_and_nothing_is_lost(count, victim, signal, then, alone, tmp_path, capsys):
    folder = tmp_path / "a"
    started = _start(folder, count)
    while not list(folder.glob("state-*.before")):
        assert started[0].poll() is None, started[0].stderr.read()
        time.sleep(0.2)
    time.sleep(1)
    started[victim].send_signal(signal)
    begin = time.monotonic()
    others = [one for one in started if one is not started[victim]]
    said = [one.communicate(timeout=WITHIN)[1] for one in others]
    took = time.monotonic() - begin
    if signal == 19:
        started[victim].kill()
    started[victim].communicate()
    for one, text in zip(others, said, strict=True):
        assert one.returncode
        line = "start all of them again" if signal != 15 else "resume with"
        assert line in text.splitlines()[-1], text
    found = _whole(folder, then)
    _same(found, alone)
    with capsys.disabled():
        print(
            f"\n{count} processes, signal {signal} to {victim}: the others ended in {took:.1f} s; "
            f"resumed by {then}, the same"
        )
