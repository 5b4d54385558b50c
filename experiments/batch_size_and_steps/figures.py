"""The figures of `batch_size_and_steps`."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.batch_size.regimes import Regime
from optjax.experiments.batch_size_and_steps.claims import (
    OPTIMISERS,
    PRECONDITIONED,
    PROBLEMS,
    faster,
    of,
    regimes,
    series,
)
from optjax.report.style import COLOURS, MARKERS, caption, figure

BANDS = {Regime.NOISE: "#DCE9F5", Regime.TRANSITION: "#F3F3F3", Regime.CURVATURE: "#FBE6D8"}


def _axis(ax: Axes, sizes: np.ndarray) -> None:
    ax.set(xscale="log", yscale="log", xlabel="batch size B (examples)")
    shown = sizes if len(sizes) <= 6 else sizes[:: -(-len(sizes) // 5)]
    ax.set_xticks(shown, [f"{b:,.0f}" if b < 10**5 else f"$2^{{{np.log2(b):.0f}}}$" for b in shown])
    ax.set_xticks([], minor=True)


def _bands(ax: Axes, dataset: xr.Dataset, problem: str) -> None:
    """SGD's regimes behind the curves, each batch size halfway to its neighbours."""
    sizes, named = regimes(dataset, problem)
    x = np.log(sizes)
    edges = np.exp(np.concatenate([[x[0] - 0.3], (x[1:] + x[:-1]) / 2, [x[-1] + 0.3]]))
    for i, kind in enumerate(named):
        ax.axvspan(edges[i], edges[i + 1], color=BANDS[Regime(kind)], lw=0, zorder=0)
    for kind, word in ((Regime.NOISE, "noise"), (Regime.CURVATURE, "curvature")):
        at = np.flatnonzero(named == kind)
        if at.size:
            middle = np.sqrt(edges[at[0]] * edges[at[-1] + 1])
            ax.text(middle, 0.015, word, transform=ax.get_xaxis_transform(), ha="center",
                    va="bottom", fontsize=8, color="#555555")  # fmt: skip


def _steps(ax: Axes, dataset: xr.Dataset, problem: str) -> None:
    _bands(ax, dataset, problem)
    drawn = []
    for i, optimiser in enumerate(OPTIMISERS):
        sizes, steps, ends = series(dataset, problem, optimiser)
        if not sizes.size:
            continue
        label = PRECONDITIONED[problem] if optimiser == "preconditioned" else optimiser
        bars = np.abs(np.clip(ends, steps / 50, steps * 50) - steps)
        ax.errorbar(sizes, steps, yerr=bars, fmt=MARKERS[i], ls="-" if i else "none", lw=1,
                    color=COLOURS[i], capsize=2, ms=4, label=label, zorder=3)  # fmt: skip
        drawn += [*steps]
    S_min, B_crit = (float(dataset[f"{problem}_SGD_{name}"]) for name in ("S_min", "B_crit"))
    sizes, steps, _ = series(dataset, problem, "SGD")
    x = np.geomspace(sizes[0] / 1.3, sizes[-1] * 1.3, 200)
    ax.plot(x, S_min * (1 + B_crit / x), color=COLOURS[0], lw=1.6, label="SGD, the law's fit")
    ax.plot(x, steps[0] * sizes[0] / x, ":", color="#555555", lw=1.2, label="slope −1")
    ax.axvline(B_crit, color="#333333", lw=1, ls="--")
    ends = of(dataset, problem, "SGD", "B_crit_interval")
    if ends is not None and np.isfinite(ends).all():
        ax.axvspan(*ends, color="#333333", alpha=0.15, lw=0)
    ax.text(B_crit * 1.1, 0.98, f"$B_{{crit}}$ = {B_crit:,.0f}", fontsize=8,
            transform=ax.get_xaxis_transform(), va="top")  # fmt: skip
    _axis(ax, dataset[f"{problem}_batch_size"].values)
    ax.set(ylabel="steps to the target", ylim=(min(drawn) / 2, max(drawn) * 2),
           xlim=(x[0], x[-1]))  # fmt: skip
    ax.set_title(PROBLEMS[problem], fontsize=10)
    ax.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 0.06))


def _remedies(ax: Axes, dataset: xr.Dataset, problem: str) -> None:
    _bands(ax, dataset, problem)
    for i, optimiser in enumerate(OPTIMISERS[1:], 1):
        sizes, factor, ends = faster(dataset, problem, optimiser)
        if not sizes.size:
            continue
        label = PRECONDITIONED[problem] if optimiser == "preconditioned" else optimiser
        ax.errorbar(sizes, factor, yerr=np.abs(ends - factor), fmt=f"{MARKERS[i]}-", lw=1.2,
                    color=COLOURS[i], capsize=2, ms=4, label=label, zorder=3)  # fmt: skip
    ax.axhline(1, color=COLOURS[0], lw=1.2, label="SGD")
    all_sizes = dataset[f"{problem}_batch_size"].values
    _axis(ax, all_sizes)
    ax.set(ylabel="times fewer steps than SGD", xlim=(all_sizes[0] / 1.3, all_sizes[-1] * 1.3))
    ax.set_title(PROBLEMS[problem], fontsize=10)
    ax.legend(frameon=False, fontsize=7, loc="upper left")


def _plane(ax: Axes, dataset: xr.Dataset) -> None:
    """Every problem's runs of SGD on the law's one curve."""
    for i, problem in enumerate(PROBLEMS):
        sizes, steps, _ = series(dataset, problem, "SGD")
        S_min, E_min = (float(of(dataset, problem, "SGD", n) or np.nan) for n in ("S_min", "E_min"))
        ax.plot(steps / S_min, sizes * steps / E_min, MARKERS[i], color=COLOURS[i], ms=5,
                label=PROBLEMS[problem])  # fmt: skip
    x = np.geomspace(1.003, 1e4, 400)
    ax.plot(x, 1 + 1 / (x - 1), color="#333333", lw=1, label="(S/S_min − 1)(E/E_min − 1) = 1")
    ax.set(xscale="log", yscale="log", xlabel="steps S / S_min", ylabel="examples E / E_min",
           xlim=(0.8, 1e4), ylim=(0.7, 3e3))  # fmt: skip
    ax.legend(frameon=False, fontsize=8)


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Steps against the batch; what other optimisers save; the law's curve."""
    steps, axes = figure("wide", 1, 3, height=3.9)
    for ax, problem in zip(axes, PROBLEMS, strict=True):
        _steps(ax, dataset, problem)
    caption(steps, "Steps to a target against the batch size, and the law S_min (1 + B_crit/B) "
            "fitted to SGD's. Its slope is −1 while noise dominates (blue) and 0 where curvature "
            "does (orange); the knee is the critical batch size. Each batch size at its tuned "
            "rate; 95 % intervals over seeds.")  # fmt: skip
    remedies, axes = figure("wide", 1, 3, height=3.4)
    for ax, problem in zip(axes, PROBLEMS, strict=True):
        _remedies(ax, dataset, problem)
    caption(remedies, "How many times fewer steps momentum and preconditioning take than SGD at "
            "the same batch size. 95 % intervals over seeds.")  # fmt: skip
    plane, ax = figure("single")
    _plane(ax, dataset)
    caption(plane, "Steps against examples, in units of the least, of SGD at every batch size: a "
            "faster run wastes examples, a thrifty one steps.")  # fmt: skip
    return {"steps": steps, "remedies": remedies, "trade-off": plane}
