"""The claims of `weight_decay`."""

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from optjax.report.claims import Claim, verdict, with_interval
from optjax.report.rendering import number


def degrees(cosine: xr.DataArray) -> np.ndarray:
    """Degrees, (spread, problem)."""
    return np.degrees(np.arccos(np.clip(cosine.transpose("spread", "problem").values, -1, 1)))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(x.ravel()), rankdata(y.ravel()))[0, 1])


def claims(dataset: xr.Dataset) -> list[Claim]:
    """weight-decay/equivalence and weight-decay/adaptive-differs."""
    l2, decoupled = float(dataset.sgd_l2.max()), float(dataset.sgd_decoupled.max())
    by_decay = float(dataset.slope_by_decay.max(skipna=False))
    by_rate = float(dataset.slope_by_rate.max(skipna=False))
    same = Claim(
        id="weight-decay/equivalence",
        statement="The penalty λ̃‖w‖² under gradient descent is weight decay w ← (1 − λ)w − η∇L "
        "with λ̃ = λ/(2η), step for step.",
        source="λ̃ = λ/(2η)",
        measured={
            "largest relative distance along the path": l2,
            "the same for optax's decoupled decay, λ = η·wd": decoupled,
            "largest distance if λ̃ = λ were taken": float(dataset.sgd_naive.max()),
            "hypergradients: largest relative difference of dL/dλ and (1/2η) dL/dλ̃": by_decay,
            "hypergradients: dL/dη|λ and dL/dη|λ̃ + dL/dλ̃ dλ̃/dη, of the largest term": by_rate,
            "hypergradients: the chain term, of dL/dη, largest": float(
                dataset.slope_chain_term.max()
            ),
        },
        tolerance="paths 1e-12 relative at every step; hypergradients 1e-10 relative, through the "
        "whole run by forward mode, with all examples and with mini-batches (float64)",
        n_runs=int(np.prod(dataset.sgd_l2.shape[:3])) + dataset.slope_by_decay.size,
        interval=None,
        verdict=verdict(l2 < 1e-12 and decoupled < 1e-12 and by_decay < 1e-10 and by_rate < 1e-10),
        evidence="weight_decay/gradient-descent",
        plain_words="An L2 penalty λ̃ is weight decay λ under gradient descent",
        measured_short=f"paths agree to {number(l2)}, hypergradients to "
        f"{number(max(by_decay, by_rate))}",
    )
    measured, interval, grows, least, shorts = {}, {}, [], np.inf, []
    picks = np.random.default_rng(0).integers(0, dataset.sizes["problem"],
                                              (2000, dataset.sizes["problem"]))  # fmt: skip
    for name in dataset.optimiser.values.tolist():
        here = dataset.sel(optimiser=name)
        ends = here.distance.isel(adaptive_step=-1).values
        scales = np.broadcast_to(here.spread.values[:, None], ends.shape)
        rho = _spearman(scales, ends)

        def ninety_five(values, scales=scales):
            # Problems are the independent units: each is kept with all its spreads.
            found = [_spearman(scales, values[:, p]) for p in picks]
            return np.quantile(found, (0.025, 0.975)).tolist()

        low, high = ninety_five(ends)
        measured[f"{name}: Spearman correlation of distance and spread of scales"] = rho
        measured[f"{name}: the same with the spread of the coordinates' RMS gradients"] = _spearman(
            here.preconditioner_spread.values, ends
        )
        measured[f"{name}: median distance for each spread of scales"] = {
            f"{s:g}": float(np.median(e)) for s, e in zip(here.spread.values, ends, strict=True)
        }
        interval[f"{name}: Spearman correlation"] = [low, high]
        shorts.append(f"{name} {with_interval(rho, [low, high], 2)}")
        slopes = dataset.sel(rule=name)
        angle, ratio = degrees(slopes.slope_cosine), abs(slopes.slope_ratio).median("problem")
        by_spread = zip(here.spread.values, angle, ratio.values, strict=True)
        measured[f"{name}: median angle of the hypergradients (degrees) and median |(1/2η) "
                 "dL/dλ̃ / dL/dλ| for each spread of scales"] = {
            f"{s:g}": [float(np.median(a)), float(q)] for s, a, q in by_spread
        }  # fmt: skip
        measured[f"{name}: Spearman correlation of that angle and the spread"] = _spearman(
            scales, angle
        )
        interval[f"{name}: Spearman correlation of that angle"] = ninety_five(angle)
        grows.append(low > 0)
        least = min(least, float(ends.min()))
    measured["smallest relative distance of any pair of ends"] = least
    differs = least > 1e-6
    apart = Claim(
        id="weight-decay/adaptive-differs",
        statement="Under RMSProp and Adam the two differ, and the more so the wider the "
        "preconditioner spreads.",
        source="beyond the source",
        measured=measured,
        tolerance="every pair apart by more than 1e-6; the correlation's 95 % interval above 0",
        n_runs=dataset.distance.isel(adaptive_step=-1).size,
        interval=interval,
        verdict=verdict(differs and all(grows), reasoning=differs),
        evidence="weight_decay/adaptive",
        plain_words="Under RMSProp and Adam they differ, the more scales spread",
        measured_short=f"{', '.join(shorts)} (correlation)",
    )
    return [same, apart]
