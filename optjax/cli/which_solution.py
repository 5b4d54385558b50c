"""optjax which-solution: of all solutions of one's own equations, which does an optimiser pick?"""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from optjax.cli.words import grouped, number, one, switch
from optjax.support.errors import UserError, nearest

DEFAULT = "sgd,momentum,rmsprop,adam,adagrad,sign_sgd,lion,steepest_l1,mirror_descent"
USAGE = f"""\
usage: optjax which-solution DATA [--optimizer adam,sgd,lion] [--target NAME] [--loss squares]
                                  [--steps 5000] [--norms 2,1,inf] [--json] [--out FOLDER]

Which of all w with Xw = t does each optimiser reach from 0? A table of certificates.

DATA         a CSV file with a header, a column for each weight and one for t; or an .npz file
             with arrays X (n, d) and t (n,)
--optimizer  by commas: {DEFAULT[: DEFAULT.index(",adagrad")]},
             {DEFAULT[DEFAULT.index("adagrad") :]} (the default), nesterov,
             adamw, shampoo, natural_gradient, steepest_l4/3, or any of optax
--target     the column or array of t (by default t, y, target or label, else the last column)
--loss       squares, or logistic for labels -1 and 1: the direction of largest margin
--steps      of each run, with all examples at each step (5000)
--norms      p of the solutions of least norm that are compared, each from 1 to inf (2,1,inf)
--out        a folder for which-solution.json and which-solution.svg
--json       for machines
"""


def which_solution(words: list[str]) -> int:
    """Compare optimisers on one's own data."""
    if not words or words[0].startswith("--"):
        raise UserError("which-solution needs the file of your data, a CSV or an .npz, first")
    path, groups = Path(words[0]), grouped(words[1:])
    names = list(dict.fromkeys(filter(None, one(groups, "optimizer", DEFAULT).split(","))))
    target = one(groups, "target") if "target" in groups else None
    loss, steps = one(groups, "loss", "squares"), number(groups, "steps", "5000")
    norms = tuple(_norm(word) for word in one(groups, "norms", "2,1,inf").split(","))
    out = Path(one(groups, "out")) if "out" in groups else None
    as_json = switch(groups, "json")
    known = ("optimizer", "target", "loss", "steps", "norms", "out", "json")
    for name in groups:
        raise UserError(f"unknown option '--{name}'; {nearest(name, known)}")
    if loss not in ("squares", "logistic"):
        raise UserError(f"--loss is {loss!r}: expected squares or logistic")
    if loss == "logistic" and not set(norms) <= {1, 2, math.inf}:
        raise UserError("--norms of the logistic loss are 1, 2 and inf")
    from optjax.cli.named_problems import factories
    from optjax.report import style
    from optjax.support.console import Console
    from optjax.support.files import write_text

    own_data = importlib.import_module("optjax.experiments.which_solution.own_data")
    X, t, column = own_data.read(path, target)
    if loss == "logistic":
        t = own_data.labels(t, column)
    if out is not None:
        _writing(out, lambda: out.mkdir(parents=True, exist_ok=True))
    contenders = own_data.contenders(names, factories(), X.shape[1])
    with Console().late("which-solution") as progress:
        found, given = own_data.compared(X, t, contenders, steps, norms, loss, progress)
    record = own_data.record(X, column, given, found)
    if out is not None:
        text, figure = json.dumps(record, ensure_ascii=False), own_data.drawn(found, path.name)
        _writing(out, lambda: write_text(out / "which-solution.json", f"{text}\n"))
        _writing(out, lambda: style.save(figure, out / "which-solution"))
    if as_json:
        print(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        own_data.show(record, own_data.distances(found))
    return 0


def _norm(word: str) -> float:
    try:
        p = float(word)
    except ValueError:
        p = math.nan
    if not p >= 1:
        raise UserError(f"--norms has {word!r}: expected numbers from 1, or inf")
    return p


def _writing(out: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"cannot write into {str(out)!r}: {error.strerror or error}") from None
