"""Every reader of files gets damaged and hostile ones; what it does not refuse, it reads.

All of it: ``pytest -m slow tests/faults/test_hostile_files.py``.
"""

import os
import subprocess
import sys

import hostile
import pytest

MANY = 100_000
"""Files for a reader of ours; for others a tenth."""


def _tried(reader, count):
    done = subprocess.run(
        [sys.executable, hostile.__file__, reader, str(count), "0"],
        capture_output=True, text=True,
        env={**os.environ, "JAX_ENABLE_X64": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_a_few_files_are_read_or_refused():
    _tried("log", 30)


@pytest.mark.slow
@pytest.mark.parametrize("reader", [*hostile.OURS, *hostile.WRAPPED])
def test_files_are_read_or_refused(reader, capsys):
    said = _tried(reader, MANY if reader in hostile.OURS else MANY // 10)
    with capsys.disabled():
        print(f"\n{said}")
