"""optjax scaling: what it prints and writes, and that a hostile file is one line."""

import json

import numpy as np
import pytest

from optjax.cli import main as cli
from optjax.cli import scaling as command
from optjax.scaling import table
from optjax.support import untrusted

N = np.tile(np.geomspace(3e7, 1e10, 8), 5)
D = np.repeat(np.geomspace(5e8, 2e11, 5), 8) * N**0.1 / 7
NOISE = 0.004 * np.random.default_rng(0).standard_t(3, 40)
LOSS = (1.5 + 300 * N**-0.31 + 900 * D**-0.36) * np.exp(NOISE)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "runs.csv"
    rows = [f"{n!r},{6 * n * d!r},{loss!r},x" for n, d, loss in zip(N, D, LOSS, strict=True)]
    path.write_text("\n".join(["Model Size,Training FLOP,loss,note", *rows]).replace("np.", ""))
    text = path.read_text().replace("float64(", "").replace(")", "")
    path.write_text(text)
    return path


def call(capsys, *words):
    status = cli.main(["scaling", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def mistake(capsys, *words):
    status, out, err = call(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("optjax: ")
    assert err.count("\n") == 1
    return err


def test_fit_finds_the_columns_and_the_law_and_writes_both(file, capsys, tmp_path):
    out = tmp_path / "new" / "out"
    words = ("fit", file, "--bootstraps", 100, "--flops", "1e21", "--out", out)
    status, text, _ = call(capsys, *words)
    assert status == 0
    for part in ("N from 'Model Size'", "C from 'Training FLOP'", "95 % interval", "objective"):
        assert part in text
    for part in ("without the highest losses", "the best use of 1e+21", "times it"):
        assert part in text
    record = json.loads((out / "fit.json").read_text())
    assert record["runs"] == 40
    for name, true in {"E": 1.5, "alpha": 0.31, "beta": 0.36}.items():
        found = record["parameters"][name]
        assert found["low"] < found["value"] < found["high"]
        assert abs(found["value"] - true) < 5 * found["error"]
    best = record["allocation"]
    assert 6 * best["N"]["value"] * best["D"]["value"] == pytest.approx(1e21)
    assert record["published"]["refit 2024"] > record["objective"]
    assert record["outliers"][0]["objective"] == pytest.approx(record["objective"])
    figure = (out / "fit.svg").read_text()
    assert figure.startswith("<?xml")
    status, text, _ = call(capsys, "fit", file, "--bootstraps", 100, "--flops", "1e21", "--json")
    again = json.loads(text)
    assert again == record


@pytest.mark.slow
@pytest.mark.parametrize("law", ["power-n", "power-d-floor", "kaplan-nd"])
def test_every_law_prints_and_draws(law, file, capsys, tmp_path):
    words = ("fit", file, "--law", law, "--bootstraps", 50, "--out", tmp_path / "out")
    status, text, _ = call(capsys, *words)
    assert status == 0
    assert law in text
    assert (tmp_path / "out" / "fit.svg").is_file()


def test_columns_may_be_named(file, capsys):
    file.write_text(file.read_text().replace("Model Size", "w, all").replace("loss", "nll", 1))
    file.write_text(file.read_text().replace("w, all", '"w, all"'))
    columns = ("--columns", "N=w, all", "loss=nll")
    words = ("fit", file, "--law", "power-n", "--bootstraps", 20, *columns, "--json")
    status, text, _ = call(capsys, *words)
    assert status == 0
    assert json.loads(text)["columns"]["N"] == "w, all"
    assert "no column 'nll2'" in mistake(capsys, "fit", file, "--columns", "loss=nll2,N=w, all")


def test_allocate_shows_both_laws_and_what_contradicts(capsys):
    status, text, _ = call(capsys, "allocate", "--flops", "1e21")
    assert status == 0
    assert text.count("CONTRADICTS") == 2
    assert text.count("differs from the printed constants of approach 3") == 2
    assert "Kaplan: N ∝ C^p: printed exponent 0.73 CONTRADICTS" in text
    assert "which give 0.681" in text
    status, text, _ = call(capsys, "allocate", "--flops=1e21", "--json")
    record = json.loads(text)
    assert len(record["allocations"]) == 4
    for name, row in record["allocations"].items():
        off = 0.03 if "exponents" in name else 1e-9  # Kaplan's printed powers miss C by 3 %
        assert 6 * row["N"] * row["D"] == pytest.approx(1e21, rel=off)
        assert ("Kaplan" in name) == (row["batch"] is not None)
    assert call(capsys, "allocate", "--help")[1] == command.USAGE


HEAD = "N,D,loss\n"
GOOD = "".join(f"{n:.6g},{d:.6g},{x:.6g}\n" for n, d, x in zip(N, D, LOSS, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected a header"),
        (HEAD, "has a header and no runs"),
        (HEAD + "1e8,1e9,3.0\n" * 3, "3 runs: the law 'hoffmann' has 5 parameters"),
        ("N,D,los\n1,2,3\n", "no column for loss (loss); did you mean 'los'"),
        ("loss,tokns\n1,2\n", "no column for N (parameters)"),
        (HEAD + GOOD + "1e8,1e9,-3.0\n", "line 42: loss is '-3.0': expected a finite number"),
        (HEAD + "0,1e9,3.0\n" + GOOD, "line 2: N is '0'"),
        (HEAD + "1e8,nan,3.0\n", "line 2: D is 'nan'"),
        (HEAD + "1e8,1e999,3.0\n", "line 2: D is '1e999'"),
        (HEAD + "1e8,__import__('os'),3.0\n", "line 2: D is \"__import__('os')\""),
        (HEAD + "1e8,1_0,3.0\n", "line 2: D is '1_0'"),
        (HEAD + "1e8,,3.0\n", "line 2: D is ''"),
        (HEAD + "1e8,1e9\n", "line 2 has 2 values: expected 3"),
        (HEAD + "1e8,1e9,3.0,4\n", "line 2 has 4 values: expected 3"),
        ("N,N,D,loss\n1,2,3,4\n", "two columns 'N'"),
        (HEAD + "".join(f"1e8,{d:.6g},{x:.6g}\n" for d, x in zip(D, LOSS, strict=True)), "all are"),
        (HEAD + "x" * 200_000 + ",1,2\n", "line"),
        ("\x00\x01" * 50, "no column for loss"),
        ("=cmd|' /C calc'!A0," * 50 + "\n1\n", "no column for loss"),
    ],
)
def test_a_hostile_file_is_one_line(text, message, capsys, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    said = mistake(capsys, "fit", path)
    assert message in said
    assert len(said) < 600


def test_files_that_cannot_be_read_are_one_line(capsys, tmp_path, monkeypatch, file):
    assert "cannot read" in mistake(capsys, "fit", tmp_path / "absent.csv")
    assert "is no file" in mistake(capsys, "fit", tmp_path)
    assert "cannot read" in mistake(capsys, "fit", "a\0b.csv")
    (tmp_path / "binary.csv").write_bytes(b"N,D,loss\n\xff\xfe")
    assert "is no UTF-8 text" in mistake(capsys, "fit", tmp_path / "binary.csv")
    monkeypatch.setattr(table, "MAX_ROWS", 10)
    assert "more than 10 runs" in mistake(capsys, "fit", file)
    monkeypatch.setattr(untrusted, "MAX_BYTES", 100)
    assert "expected at most" in mistake(capsys, "fit", file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "scaling takes fit or allocate, got none"),
        (["fitt"], "did you mean 'fit'"),
        (["fit"], "needs a CSV file"),
        (["allocate"], "needs --flops"),
        (["allocate", "--flops", "lots"], "--flops is 'lots'"),
        (["allocate", "--flops", "-1e20"], "--flops is '-1e20'"),
        (["allocate", "--flops", "1e21", "--law", "x"], "no option of 'optjax scaling allocate'"),
        (["allocate", "--flops", "1e21", "--jsn"], "did you mean 'json'"),
        (["fit", "FILE", "--law", "hofmann"], "did you mean 'hoffmann'"),
        (["fit", "FILE", "--law", "kaplan-ns"], "no column for S (steps)"),
        (["fit", "FILE", "--drop-highest", "38"], "2 runs: the law"),
        (["fit", "FILE", "--drop-highest", "50"], "drop_highest is 50 of 40 runs"),
        (["fit", "FILE", "--bootstraps", "1"], "--bootstraps is 1"),
        (["fit", "FILE", "--columns"], "--columns takes NAME=COLUMN"),
        (["fit", "FILE", "--columns", "loss"], "expected NAME=COLUMN"),
        (["fit", "FILE", "--columns", "Q=loss"], "columns name 'Q'"),
        (["fit", "FILE", "--out", "FILE"], "is a file: expected a folder"),
    ],
)
def test_a_mistake_in_the_words_is_one_line(words, message, file, capsys):
    words = [str(file) if word == "FILE" else word for word in words]
    assert message in mistake(capsys, *words)


def test_a_loss_that_rises_gets_no_allocation(capsys, tmp_path):
    path = tmp_path / "up.csv"
    rows = [f"{n:.9g},{d:.9g},{1 / x:.9g}" for n, d, x in zip(N, D, LOSS, strict=True)]
    path.write_text("\n".join(["params,tokens,loss", *rows]))
    status, text, _ = call(capsys, "fit", path, "--bootstraps", 50)
    assert status == 0
    assert "does not fall with N and D: no budget is allocated" in text
    assert "the best use of" not in text


def test_what_makes_the_intervals_doubtful_is_said(capsys, tmp_path):
    few, odd = tmp_path / "few.csv", tmp_path / "odd.csv"
    few.write_text("N,D,loss\n" + "".join(f"{N[i]},{D[i]},{LOSS[i]}\n" for i in range(0, 40, 5)))
    text = call(capsys, "fit", few, "--bootstraps", 40)[1]
    assert "of 40 resamples had no minimum: the intervals are of the others" in text
    rows = "".join(f"{n},{d},{6e3 * n * d},{y}\n" for n, d, y in zip(N, D, LOSS, strict=True))
    odd.write_text("N,D,C,loss\n" + rows)
    assert "C is 1e+03 to 1e+03 times 6ND" in call(capsys, "fit", odd, "--bootstraps", 20)[1]
