"""A real disk that is full, and a folder that cannot be written: one line, and nothing is lost."""

import os
import subprocess
import sys

import numpy as np
import pytest

import optjax as oj

WORDS = (
    "least-squares --optimizer adam --learning-rate 1e-3:1e-1:log:8 --batch-size 8 --seeds 8 "
    "--steps 4000 --record-every 20 --chunk-seconds 0.05 --checkpoint-seconds 0"
)


def _swept(folder):
    command = [sys.executable, "-m", "optjax.cli.main", "sweep", *WORDS.split()]
    return subprocess.run(
        [*command, "--out", str(folder)], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_X64": "0"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "a"
    assert _swept(folder).returncode == 0
    return oj.load_sweep(folder), sum(file.stat().st_size for file in folder.iterdir())


def _same(found, whole):
    for name, values in whole.variables.items():
        np.testing.assert_array_equal(found[name].values, values.values, err_msg=str(name))


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory; a function sets how many bytes it holds."""

    def sized(size, how):
        words = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(tmp_path)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting needs rights that this user lacks")
        return tmp_path

    yield sized
    subprocess.run(["umount", "-l", str(tmp_path)], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", np.linspace(0.02, 0.78, 20).round(2))
def test_a_full_disk_is_one_line_and_loses_nothing(share, whole, small_disk):
    expected, size = whole
    disk = small_disk(int(share * size), "")
    done = _swept(disk / "a")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith("optjax: ")
    assert "no space left on device" in last or "the disk has" in last
    assert "Traceback" not in done.stderr
    small_disk(4 * size, "remount,")
    again = _swept(disk / "a")
    assert again.returncode == 0, again.stderr
    _same(oj.load_sweep(disk / "a"), expected)
    kept = {file.name for file in (disk / "a").iterdir()}
    assert not [name for name in kept if name.startswith(".writing-")]


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_is_one_line_and_loses_nothing(whole, small_disk):
    disk = small_disk(16 << 20, "")
    assert _swept(disk / "a").returncode == 0
    small_disk(16 << 20, "remount,ro,")
    for folder in ("a", "b"):
        done = _swept(disk / folder)
        assert done.returncode == 2, done.stderr
        assert "read-only file system" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    _same(oj.load_sweep(disk / "a"), whole[0])
