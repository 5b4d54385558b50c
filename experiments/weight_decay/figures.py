"""The figures of `weight_decay`."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.weight_decay.claims import degrees
from optjax.report.style import COLOURS, MARKERS, band, caption, figure


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """SGD: the paths coincide. RMSProp and Adam: the distance grows with the spread."""
    fig, ax = figure("single", height=3.4)
    x = dataset.sgd_step.values
    over = ("problem", "rate_share", "decay")
    for name, label, colour in (
        ("sgd_naive", "penalty λ̃ = λ (factor left out)", COLOURS[1]),
        ("sgd_l2", "penalty λ̃ = λ/(2η)", COLOURS[0]),
        ("sgd_decoupled", "optax's decoupled, wd = λ/η", COLOURS[2]),
    ):
        runs = np.maximum(dataset[name], 1e-17)
        style = "--" if name == "sgd_decoupled" else "-"  # it lies on the line before it
        ax.plot(x, runs.median(over), style, color=colour, label=label)
        band(ax, x, runs.min(over), runs.max(over), colour=colour)
    ax.set_yscale("log")
    ax.set(
        xlabel="step", ylabel="relative distance to the path of\nweight decay λ", ylim=(1e-17, 9)
    )
    ax.legend(frameon=False, fontsize=8, loc="center right")
    caption(fig, "Under gradient descent the paths of the penalty λ/(2η) and of weight decay λ "
            "coincide to rounding. Lines: medians over problems, rates and λ; bands: "
            "all.")  # fmt: skip

    wide, axes = figure("wide", 1, 2, sharey=True)
    for ax, name in zip(axes, dataset.optimiser.values.tolist(), strict=True):
        here = dataset.sel(optimiser=name)
        for i, s in enumerate(dataset.spread.values):
            one = here.sel(spread=s)
            ax.plot(one.preconditioner_spread, one.distance.isel(adaptive_step=-1), ".",
                    color=COLOURS[i], ms=6, label=f"{s:g}")  # fmt: skip
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="spread of the RMS gradients, max / min over coordinates",
        )
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("relative distance of the ends,\npenalty against decay")
    axes[1].legend(frameon=False, fontsize=8, title="spread of scales", title_fontsize=8)
    caption(wide, "How far apart penalty and decay end under adaptive optimisers, against the "
            "spread of the gradients' scales. A dot a problem.")  # fmt: skip
    return {"gradient-descent": fig, "adaptive": wide, "hypergradients": _slopes_figure(dataset)}


def _slopes_figure(dataset: xr.Dataset) -> Figure:
    fig, (left, right) = figure("wide", 1, 2, height=3.6)
    words = {
        "slope_chain_term": "the chain term left out",
        "slope_by_decay": "dL/dλ = (1/2η) dL/dλ̃",
        "slope_by_rate": "dL/dη|λ = dL/dη|λ̃ + dL/dλ̃ dλ̃/dη",
    }
    over = ("batch", "problem", "slope_rate")
    for i, (name, label) in enumerate(words.items()):
        error = np.maximum(dataset[name], 1e-17)
        middle = error.median(over)
        ends = [middle - error.min(over), error.max(over) - middle]
        left.errorbar(dataset.slope_decay * 1.15 ** (i - 1), middle, ends, fmt=MARKERS[i], ms=5,
                      color=COLOURS[i], capsize=3, label=label)  # fmt: skip
    left.axhline(np.finfo(float).eps, color="#222222", lw=1, ls="--")
    left.set(xscale="log", yscale="log", xlabel="weight decay λ (a step)", ylim=(1e-17, 1e2),
             ylabel="relative error of the identity")  # fmt: skip
    left.set_title("SGD", fontsize=10)
    right.set_title("all examples in every step", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="center")
    for i, name in enumerate(dataset.rule.values.tolist()):
        angle = degrees(dataset.slope_cosine.sel(rule=name))
        at = dataset.spread.values * 1.06 ** (i - 1)
        low, middle, high = np.quantile(angle, (0.25, 0.5, 0.75), axis=1)
        right.errorbar(at, middle, [middle - low, high - middle], fmt="-" + MARKERS[i], ms=5,
                       color=COLOURS[i], capsize=3, label=name)  # fmt: skip
    right.set(xscale="log", ylim=(-3, 93), xlabel="spread of the features' scales, max / min",
              ylabel="angle of dL/dλ and (1/2η) dL/dλ̃ (degrees)")  # fmt: skip
    right.set_yticks([0, 30, 60, 90])
    right.legend(frameon=False, fontsize=8, loc="upper left")
    return caption(fig, "Through a whole run, hypergradients by λ and by λ̃ = λ/(2η) obey the chain "
                   "rule under SGD and point apart under RMSProp and Adam. Left: errors of the "
                   "chain rule with all examples and with mini-batches; bars: all problems and "
                   "rates; dashed: machine epsilon. Right: by a λ for each parameter; bars: "
                   "quartiles over problems.")  # fmt: skip
