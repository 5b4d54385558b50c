"""The figures of `scaling_laws`, drawn from its saved dataset."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax import scaling
from optjax.experiments.scaling_laws import analysis
from optjax.experiments.scaling_laws.claims import NOTES, PAPER, REFIT, elasticities, growth
from optjax.report.claims import mean_interval
from optjax.report.style import COLOURS, INK, MARKERS, caption, figure

SYMBOLS = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β"}
_PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.0}


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Loss against compute; the best size of a budget; Hoffmann's points and their outliers."""
    found = {"compute": _compute(dataset), "best_size": _best_size(dataset)}
    if dataset.attrs["hoffmann_points"]:
        found |= {"hoffmann": _hoffmann(dataset), "outliers": _outliers(dataset)}
    return found


def _ends(values: np.ndarray) -> np.ndarray:
    """95 % intervals of the means over the last axis, (2, n)."""
    return np.array([mean_interval(row) or [row[0], row[0]] for row in values]).T


def _compute(dataset: xr.Dataset) -> Figure:
    nets = dataset.net.values.tolist()
    fig, axes = figure("wide", 1, len(nets), height=3.9, sharey=True, squeeze=False)
    for ax, net in zip(axes[0], nets, strict=True):
        one = dataset.sel(net=net)
        best = analysis.best_rate(one.loss).transpose("filters", "seed", "step")
        lowest = []
        for i, width in enumerate(best.filters.values):
            flops = float(one.flops[i]) * best.step.values
            kept = np.isfinite(best.values[i]).all(axis=0)
            mean = best.values[i].mean(axis=0)[kept]
            style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "ms": 3.5, "lw": 1.3}
            N = f"NF = {width} (N = {int(one.parameters[i]):,})"
            ax.plot(flops[kept], mean, label=N, markevery=max(1, len(mean) // 12), **style)
            low, high = best.values[i].min(axis=0)[kept], best.values[i].max(axis=0)[kept]
            ax.fill_between(flops[kept], low, high, color=COLOURS[i % 8], alpha=0.15, linewidth=0)
            lowest.append(one.budget_loss.transpose("budget_index", "filters", "seed")[:, i])
        envelope = np.min([part.mean("seed") for part in lowest], axis=0)
        ax.plot(one.budget, envelope, "--", color=INK, lw=2.2, label="least of all NF", zorder=5)
        ax.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)")
        ax.set_title(net, fontsize=10)
        _plain_ticks(ax, "y")
        ax.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("held-out loss (nats a pixel)")
    return caption(
        fig,
        "The held-out loss that training compute buys at each width. Adam on "
        f"{dataset.attrs['data']}, smoothed (a parabola of each run's log loss in log steps), at "
        "each record the better of the rates tried; "
        f"lines: mean over {dataset.sizes['seed']} seeds, bands: from "
        "lowest to highest. Dashed: the least over the widths, at budgets that all of them reach.",
    )


def _plain_ticks(ax: Axes, axis: str) -> None:
    """Numbers as 1, 1.2, 1.5 and not as powers, on a logarithmic axis of less than a decade."""
    low, high = getattr(ax, f"get_{axis}lim")()
    ticks = [t for t in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 2.5, 3) if low <= t <= high]
    side = getattr(ax, f"{axis}axis")
    side.set_ticks(ticks, [f"{t:g}" for t in ticks])
    side.set_ticks([], minor=True)


def _best_size(dataset: xr.Dataset) -> Figure:
    nets = dataset.net.values.tolist()
    fig, axes = figure("wide", 1, len(nets) + 1, height=3.9, squeeze=False)
    axes = axes[0]
    for i, (ax, net) in enumerate(zip(axes, nets, strict=False)):
        one = dataset.sel(net=net)
        best = np.log(one.best_N.transpose("budget_index", "seed").values)
        x, mean, ends = one.budget.values, np.exp(best.mean(axis=1)), np.exp(_ends(best))
        sizes = one.parameters.values
        shown = np.clip(ends, sizes[0], sizes[-1])
        ax.errorbar(x, mean, yerr=np.abs(shown - mean), fmt="o", color=COLOURS[0], capsize=3,
                    ms=4.5, label="best N, measured, 95 %")  # fmt: skip
        told = one.foretold_N.transpose("budget_index", "seed").values
        fitted = np.isfinite(told).all(axis=0)
        if fitted.any():
            middle = np.exp(np.log(told[:, fitted]).mean(axis=1))
            ax.plot(x, middle, color=COLOURS[1], lw=1.8, label="law of the smaller budgets")
        centre = np.exp(np.log(mean).mean()), np.exp(np.log(x).mean())
        for power, dashes, label in (
            (0.73, "--", "Kaplan: C$^{0.73}$"), (0.5, ":", "Hoffmann: C$^{0.5}$")
        ):  # fmt: skip
            line = centre[0] * (x / centre[1]) ** power
            ax.plot(x, line, dashes, color="#555555", label=label)
        own = growth(dataset, net)
        ends_of = mean_interval(own)
        said = "" if ends_of is None else f" [{ends_of[0]:.2f}, {ends_of[1]:.2f}]"
        ax.set_title(f"{net}: power {own.mean():.2f}{said}", fontsize=10)
        ax.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)",
               ylim=(sizes[0] / 1.5, sizes[-1] * 4))  # fmt: skip
        ticks = [t for e in range(6, 30) for t in (10.0**e, 3 * 10.0**e) if x[0] <= t <= x[-1]]
        ax.set_xticks(ticks, [f"{t:.0e}".replace("e+", "e") for t in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks(sizes, [f"{n:,}" for n in sizes])
        ax.set_yticks([], minor=True)
        if i == 0:
            ax.set_ylabel("best model size N (parameters)")
            ax.legend(frameon=False, fontsize=7.5, loc="upper left")
    _effects(axes[-1], dataset)
    return caption(
        fig,
        "The size of network that is best for each compute budget, and what more compute buys if "
        "spent on one resource alone. "
        "Left: the parameters of least held-out loss, with 95 % intervals "
        "over seeds (cut at the widths tried), the power fitted to them, and what the law "
        "L(N, D) fitted to the smaller half of the budgets gives; grey: the published slopes. "
        "Right: −d log L/d log C by each resource, of "
        f"{nets[0]} at NF = {dataset.attrs['middle']}, B = {dataset.attrs['batch']}, "
        f"S = {dataset.attrs['middle_steps']}.",
    )


def _effects(ax: Axes, dataset: xr.Dataset) -> None:
    effect = elasticities(dataset)
    mean, ends = effect.mean(axis=1), _ends(effect)
    for i in range(3):
        ax.errorbar([i], mean[i], yerr=np.abs(ends[:, i : i + 1] - mean[i]), color=COLOURS[i],
                    fmt=MARKERS[i], ms=7, capsize=5, lw=1.8)  # fmt: skip
        ax.plot(i + np.linspace(-0.12, 0.12, effect.shape[1]), effect[i], ".", color="#777777")
    ax.axhline(0, color="#777777", lw=1)
    ax.set_xticks(range(3), ["size N", "batch B", "steps S"])
    ax.set(xlim=(-0.5, 2.5), ylabel="−d log loss / d log C")
    ax.set_title("effect of more compute", fontsize=10)


def _hoffmann(dataset: xr.Dataset) -> Figure:
    fig, axes = figure("wide", 1, 2, height=3.9, width_ratios=(1.25, 1))
    value = dataset.hoffmann.sel(of="value")
    law = scaling.Hoffmann(*(float(value.sel(field=name)) for name in SYMBOLS))
    N, D, loss = (dataset[f"points_{name}"].values for name in ("N", "D", "loss"))
    ax = axes[0]
    seen = ax.scatter(6 * N * D, N, c=loss, s=13, cmap="cividis", linewidth=0)
    fig.colorbar(seen, ax=ax, label="loss (nats a token)")
    most = 3 * (6 * N * D).max()
    n = np.geomspace(N.min() / 1.3, N.max() * 1.3, 200)
    for level in (2.2, 2.5, 3.0, 3.5):
        left = level - law.E - law.A * n**-law.alpha
        needed = 6 * n * (law.B / np.where(left > 0, left, np.nan)) ** (1 / law.beta)
        needed = np.where(needed < most, needed, np.nan)
        ax.plot(needed, n, color="#777777", lw=0.9)
        if np.isfinite(needed).any():
            first = int(np.nanargmin(needed))
            ax.annotate(f"{level:g}", (needed[first], n[first]), fontsize=8.5, color=INK,
                        ha="center", va="center", bbox=_PLATE, zorder=6)  # fmt: skip
    C = np.geomspace((6 * N * D).min(), (6 * N * D).max(), 50)
    best = np.asarray(scaling.allocate_hoffmann(law, C).N)
    a = float(value.sel(field="a"))
    ax.plot(C, best, color=COLOURS[1], lw=2, label=f"best N ∝ C$^{{{a:.2f}}}$ by our fit")
    ax.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)",
           ylabel="model size N (parameters)")  # fmt: skip
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    _parameters(axes[1], dataset)
    return caption(
        fig,
        "Hoffmann's law fitted again to the runs of their figure, beside the published refit and "
        "the paper's rounded figures. Left: the runs, the fitted curves of equal loss (grey) and "
        "the best size of each budget. Right: each parameter over our value, with the 95 % "
        f"interval of {dataset.attrs['resamples']:,} bootstrap resamples.",
    )


def _parameters(ax: Axes, dataset: xr.Dataset) -> None:
    shown: list[Any] = []
    for i, name in enumerate(SYMBOLS):
        value, low, high, _ = dataset.hoffmann.sel(field=name).values
        ends = [[1 - low / value], [high / value - 1]]
        shown = [ax.errorbar([1], [-i], xerr=ends, fmt="o", color=COLOURS[0], capsize=4, lw=1.8)]
        shown += ax.plot(REFIT[name] / value, -i + 0.18, MARKERS[2], color=COLOURS[2], ms=6)
        shown += ax.plot(PAPER[name] / value, -i - 0.18, MARKERS[1], color=COLOURS[1], ms=6)
    values = dataset.hoffmann.sel(of="value")
    named = [f"{text} = {float(values.sel(field=name)):.4g}" for name, text in SYMBOLS.items()]
    ax.set_yticks([-i for i in range(5)], named)
    ax.set(xscale="log", xlabel="parameter / our value", xlim=(0.15, 4), ylim=(-5.5, 0.6))
    ticks = (0.2, 0.5, 1, 2, 3)
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xticks([], minor=True)
    ax.legend(shown, ["our fit, 95 %", "Besiroglu et al.", "paper, as printed"],
              frameon=False, fontsize=8, loc="lower center", ncols=3, columnspacing=0.8,
              handletextpad=0.3)  # fmt: skip


def _outliers(dataset: xr.Dataset) -> Figure:
    fig, ax = figure("single")
    k, laws = dataset.left_out.values, dataset.outlier_law
    for i, name in enumerate(("beta", "alpha")):
        ax.plot(k, laws.sel(field=name), color=COLOURS[i], marker=MARKERS[i], ms=5,
                label=SYMBOLS[name])  # fmt: skip
        _, low, high, _ = dataset.hoffmann.sel(field=name).values
        ax.fill_between(k, low, high, color=COLOURS[i], alpha=0.12, linewidth=0)
        ax.axhline(NOTES[name], color=COLOURS[i], lw=0.8, ls=":")
    ax.set(xlabel="highest losses left out (runs)", ylabel="exponent")
    ax.set_xticks(k[::2])
    ax.legend(frameon=False, fontsize=9)
    return caption(
        fig,
        "The exponents of Hoffmann's law, fitted without the highest of all losses. Bands: our "
        "95 % intervals with five left out, as in the published refit; dotted: our notes' values.",
    )
