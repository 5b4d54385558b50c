"""Numbers, names and types that the command line does not take, each in a line."""

import dataclasses
import json
import warnings

import pytest

from optjax.cli import main as cli
from optjax.report import catalogue, runner
from optjax.scaling.table import read_runs
from optjax.support.errors import UserError


def numbers():
    """Every experiment's fields that hold whole numbers, by their defaults."""
    for experiment in catalogue.discover().values():
        config = catalogue.load(experiment).Config
        for field in dataclasses.fields(config):
            values = field.default if isinstance(field.default, tuple) else (field.default,)
            if values and all(type(v) is int for v in values):
                yield config, field


def test_no_number_of_an_experiment_is_below_its_least(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = list(numbers())
    assert len(cases) > 60
    for config, field in cases:
        value = (-1,) if isinstance(field.default, tuple) else -1
        wrong = dataclasses.replace(config(), **{field.name: value})
        with pytest.raises(UserError, match=f"{field.name} is -1: expected a whole number"):
            runner._check_numbers(wrong)
    assert cli.main(["run", "one_step", "--seed", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "tuning", "--pieces", "1,2"], "expected a whole number"),
        (["run", "noise_scale", "--noises", "a"], "expected finite numbers, by commas"),
        (["run", "noise_scale", "--net-span", "1"], "expected 2 finite numbers, by commas"),
        (["run", "colourisation", "--epochs", "x"], "expected a whole number"),
        (["sweep", "quadratic", "--optimizer", "sgd", "--lr", "1", "--out", "s"],
         "did you mean 'learning-rate'?"),
        (["sweep", "--show", "s", "--best", "most"], "--best is 'most': expected min or max"),
    ],
)  # fmt: skip
def test_messages_speak_english(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert not any(kind in said for kind in ("tuple[", "float", "int,", "NoneType"))


def test_json_of_list_and_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["list", "--json"]) == 0
    assert {e["name"] for e in json.loads(capsys.readouterr().out)} == {*catalogue.discover()}
    assert cli.main(["run", "padding", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {c["verdict"] for c in found["claims"]} == {"holds"}
    assert (tmp_path / found["dataset"]).is_file()


RUNS = "{0}{3}{1}{3}{2}\n1e6{3}2e7{3}3.0\n10M{3}0.2B{3}2.5\n"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (RUNS.format("model_params", "train_tokens", "eval_loss", ","), ([1e6, 1e7], [2e7, 2e8])),
        (RUNS.format("N", "D", "loss", ";"), ([1e6, 1e7], [2e7, 2e8])),
        (RUNS.format("params", "tokens_seen", "val_loss", "\t"), ([1e6, 1e7], [2e7, 2e8])),
        ('N,D,loss\n"1,000","2,000,000.0",3\n1e3,2e6,2\n', ([1e3, 1e3], [2e6, 2e6])),
        ("N,D,loss\n1e3,2e6,3\n1e3,2e6,nan\n1e3,2e6,\n", ([1e3], [2e6])),
        ("N;D;loss\n1e3;2e6;2,5\n", "loss is '2,5'"),
        ("N\tD\tloss\n1e3\t2e6\t2,345\n", "loss is '2,345'"),
        ("N,D,loss\n1_000,2e6,2.5\n", "N is '1_000'"),
        ("N,D,loss\n1e3,2e6,diverged\n", "no runs with a loss"),
    ],
)
def test_tables_as_people_write_them(text, sizes, tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text(text)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if isinstance(sizes, str):
            with pytest.raises(UserError, match=sizes):
                read_runs(file, needed=("loss", "N", "D"))
            return
        runs, _ = read_runs(file, needed=("loss", "N", "D"))
    assert (runs.N.tolist(), runs.D.tolist()) == sizes
    assert bool(told) == ("nan" in text)
    assert all("rows without a loss are left out: 2 (line 3, …)" in str(w.message) for w in told)
