"""Figures of a study: its scores, its curves, and what a few of its recipes make of pictures."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.report.claims import mean_interval
from optjax.report.style import COLOURS, MARKERS, band, caption, figure, pictures

GREY = {"color": "#555555", "linestyle": "--", "linewidth": 1.2}


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    found = {"scores": _scores(dataset)}
    if "missed" in dataset:
        found["probe"] = _probe(dataset)
    return found | {
        "curves": _curves(dataset),
        "pictures": _pictures(dataset),
        "calibration": _calibration(dataset),
        "trade": _trade(dataset),
        "confusion": _confusion(dataset),
    }


def _best(dataset: xr.Dataset) -> str:
    return str(dataset["loss"].mean("seed").idxmin("recipe").values)


def _few(dataset: xr.Dataset, most: int = 4) -> list[str]:
    """The recipes to look at closely: all where they are few, else the first and the best."""
    names = dataset["recipe"].values.tolist()
    return names if len(names) <= most else list(dict.fromkeys([names[0], _best(dataset)]))


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4}


def _where(dataset: xr.Dataset) -> str:
    pictures = "demo pictures" if dataset.attrs["demo"] else dataset.attrs["data"]
    return f"{pictures}, {dataset.sizes['seed']} seeds"


def _scores(dataset: xr.Dataset) -> Figure:
    names = dataset["recipe"].values.tolist()
    fig, axes = figure("wide", 1, 2, sharey=True, height=1.3 + 0.3 * len(names))
    columns = (
        ("accuracy", 100, "validation accuracy (% of pixels)"),
        ("loss", 1, "validation loss (nats a pixel)"),
    )
    for ax, (name, factor, label) in zip(axes, columns, strict=True):
        _listed(ax, factor * dataset[name].values)
        ax.axvline(factor * float(dataset[f"baseline_{name}"]), **GREY)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), names)
    return caption(
        fig,
        f"Recipes after {dataset.attrs['steps']} steps on {_where(dataset)}: each seed, the mean "
        "and its 95 % interval, by population statistics. Dashed: each pixel takes what training "
        "pictures have at its own grey level.",
    )


def _listed(ax: Axes, values: np.ndarray) -> None:
    """Draw each seed, the mean and its interval, a line for each recipe; values (recipe, seed)."""
    ax.set_ylim(len(values) - 0.4, -0.6)  # the first on top
    for i, row in enumerate(values):
        ax.plot(row, np.full(len(row), i), ".", color=COLOURS[5], markersize=5)
        half = row.mean() - (mean_interval(row) or [np.nan])[0]
        ax.errorbar(row.mean(), i, xerr=half, fmt="o", color=COLOURS[0], capsize=4, markersize=5)


def _probe(dataset: xr.Dataset) -> Figure:
    names = dataset["recipe"].values.tolist()
    fig, ax = figure("wide", height=1.3 + 0.3 * len(names))
    _listed(ax, 100 * dataset["missed"].values)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(left=0)
    ax.set_xlabel("share of the grey picture not found (%)")
    return caption(
        fig,
        "Of the variance of the grey picture, what a linear probe does not find in the last "
        "features, before the input joins them: each seed, the mean and its 95 % interval. What a "
        "skip connection brings back of the detail that the way down has lost, is not missed.",
    )


def _curves(dataset: xr.Dataset) -> Figure:
    fig, ax = figure("wide", height=3.6)
    names = dataset["recipe"].values
    spread = np.linspace(0, len(names) - 1, min(len(names), len(COLOURS) - 1)).round().astype(int)
    for i, name in enumerate(dict.fromkeys([*names[spread].tolist(), _best(dataset)])):
        one = dataset.sel(recipe=name)
        step, loss = one["curve_step"].values, one["curve"].values
        ax.plot(step, loss.mean(0), label=name, **_style(i))
        band(ax, step, loss.min(0), loss.max(0))
    ax.axhline(float(dataset["baseline_loss"]), label="table of grey levels", **GREY)
    ax.set(xlabel="step", ylabel="validation loss (nats a pixel)")
    late = dataset["curve"].isel(record=slice(2, None))
    ends = [float(dataset["baseline_loss"]), float(dataset["curve"].min()), float(late.max())]
    if np.isfinite(ends).all():
        ax.set_ylim(min(ends) - 0.05, max(ends) + 0.1)
    ax.legend(fontsize=8)
    return caption(
        fig,
        f"Validation along training on {_where(dataset)}, with running averages: the mean, and a "
        "band from the lowest seed to the highest. Of many recipes some, the best among them.",
    )


def _pictures(dataset: xr.Dataset) -> Figure:
    true, best = dataset["true"].values / 255, _best(dataset)
    ours = dataset.sel(recipe=best)
    entropy = ours["entropy"].values / np.log(dataset.sizes["colour"])
    wrong = np.where(ours["right"].values[..., None], 0.92, [0.84, 0.37, 0.0])
    rows: list[tuple[str, np.ndarray]] = [
        ("grey input", np.repeat(true.mean(-1, keepdims=True), 3, axis=-1)),
        ("true colours", true),
        *((name, dataset["found"].sel(recipe=name).values / 255) for name in _few(dataset)),
        (f"{best}:\nwrong colours", wrong),
        (f"{best}:\nunsure", entropy),
    ]
    fig, axes = figure("wide", len(rows), dataset.sizes["picture"], height=1.1 * len(rows))
    for (label, row), line in zip(rows, np.atleast_2d(axes), strict=True):
        for ax, each in zip(line, row, strict=True):
            pictures(ax).imshow(each, interpolation="nearest", cmap="cividis", vmin=0, vmax=1)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    return caption(
        fig,
        f"Validation pictures of {_where(dataset)}; the first seed's colours, annealed at T = 0.38 "
        "and moved to each pixel's own grey level. Then the pixels whose most probable colour is "
        "not the label (orange), and the entropy of the colours (yellow: all as probable).",
    )


def _calibration(dataset: xr.Dataset) -> Figure:
    fig, ax = figure("single", height=4.2)
    ax.plot([0, 1], [0, 1], **GREY)
    for i, name in enumerate(_few(dataset)):
        one = dataset.sel(recipe=name)
        sure, right = one["reliability"].mean("seed").sel(kind=["confidence", "accuracy"]).values
        error = 100 * float(one["calibration_error"].mean())
        ax.plot(sure, right, label=f"{name} (ECE {error:.1f} %)", **_style(i))
    ax.set(xlabel="probability of the best colour", ylabel="share of pixels where it is right")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(fontsize=8)
    return caption(
        fig,
        f"Reliability on {_where(dataset)}, in 15 equal ranges of the probability. Below the "
        "diagonal a network is too sure. ECE: expected calibration error.",
    )


def _trade(dataset: xr.Dataset) -> Figure:
    fig, ax = figure("single", height=3.8)
    for i, name in enumerate(_few(dataset)):
        one = dataset.sel(recipe=name).mean("seed")
        x, y = one["colourfulness"].values, one["psnr"].values
        ax.plot(x, y, label=name, **_style(i))
        for at, temperature in enumerate(dataset["temperature"].values):
            ax.annotate(
                f"{temperature:g}", (x[at], y[at]), (0, 5), textcoords="offset points",
                fontsize=7, color=COLOURS[i], ha="center",
            )  # fmt: skip
    true = float(dataset["true_colourfulness"])
    ax.axvline(true, label="the true pictures", **GREY)
    ax.set(xlabel="colourfulness (Hasler and Süsstrunk)", ylabel="PSNR (dB)")
    ax.margins(y=0.12)
    ax.legend(fontsize=8)
    return caption(
        fig,
        f"What the temperature T of the annealed mean trades on {_where(dataset)}: high T is near "
        "the mean and pale, low T takes the likeliest colour. The numbers are T.",
    )


def _confusion(dataset: xr.Dataset) -> Figure:
    best = _best(dataset)
    palette, share = dataset["palette"].values, dataset["share"].values
    order = np.argsort(palette.mean(-1))
    table = dataset["confusion"].sel(recipe=best).mean("seed").values[np.ix_(order, order)]
    fig, ax = figure("single", height=4.6)
    count = len(order)
    image = pictures(ax).imshow(100 * table, cmap="cividis", vmin=0, vmax=100)
    strip = np.clip(palette[order], 0, 1)
    ax.imshow(strip[:, None], extent=(-2.2, -0.7, count - 0.5, -0.5), aspect="auto")
    ax.imshow(strip[None], extent=(-0.5, count - 0.5, count + 1.2, count - 0.3), aspect="auto")
    ax.set(xlim=(-2.3, count - 0.4), ylim=(count + 1.3, -0.6), aspect="equal")
    ax.set(xlabel="colour given", ylabel="true colour")
    fig.colorbar(image, ax=ax, shrink=0.7, label="share of the true colour's pixels (%)")
    right = 100 * np.diag(table)
    rarest = order[np.nanargmin(right)]
    return caption(
        fig,
        f"Which colour {best} gives to each, dark to light, on {_where(dataset)}. A bright "
        f"diagonal is right; the colour found least ({np.nanmin(right):.0f} %) has "
        f"{100 * share[rarest]:.1f} % of the pixels.",
    )
