"""The critical batch size of a sweep: tuned steps against batch size, the law, the regimes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from optjax.batch_size.ratio import share
from optjax.batch_size.regimes import Regime, fitted_slope, local_slope, regime
from optjax.batch_size.steps_law import (
    CriticalBatch,
    data_parallel,
    fit_critical_batch,
    goodness,
    law,
)
from optjax.batch_size.steps_to_target import StepsToTarget, steps_to_target
from optjax.batch_size.tuned_rates import Statistic, TunedRates, intervals, tuned_rates
from optjax.support.errors import UserError, whole
from optjax.support.types import Better

if TYPE_CHECKING:
    import xarray as xr


def critical_batch_size(
    sweep: "xr.Dataset | StepsToTarget",
    target: float | None = None,
    *,
    metric: str = "loss",
    better: Better = "low",
    interpolate: bool = True,
    window: int = 1,
    statistic: Statistic = "median",
    may_fail: float = 0.2,
    noise_below: float = -0.75,
    curvature_above: float = -0.25,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> "xr.Dataset":
    """Fit the critical batch size of a sweep: tuned rates, the law, regimes, speed-up.

    S = S_min(1 + B_crit/B), fitted to the steps at each batch size's tuned rate, weighted by
    1/(σ² + mean σ²), since the variances σ² over few seeds are uncertain themselves.

    Args:
      sweep: a Dataset of `sweep` over ``batch_size`` and ``learning_rate``; or a `steps_table`.
      target: value that the metric is to reach; for a Dataset.
      metric: as in `steps_to_target`, for a Dataset; likewise `better`, `interpolate`, `window`.
      better: whether the metric is to be ``"low"`` or ``"high"``.
      interpolate: whether to interpolate between records.
      window: records in the metric's moving mean.
      statistic: of the steps over seeds, as in `tuned_rates`.
      may_fail: share of a rate's runs that may fail, as in `tuned_rates`.
      noise_below: slope below which noise limits the steps, as in `regime`.
      curvature_above: slope above which curvature limits the steps, as in `regime`.
      resamples: bootstrap resamples.
      level: confidence of the intervals.
      seed: of the resamples.

    Returns:
      A Dataset over ``batch_size``, whose ``…_interval`` have an axis ``bound`` (low, high):
      ``steps_to_target`` and ``censored`` (…, learning_rate, seed); ``rate``, ``steps``,
      ``examples`` at the tuned rate, with intervals; ``share`` of the runs that reach the target
      there; ``rate_end``, ``optimism`` of `tuned_rates`; ``S_min``, ``E_min``, ``B_crit``, with
      intervals; ``resolved``, whether B_crit lies within the batch sizes; ``steps_fitted``,
      ``residual``, ``r2``, ``worst_factor`` and ``worst_batch_size`` of the fit; ``p_value`` of so
      large a lack of fit by the seeds' scatter alone; ``slope`` with interval and ``slope_fitted``;
      ``regime`` by the slope, ``regime_sure`` where the interval lies wholly within,
      ``regime_fitted``; ``speedup`` and ``efficiency`` against the smallest batch that reaches the
      target. The attribute ``notes`` lists the doubts, one a line.

    Raises:
      UserError: fewer than two seeds, fewer than three batch sizes that reach the target, or an
        argument that the functions named above refuse.

    >>> import numpy as np
    >>> from optjax.batch_size.steps_to_target import steps_table
    >>> sizes, luck = np.array([1, 4, 16, 64, 256]), np.exp([-0.1, 0.0, 0.1, 0.02])
    >>> steps = (100 * (1 + 16 / sizes))[:, None, None] * luck
    >>> found = critical_batch_size(steps_table(sizes, [0.1], steps))
    >>> round(float(found.B_crit), 3), found.regime.values.tolist()
    (16.0, [0, 0, 1, 2, 2])

    Source: McCandlish et al. 2018 (arXiv:1812.06162), equation 2.11.
    """
    import xarray as xr

    regime(0.0, noise_below, curvature_above)
    share("level", level)
    whole("resamples", resamples, 1)
    if isinstance(sweep, StepsToTarget):
        table = sweep
    elif target is None:
        raise UserError("target is None: expected the value that the metric is to reach")
    else:
        table = steps_to_target(
            sweep, target, metric, better, interpolate=interpolate, window=window
        )
    tuned = tuned_rates(
        table, statistic=statistic, may_fail=may_fail, resamples=resamples, seed=seed
    )
    used = _used(tuned)
    dataset = xr.Dataset(
        _measured(table, tuned, level) | _fitted(tuned, used, level) | _sloped(tuned, used, level),
        {"batch_size": table.sizes, "learning_rate": table.rates, "bound": ["low", "high"]},
    )
    _classify(dataset, noise_below, curvature_above)
    dataset.attrs.update(
        statistic=statistic, may_fail=may_fail, resamples=resamples, level=level,
        noise_below=noise_below, curvature_above=curvature_above,
    )  # fmt: skip
    if not isinstance(sweep, StepsToTarget):
        dataset.attrs.update(target=float(target or 0), metric=metric, better=better)
    dataset.attrs["notes"] = "\n".join(_notes(dataset))
    return dataset


def _used(tuned: TunedRates) -> np.ndarray:
    """Return which batch sizes reach the target, (B,) bool; require at least three."""
    if len(tuned.sizes) < 3:
        raise UserError(f"the sweep has {len(tuned.sizes)} batch sizes: expected at least 3")
    used = np.isfinite(tuned.steps)
    if used.sum() < 3:
        raise UserError(
            f"only {used.sum()} batch sizes have a rate at which enough runs reach the target (not "
            f"{_listed(tuned.sizes[~used])}): expected at least 3; run more steps, or choose an "
            "easier target"
        )
    return used


def _measured(table: StepsToTarget, tuned: TunedRates, level: float) -> dict[str, Any]:
    """Return the variables that are measured at each batch size."""
    runs = ("batch_size", "learning_rate", "seed")
    b, used = tuned.sizes, np.isfinite(tuned.steps)
    parallel = data_parallel(b, tuned.steps, int(np.argmax(used)))
    found: dict[str, Any] = {
        "steps_to_target": (runs, table.steps),
        "censored": (runs, table.censored),
        "share": ("batch_size", tuned.share),
        "rate_end": ("batch_size", tuned.end),
        "optimism": ("batch_size", tuned.optimism),
        "speedup": ("batch_size", np.where(used, parallel.speedup, np.nan)),
        "efficiency": ("batch_size", np.where(used, parallel.efficiency, np.nan)),
    }
    for name, value, rows in (
        ("rate", tuned.rate, tuned.rate_resampled),
        ("steps", tuned.steps, tuned.steps_resampled),
        ("examples", b * tuned.steps, b * tuned.steps_resampled),
    ):
        found[name] = ("batch_size", value)
        flattery = 0.0 if name == "rate" else _flattery(tuned)
        ends = intervals(value, rows, tuned.seeds, level, flattery=flattery)
        found[f"{name}_interval"] = (("batch_size", "bound"), ends)
    return found


def _flattery(tuned: TunedRates) -> np.ndarray:
    """Return how far picking a rate made the log steps too small, (B,); 0 where unknown."""
    return np.log(np.where(np.isnan(tuned.optimism), 1, tuned.optimism))


def _fitted(tuned: TunedRates, used: np.ndarray, level: float) -> dict[str, Any]:
    """Fit the law; return its variables, their intervals and a test of the fit."""
    b, steps, rows = tuned.sizes[used], tuned.steps[used], tuned.steps_resampled[:, used]
    logs = np.log(np.where(np.isfinite(rows), rows, np.nan))
    variance = np.array([np.nanvar(v) if np.isfinite(v).any() else np.nan for v in logs.T])
    total = variance + np.nanmean(variance)
    # Without scatter, or where no resample has steps, a size gets the others' mean weight.
    weights = 1 / np.where(total > 0, total, 1)
    weights[~(total > 0)] = weights[total > 0].mean() if np.any(total > 0) else 1
    fit = fit_critical_batch(b, steps, weights)
    refits = fit_critical_batch(b, rows, weights)
    # Common to the sizes, it affects S_min and E_min, and not their ratio.
    each = _flattery(tuned)[used]
    flattery = float(each[np.isfinite(each)].mean()) if np.isfinite(each).any() else 0.0
    found: dict[str, Any] = {}
    for name, value, values in zip(fit._fields, fit, refits, strict=True):
        found[name] = ((), float(value))
        ends = intervals(
            np.asarray(value), values, tuned.seeds, level,
            flattery=0.0 if name == "B_crit" else flattery,
        )  # fmt: skip
        found[f"{name}_interval"] = (("bound",), ends)
    good = goodness(b, steps, fit)
    whole_line = np.full(len(used), np.nan)
    whole_line[used] = good.residual
    return found | {
        "resolved": ((), bool(b[0] <= fit.B_crit <= b[-1])),
        "steps_fitted": ("batch_size", law(tuned.sizes, fit)),
        "residual": ("batch_size", whole_line),
        "r2": ((), good.r2),
        "worst_factor": ((), good.worst),
        "worst_batch_size": ((), good.worst_size),
        "p_value": ((), _lack_of_fit(good.residual, logs, b, refits, weights, tuned.seeds)),
        "slope_fitted": ("batch_size", fitted_slope(tuned.sizes, fit.B_crit)),
    }


def _lack_of_fit(
    residual: np.ndarray, logs: np.ndarray, b: np.ndarray, refits: CriticalBatch,
    weights: np.ndarray, seeds: int,
) -> float:  # fmt: skip
    """Return the share of resamples whose residuals move by at least the measured ones."""
    off = (logs - np.log(law(b, refits)) - residual) * np.sqrt(seeds / (seeds - 1))
    by_chance = np.sum(weights * off**2, -1)
    by_chance = by_chance[np.isfinite(by_chance)]
    # At least, to rounding: without scatter and lack of fit there is nothing to explain.
    least = np.sum(weights * residual**2) * (1 - 1e-9) - 1e-18 * weights.sum()
    return float((1 + np.sum(by_chance >= least)) / (1 + len(by_chance)))


def _sloped(tuned: TunedRates, used: np.ndarray, level: float) -> dict[str, Any]:
    """Return the local slopes at the batch sizes that reach the target."""
    slope, ends = np.full(len(used), np.nan), np.full((len(used), 2), np.nan)
    b = tuned.sizes[used]
    slope[used] = local_slope(b, tuned.steps[used])
    rows = local_slope(b, tuned.steps_resampled[:, used])
    ends[used] = intervals(slope[used], rows, tuned.seeds, level, log=False)
    return {"slope": ("batch_size", slope), "slope_interval": (("batch_size", "bound"), ends)}


def _classify(dataset: "xr.Dataset", noise_below: float, curvature_above: float) -> None:
    """Add the regimes by the slopes to the dataset."""
    slopes = [dataset["slope"].values, *dataset["slope_interval"].values.T]
    named, low, high = (regime(slope, noise_below, curvature_above) for slope in slopes)
    sure = (named == low) & (named == high) & (named != Regime.UNKNOWN)
    fitted = regime(dataset["slope_fitted"].values, noise_below, curvature_above)
    dataset["regime"] = ("batch_size", named)
    dataset["regime_sure"] = ("batch_size", sure)
    dataset["regime_fitted"] = ("batch_size", fitted)
    for name in ("regime", "regime_fitted"):
        dataset[name].attrs.update(
            flag_values=[int(r) for r in Regime],
            flag_meanings=" ".join(r.name.lower() for r in Regime),
        )


def _notes(found: "xr.Dataset") -> list[str]:
    """List the doubts about a result, one a line."""
    b, lines = found["batch_size"].values, []
    lost = ~np.isfinite(found["steps"].values)
    if lost.any():
        lines.append(
            f"batch {_listed(b[lost])}: too few runs reach the target at any rate; left out of the "
            "fit"
        )
    for side, word in ((-1, "lowest"), (1, "highest")):
        ends = found["rate_end"].values == side
        if ends.any() and found.sizes["learning_rate"] > 1:
            lines.append(
                f"batch {_listed(b[ends])}: the best rate is the grid's {word}: the rate grid is "
                "too small, and fewer steps may be possible"
            )
    if found.sizes["learning_rate"] < 3:
        lines.append(f"{found.sizes['learning_rate']} rates: too few to tune the rate")
    low, high = found["B_crit_interval"].values
    kept, B_crit = b[~lost], float(found["B_crit"])
    if not bool(found["resolved"]):
        above = B_crit > kept[-1]
        lines.append(
            f"B_crit = {B_crit:.3g} is {'above the largest' if above else 'below the smallest'} "
            f"batch measured, {kept[-1 if above else 0]:g}: extrapolated; measure "
            f"{'larger' if above else 'smaller'} batches"
        )
    elif low < kept[0] or high > kept[-1]:
        lines.append(
            f"the interval of B_crit, {low:.3g} to {high:.3g}, reaches beyond the batches measured"
        )
    p, worst = float(found["p_value"]), float(found["worst_factor"])
    if p < 1 - found.attrs["level"] and worst > 1.001:
        lines.append(
            f"the law does not hold within the seeds' scatter (p = {p:.2g}): the steps are off by "
            f"up to a factor {worst:.3g}, at batch {float(found['worst_batch_size']):g}"
        )
    return lines


def _listed(sizes: Iterable[float]) -> str:
    return ", ".join(f"{size:g}" for size in sizes)
