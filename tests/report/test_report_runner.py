"""The runner keeps what was computed, and the page is safe and self-contained."""

import json
import re
import time

import pytest

from optjax.cli import main as cli
from optjax.report import catalogue, runner
from optjax.report.claims import Claim, read_claims, write_claims
from optjax.support import files, provenance
from optjax.support.console import Console
from optjax.support.errors import UserError

TINY = '''"""Is one <b>one</b>?"""
from dataclasses import dataclass
import pathlib
import xarray
from optjax.support.errors import UserError
from optjax.report.claims import Claim, verdict
from optjax.report.style import caption, figure

@dataclass(frozen=True)
class Config:
    """Question. Command: optjax run tiny. Cost: 1 s on two cores. Expect: one."""
    seed: int = 0
    rate: float = 0.5
    widths: tuple[int, ...] = (1, 2)
    quick: bool = False
    log: str = "LOG"
    stop: bool = STOP

def run(config, progress):
    progress("half <way>", 0.5)
    with pathlib.Path(config.log).open("a") as file:
        file.write("ran\\n")
    if config.stop:
        raise KeyboardInterrupt
    if config.seed < 0:
        raise UserError("seed is negative;\\nexpected 0 or more")
    return xarray.Dataset({"x": ("step", [1.0, 2.0])}, attrs={"demo": True})

def _draw(ax):
    ax.plot([1, 2])

def figures(dataset):
    fig, ax = figure()
    _draw(ax)
    return {"line": caption(fig, "<script>alert(1)</script>")}

def claims(dataset):
    return [Claim("tiny/NAME", "<img src=x onerror=y>", "1 < 2", {"x": float("nan")}, None, 1,
                  [0.1, 0.2], verdict(True), "tiny/line")]
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    place = tmp_path / "experiments"
    place.mkdir()
    write(place, "tiny", tmp_path)
    monkeypatch.setattr(catalogue, "experiments_folder", lambda: place)
    monkeypatch.setattr(catalogue, "_DEFAULT_PACKAGE", f"_tiny_{tmp_path.name.replace('-', '_')}")
    import sys
    import types

    package = types.ModuleType(catalogue._DEFAULT_PACKAGE)
    package.__path__ = [str(place)]
    monkeypatch.setitem(sys.modules, catalogue._DEFAULT_PACKAGE, package)
    monkeypatch.chdir(tmp_path)
    return place


def write(place, name, tmp_path, stop=False):
    text = TINY.replace("NAME", name).replace("LOG", str(tmp_path / "log.txt"))
    (place / f"{name}.py").write_text(text.replace("STOP", str(stop)))


def runs(tmp_path):
    return len((tmp_path / "log.txt").read_text().split())


def test_same_code_and_config_run_once(folder, tmp_path):
    go = ["run", "tiny", "--results", "out"]
    assert cli.main(go) == 0
    assert cli.main(go) == 0
    assert runs(tmp_path) == 1
    assert cli.main([*go, "--seed", "3"]) == 0
    assert runs(tmp_path) == 2
    assert cli.main([*go, "--seed=3", "--force"]) == 0
    assert runs(tmp_path) == 3


def test_drawing_changes_do_not_run_again_but_run_changes_do(folder, tmp_path):
    file = folder / "tiny.py"
    before = provenance.code_hash(folder, "tiny")
    file.write_text(file.read_text().replace("ax.plot([1, 2])", "ax.plot([1, 2, 3])"))
    assert provenance.code_hash(folder, "tiny") == before
    file.write_text(file.read_text().replace('progress("half', 'progress("nearly half'))
    assert provenance.code_hash(folder, "tiny") != before


def test_hash_follows_imports(folder):
    helper = folder / "helper.py"
    helper.write_text("X = 1\n")
    file = folder / "tiny.py"
    file.write_text(
        file.read_text().replace("import pathlib", "import pathlib\nfrom . import helper")
    )
    before = provenance.code_hash(folder, "tiny")
    helper.write_text("X = 2\n")
    assert provenance.code_hash(folder, "tiny") != before


def test_page_escapes_and_needs_no_network(folder, tmp_path):
    assert cli.main(["reproduce", "--results", "out"]) == 0
    page = (tmp_path / "out/report/index.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>one" not in page
    assert "demo data" in page
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert target.startswith(("#", "data:"))
    for anchor in re.findall(r'href="#([^"]*)"', page):
        assert f'id="{anchor}"' in page
    rows = json.loads((tmp_path / "out/claims.json").read_text())
    assert rows[0]["measured"] == {"x": None, "x_text": "nan"}
    assert rows[0]["config"]["seed"] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "tinny"], "did you mean 'tiny'"),
        (["run", "tiny", "--sead", "1"], "did you mean 'seed'"),
        (["run", "tiny", "--seed", "x"], "--seed got 'x', expected a whole number"),
        (["run", "tiny", "--rate=nan"], "expected a finite number"),
        (["run", "tiny", "--widths", "1", "b"], "expected whole numbers, by commas"),
        (["run", "tiny", "--quick=maybe"], "expected true or false"),
        (["run", "tiny", "--seed", "-1"], "seed is -1: expected a whole number of at least 0"),
        (["run", "tiny", "--results", "log"], "cannot write to the folder 'log"),
        (["run"], "run needs"),
        (["reproduce", "--dta", "x"], "did you mean '--data'"),
        (["reproduce", "extra"], "unrecognized arguments"),
        (["report", "--results", "none"], "no results in 'none'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(folder, tmp_path, capsys, words, expected):
    (tmp_path / "log").write_text("a file, not a folder")
    assert cli.main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "running" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("optjax: ")
    assert expected in errors[0]


def test_interrupted_reproduce_keeps_what_was_finished(folder, tmp_path, capsys):
    write(folder, "zlast", tmp_path, stop=True)
    assert cli.main(["reproduce", "--jobs", "1", "--results", "out"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert (tmp_path / "out/tiny.nc").is_file()
    assert not (tmp_path / "out/zlast.nc").exists()
    assert [c.id for c in read_claims(tmp_path / "out/claims.json")] == ["tiny/tiny"]
    assert (tmp_path / "out/report/index.html").is_file()


SWEPT = """
def run(config, progress):
    import optax, optjax
    here = pathlib.Path(config.log).with_name
    plan = optjax.make_run(optjax.least_squares([[1.0, 2.0]], [1.0]), optax.sgd, 4)
    def swept(name):
        rates = {"learning_rate": [0.1, 0.2]}
        def noted(rows):
            with here(name).open("a") as file:
                file.write("x")
        return optjax.sweep(plan, rates, progress=progress, on_records=noted).final_loss
    found = {name: swept(name) for name in ("first", "second")[: 1 + here("again").exists()]}
    if len(found) == 1:
        raise KeyboardInterrupt
    return xarray.Dataset(found)
"""


@pytest.mark.parametrize("force", [False, True])
def test_the_sweeps_of_an_interrupted_experiment_are_not_run_again(folder, tmp_path, force):
    (folder / "swept.py").write_text((folder / "tiny.py").read_text() + SWEPT)
    go = ["run", "swept", "--results", "out"]
    assert cli.main(go) == 130
    assert (tmp_path / "out/unfinished/swept").is_dir()
    before = (tmp_path / "first").read_text()
    (tmp_path / "again").touch()
    assert cli.main([*go, "--force"] if force else go) == 0
    assert (tmp_path / "first").read_text() == before * (1 + force)
    assert (tmp_path / "second").read_text() == before
    assert not (tmp_path / "out/unfinished/swept").exists()


@pytest.mark.slow
def test_several_at_once_give_what_one_after_the_other_gives(folder, tmp_path, capsys):
    for name in ("other", "third"):
        write(folder, name, tmp_path)
    (folder / "abroken.py").write_text((folder / "tiny.py").read_text() + "\n1 / 0\n")
    assert runner.reproduce(results="out", folder=folder, jobs=2) == ["abroken"]
    found = [claim.id for claim in read_claims(tmp_path / "out/claims.json")]
    assert found == ["tiny/other", "tiny/third", "tiny/tiny"]
    assert runs(tmp_path) == 3
    assert "ZeroDivisionError" in (tmp_path / "out/abroken.error.txt").read_text()
    errors = capsys.readouterr().err
    assert "third: done" in errors
    assert "abroken: broke" in errors


def test_a_mistake_in_one_of_several_ends_them_all(folder, tmp_path):
    text = (folder / "tiny.py").read_text().replace("Cost: 1 s", "Cost: 9 s")
    (folder / "wrong.py").write_text(text.replace("config.seed < 0", "True"))
    deaf = "signal.signal(signal.SIGTERM, lambda *_: None)"  # as a sweep under way is
    slow = text.replace("import pathlib", "import pathlib, signal, time").replace(
        '    progress("half', f'    {deaf}\n    time.sleep(60)\n    progress("half'
    )
    (folder / "slow.py").write_text(slow)
    begin = time.monotonic()
    with pytest.raises(UserError, match="wrong: seed is negative"):
        runner.reproduce(results="out", folder=folder, jobs=2)
    assert time.monotonic() - begin < 40


def test_failed_write_leaves_the_old_dataset(tmp_path, monkeypatch):
    import xarray

    path = tmp_path / "a.nc"
    files.save_dataset(xarray.Dataset({"x": ("n", [1.0])}), path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xarray.Dataset, "to_netcdf", full)
    with pytest.raises(UserError, match="No space left"):
        files.save_dataset(xarray.Dataset({"x": ("n", [2.0])}), path)
    assert files.read_dataset(path).x.item() == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["a.nc"]


def test_claims_merge_by_id_in_the_source_order(tmp_path):
    def claim(name, n_runs):
        return Claim(name, "s", "s", {}, None, n_runs, None, "holds", "e")

    path = tmp_path / "claims.json"
    write_claims([claim("padding/kernel-4", 1), claim("x/later", 1)], path)
    write_claims([claim("min-norm/sgd", 1), claim("padding/kernel-4", 2)], path)
    found = [(c.id, c.n_runs) for c in read_claims(path)]
    assert found == [("min-norm/sgd", 1), ("padding/kernel-4", 2), ("x/later", 1)]
    with pytest.raises(UserError, match="verdict"):
        Claim("a/b", "s", "s", {}, None, 1, None, "true", "e")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["1"], ["minimum_norm", "rmsprop_counterexample", "sgd_moments"]),
        (["4–5"], ["accounting", "colourisation", "padding", "pooling", "recipes"]),
        (["5", "One-Step"], None),
        (["colourisation"], ["colourisation"]),
        (["2", "padding"], ["one_step", "weight_decay", "padding"]),
        (["Beyond", "weight-decay"], [
            "gunasekar", "hypergradient_of_learning_rate", "max_margin", "noise_scale",
            "short_horizon_bias", "singular_limit", "tuning", "which_solution", "wilson",
            "weight_decay",
        ]),
    ],
)  # fmt: skip
def test_only_takes_names_and_sections(words, expected):
    if expected is None:
        with pytest.raises(UserError, match=r"unknown experiment 'One-Step', and no section \(1, "):
            catalogue.choose(words)
    else:
        assert list(catalogue.choose(words)) == expected


def test_every_experiment_belongs_to_the_sections_of_its_claims():
    sections = {e.name: e.sections for e in catalogue.discover().values()}
    assert all(sections.values())
    assert set.union(*sections.values()) == {"1", "2", "3", "4", "5", "4-5", "beyond"}


def test_a_broken_experiment_does_not_stop_the_others(folder, tmp_path):
    text = (folder / "tiny.py").read_text()
    (folder / "abroken.py").write_text(text.replace("if config.stop", "1 / 0\n    if config.stop"))
    console = Console(quiet=True)
    assert runner.reproduce(results="out", console=console) == ["abroken"]
    assert (tmp_path / "out/tiny.nc").is_file()
    assert "ZeroDivisionError" in (tmp_path / "out/abroken.error.txt").read_text()


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\x89HDF\r\n\x1a\n" + bytes(200), None])
@pytest.mark.parametrize("what", ["one.nc", "figures/one/record.json"])
def test_damage_of_one_experiment_is_named_and_the_others_are_shown(
    folder, tmp_path, capsys, what, damage
):
    for name in ("one", "two"):
        write(folder, name, tmp_path)
    (folder / "tiny.py").unlink()
    for name in ("one", "two"):
        runner.run_experiment(name, results=tmp_path / "results", console=Console(quiet=True))
    file = tmp_path / "results" / what
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert cli.main(["report"]) == 0
    said = capsys.readouterr().err
    if what == "one.nc":
        assert re.search(r"optjax: one is not drawn again: .*one\.nc is not a readable data", said)
        assert said.count("\n") == 1
    page = (tmp_path / "results/report/index.html").read_text()
    assert "tiny/two" in page
    if what != "one.nc":  # drawn again from the dataset
        assert "tiny/one" in page
        file.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert cli.main(["run", "two"]) == 0
    said = capsys.readouterr().err
    assert ("'optjax run one --force' writes it again" in said) == (what != "one.nc")
