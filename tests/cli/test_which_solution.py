"""optjax which-solution on files as users have them, and on those that cannot be."""

import json

import numpy as np
import pytest

from optjax.cli.main import main
from optjax.experiments.which_solution import own_data

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 6))
T = X @ np.eye(6)[0]
FEW = ["--optimizer", "sgd,sign_sgd", "--steps", "400"]


def save(path, X, t, header=None, parted=","):
    header = header or [*(f"x{i}" for i in range(X.shape[1])), "t"]
    rows = [header, *(map(repr, map(float, row)) for row in np.column_stack([X, t]))]
    path.write_text("\n".join(parted.join(row) for row in rows) + "\n")
    return str(path)


def test_a_table_a_record_and_a_figure(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["which-solution", save(tmp_path / "a.csv", X, T), *FEW, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "X 3 × 6, rank 3" in shown
    assert "the solution of least ℓ2 norm" in shown
    record = json.loads((out / "which-solution.json").read_text())
    assert record["optimizers"]["sgd"]["picked"] == ["least ℓ2"]
    assert record["optimizers"]["sign_sgd"]["off_row_space"] > 0.01
    np.testing.assert_allclose(X @ record["optimizers"]["sgd"]["weights"], T, atol=1e-6)
    assert record["failed"] == []
    assert (out / "which-solution.svg").read_text().startswith("<?xml")


def test_an_end_that_is_not_finite_has_its_row(capsys):
    one, end = np.ones((1, 1)), np.array([np.nan])
    found = {"bad": own_data.End(own_data._margins(end, one, one[0], (2,)), None, end)}
    record = own_data.record(one, "t", own_data.equations(one, one[0]), found)
    own_data.show(record, own_data.distances(found))
    assert "no direction: w is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "parted", "more"),
    [
        (["y", "a", "b", "c", "d", "e", "f"], ";", []),
        (["price", "a", "b", "c", "d", "e", "f"], "\t", ["--target", "price"]),
    ],
)
def test_the_column_of_t_is_found_or_named(tmp_path, capsys, header, parted, more):
    path = save(tmp_path / "a.csv", np.column_stack([T, X[:, :-1]]), X[:, -1], header, parted)
    assert main(["which-solution", path, *FEW, *more, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["target"] == header[0]
    assert record["optimizers"]["sgd"]["picked"] == ["least ℓ2"]


def test_labels_are_separated(tmp_path, capsys):
    y = np.where(T > 0, 1, 0)  # 0 and 1 are labels, too
    np.savez(tmp_path / "a.npz", X=X.astype(np.float32), y=y)
    words = ["--loss", "logistic", "--optimizer", "sgd,adam", "--steps", "400"]
    assert main(["which-solution", str(tmp_path / "a.npz"), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["optimizers"]
    assert found["sgd"]["training_error"] == 0
    assert found["sgd"]["found"].startswith("nearest to the largest ℓ2 margin")


CONDITIONS = {
    "rank": (X[[0, 1, 1]], T[[0, 1, 1]], [], "X has rank 2, less than its 3 rows"),
    "tall": (X.T[:, :2], X.T[:, :2] @ [1.0, 2.0], [], "X has 6 rows and 2 columns (n > d)"),
    "inconsistent": (X[[0, 1, 1]], np.array([1.0, 2.0, 3.0]), [], "no w solves Xw = t"),
    "inseparable": (X[[0, 0]], np.array([1.0, -1.0]), ["--loss", "logistic"],
                    "no direction through the origin separates"),
    "zeros": (np.zeros((2, 3)), np.array([1.0, 2.0]), ["--norms", "2,1,inf,3"],
              "X has rank 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_that_fails_is_a_line_and_the_table_stands(tmp_path, capsys, name):
    A, t, more, line = CONDITIONS[name]
    words = ["--optimizer", "sgd", "--steps", "400", *more]
    assert main(["which-solution", save(tmp_path / "a.csv", A, t), *words]) == 0
    shown = capsys.readouterr().out
    assert f"! {line}" in shown
    assert "sgd" in shown


MISTAKES = {
    "no file": ("", [], "needs the file of your data"),
    "absent": ("absent.csv", [], "cannot read"),
    "missing value": ("x,z,t\n1,2,3\n1,,3\n", [], "line 3: 'z' is '': expected a finite number"),
    "nan": ("x,z,t\n1,nan,3\n", [], "line 2: 'z' is 'nan': expected a finite number"),
    "huge": ("x,z,t\n1,1e308,3\n", [], "'z' is '1e308': expected a finite number, at most 1e+100"),
    "twice": ("t,x,t\n1,2,3\n", [], "say which is t with --target"),
    "same": ("x,x,z\n1,2,3\n", ["--target", "x"], "has two columns 'x'"),
    "ambiguous": ("y,x,label\n1,2,3\n", [], "has the columns y, label: say which"),
    "no names": ("x,y,a\n1,2,3\n", ["--target", "a", "--optimizer", ","], "--optimizer names none"),
    "needs more": ("x,z,t\n1,2,3\n", ["--optimizer", "dpsgd"], "unknown --optimizer 'dpsgd'"),
    "does not suit": ("x,z,t\n1,2,3\n", ["--optimizer", "rprop"], "'rprop' does not suit"),
    "ragged": ("x,z,t\n1,2\n", [], "line 2 has 2 values: expected 3, as the header has"),
    "no rows": ("x,z,t\n", [], "has a header and no rows below it"),
    "one column": ("t\n1\n", [], "has 1 columns: expected a header"),
    "empty": ("", [], "has 0 columns"),
    "target": ("x,z,t\n1,2,3\n", ["--target", "q"], "has no column 'q'"),
    "optimizer": ("x,z,t\n1,2,3\n", ["--optimizer", "adma"], "unknown --optimizer 'adma'; did you"),
    "muon": ("x,z,t\n1,2,3\n", ["--optimizer", "muon"], "weights that are a matrix"),
    "loss": ("x,z,t\n1,2,3\n", ["--loss", "hinge"], "expected squares or logistic"),
    "label": ("x,z,t\n1,2,3\n", ["--loss", "logistic"], "t holds the label 3: expected -1 and 1"),
    "norm": ("x,z,t\n1,2,3\n", ["--norms", "2,0.5"], "expected numbers from 1, or inf"),
    "margin": ("x,z,t\n1,2,1\n", ["--loss", "logistic", "--norms", "3"], "are 1, 2 and inf"),
    "steps": (
        "x,z,t\n1,2,3\n",
        ["--steps", "0"],
        "optjax: steps is 0: expected a whole number of at least 1",
    ),
    "option": ("x,z,t\n1,2,3\n", ["--optimiser", "sgd"], "did you mean 'optimizer'"),
    "out": ("x,z,t\n1,2,3\n", [*FEW, "--out", "a.csv"], "cannot write into"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, name):
    text, more, words = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    path = text
    if text != "absent.csv" and name != "no file":
        (tmp_path / "a.csv").write_text(text)
        path = "a.csv"
    assert main(["which-solution", *([path] if path else []), *more]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") <= 2  # a line of progress may come before it
    assert "Traceback" not in error


ARRAYS = {
    "X as t": ({"X": X, "t": T}, "--target is 'X'"),
    "no X": ({"t": T}, "has no array 'X': found 't'"),
    "no t": ({"X": X}, "has no array 't': found 'X'"),
    "text": ({"X": np.array([["a"]]), "t": T}, "expected real numbers"),
    "pickle": ({"X": np.array([[None]]), "t": T}, "an object array"),
    "axes": ({"X": T, "t": T}, "expected 2 axes"),
    "lengths": ({"X": X, "t": T[:2]}, "t has 2 entries and X 3 rows"),
    "nan": ({"X": X * np.nan, "t": T}, "X holds nan at (0, 0)"),
    "empty": ({"X": X[:0], "t": T[:0]}, "X has shape (0, 6): expected rows and columns"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_cannot_be_are_one_line(tmp_path, capsys, name):
    arrays, words = ARRAYS[name]
    np.savez(tmp_path / "a.npz", **arrays)
    more = ["--target", "X"] if name == "X as t" else []
    assert main(["which-solution", str(tmp_path / "a.npz"), *FEW, *more]) == 2
    assert words in capsys.readouterr().err
