"""The comparison on a user's own X and t, from a CSV or an .npz file."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from optjax.experiments.max_margin import falling, logistic
from optjax.experiments.which_solution.contenders import (
    BETA,
    CONTENDERS,
    FACTORS,
    SOLVED,
    Contender,
    Scales,
    final_weights,
    normalised,
)
from optjax.experiments.which_solution.data_sets import DataSet
from optjax.experiments.which_solution.run import best_of, endpoints
from optjax.report.style import COLOURS, INK, MARKERS, caption, figure
from optjax.run.geometries import hypentropy
from optjax.run.optimizers import Factory, required
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError, nearest, one_line
from optjax.support.files import plain
from optjax.support.untrusted import csv_lines, npz_arrays
from optjax.sweeps import grid, sweep
from optjax.theory.implicit_bias import (
    Certificate,
    MarginCertificate,
    certificate,
    margin_certificate,
)
from optjax.theory.least_norms import Equations, equations

MOST = 20_000_000
"""Numbers of X."""
LARGEST = 1e100
"""Number whose square is still one."""


class End(NamedTuple):
    """What one optimiser ends at."""

    certificate: Certificate | MarginCertificate
    spread: float | None  # largest relative distance of an end at another learning rate
    weights: np.ndarray  # (d,)


def read(path: Path, target: str | None = None) -> tuple[np.ndarray, np.ndarray, str]:
    """Read X (n, d), t (n,) and the name of t from a CSV file with a header, or from an .npz file.

    Args:
      path: cells parted by commas, semicolons or tabs; or arrays X and t (or y).
      target: the column or array of t; by default t, y, target or label, and else the last column.

    Raises:
      UserError: the file is no such table; one line names the file, line and value.
    """
    X, t, name = (_npz if path.suffix.lower() == ".npz" else _csv)(path, target)
    if not X.size:
        raise UserError(f"{str(path)!r}: X has shape {X.shape}: expected rows and columns")
    return X, t, name


USUAL = ("t", "y", "target", "label")


def _csv(path: Path, target: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    lines, _ = csv_lines(path)
    header = [cell.strip() for cell in next(lines, (0, []))[1]]
    if len(header) < 2:
        raise UserError(
            f"{str(path)!r} has {len(header)} columns: expected a header, with a column for each "
            "weight and one for t"
        )
    if target is not None and target not in header:
        hint = nearest(target[:40], [name[:40] for name in header[:1000]])
        raise UserError(f"{str(path)!r} has no column {target[:40]!r}; {hint}")
    usual = [name for name in header if name.lower() in USUAL]
    if target is None and len(usual) > 1:
        raise UserError(
            f"{str(path)!r} has the columns {', '.join(usual[:4])}: say which is t with --target"
        )
    goal = target or (usual or header[-1:])[0]
    if header.count(goal) > 1:
        raise UserError(f"{str(path)!r} has two columns {goal[:40]!r}: rename one")
    at = header.index(goal)
    rows: list[list[float]] = []
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{str(path)!r} line {number} has {len(cells)} values: expected {len(header)}, as "
                "the header has"
            )
        rows.append([_number(path, number, *pair) for pair in zip(header, cells, strict=True)])
        if len(rows) * len(header) > MOST:
            raise UserError(f"{str(path)!r} has more than {MOST:,} numbers: take fewer rows")
    if not rows:
        raise UserError(f"{str(path)!r} has a header and no rows below it")
    table = np.array(rows)
    return np.delete(table, at, axis=1), table[:, at], header[at]


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:  # NaN, too
        shown = text.strip()[:40]
        raise UserError(
            f"{str(path)!r} line {line}: {column[:40]!r} is {shown!r}: expected a finite number, "
            f"at most {LARGEST:g}; correct it or leave the row out"
        )
    return value


def _npz(path: Path, target: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    goal = target or "t"

    def choose(names: list[str]) -> list[str]:
        nonlocal goal
        goal = target or next((name for name in USUAL if name in names), "t")
        if goal == "X":
            raise UserError("--target is 'X', the examples: expected the array of t")
        for name in ("X", goal):
            if name not in names:
                found = ", ".join(repr(n[:40]) for n in sorted(names)[:8]) or "nothing"
                raise UserError(f"{str(path)!r} has no array {name!r}: found {found}")
        return ["X", goal]

    def check(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if dtype.kind not in "fiu":
            raise UserError(f"{where}: dtype {dtype}: expected real numbers")
        axes = 2 if where.endswith("'X'") else 1
        if len(shape) != axes or math.prod(shape) > MOST:
            raise UserError(
                f"{where}: shape {shape}: expected {axes} axes and at most {MOST:,} numbers"
            )

    X, t = (array.astype(np.float64) for array in npz_arrays(path, choose, check).values())
    for name, array in (("X", X), ("t", t)):
        odd = ~(np.abs(array) <= LARGEST)  # NaN, too
        if odd.any():
            where = tuple(int(i) for i in np.argwhere(odd)[0])
            raise UserError(
                f"{str(path)!r}: {name} holds {array[where]:g} at {where}: expected finite "
                f"numbers, at most {LARGEST:g}"
            )
    if len(t) != len(X):
        raise UserError(
            f"{str(path)!r}: t has {len(t)} entries and X {len(X)} rows: expected equal"
        )
    return X, t, goal


def contenders(
    names: Sequence[str], others: Mapping[str, Factory], columns: int
) -> dict[str, Contender]:
    """Find optimisers by name; those of `others` take steps of fixed length.

    Raises:
      UserError: a name that is not known, or an optimiser that does not suit a vector of `columns`.
    """
    if "muon" in names:
        raise UserError("muon is for weights that are a matrix, and w is a vector: leave it out")
    if "shampoo" in names and columns > 300:
        raise UserError(
            f"shampoo takes eigenvalues of a {columns} × {columns} matrix at every step: expected "
            "at most 300 columns; leave it out"
        )
    if not names:
        raise UserError("--optimizer names none; give some by commas, as adam,sgd,lion")
    known = CONTENDERS | {
        name: Contender(f, normalised, fixed=True)
        for name, f in others.items()
        if name not in CONTENDERS and required(f) <= {"learning_rate"}
    }
    for name in names:
        if name not in known:
            raise UserError(f"unknown --optimizer {name!r}; {nearest(name, known)}")
    return {name: known[name] for name in names}


def record(
    X: np.ndarray, column: str, given: Equations, found: Mapping[str, End]
) -> dict[str, Any]:
    """Return all that was found, as JSON can hold it."""
    failed = dict.fromkeys(line for each in found.values() for line in each.certificate.failed)
    return plain({
        "rows": X.shape[0], "columns": X.shape[1], "target": column,
        "rank": len(given.X), "condition": given.condition, "failed": list(failed),
        "optimizers": {
            name: {k: v for k, v in each.certificate._asdict().items() if k != "failed"}
            | {"spread": each.spread, "weights": each.weights}
            for name, each in found.items()
        },
    })  # fmt: skip


def compared(
    X: np.ndarray,
    t: np.ndarray,
    chosen: Mapping[str, Contender],
    steps: int,
    norms: tuple[float, ...],
    loss: str = "squares",
    progress: Callable[[str, float], None] = silent,
) -> tuple[dict[str, End], Equations]:
    """Find where each optimiser ends, from 0 and with all examples at each step, and certify it.

    Args:
      X: (n, d).
      t: (n,); −1 and 1 for the logistic loss.
      chosen: optimisers by name.
      steps: of each run.
      norms: p of the solutions compared; of the logistic loss 1, 2 and ∞.
      loss: "squares" or "logistic".
      progress: called with (text, fraction).
    """
    given, found = equations(X, t), {}
    mirrors = {"mirror_descent", "natural_gradient"} & set(chosen)
    potentials = [hypentropy(BETA)] if mirrors else []
    own = DataSet("own", X, t, X[:0], t[:0])
    with jax.enable_x64(True):
        for i, (name, contender) in enumerate(chosen.items()):

            def said(text: str, f: float, i: int = i, name: str = name) -> None:
                progress(f"{name}: {text}", (i + f) / len(chosen))

            try:
                if loss == "logistic":
                    w = _separated(X, t, contender, steps, said)
                    found[name] = End(_margins(w, X, t, norms), None, w)
                    continue
                ends = endpoints(contender, [own], steps, FACTORS, said)[0]
            except UserError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                raise UserError(f"optimizer {name!r} does not suit: {one_line(error)}") from error
            best, spread = best_of(given, ends)
            w = ends[best]
            found[name] = End(
                certificate(w, X, t, norms=norms, potentials=potentials, tolerance=SOLVED),
                spread if math.isfinite(spread) else None,
                w,
            )
    return found, given


def _separated(
    X: np.ndarray, y: np.ndarray, contender: Contender, steps: int, progress: Callable
) -> np.ndarray:
    """Where a run on the logistic loss ends, of rows of length 1 at most: no direction changes."""
    A = y[:, None] * X / (float(np.linalg.norm(X, axis=1).max()) or 1.0)
    curvature = float(np.linalg.norm(A, 2) ** 2) / (4 * len(y))
    factory, rate = contender.optimizer, contender.rate(Scales(curvature or 1.0, 1.0, steps))
    if contender.fixed:
        factory, rate = falling(factory), 0.1
    run = make_run(logistic({"A": A[None]}), factory, steps, record_every=steps)
    point = {"set": 0, "learning_rate": rate}
    runs = sweep(run, grid.points([point]), final=final_weights, progress=progress)
    return runs.weights.values.reshape(-1)


def _margins(
    w: np.ndarray, X: np.ndarray, y: np.ndarray, norms: tuple[float, ...]
) -> MarginCertificate:
    if np.isfinite(w).all():
        return margin_certificate(w, X, y, norms=norms)
    any_other = margin_certificate(np.ones_like(w), X, y, norms=norms)
    return MarginCertificate(math.nan, {}, {}, any_other.failed, "no direction: w is not finite")


def distances(found: Mapping[str, End]) -> xr.DataArray:
    """Distances to each solution, or degrees to each direction, (optimizer, solution)."""
    rows: dict[str, dict[str, float]] = {}
    for name, each in found.items():
        c = each.certificate
        if isinstance(c, Certificate):
            rows[name] = c.distances
        else:
            rows[name] = {f"largest {k} margin": math.degrees(a) for k, a in c.angles.items()}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    values = [[row.get(key, math.nan) for key in keys] for row in rows.values()]
    return xr.DataArray(
        np.array(values).reshape(len(rows), len(keys)),
        {"optimizer": list(rows), "solution": keys},
        ("optimizer", "solution"),
    )


def drawn(found: Mapping[str, End], title: str) -> Figure:
    """Draw how far each optimiser's end is from each solution."""
    table = distances(found)
    margins = any(isinstance(each.certificate, MarginCertificate) for each in found.values())
    fig, ax = figure("single", height=1.3 + 0.26 * len(found))
    for j, solution in enumerate(table.solution.values):
        x = np.maximum(table.sel(solution=solution).values, 1e-16)
        ax.plot(x, range(len(found)), MARKERS[j % 8], ls="", color=COLOURS[j % 7], ms=7, mec=INK,
                mew=0.6, label=str(solution))  # fmt: skip
    for i, each in enumerate(found.values()):
        unsolved = not (getattr(each.certificate, "residual", 0.0) <= SOLVED)
        if unsolved and not margins:
            ax.text(1.02, i, "not solved", fontsize=7, color="#666666", va="center",
                    transform=ax.get_yaxis_transform())  # fmt: skip
    if not margins:
        ax.axvline(SOLVED, color="#777777", ls="--", lw=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(found)), list(found))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlabel("angle, degrees" if margins else "relative distance ‖w − s‖ / ‖s‖")
    ax.set_title(title[:60], parse_math=False)
    fig.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return caption(fig, "Angle of each optimiser's end to each direction." if margins else
                   "How far each optimiser ends from each solution; left of the dashed line it is "
                   "that solution.")  # fmt: skip


def labels(t: np.ndarray, column: str) -> np.ndarray:
    """Return labels −1 and 1; 0 and 1 are taken as these."""
    if set(np.unique(t)) <= {0.0, 1.0}:
        return 2 * t - 1
    odd = t[~np.isin(t, (-1, 1))]
    if odd.size:
        raise UserError(f"{column[:40]} holds the label {odd[0]:g}: expected -1 and 1, or 0 and 1")
    return t


def show(record: dict[str, Any], distances: xr.DataArray) -> None:
    """Print the table and the conditions that fail."""
    # Off a terminal nobody's width is known, and a cut table is worth nothing.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    print(
        f"X {record['rows']} × {record['columns']}, rank {record['rank']}, condition "
        f"{_cell(record['condition'], '.3g')}; t: {record['target'][:60]!r}"
    )
    for line in record["failed"]:
        print(f"! {line}")
    table = Table(box=box.SIMPLE, pad_edge=False)
    solves = "residual" in next(iter(record["optimizers"].values()))
    table.add_column("optimizer")
    for name in ["residual", "off row space"] if solves else ["wrong"]:
        table.add_column(name, justify="right")
    for name in distances.solution.values:
        table.add_column(str(name) + ("" if solves else ", °"), justify="right")
    if solves:
        table.add_column("by rate", justify="right")
    table.add_column("found", overflow="fold")
    for name, row in record["optimizers"].items():
        keys = ("residual", "off_row_space") if solves else ("training_error",)
        cells = [_cell(row[key], ".1e" if solves else ".0%") for key in keys]
        cells += [f"{value:.2g}" for value in distances.sel(optimizer=name).values]
        if solves:
            cells.append("" if row["spread"] is None else f"{row['spread']:.1g}")
        table.add_row(name, *cells, row["found"])
    console.print(table)
    if solves:
        print(
            "residual, share off the row space, relative distances to these solutions; by rate: "
            "how far ends at 1/4, 1/2 and 1 of the learning rate lie from the best"
        )
    if any("yet" in row["found"] for row in record["optimizers"].values()):
        print("where there is no solution yet, give more steps: --steps 50000")


def _cell(value: float | None, form: str) -> str:
    """Format a number that JSON may have lost."""
    return "nan" if value is None else format(value, form)
