"""Processes are killed at random moments and resumed; the end is that of one nobody killed.

All of it: ``pytest -m slow tests/faults``, which prints a line for each kind of program.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import optjax as oj

KINDS = ("static", "masked", "target", "plateau", "halving", "gradients", "colouriser")
PROGRAM = Path(__file__).with_name("program.py")


def _start(kind, folder, seconds):
    """Return the exit status, and (seconds it took, digest) of one that was not killed."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), kind, str(folder), str(seconds)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_ENABLE_X64": "0"},
    )
    assert done.returncode in (0, -9), done.stderr
    took, digest = done.stdout.split() if done.returncode == 0 else (None, None)
    return done.returncode, took, digest, done.stderr


def _killed(kind, tmp_path, kills, seed):
    """Kill programs of a kind so many times; return how often one that was killed ended."""
    _, took, expected, _ = _start(kind, tmp_path / "whole", 0)
    rng = np.random.default_rng(seed)
    count, ends = 0, 0
    while count < kills:
        folder = tmp_path / f"{ends}"
        status, *_ = _start(kind, folder, rng.uniform(0, 1.2 * float(took)))
        count += status != 0
        if status != 0 and rng.uniform() < 0.7:
            continue  # kill it again
        _, _, digest, said = _start(kind, folder, 0)
        assert digest == expected, (kind, folder, said)
        shutil.rmtree(folder)
        ends += 1
    return ends


def test_a_killed_sweep_ends_as_if_nobody_had(tmp_path):
    _killed("target", tmp_path, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_sweep_ends_as_if_nobody_had_killed_it(kind, tmp_path, capsys):
    ends = _killed(kind, tmp_path, 30, 1)
    with capsys.disabled():
        print(f"\n{kind}: killed 30 times, {ends} ends, each to the bit")


WORDS = (
    "least-squares --optimizer adam --learning-rate 1e-3:1e-1:log:8 --batch-size 8 --seeds 32 "
    "--steps 150000 --record-every 500"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_first_and_ends_within_five_seconds(number, tmp_path, capsys):
    """By the command line, with its own chunks and checkpoints."""

    def start(folder):
        command = [sys.executable, "-m", "optjax.cli.main", "sweep", *WORDS.split()]
        return subprocess.Popen(
            [*command, "--out", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "JAX_ENABLE_X64": "0", "XLA_FLAGS": ""},
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup ignores some
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    whole.communicate()
    assert whole.returncode == 0
    expected = oj.load_sweep(tmp_path / "whole")
    rng = np.random.default_rng(int(number))
    longest, tries, status = 0.0, 0, 1
    while status:
        started = start(tmp_path / "a")
        begin = time.time()
        while started.poll() is None and not any(
            file.stat().st_mtime > begin for file in tmp_path.glob("a/records.log")
        ):
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 4))
        started.send_signal(number)
        begin = time.monotonic()
        said = started.communicate()[1]
        status = started.returncode
        # Before and after the sweep itself, as while its page is written, a signal just ends it.
        assert status in (0, 128 + number, -number), said
        if status > 0:
            tries, longest = tries + 1, max(longest, time.monotonic() - begin)
            assert "resume with: optjax sweep --resume" in said.splitlines()[-1]
    with capsys.disabled():
        print(f"\n{number.name}: {tries} times, the longest took {longest:.1f} s")
    assert tries
    assert longest < 5
    found = oj.load_sweep(tmp_path / "a")
    for name, values in expected.variables.items():
        np.testing.assert_array_equal(found[name].values, values.values, err_msg=str(name))
