"""The runs that a law is fitted to, from arrays or from a CSV file."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from optjax.run.problems import finite
from optjax.support.errors import UserError, nearest
from optjax.support.untrusted import csv_lines

MAX_ROWS = 1_000_000
_WHAT = {
    "N": "parameters",
    "D": "tokens",
    "S": "steps",
    "C": "training FLOPs",
    "loss": "loss",
}
_NAMES = {
    "N": "n params parameters modelsize modelparams modelparameters nparams nparameters numparams "
    "numparameters size",
    "D": "d tokens ntokens numtokens traintokens trainingtokens tokensseen datasetsize datasize "
    "examples nexamples",
    "S": "s smin steps step nsteps numsteps trainingsteps",
    "C": "c flops flop compute trainingflop trainingflops trainingcompute",
    "loss": "loss l finalloss validationloss valloss testloss evalloss evaluationloss",
}
_TIMES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_NUMBER = re.compile(r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[+-]?\d+)?) ?([kmbgt]?)")
_FAILED = {"", *"nan -nan inf -inf infinity none null na n/a - diverged failed".split()}
"""A loss that says that the run had none."""


class Runs(NamedTuple):
    """The sizes and losses of trained models; unknown sizes are None."""

    loss: np.ndarray  # (n,) above 0
    N: np.ndarray | None = None  # (n,) parameters
    D: np.ndarray | None = None  # (n,) tokens
    S: np.ndarray | None = None  # (n,) steps, S_min for Kaplan's law
    C: np.ndarray | None = None  # (n,) floating-point operations

    def take(self, which: Any) -> "Runs":
        """Select runs by index or mask."""
        return Runs(self.loss[which], *(None if x is None else x[which] for x in self[1:]))


def runs(
    loss: ArrayLike,
    N: ArrayLike | None = None,
    D: ArrayLike | None = None,
    S: ArrayLike | None = None,
    C: ArrayLike | None = None,
) -> Runs:
    """Make runs from arrays; compute the one of N, D and C that is missing by C = 6ND.

    Args:
      loss: (n,) above 0.
      N: (n,) parameters, above 0.
      D: (n,) tokens, above 0.
      S: (n,) steps, above 0.
      C: (n,) floating-point operations, above 0.

    Raises:
      UserError: shapes that differ, a value that is not a finite number above 0.

    >>> runs([3.0, 2.5], N=[1e6, 1e7], C=[6e14, 6e15]).D.tolist()
    [100000000.0, 100000000.0]
    """
    given = {"loss": loss, "N": N, "D": D, "S": S, "C": C}
    arrays = {name: _array(name, x) for name, x in given.items() if x is not None}
    for name, x in arrays.items():
        if x.shape != arrays["loss"].shape:
            raise UserError(
                f"{name} has shape {x.shape} and loss {arrays['loss'].shape}: expected equal"
            )
    return _completed(arrays)


def _array(name: str, values: ArrayLike) -> np.ndarray:
    """Convert values to a float64 array (n,); check that they are finite and above 0."""
    x = finite(name, values, 1).astype(np.float64)
    bad = np.flatnonzero(x <= 0)
    if bad.size:
        raise UserError(f"{name}[{bad[0]}] is {x[bad[0]]:g}: expected a finite number above 0")
    return x


def _completed(arrays: Mapping[str, np.ndarray]) -> Runs:
    """Make runs; compute the one of N, D and C that is missing by C = 6ND."""
    found = dict(arrays)
    N, D, C = found.get("N"), found.get("D"), found.get("C")
    made = None
    with np.errstate(over="ignore", under="ignore"):
        if N is not None and D is None and C is not None:
            made, found["D"] = "D", C / (6 * N)
        elif N is None and D is not None and C is not None:
            made, found["N"] = "N", C / (6 * D)
        elif N is not None and D is not None and C is None:
            made, found["C"] = "C", 6 * N * D
    if made is not None:
        bad = np.flatnonzero(~(np.isfinite(found[made]) & (found[made] > 0)))
        if bad.size:
            raise UserError(
                f"{made} of run {bad[0] + 1}, by C = 6ND, is {found[made][bad[0]]:g}: expected a "
                "finite number above 0; check the units of the others"
            )
    return Runs(**found)


def read_runs(
    path: str | Path, columns: Mapping[str, str] | None = None, needed: Sequence[str] = ("loss",)
) -> tuple[Runs, dict[str, str]]:
    """Read runs from a CSV file with a header line, cells parted by commas, semicolons or tabs.

    Nothing in the file is evaluated; only the columns used are read as numbers, also as "1,000" or
    "10M" (k, M, B or G, T). Rows without a loss, of runs that failed, are left out with a warning.

    Args:
      path: the file, at most 64 MiB and a million lines, UTF-8.
      columns: the column of each of "N", "D", "S", "C", "loss"; those left out are found by their
        usual names (params, Model Size, tokens, Training FLOP, steps, ...).
      needed: quantities that must be there; N and D can each be computed from the other by C = 6ND.

    Returns:
      The runs, and the column that each quantity was read from.

    Raises:
      UserError: the file is no such table; one line names the file, line and value, with a remedy.
    """
    path = Path(path)
    lines, parted = csv_lines(path)
    try:
        header = [name.strip() for name in next(lines)[1]]
    except StopIteration:
        raise UserError(f"{str(path)!r} is empty: expected a header and a line for each run") from (
            None
        )
    where = _columns(str(path), header, dict(columns or {}), needed)
    values: dict[str, list[float]] = {name: [] for name in where}
    failed: list[int] = []
    for number, row in lines:
        if len(row) != len(header):
            raise UserError(
                f"{str(path)!r} line {number} has {len(row)} values: expected {len(header)}, as the"
                " header has"
            )
        if "loss" in where and row[where["loss"]].strip().lower() in _FAILED:
            failed.append(number)
            continue
        for name, i in where.items():
            values[name].append(_number(str(path), number, header[i], row[i], parted))
        if len(values["loss"]) > MAX_ROWS:
            raise UserError(f"{str(path)!r} has more than {MAX_ROWS:,} runs: take a sample of them")
    if not values["loss"]:
        raise UserError(f"{str(path)!r} has a header and no runs with a loss below it")
    if failed:
        text = f"{str(path)!r}: rows without a loss are left out: {len(failed)} (line {failed[0]}"
        warnings.warn(text + (", …)" if len(failed) > 1 else ")"), stacklevel=2)
    found = _completed({name: np.asarray(x) for name, x in values.items()})
    return found, {name: header[i] for name, i in where.items()}


def _plain(name: str) -> str:
    """Reduce a name to its lower-case letters and digits."""
    return "".join(c for c in name.lower() if c.isalnum())


def _columns(
    path: str, header: list[str], named: dict[str, str], needed: Sequence[str]
) -> dict[str, int]:
    """Find the column of each quantity that is there."""
    for quantity in named:
        if quantity not in _NAMES:
            raise UserError(
                f"columns name {quantity!r}: expected N, D, S, C or loss; "
                f"{nearest(quantity, _NAMES)}"
            )
    where: dict[str, int] = {}
    plain = [_plain(name) for name in header]
    for quantity, names in _NAMES.items():
        if quantity in named:
            column = named[quantity]
            if column not in header:
                raise UserError(f"{path!r} has no column {column!r}; {_near(column, header)}")
            where[quantity] = header.index(column)
        else:
            found = [plain.index(name) for name in names.split() if name in plain]
            if found:
                where[quantity] = found[0]
        if quantity in where and header.count(header[where[quantity]]) > 1:
            raise UserError(f"{path!r} has two columns {header[where[quantity]]!r}: rename one")
    for quantity in needed:
        other = {"N": "D", "D": "N"}.get(quantity)
        if quantity not in where and not (other in where and "C" in where):
            ask = f"no column for {quantity} ({_WHAT[quantity]})"
            raise UserError(
                f"{path!r} has {ask}; {_near(_WHAT[quantity], header)}; say which with --columns "
                f"{quantity}=NAME"
            )
    return where


def _near(name: str, header: list[str]) -> str:
    """Suggest the nearest names of the header, in a text of bounded length."""
    hint = nearest(name, header[:1000])
    return hint if len(hint) <= 200 else f"{hint[:200]}…"


def _number(path: str, line: int, column: str, text: str, parted: str) -> float:
    """Parse a cell as a finite number above 0; where commas part no cells, one might be a point."""
    parts = None if parted != "," and "," in text else _NUMBER.fullmatch(text.strip().lower())
    try:
        value = float(parts[1].replace(",", "")) * _TIMES[parts[2]] if parts else math.nan
    except ValueError:
        value = math.nan
    if math.isfinite(value) and value > 0:
        return value
    shown = text.strip() if len(text) <= 40 else f"{text[:40]}…"
    raise UserError(
        f"{path!r} line {line}: {column} is {shown!r}: expected a finite number above 0, as 1.5e9, "
        "1,000 (between commas alone) or 10M"
    )
