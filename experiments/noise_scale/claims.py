"""The verdicts of `noise_scale`, computed from its saved dataset."""

from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from optjax.experiments.noise_scale.families import TRUTH
from optjax.report.claims import Claim, verdict, with_interval
from optjax.report.rendering import number

FACTOR = 3.0
"""Prediction and measurement agree within this factor; fixed before anything was measured."""
COVERAGE = (0.93, 0.97)
"""The share of 95 % intervals that hold the truth."""
FAMILIES = {
    "quadratic": "noisy quadratic (exact)",
    "squares": "least squares",
    "net": "ConvTransposeNet",
}
LABELS = {
    "simple": "B_simple = tr Σ/|G|², mean along the run",
    "curved": "B_noise = tr HΣ/GᵀHG, mean along the run",
}


def known(values: xr.DataArray) -> np.ndarray:
    """A critical batch of 0 or ∞ is none."""
    return np.isfinite(values.values) & (values.values > 0)


def _ranks(x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
    """Spearman's rank correlation of four or more, with the interval of Bonett and Wright (2000).

    tanh(artanh r ± 1.96 √((1 + r²/2)/(n − 3)))

    The low end of a perfect order is that of one with a neighbouring pair exchanged.
    """
    found: Any = stats.spearmanr(x, y)
    r, n = float(found.statistic), len(x)
    nearly = 1 - 12 / (n * (n**2 - 1))
    at = np.clip(r, -nearly, nearly)
    half = 1.96 * np.sqrt((1 + at**2 / 2) / (n - 3))
    low, high = np.tanh(np.arctanh(at) + np.array([-half, half]))
    return r, [float(min(low, r)), float(max(high, r))]


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
    """D log y/d log x by least squares, and Student's interval."""
    fit: Any = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    return float(fit.slope), [float(fit.slope - half), float(fit.slope + half)]


def _predicts(dataset: xr.Dataset) -> Claim:
    measured: dict[str, Any] = {}
    interval: dict[str, Any] = {}
    for scale, label in (*LABELS.items(), ("averaged", "mean tr Σ/mean |G|² along the run")):
        for family in ("all", *FAMILIES):
            own = known(dataset[scale]) & known(dataset.critical)
            if family != "all":
                own &= dataset.family.values == family
            x, y = dataset[scale].values[own], dataset.critical.values[own]
            if len(x) < 2:
                continue
            title = f"{label}, {FAMILIES.get(family, 'all problems')}"
            measured[f"{title}: predicted/measured, least, geometric mean, most"] = [
                float(f) for f in ((x / y).min(), stats.gmean(x / y), (x / y).max())
            ]
            if len(x) < 4:
                continue
            for what, of in (("rank correlation", _ranks), ("log-log slope", _slope)):
                measured[f"{title}: {what}"], interval[f"{title}: {what}"] = of(x, y)
    for name in ("critical", "simple"):
        measured[f"{name}, by problem"] = dict(
            zip(dataset.point.values.tolist(), dataset[name].values.tolist(), strict=True)
        )
        ends = dataset[f"{name}_interval"].values.tolist()
        interval[f"{name}, by problem"] = dict(
            zip(dataset.point.values.tolist(), ends, strict=True)
        )
    both = known(dataset.simple) & known(dataset.critical)
    factor = dataset.simple.values[both] / dataset.critical.values[both]
    close = both.all() and bool(np.all(np.abs(np.log(factor)) <= np.log(FACTOR)))
    name = f"{LABELS['simple']}, all problems: rank correlation"
    order = interval.get(name)
    ranked = order is not None and order[0] > 0
    short = "not known on any problem"
    if factor.size:
        least, most = (number(float(f), 2) for f in (factor.min(), factor.max()))
        short = f"{least} to {most} times it"
    if order is not None:
        short += f"; rank correlation {with_interval(measured[name], order, 2)}"
    return Claim(
        id="noise-scale/predicts-critical-batch",
        statement="The gradient noise scale along one run, averaged over its steps, is the "
        "critical batch size of steps to a target.",
        source="beyond the source; McCandlish et al. 2018, section 2.2",
        measured=measured,
        tolerance=f"every problem's B_simple within a factor of {FACTOR:g} of its B_crit, and the "
        "95 % interval of the rank correlation over all problems above 0; corrected where the "
        "latter alone",
        n_runs=int(dataset.attrs["runs"]),
        interval=interval,
        verdict=verdict(close and ranked, reasoning=ranked),
        evidence="noise_scale/critical",
        plain_words="The noise scale along one run is the critical batch size",
        source_short="beyond the source",
        measured_short=short,
    )


def claims(dataset: xr.Dataset) -> list[Claim]:
    """noise-scale/predicts-critical-batch, /ratio-of-means and /interval-coverage."""
    truth, repeats = TRUTH["trace"] / TRUTH["square"], int(dataset.attrs["repeats"])
    most = dataset.isel(pairs=-1)
    means, ratios = (most[name].values for name in ("of_means", "of_ratios"))
    enough = dataset.held.values[dataset.pairs.values >= 32]
    held = [*enough.tolist(), float(dataset.squares_held)]
    pairs = f"{int(most.pairs)} pairs"
    return [
        _predicts(dataset),
        Claim(
            id="noise-scale/ratio-of-means",
            statement="The ratio of the means of |G|² and tr Σ over pairs of batches converges to "
            "the noise scale; the mean of the pairs' ratios does not.",
            source={"truth": 49.5, "ratio of means": 49.6, "mean of ratios": 68.2},
            measured={
                "truth": truth,
                f"ratio of means, median over experiments of {pairs}": float(means[1]),
                f"mean of ratios, median over experiments of {pairs}": float(ratios[1]),
            },
            tolerance=f"at {pairs}: the median of the ratio of means within 2 % of the truth, that "
            "of the mean of ratios at least 10 % above it",
            n_runs=repeats,
            interval={
                "ratio of means": means[[0, 2]].tolist(),
                "mean of ratios": ratios[[0, 2]].tolist(),
            },
            verdict=verdict(abs(means[1] / truth - 1) < 0.02 and ratios[1] > 1.1 * truth),
            evidence="noise_scale/estimators",
            plain_words="The ratio of means finds the noise scale, the mean of ratios not",
            source_short="49.6 and 68.2; truth 49.5",
            measured_short=f"{with_interval(means[1], means[[0, 2]])} and "
            f"{with_interval(ratios[1], ratios[[0, 2]])}, truth {number(truth)}",
        ),
        Claim(
            id="noise-scale/interval-coverage",
            statement="95 % intervals of the noise scale from 32 or more pairs hold the truth as "
            "often as they say.",
            source="beyond the source",
            measured={
                "Gaussian gradients, by pairs": dict(
                    zip(map(str, dataset.pairs.values), dataset.held.values.tolist(), strict=True)
                ),
                "least squares, 64 pairs": held[-1],
            },
            tolerance=f"{COVERAGE[0]:.0%} to {COVERAGE[1]:.0%} for 32 pairs and more",
            n_runs=repeats * len(held),
            interval=None,
            verdict=verdict(all(COVERAGE[0] <= share <= COVERAGE[1] for share in held)),
            evidence="noise_scale/estimators",
            plain_words="95 % intervals of the noise scale hold the truth as often",
            measured_short=f"{100 * min(held):.1f} to {100 * max(held):.1f} % of them",
        ),
    ]
