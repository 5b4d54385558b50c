"""The table of solutions, the test errors, and the networks."""

import textwrap

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.which_solution.contenders import SOLVED
from optjax.experiments.which_solution.small_networks import FITTED
from optjax.report.style import COLOURS, MARKERS, caption, figure

KINDS = {
    "least ℓ2": ("ℓ2", COLOURS[5]),
    "least ℓ1": ("ℓ1", COLOURS[4]),
    "least ℓ∞": ("ℓ∞", COLOURS[2]),
    "least ℓ4/3": ("ℓ4/3", COLOURS[3]),
    "Bregman": ("mirror", "#b3a2d9"),
}
"""A solution, its mark in the table, and its colour."""


def picked(row: xr.Dataset) -> tuple[str, str]:
    """Return the mark and the colour of an end: which solution, or how far from any."""
    name = str(row.picked.values)
    if name in ("", "not solved"):
        return name, "#d9d9d9"
    if name == "none":
        return f"{float(row.distance.min()):.1g} off", "#ffffff"
    return next(mark for start, mark in KINDS.items() if name.startswith(start))


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Which solution, what error, and the networks."""
    return {
        "table": table(dataset),
        "errors": _errors(dataset),
        **({"networks": _networks(dataset)} if "network" in dataset.dims else {}),
    }


def table(dataset: xr.Dataset) -> Figure:
    """Draw the solution that each optimiser picks on each data set."""
    names, sets = dataset.optimizer.values.tolist(), dataset.data.values.tolist()
    fig, ax = figure("wide", height=1.0 + 0.27 * len(names))
    for i, name in enumerate(names):
        for j, data in enumerate(sets):
            mark, colour = picked(dataset.sel(optimizer=name, data=data))
            if mark:
                box = [j, j + 1, j + 1, j], [i, i, i + 1, i + 1]
                ink = "#666666" if colour in ("#ffffff", "#d9d9d9") else "#000000"
                ax.fill(*box, color=colour, ec="#ffffff", lw=2)
                ax.text(j + 0.5, i + 0.5, mark, ha="center", va="center", fontsize=9, color=ink)
    ax.set(xlim=(0, len(sets)), ylim=(len(names), 0))
    ax.set_xticks(np.arange(len(sets)) + 0.5, [textwrap.fill(s, 11) for s in sets])
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.xaxis.tick_top()
    ax.grid(False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return caption(
        fig, "The solution that each optimiser picks from 0: that of least norm in ℓ2, ℓ1, ℓ∞ or "
        "ℓ4/3, the one of mirror descent, or, in white, none of these and how far the nearest "
        "is, relative to its length.",
    )  # fmt: skip


def _errors(dataset: xr.Dataset) -> Figure:
    """Draw the test errors of ends that solve the equations."""
    tested = [
        k for k in dataset.data.values.tolist() if dataset.test_error.sel(data=k).notnull().any()
    ]
    names = dataset.optimizer.values.tolist()
    fig, axes = figure("wide", 1, len(tested), height=0.9 + 0.2 * len(names), sharey=True)
    for ax, data in zip(np.atleast_1d(axes), tested, strict=True):
        for i, name in enumerate(names):
            row = dataset.sel(optimizer=name, data=data)
            colour = picked(row)[1]
            if row.residual <= SOLVED:
                ax.plot(float(row.test_error), i, "o", ms=7, mec="#222222", mew=0.8,
                        color=colour)  # fmt: skip
        ax.set_title(data)
        ax.set_xlim(-0.05, max(1.0, float(dataset.test_error.sel(data=data).max())) + 0.05)
        ax.set_xlabel("share of wrong signs" if "Wilson" in data else "relative error")
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(names)), names)
    first.set_ylim(len(names) - 0.5, -0.5)
    return caption(
        fig, "Test error of each optimiser's solution, in the colours of the table. A bias helps "
        "where the truth shares it: the least ℓ1 norm finds sparse weights.",
    )  # fmt: skip


def _networks(dataset: xr.Dataset) -> Figure:
    """Draw the test errors of both networks, a point a seed and the median."""
    trained = dataset.network_residual.notnull().any(["network", "seed"])
    names = dataset.optimizer.values[trained.values].tolist()
    fig, axes = figure("wide", 1, 2, height=0.9 + 0.2 * len(names), sharey=True)
    for ax, network in zip(axes, dataset.network.values, strict=True):
        for i, name in enumerate(names):
            row = dataset.sel(optimizer=name, network=network)
            error = row.network_test_error.values
            fits = row.network_residual.values <= FITTED
            colour = COLOURS[0] if fits.all() else "#999999"
            ax.plot(error, np.full(error.size, i), MARKERS[0], color=colour, ms=4, alpha=0.5)
            ax.plot(np.median(error), i, "|", color="#000000", ms=12, mew=2)
        ax.set_xlabel("relative test error")
        ax.set_title(str(network))
        ax.set_xlim(0, 1.1)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return caption(
        fig, "Two networks with more weights than examples. A dot a seed, bars the medians; grey: "
        "some run does not fit its examples to 2 %.",
    )  # fmt: skip
