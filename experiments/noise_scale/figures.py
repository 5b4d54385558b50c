"""The figures of `noise_scale`, drawn from its saved dataset."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.experiments.noise_scale.claims import COVERAGE, FACTOR, FAMILIES, LABELS, known
from optjax.experiments.noise_scale.families import TRUTH
from optjax.report.style import COLOURS, MARKERS, band, caption, figure


def _both(ax: Axes, dataset: xr.Dataset, scale: str) -> None:
    """Measured against predicted, and the band of agreement."""
    shown = dataset.isel(point=known(dataset[scale]) & known(dataset.critical))
    x, y = shown[scale].values, shown.critical.values
    ends = np.array([0.6 * min(x.min(), y.min()), 1.7 * max(x.max(), y.max())])
    ax.plot(ends, ends, "-", color="#777777", lw=1, label="equal")
    band(ax, ends, ends / FACTOR, ends * FACTOR, colour="#777777", alpha=0.15,
         label=f"within a factor of {FACTOR:g}")  # fmt: skip
    for i, (family, title) in enumerate(FAMILIES.items()):
        own = shown.isel(point=shown.family.values == family)
        if not own.sizes["point"]:
            continue
        at, value = own[scale].values, own.critical.values
        off = [
            np.abs(_clipped(own[f"{name}_interval"].values, *ends).T - middle)
            for name, middle in ((scale, at), ("critical", value))
        ]
        ax.errorbar(
            at, value, xerr=off[0], yerr=off[1], fmt=MARKERS[i], color=COLOURS[i], ms=5, lw=1,
            capsize=2, label=title,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ax.set(xlabel=f"{LABELS[scale]}\n(examples)", ylabel="critical batch measured (examples)")
    ax.legend(frameon=False, fontsize=7.5, loc="upper left")


def _clipped(ends: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intervals that are unbounded end at the frame."""
    return np.clip(np.nan_to_num(ends, nan=low, posinf=high), low, high)


def _along(axes: np.ndarray, dataset: xr.Dataset) -> None:
    at, exact = dataset.squares_step.values, dataset.squares_exact.values
    frame = 0.3 * exact.min(), 5 * exact.max()
    low, high = _clipped(dataset.squares_pairs_interval.values, *frame).T
    value = _clipped(dataset.squares_pairs.values, *frame)
    bars = np.maximum([value - low, high - value], 0)
    ax = axes[0]
    ax.errorbar(at, value, yerr=bars, fmt="o", color=COLOURS[1], ms=4, lw=1, capsize=2,
                label="from 64 pairs of batches, 95 %")  # fmt: skip
    ax.plot(at, exact, "-", color=COLOURS[0], label="of all examples, exact")
    axes[1].plot(dataset.net_step, dataset.net_scale, "-o", color=COLOURS[0], ms=4,
                 label="middle of the runs, 95 %")  # fmt: skip
    band(axes[1], dataset.net_step, *dataset.net_scale_interval.values.T)
    for ax, family in zip(axes, ("squares", "net"), strict=True):
        name = dataset.attrs[f"{family}_shown"]
        critical = float(dataset.critical.sel(point=name))
        ax.axhline(critical, color="#777777", ls="--", label="critical batch measured")
        ax.set(yscale="log", xlabel="step", ylabel="B_simple (examples)")
        ax.set_title(f"{FAMILIES[family]}, {name}", fontsize=10)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylim(0.1 * min(frame[0], float(dataset.critical.sel(
        point=dataset.attrs["squares_shown"]))), frame[1])  # fmt: skip


def _estimators(axes: np.ndarray, dataset: xr.Dataset) -> None:
    ax, truth = axes[0], TRUTH["trace"] / TRUTH["square"]
    for i, (name, label) in enumerate(
        {"of_ratios": "mean of ratios", "of_means": "ratio of means"}.items()
    ):
        low, middle, high = dataset[name].transpose("level", "pairs").values
        ax.plot(dataset.pairs, middle, marker=MARKERS[i], color=COLOURS[1 - i], label=label)
        band(ax, dataset.pairs, low, high)
    ax.axhline(truth, color=COLOURS[6], ls="--", lw=1, label=f"truth, {truth:g}")
    ax.set(xscale="log", yscale="log", xlabel="pairs of batches", ylim=(truth / 3, 6 * truth),
           ylabel="estimate of B_simple (examples)")  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    ax = axes[1]
    ax.axhspan(100 * COVERAGE[0], 100 * COVERAGE[1], color="#777777", alpha=0.15, lw=0,
               label="93 to 97 %")  # fmt: skip
    held, n = dataset.held.values, int(dataset.attrs["repeats"])
    ax.errorbar(dataset.pairs, 100 * held, yerr=196 * np.sqrt(held * (1 - held) / n), fmt="o",
                color=COLOURS[0], ms=4, capsize=2, label="Gaussian gradients")  # fmt: skip
    ax.plot([64], [100 * float(dataset.squares_held)], "D", color=COLOURS[1],
            label="least squares")  # fmt: skip
    ax.set(xscale="log", xlabel="pairs of batches", ylim=(88, 100),
           ylabel="95 % intervals that hold the truth (%)")  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.set_xticks(dataset.pairs.values, [str(n) for n in dataset.pairs.values])
        ax.set_xticks([], minor=True)


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Measured against predicted; the scale along a run; the estimator where truth is known."""
    critical, axes = figure("wide", 1, 2, height=4.2)
    for ax, scale in zip(axes, LABELS, strict=True):
        _both(ax, dataset, scale)
    caption(critical, "The critical batch size of tuned steps to a target, measured, against what "
            "the noise scale along the largest batch's run alone predicts. Bars: 95 % intervals "
            "(the quadratics are exact). The curvature scale is not measured on the "
            "network.")  # fmt: skip
    along, axes = figure("wide", 1, 2, height=3.6)
    _along(axes, dataset)
    caption(along, "The noise scale along a run, beside the critical batch size measured. It grows "
            "as the gradient falls and its noise stays. Bars that leave the frame: |G|² is not "
            "distinguishable from 0.")  # fmt: skip
    estimators, axes = figure("wide", 1, 2, height=3.6)
    _estimators(axes, dataset)
    caption(estimators, "More pairs of batches mend the ratio of means, not the mean of ratios. "
            f"Left: medians and the middle 95 % of {dataset.attrs['repeats']} experiments with "
            "Gaussian gradients, |G|² = 1, tr Σ = 49.5, b = 16, B = 128. Right: how many "
            "intervals of the ratio of means hold the truth.")  # fmt: skip
    return {"critical": critical, "along": along, "estimators": estimators}
