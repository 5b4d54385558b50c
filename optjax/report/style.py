"""The look of every figure: one size grid, one colour-blind-safe palette, no global state."""

from pathlib import Path
from typing import Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # green
    "#CC79A7",  # pink
    "#E69F00",  # orange
    "#56B4E9",  # sky
    "#000000",  # black
    "#F0E442",  # yellow: last, since it is faint on white
)
"""The palette of Okabe and Ito (2008), told apart by readers with any common colour vision."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One marker for each colour, so that a figure also reads in black and white."""

INK = "#222222"
WIDTHS = {"single": 4.6, "wide": 9.2}
_SAVE: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "optjax"}


def figure(
    width: Literal["single", "wide"] = "single",
    rows: int = 1,
    cols: int = 1,
    *,
    height: float | None = None,
    **subplots: Any,
) -> tuple[Figure, Any]:
    """Create a figure in the house style, and its axes.

    Args:
        width: "single" (4.6 inches) or "wide" (9.2 inches).
        rows: rows of axes.
        cols: columns of axes.
        height: inches; by default each axes is three quarters as high as it is wide.
        subplots: passed on to `matplotlib.figure.Figure.subplots` (sharex, width_ratios, ...).

    Returns:
        The figure, and one Axes for 1 × 1, else an array of them, as `Figure.subplots` shapes it.

    >>> fig, ax = figure()
    >>> lines = ax.plot([1, 2], [3, 4], label="loss")
    >>> fig, axes = figure("wide", 1, 2)
    >>> axes.shape
    (2,)
    """
    inches = WIDTHS[width]
    each = inches / cols
    fig = Figure(
        figsize=(inches, height or rows * max(min(0.72 * each, 3.4), 2.2)), layout="constrained"
    )
    axes = fig.subplots(rows, cols, **subplots)
    for ax in fig.axes:
        _dress(ax)
    return fig, axes


def caption(fig: Figure, text: str) -> Figure:
    """Give a figure the sentence that the report prints below it.

    >>> caption(figure()[0], "Loss against steps.").caption
    'Loss against steps.'
    """
    fig.caption = text  # pyright: ignore[reportAttributeAccessIssue]
    return fig


def band(ax: Axes, x: Any, low: Any, high: Any, *, colour: str | None = None, **fill: Any) -> Any:
    """Shade from `low` to `high` over `x`, in the colour of the line drawn last.

    >>> fig, ax = figure()
    >>> line, = ax.plot([0, 1], [1, 2])
    >>> shade = band(ax, [0, 1], [0.5, 1.5], [1.5, 2.5])
    """
    if colour is None:
        lines = ax.get_lines()
        colour = str(lines[-1].get_color()) if lines else COLOURS[0]
    return ax.fill_between(x, low, high, color=colour, **{"alpha": 0.2, "linewidth": 0, **fill})


def pictures(ax: Axes) -> Axes:
    """Strip an axes of ticks, grid and frame, for showing a picture.

    >>> fig, ax = figure()
    >>> bool(pictures(ax).get_xticks().size)
    False
    """
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def has_pictures(fig: Figure) -> bool:
    """Tell whether any axes of the figure shows a raster picture.

    >>> fig, ax = figure()
    >>> image = ax.imshow([[0, 1]])
    >>> has_pictures(fig)
    True
    """
    return any(ax.images for ax in fig.axes)


def save(fig: Figure, path: Path) -> list[Path]:
    """Write `path`.svg, and `path`.png beside it for a figure with pictures.

    The same figure gives the same bytes: no date, no random element ids.
    """
    for ax in fig.axes:
        for title in (ax.title, ax._left_title, ax._right_title):  # pyright: ignore[reportAttributeAccessIssue]
            title.set_fontsize(10)
    written = [path.with_name(path.name + ".svg")]
    with matplotlib.rc_context(_SAVE):
        fig.savefig(written[0], format="svg", dpi=200, metadata={"Date": None, "Creator": None})
        if has_pictures(fig):
            written.append(path.with_name(path.name + ".png"))
            fig.savefig(written[1], format="png", dpi=200)
    return written


def _dress(ax: Axes) -> None:
    ax.set_prop_cycle(cycler(color=COLOURS))
    ax.set_axisbelow(True)
    ax.grid(True, color="#d9d9d9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#777777")
    ax.tick_params(which="both", colors=INK, labelsize=8.5, color="#777777")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_fontsize(9.5)
        label.set_color(INK)
