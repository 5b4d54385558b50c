"""The path of a tuning, drawn from its dataset."""

import json
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.report.style import COLOURS, caption, figure
from optjax.support.errors import sign_of

if TYPE_CHECKING:
    import xarray

_FAINT = "#b5b5b5"


def picture(path: "xarray.Dataset", most: int = 7) -> Figure:
    """Draw the value, and up to `most` hyperparameters, along the outer steps.

    A hyperparameter of several numbers (a schedule) is drawn against its index, at the start and
    at the best point.
    """
    names = json.loads(path.attrs["tuned"])[:most]
    logs = set(json.loads(path.attrs["logarithmic"]))
    panels = 1 + len(names)
    columns = min(3, panels)
    rows = -(-panels // columns)
    fig, axes = figure("wide", rows, columns, squeeze=False)
    values, sign = path.value.values, sign_of(path.attrs.get("better", "low"))
    seen = bool(np.isfinite(values).any())
    place = int(np.nanargmin(sign * values)) if seen else values.size - 1
    restart, step = (int(i) for i in np.unravel_index(place, values.shape))
    _lines(axes.flat[0], values, restart, step)
    axes.flat[0].set(ylabel="value", xlabel="outer step")
    axes.flat[0].legend(frameon=False, fontsize=8)
    if seen and np.nanmin(values) > 0:
        axes.flat[0].set_yscale("log")
    for ax, name in zip(axes.flat[1:], names, strict=False):
        found = path[name].values
        if found.ndim == 2:
            _lines(ax, found, restart, step)
            ax.set_xlabel("outer step")
        else:
            first, best = found[0, 0].ravel(), found[restart, step].ravel()
            ax.plot(first, "--", color=_FAINT, drawstyle="steps-mid", label="start")
            ax.plot(best, color=COLOURS[0], drawstyle="steps-mid", label="best")
            ax.set_xlabel("index")
            ax.legend(frameon=False, fontsize=8)
        ax.set_ylabel(name)
        if name in logs:
            ax.set_yscale("log")
    for ax in list(axes.flat)[panels:]:
        ax.set_visible(False)
    caption(fig, "Grey: the restarts; blue: the one that found the best point, which is marked.")
    return fig


def _lines(ax: Axes, values: np.ndarray, restart: int, step: int) -> None:
    others = np.delete(values, restart, axis=0)
    for r, line in enumerate(others):
        ax.plot(line, color=_FAINT, lw=0.8, label=None if r else "other restarts")
    ax.plot(values[restart], color=COLOURS[0], lw=1.6, label="best restart")
    ax.plot([step], values[restart, step], "o", color=COLOURS[1], ms=5, label="best point")
