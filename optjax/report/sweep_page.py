"""What a sweep has found, to look at: its best points, figures, and one page with both."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from optjax.report import style
from optjax.report.rendering import data_uri, number, render
from optjax.run.core import Status
from optjax.support.errors import UserError
from optjax.support.files import write_text
from optjax.sweeps.best import last

_COLOURED = 100.0
"""Largest over least final loss that colours tell apart."""

SHOWN = 5
"""Points whose loss is drawn against the steps."""

Row = dict[str, Any]


def ranked(dataset: xr.Dataset, metric: str | None = None, mode: str = "min") -> xr.Dataset:
    """Return the dataset with its runs judged by a metric, as ``judged``.

    Args:
      metric: a variable; by default the final loss, or of a sweep under way the last recorded one.
      mode: "min", or "max" for an accuracy.

    Raises:
      UserError: an unknown metric; a dataset that is of no runs.
    """
    if "final_loss" not in dataset:
        raise UserError(
            f"a {dataset.attrs.get('kind')} has no runs to rank: oj.load_sweep reads it"
        )
    going = bool((dataset.status == Status.RUNNING).any())
    if metric is None:
        metric = "loss" if going and "loss" in dataset else "final_loss"
    values = last(dataset, metric)
    if "step" in dataset[metric].dims:
        values = values.where(dataset.steps_done > 0)
    name = metric.replace("_", " ")
    name = f"last {name}" if "step" in dataset[metric].dims else name
    bad = np.inf if mode == "min" else -np.inf
    values = values.where(dataset.status != Status.DIVERGED, bad)
    return dataset.assign(judged=values.assign_attrs(name=name, mode=mode))


def _sign(dataset: xr.Dataset) -> int:
    """Return 1 where the least is best, −1 where the largest is."""
    return 1 if dataset.judged.attrs["mode"] == "min" else -1


def points(dataset: xr.Dataset) -> list[Row]:
    """List the points of the grid, the best first, of a dataset from `ranked`.

    A row has what the seeds' runs are judged by and how they ended. The median counts a diverged
    run as infinitely bad; runs that are not done are left out.
    """
    axes = [str(d) for d in dataset.judged.dims if d != "seed"]
    names = [str(c) for c in dataset.coords if c not in ("seed", "step", "point")]
    sizes = [dataset.sizes[a] for a in axes]
    final = dataset.judged.transpose(*axes, "seed").values.reshape(-1, dataset.sizes["seed"])
    status = dataset.status.transpose(*axes, "seed").values.reshape(final.shape)
    done = dataset.steps_done.transpose(*axes, "seed").values.reshape(final.shape)
    rows = []
    for i, place in enumerate(np.ndindex(*sizes)):
        at = dict(zip(axes, place, strict=True))
        diverged = status[i] == Status.DIVERGED
        losses = final[i][~np.isnan(final[i])]
        rows.append(
            {
                "at": at,
                "values": {n: _value(dataset[n], at) for n in names},
                "median": float(np.median(losses)) if len(losses) else np.nan,
                "low": float(losses.min()) if len(losses) else np.nan,
                "high": float(losses.max()) if len(losses) else np.nan,
                "runs": len(losses),
                "diverged": int(diverged.sum()),
                "stopped": int((status[i] == Status.STOPPED).sum()),
                "steps": int(done[i].max()),
            }
        )
    sign = _sign(dataset)
    return sorted(rows, key=lambda row: (np.isnan(row["median"]), sign * row["median"]))


def _value(coordinate: xr.DataArray, at: dict[str, int]) -> Any:
    return coordinate.isel({d: at[str(d)] for d in coordinate.dims}).item()


def _said(values: dict[str, Any]) -> str:
    if not values:
        return "the run"
    texts = {name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in texts.items())


# ------------------------------------------------------------------------------------- figures


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Draw the loss against the steps, and the final loss over the grid."""
    found = {}
    rows = [row for row in points(dataset) if np.isfinite(row["median"])]
    if "loss" in dataset and rows:
        found["loss"] = _loss(dataset, rows)
    axes = _numeric(dataset)
    if not rows or not axes:
        return found
    if "point" in dataset.dims:
        found["final-loss"] = _scatter(dataset, rows, axes)
    elif len(axes) == 1:
        found["final-loss"] = _line(dataset, axes[0])
    else:
        found["final-loss"] = _map(dataset, axes[0], axes[1])
    return found


def _numeric(dataset: xr.Dataset) -> list[str]:
    """Name the grid's numeric axes, those with most values first."""
    names = [str(c) for c in dataset.coords if c not in ("seed", "step", "point")]
    names = [n for n in names if dataset[n].dtype.kind in "if" and len(np.unique(dataset[n])) > 1]
    return sorted(names, key=lambda n: -len(np.unique(dataset[n])))


def _loss(dataset: xr.Dataset, rows: list[Row]) -> Figure:
    fig, ax = style.figure("wide", height=3.8)
    step = dataset.step.values
    over = [d for d in dataset.loss.dims if d != "step"]
    every = dataset.loss.stack(run=over).transpose("run", "step").values
    lines = _bands(every)
    ax.plot(step, lines[1], color="#777777", lw=1, label=f"all runs ({every.shape[0]:,})")
    style.band(ax, step, lines[0], lines[2], alpha=0.15)
    for i, row in enumerate(rows[:SHOWN]):
        runs = dataset.loss.isel(row["at"]).transpose("seed", "step").values
        low, middle, high = _bands(runs)
        ax.plot(step, middle, color=style.COLOURS[i], lw=1.4, label=_said(row["values"]))
        if runs.shape[0] > 1:
            style.band(ax, step, low, high)
    positive = every[np.isfinite(every)]
    if positive.size and positive.min() > 0 and positive.max() > 20 * positive.min():
        ax.set_yscale("log")
        # Runs that all but diverged would press the others together.
        best = [dataset.loss.isel(row["at"]).transpose("seed", "step") for row in rows[:SHOWN]]
        ends = np.array([_bands(runs.values)[::2] for runs in best])
        bottom, top = 0.5 * np.nanmin(ends[:, 0]), 10 * np.nanmax(ends[:, 1])
        ax.set_ylim(max(ax.get_ylim()[0], bottom), min(ax.get_ylim()[1], top))
    ax.set(xlabel="steps", ylabel="mini-batch loss")
    ax.legend(frameon=False, fontsize=8)
    return style.caption(
        fig,
        f"Mean mini-batch loss between records, for the {min(SHOWN, len(rows))} best points by "
        f"median {dataset.judged.attrs['name']} and for all runs. Lines: medians over runs still "
        "under way; bands: 10th to 90th percentile.",
    )


def _bands(runs: np.ndarray) -> np.ndarray:
    """Compute each column's 10th, 50th and 90th percentile; NaN where no run is left."""
    found = np.full((3, runs.shape[1]), np.nan)
    for i, column in enumerate(runs.T):
        good = column[np.isfinite(column)]
        if len(good):
            found[:, i] = np.quantile(good, (0.1, 0.5, 0.9))
    return found


def _scale(values: np.ndarray, sign: int) -> Normalize:
    good = values[np.isfinite(values)]
    if sign > 0 and good.size and good.min() > 0:
        # Runs that all but diverged would take the colours from the rest.
        top = np.clip(good.max(), good.min() * (1 + 1e-6), _COLOURED * good.min())
        return LogNorm(good.min(), top)
    return Normalize(good.min() if good.size else 0, good.max() if good.size else 1)


def _map(dataset: xr.Dataset, across: str, up: str) -> Figure:
    """Draw medians over the seeds; where there are more axes, the best of them."""
    sign, name = _sign(dataset), dataset.judged.attrs["name"]
    median = sign * dataset.judged.median("seed")
    others = [d for d in median.dims if d not in (across, up)]
    cells = (median.min(others) if others else median).transpose(up, across).values
    fig, ax = style.figure("single", height=3.8)
    shown = sign * np.where(np.isfinite(cells), cells, np.nan)
    colours = "cividis_r" if sign > 0 else "cividis"
    mesh = ax.pcolormesh(shown, cmap=colours, norm=_scale(shown, sign), rasterized=False)
    for y, x in zip(*np.nonzero(np.isinf(cells)), strict=True):
        ax.plot(x + 0.5, y + 0.5, "x", color="#777777", ms=5)
    if np.isfinite(cells).any():
        y, x = np.unravel_index(np.nanargmin(sign * shown), shown.shape)
        ax.plot(x + 0.5, y + 0.5, "*", color="#d55e00", mec="white", ms=14)
    ax.grid(False)
    for axis, along in ((ax.xaxis, across), (ax.yaxis, up)):
        values = dataset[along].values
        every = max(1, -(-len(values) // 9))
        texts = [f"{v:.3g}" if values.dtype.kind == "f" else str(v) for v in values[::every]]
        axis.set_ticks(np.arange(len(values))[::every] + 0.5, texts)
        axis.set_label_text(along.replace("_", " "))
    if len(dataset[across]) > 5:
        ax.tick_params(axis="x", rotation=40)
    _bar(fig, ax, mesh, shown, name)
    rest = f", the best over {', '.join(map(str, others))}" if others else ""
    return style.caption(
        fig,
        f"{_capital(name)}, median over the seeds{rest}. Star: the best. "
        "Cross: more than half of the runs diverged.",
    )


def _capital(name: str) -> str:
    name = "final loss over all training data" if name == "final loss" else name
    return name[0].upper() + name[1:]


def _bar(fig: Figure, ax: Axes, drawn: Any, values: np.ndarray, name: str) -> None:
    clipped = np.nanmax(values) > drawn.norm.vmax
    bar = fig.colorbar(drawn, ax=ax, extend="max" if clipped else "neither")
    bar.set_label(f"median {name}")


def _line(dataset: xr.Dataset, name: str) -> Figure:
    runs, judged = dataset.judged.transpose(name, ..., "seed").values, dataset.judged.attrs["name"]
    runs = runs.reshape(len(runs), -1, runs.shape[-1])
    best = np.argmin(_sign(dataset) * np.median(runs, axis=2), axis=1)
    runs = runs[np.arange(len(runs)), best]
    fig, ax = style.figure("single")
    x = dataset[name].values
    middle = np.median(runs, axis=1)
    good = np.isfinite(middle)
    ax.plot(x[good], middle[good], "o-", ms=4)
    low, high = np.quantile(runs[good], (0.1, 0.9), axis=1, method="nearest")
    if np.isfinite(high).all():
        style.band(ax, x[good], low, high)
    _logs(ax, x, middle[good])
    ax.set(xlabel=name.replace("_", " "), ylabel=judged)
    return style.caption(
        fig,
        f"{_capital(judged)}: median over the seeds, band from the 10th to the 90th percentile. "
        "Values at which more than half of the runs diverged are left out.",
    )


def _scatter(dataset: xr.Dataset, rows: list[Row], axes: list[str]) -> Figure:
    name, colours = dataset.judged.attrs["name"], "cividis_r" if _sign(dataset) > 0 else "cividis"
    fig, ax = style.figure("single", height=3.8)
    x = np.array([row["values"][axes[0]] for row in rows])
    losses = np.array([row["median"] for row in rows])
    if len(axes) == 1:
        ax.plot(x, losses, "o", ms=4)
        _logs(ax, x, losses)
        ax.set(xlabel=axes[0].replace("_", " "), ylabel=f"median {name}")
    else:
        y = np.array([row["values"][axes[1]] for row in rows])
        dots = ax.scatter(x, y, c=losses, cmap=colours, norm=_scale(losses, _sign(dataset)), s=28)
        ax.plot(x[0], y[0], "*", color="#d55e00", mec="white", ms=14)
        _logs(ax, x, y)
        ax.set(xlabel=axes[0].replace("_", " "), ylabel=axes[1].replace("_", " "))
        _bar(fig, ax, dots, losses, name)
    return style.caption(
        fig, f"Median {name} over the seeds at each point; diverged points are left out."
    )


def _logs(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Set a logarithmic axis for values that spread over more than a decade."""
    for values, scale in ((x, ax.set_xscale), (y, ax.set_yscale)):
        if len(values) and np.min(values) > 0 and np.max(values) > 10 * np.min(values):
            scale("log")


# ---------------------------------------------------------------------------------------- page


def summary(dataset: xr.Dataset) -> dict[str, int]:
    """Count the runs, and those that ended in each way."""
    ended = int((dataset.final_loss.notnull() | (dataset.status == Status.DIVERGED)).sum())
    found = {"runs": dataset.status.size, "ended": ended}
    for status in (Status.CONVERGED, Status.STOPPED, Status.DIVERGED):
        found[status.name.lower()] = int((dataset.status == status).sum())
    return found


def write(dataset: xr.Dataset, folder: Path, title: str, most: int = 20) -> Path:
    """Write FOLDER/figures/*.svg and FOLDER/index.html, and return the page's path."""
    drawn = []
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, fig in figures(dataset).items():
        file = style.save(fig, folder / "figures" / name)[0]
        drawn.append((data_uri(file), str(getattr(fig, "caption", ""))))
    rows = points(dataset)
    page = render(
        "sweep.html.j2",
        title=title,
        counts=", ".join(f"{n:,} {name}" for name, n in summary(dataset).items() if n),
        figures=drawn,
        heads=heads(dataset, rows),
        rows=[cells(row) for row in rows[:most]],
        points=len(rows),
    )
    path = folder / "index.html"
    write_text(path, page)
    return path


def heads(dataset: xr.Dataset, rows: list[Row]) -> list[str]:
    """Name what `cells` formats."""
    names = list(rows[0]["values"]) if rows else []
    return [*names, dataset.judged.attrs["name"], "over the seeds", "runs", "diverged", "steps"]


def cells(row: Row) -> list[str]:
    """Format a row of `points` as text."""
    values = [_digits(v) if isinstance(v, float) else str(v) for v in row["values"].values()]
    spread = f"{_digits(row['low'])} to {_digits(row['high'])}" if row["runs"] > 1 else ""
    counts = [str(row["runs"]), str(row["diverged"] or ""), f"{row['steps']:,}"]
    return [*values, _digits(row["median"]), spread, *counts]


def _digits(x: float) -> str:
    """Format a number to four significant digits.

    >>> _digits(0.000719686), _digits(128.0)
    ('0.0007197', '128')
    """
    return number(float(f"{x:.4g}"))
