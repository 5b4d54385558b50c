"""What a sweep leaves on disk: continued, extended, refused; nothing that was computed is lost."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import xarray as xr

import optjax as oj
from optjax.cli.words import interrupted
from optjax.sweeps.active_runs import ActiveRuns
from optjax.sweeps.store import Store

GRID = {"learning_rate": [0.02, 0.1, 30.0], "batch_size": [2, 6]}


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6, 4))
    return oj.make_run(oj.least_squares(X, rng.normal(size=6)), optax.adam, 40, record_every=2)


@pytest.fixture(scope="module")
def whole(run):
    return oj.sweep(run, GRID, 2)


def _killer(after):
    seen = [0]

    def progress(text, fraction):
        seen[0] += 1
        if seen[0] > after:
            raise Killed

    return progress


def _counted(monkeypatch):
    """How many lane-steps are computed, padding left out."""
    done = [0]
    send = ActiveRuns.send

    def counting(self, count, every):
        done[0] += count * every * len(self.runs())
        return send(self, count, every)

    monkeypatch.setattr(ActiveRuns, "send", counting)
    return done


@pytest.mark.parametrize("stop", [(), oj.Target(0.3), oj.Halving(8, keep=0.5)], ids=str)
def test_killed_after_any_chunk_and_resumed_it_is_the_whole(run, tmp_path, stop):
    how = {
        "stop": stop,
        "chunk_steps": 8,
        "checkpoint_seconds": 0,
        "batching": "static",
        "vmap_chunk": 4,
    }
    whole = oj.sweep(run, GRID, 3, **how)
    for after in (1, 4):
        _stopped_and_resumed(run, tmp_path / str(after), after, how, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(), oj.Target(0.3), oj.Halving(8, keep=0.5)], ids=str)
def test_killed_after_every_chunk_in_turn(run, tmp_path, stop):
    for batching, vmap_chunk in (("static", 4), ("masked", 3)):
        how = {"stop": stop, "chunk_steps": 8, "checkpoint_seconds": 0}
        how |= {"batching": batching, "vmap_chunk": vmap_chunk}
        whole = oj.sweep(run, GRID, 3, **how)
        for after in range(12):
            out = tmp_path / f"{batching}{after}"
            _stopped_and_resumed(run, out, after, how, whole)


def _stopped_and_resumed(run, out, after, how, whole):
    try:
        oj.sweep(run, GRID, 3, out=out, progress=_killer(after), **how)
    except Killed:
        assert not (out / "result.nc").exists()
    found = oj.sweep(run, GRID, 3, out=out, **how)
    xr.testing.assert_equal(found, whole)  # to the bit
    assert not list(out.glob("state-*"))


def test_a_resumed_sweep_computes_only_what_is_missing(run, tmp_path, monkeypatch):
    how = {"chunk_steps": 8, "checkpoint_seconds": 0, "batching": "masked"}
    done = _counted(monkeypatch)
    with pytest.raises(Killed):
        oj.sweep(run, GRID, 2, out=tmp_path / "a", progress=_killer(3), **how)
    before = done[0]
    oj.sweep(run, GRID, 2, out=tmp_path / "a", **how)
    assert before >= 12 * 24
    assert done[0] <= 12 * 40 + 12 * 8  # one chunk twice at most
    done[0] = 0
    again = oj.sweep(run, GRID, 2, out=tmp_path / "a", **how)
    assert done[0] == 0
    assert again.loss.shape == (3, 2, 2, 20)


def test_more_points_and_seeds_compute_only_the_new_ones(run, tmp_path, monkeypatch):
    done = _counted(monkeypatch)
    out = tmp_path / "a"
    first = oj.sweep(run, GRID, 2, out=out)
    assert done[0] == 12 * 40
    wider = {"learning_rate": [0.02, 0.05, 0.1, 30.0], "batch_size": [2, 6]}
    found = oj.sweep(run, wider, 2, out=out)
    assert done[0] == 16 * 40
    more = oj.sweep(run, wider, [0, 1, 7], out=out)
    assert done[0] == 24 * 40
    whole = oj.sweep(run, wider, [0, 1, 7])
    for name in ("loss", "final_loss", "status"):
        np.testing.assert_allclose(more[name], whole[name], rtol=1e-12)
    np.testing.assert_array_equal(found.loss.sel(first.coords), first.loss)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_after_the_chunk_and_keeps_it(run, whole, tmp_path, number):
    asked = []

    def progress(text, fraction):
        if fraction > 0.2 and not asked:
            asked.append(fraction)
            signal.raise_signal(number)

    out, before = tmp_path / "a", signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            oj.sweep(run, GRID, 2, out=out, chunk_steps=4, progress=progress)
        assert signal.getsignal(number) is signal.default_int_handler
        assert interrupted(raised.value) == 128 + number
    finally:
        signal.signal(number, before)
    assert list(out.glob("state-*.frame"))
    found = oj.sweep(run, GRID, 2, out=out, chunk_steps=4)
    xr.testing.assert_allclose(found, whole, rtol=1e-12)


def test_another_sweep_is_refused_with_the_difference(run, tmp_path):
    out = tmp_path / "a"
    oj.sweep(run, GRID, 2, out=out)
    kept = (out / "records.log").read_bytes()
    rng = np.random.default_rng(1)
    other_data = oj.least_squares(rng.normal(size=(6, 4)), rng.normal(size=6))
    longer = oj.make_run(run.problem, optax.adam, 80, record_every=2)
    for other, grid, how, message in [
        (longer, GRID, {}, "steps was '40' and is '80'"),
        (oj.make_run(run.problem, optax.sgd, 40, record_every=2), GRID, {}, "optimizer was .*adam"),
        (oj.make_run(other_data, optax.adam, 40, record_every=2), GRID, {}, "data was"),
        (run, GRID, {"stop": oj.Target(0.1)}, "stop was"),
        (run, {"learning_rate": [0.02], "batch_size": [2, 6]}, {}, "8 of its 12 runs are not in"),
    ]:
        with pytest.raises(oj.UserError, match=message) as caught:
            oj.sweep(other, grid, 2, out=out, **how)
        assert "\n" not in str(caught.value)
    assert (out / "records.log").read_bytes() == kept
    assert oj.sweep(longer, GRID, 2, out=out, overwrite=True).sizes["step"] == 40


@pytest.mark.slow
def test_changed_code_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine_swept.py").write_text(
        "import optax\n"
        "def factory(learning_rate):\n"
        "    '''A step.'''\n"
        "    return optax.sgd(learning_rate)\n"
    )
    code = (
        "import sys; sys.path.insert(0, '.'); import optjax as oj, mine_swept\n"
        "run = oj.make_run(oj.least_squares([[2.0, 1.0]], [2.0]), mine_swept.factory, 4)\n"
        "try: oj.sweep(run, {'learning_rate': [0.1]}, out='out')\n"
        "except oj.UserError as error: print(error)\n"
    )

    def go():
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert go() == ""
    file = tmp_path / "mine_swept.py"
    file.write_text(file.read_text().replace("A step.", "One step."))
    assert go() == ""
    file.write_text(file.read_text().replace("sgd(learning_rate)", "sgd(2 * learning_rate)"))
    assert "the code of mine_swept changed" in go()


def test_two_writers_are_one_too_many(run, tmp_path):
    out = tmp_path / "a"
    store = Store(out)
    with pytest.raises(oj.UserError, match=rf"another process is .*\(process {os.getpid()} on "):
        oj.sweep(run, GRID, out=out)
    store.close()
    oj.sweep(run, GRID, out=out)


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(oj.UserError, match=r"holds 'thesis.tex' and no sweep"):
        oj.sweep(run, GRID, out=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
    with pytest.raises(oj.UserError, match="cannot write to the folder"):
        oj.sweep(run, GRID, out="/dev/null/a")


@pytest.mark.parametrize("after", range(10))
def test_a_full_disk_is_one_line_and_loses_nothing(run, whole, tmp_path, monkeypatch, after):
    out, fsync, calls = tmp_path / "a", os.fsync, [0]

    def full(number):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    how = {"chunk_steps": 8, "checkpoint_seconds": 0}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(oj.UserError, match=r"no space left on device\): make room and start"):
        oj.sweep(run, GRID, 2, out=out, **how)
    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.closing(Store(out)) as store:
        assert len(list(store.frames())) == (after > 5) + (after > 8)  # of records
    found = oj.sweep(run, GRID, 2, out=out, **how)
    xr.testing.assert_allclose(found, whole, rtol=1e-12)


@pytest.mark.parametrize("limit", [100, 1000, 9000, 30_000])
def test_a_write_that_stops_half_way_leaves_whole_frames(tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store(tmp_path / "a")
    written = 0

    def fill():
        nonlocal written
        while True:
            store.append("records", {"run": np.arange(100.0) + written})
            written += 1

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(oj.UserError, match=r"file too large\): see to it"):
            fill()
        store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with contextlib.closing(Store(tmp_path / "a", overwrite=True)) as store:
        assert [arrays["run"][0] for _, arrays in store.frames()] == [*range(written)]
        store.append("records", {"run": np.arange(3.0)})
        assert len(list(store.frames())) == written + 1


def test_a_disk_too_small_is_refused_beforehand(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "free", lambda self: 1000)
    with pytest.raises(oj.UserError, match="the disk has 1e-06 GB free"):
        oj.sweep(run, GRID, 2, out=tmp_path / "a")


@pytest.mark.parametrize("damage", ["torn", "flipped", "grown"])
def test_a_damaged_log_is_cut_at_its_last_whole_frame(run, tmp_path, damage, capsys):
    out = tmp_path / "a"
    how = {"chunk_steps": 8, "checkpoint_seconds": 1e9}
    whole = oj.sweep(run, GRID, 2, out=out, **how)
    (out / "result.nc").unlink()
    log = out / "records.log"
    data = bytearray(log.read_bytes())
    if damage == "torn":
        data = data[: len(data) - 11]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data += b"oj1\n" + b"\0\0\0\0" + (1 << 60).to_bytes(8, "little")
    log.write_bytes(data)
    found = oj.sweep(run, GRID, 2, out=out, **how)
    named = "records.log is damaged at byte" in capsys.readouterr().err
    assert named == (out / "damaged-records.log").is_file() == (damage == "flipped")
    for name in ("loss", "final_loss", "status", "diverged_at"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-12)


def _flip(data, at=0.5):
    data = bytearray(data)
    data[int(at * (len(data) - 1))] ^= 1
    return bytes(data)


DAMAGE = {
    "flipped": _flip,
    "first byte": lambda data: _flip(data, 0),
    "last byte": lambda data: _flip(data, 1),
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: data[:-64] + bytes(64),
    "another number": lambda data: data.replace(b"2", b"3", 1),
    "hostile": lambda data: b"oj1\n\0\0\0\0" + (1 << 40).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_set_aside_and_the_one_before_it_used(
    run, whole, tmp_path, damage, capsys, monkeypatch
):
    out = tmp_path / "a"
    how = {"chunk_steps": 8, "checkpoint_seconds": 0}
    with pytest.raises(Killed):
        oj.sweep(run, GRID, 2, out=out, progress=_killer(3), **how)
    newest = sorted(out.glob("state-*.frame"))
    assert newest
    assert [path.with_suffix(".before").is_file() for path in newest] == [True] * len(newest)
    for path in newest:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    done = _counted(monkeypatch)
    found = oj.sweep(run, GRID, 2, out=out, **how)
    said = capsys.readouterr().err
    assert (
        f"{newest[0].name} is damaged, kept as damaged-{newest[0].name}: the state before" in said
    )
    assert (out / f"damaged-{newest[0].name}").is_file()
    assert done[0] < 40 * 12  # not from the start
    xr.testing.assert_equal(found, oj.sweep(run, GRID, 2, **how))


@pytest.fixture(scope="module")
def killed(run, tmp_path_factory):
    """The folder of a sweep that was killed."""
    out = tmp_path_factory.mktemp("killed") / "a"
    with pytest.raises(Killed):
        oj.sweep(run, GRID, 2, out=out, progress=_killer(3), chunk_steps=8, checkpoint_seconds=0)
    return out


LIES = {
    "no layout": (["batch"], {}),
    "no vmap chunk": ([], {"vmap_chunk": 0}),
    "a chunk that does not divide": ([], {"vmap_chunk": 5, "batch": 12}),
    "a huge batch": ([], {"batch": 1 << 40, "vmap_chunk": 1 << 40}),
    "another compiler": ([], {"haste": 7}),
    "before the start": ([], {"step": -1}),
    "no number": ([], {"step": "two"}),
    "a place twice": ([], {"place": lambda at: 0 * at}),
    "a place far away": ([], {"place": lambda at: at + (1 << 50)}),
    "no place": ([], {"place": lambda at: -1 - at}),
    "too few places": ([], {"place": lambda at: at[1:]}),
    "too few rows": ([], {"leaf0": lambda leaf: leaf[1:]}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_state_that_lies_is_refused_before_anything_is_made_of_it(run, killed, tmp_path, lie):
    missing, other = LIES[lie]
    out = tmp_path / "a"
    shutil.copytree(killed, out)
    with contextlib.closing(Store(out)) as store:
        name, facts, arrays = store.states()[-1]
        for key, change in other.items():
            if key in facts:
                facts[key] = change
            else:
                arrays[key] = change(arrays[key])
        facts = {key: value for key, value in facts.items() if key not in missing}
        store.save_state(name, arrays, **facts)
    with pytest.raises(oj.UserError, match=r"a state in .* is damaged .*: remove the state-"):
        oj.sweep(run, GRID, 2, out=out)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The folder of a complete sweep."""
    out = tmp_path_factory.mktemp("sweep") / "a"
    oj.sweep(run, GRID, 2, out=out)
    return out


@pytest.mark.parametrize("damage", [*DAMAGE, "gone"])
@pytest.mark.parametrize("name", ["result.nc", "sweep.json"])
def test_a_damaged_result_or_spec_is_made_again_from_the_log(
    run, folder, tmp_path, name, damage, capsys
):
    whole, out = oj.load_sweep(folder), tmp_path / "a"
    shutil.copytree(folder, out)
    file = out / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    for again in (lambda: oj.load_sweep(out), lambda: oj.sweep(run, GRID, 2, out=out)):
        xr.testing.assert_equal(again(), whole)
    if name == "sweep.json":
        assert "sweep.json is damaged: the log says what is swept" in capsys.readouterr().err


def test_a_log_torn_in_its_first_frame_is_told_again_what_is_swept(run, folder, tmp_path):
    out = tmp_path / "a"
    shutil.copytree(folder, out)
    log = out / "records.log"
    log.write_bytes(log.read_bytes()[:30])
    (out / "result.nc").unlink()
    found = oj.sweep(run, GRID, 2, out=out)
    (out / "sweep.json").write_text("{")
    xr.testing.assert_equal(oj.load_sweep(out), found)


@pytest.mark.parametrize("left", ["records.log", "state-0000.frame", "damaged-result.nc"])
def test_what_is_left_of_a_store_is_refused_unless_it_may_be_overwritten(run, tmp_path, left):
    out = tmp_path / "a"
    out.mkdir()
    (out / left).write_bytes(b"1")
    with pytest.raises(oj.UserError, match=f"holds '{left}' and no sweep"):
        oj.sweep(run, GRID, 2, out=out)
    oj.sweep(run, GRID, 2, out=out, overwrite=True)
    assert oj.load_sweep(out).sizes["seed"] == 2
    assert not (out / "damaged-result.nc").exists()


def test_names_that_are_no_text_are_kept(run, tmp_path):
    about = {"columns": {2: "two", 10: "ten"}}
    found = oj.sweep(run, GRID, 2, out=tmp_path / "a", about=about)
    xr.testing.assert_equal(oj.sweep(run, GRID, 2, out=tmp_path / "a", about=about), found)


def test_what_killed_writers_left_is_cleared_away(run, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / ".writing-sweep.json.abc").write_text("{")  # killed while it was first written
    found = oj.sweep(run, GRID, 2, out=out)
    assert not list(out.glob(".writing-*"))
    xr.testing.assert_equal(oj.load_sweep(out), found)
    spec = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps({**spec, "format": 3}))
    for reader in (lambda: oj.load_sweep(out), lambda: oj.sweep(run, GRID, 2, out=out)):
        with pytest.raises(oj.UserError, match="another version of optjax: expected format 4"):
            reader()


def test_the_spec_is_readable_json(run, tmp_path):
    oj.sweep(run, GRID, 2, out=tmp_path / "a")
    spec = json.loads((tmp_path / "a" / "sweep.json").read_text())
    assert spec["columns"]["batch_size"] == [2, 6] * 3
    assert spec["identity"]["version of jax"] == jax.__version__
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # a folder may be moved
    assert oj.sweep(run, GRID, 2, out=tmp_path / "b").loss.shape == (3, 2, 2, 20)
