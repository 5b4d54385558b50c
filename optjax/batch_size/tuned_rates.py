"""The learning rate of fewest steps to a target at each batch size, and how sure it is.

The steps of a rate are the median over its seeds, with runs that failed (censored or diverged) at
infinity: it is known while fewer than half fail, and no failure makes it smaller. A geometric mean
is more precise where no run fails.

The least of several noisy numbers is less than the least of their true values: a rate picked on
the very seeds that then measure it looks faster than it is (the winner's curse). There are three
remedies. Every bootstrap resample picks its own rates, so that its spread holds the choice's.
`intervals` are widened by the bias of the resamples, which pick once more, and fall below the
estimate as it falls below the truth. And `optimism` measures each seed at the rate that the others
pick, and widens intervals of steps where it says more. The estimate itself is not corrected: where
rates near the best differ little, a few seeds make it some per cent too small at all batch sizes.

Seeds are drawn whole, with the runs of all batch sizes and rates: a seed's start and order of
examples are common to them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from optjax.batch_size.steps_to_target import StepsToTarget
from optjax.support.errors import UserError, whole

Statistic = Literal["median", "mean"]


class TunedRates(NamedTuple):
    """The rate of fewest steps by batch size; where no rate is eligible, NaN, and steps inf."""

    sizes: np.ndarray  # (B,) batch sizes
    rate: np.ndarray  # (B,) of fewest steps
    steps: np.ndarray  # (B,) at that rate
    share: np.ndarray  # (B,) of the runs that reach the target, at the grid's best rate
    end: np.ndarray  # (B,) int, −1 or 1 where the best rate is the grid's first or last, else 0
    optimism: np.ndarray  # (B,) steps at rates that other seeds pick, over those at all seeds' pick
    rate_resampled: np.ndarray  # (N, B)
    steps_resampled: np.ndarray  # (N, B)
    seeds: int  # S


def tuned_rates(
    table: StepsToTarget,
    *,
    statistic: Statistic = "median",
    may_fail: float = 0.2,
    resamples: int = 2000,
    seed: int = 0,
) -> TunedRates:
    """Find the rate of fewest steps at every batch size, and resample it over seeds.

    The rate is the vertex of the parabola through the grid's best rate and its neighbours, in log
    rate and log steps, if both neighbours need at most twice its steps. Beyond, as at the edge of
    divergence, steps are no parabola, and the grid's rate stands. (So the vertex is at most 9 %
    below the least that was measured on an even grid.)

    Args:
      table: steps and censoring, from `steps_to_target` or `steps_table`.
      statistic: over the seeds, ``"median"`` (of two: their geometric mean) or ``"mean"``,
        geometric.
      may_fail: share of an eligible rate's runs that may fail, below ½; 0 for the mean.
      resamples: N, bootstrap resamples; 0 for none.
      seed: of the resamples.

    Raises:
      UserError: fewer than two seeds to resample, an unknown statistic, a share outside [0, ½).

    >>> from optjax.batch_size.steps_to_target import steps_table
    >>> steps = [[[40, 44, 36], [20, 22, 18], [40, 38, 44]], [[9, 9, 9], [5, 5, 5], [3, 3, 4]]]
    >>> found = tuned_rates(steps_table([1, 16], [0.1, 0.2, 0.4], steps))
    >>> found.rate.round(3).tolist(), found.steps.round(1).tolist(), found.end.tolist()
    ([0.2, 0.4], [20.0, 3.0], [0, 1])
    """
    if statistic not in ("median", "mean"):
        raise UserError(f"statistic is {statistic!r}: expected 'median' or 'mean'")
    if not 0 <= may_fail < 0.5:
        raise UserError(f"may_fail is {may_fail}: expected a share of at least 0 and below 0.5")
    seed, S = whole("seed", seed, 0), table.steps.shape[2]
    if whole("resamples", resamples, 0) and S < 2:
        raise UserError(f"the sweep has {S} seed: expected at least 2 for intervals")

    def middle(logs: np.ndarray) -> np.ndarray:
        return _middle(logs, statistic, may_fail)

    logs = np.where(table.censored, np.inf, np.log(table.steps))
    x = np.log(table.rates)
    y = middle(logs)
    i = y.argmin(-1)
    rate, steps = least(x, y)
    end = np.where(i == len(x) - 1, 1, np.where(i == 0, -1, 0)) * np.isfinite(steps)
    share = 1 - np.take_along_axis(table.censored.mean(-1), i[:, None], 1)[:, 0]
    rates_NB, steps_NB = _resampled(logs, x, middle, resamples, np.random.default_rng(seed))
    return TunedRates(
        table.sizes, np.exp(rate), np.exp(steps), share, end.astype(int),
        _optimism(logs, middle), np.exp(rates_NB), np.exp(steps_NB), S,
    )  # fmt: skip


def _middle(logs: np.ndarray, statistic: str, may_fail: float) -> np.ndarray:
    """Return the middle of the last axis' log steps, infinite where too many runs fail."""
    if statistic == "mean":
        return logs.mean(-1)
    S = logs.shape[-1]
    logs = np.sort(logs, axis=-1)
    # Rounding, as in 0.2 · 5, must not make one too few.
    allowed = int(np.floor(may_fail * S + 1e-9))
    middle = (logs[..., (S - 1) // 2] + logs[..., S // 2]) / 2
    return np.where(np.isfinite(logs[..., S - 1 - allowed]), middle, np.inf)


def least(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where y (…, R) on the grid x (R,) is least, and its value there, (…) each.

    It is the vertex of the parabola through three points where `tuned_rates` says so.
    """
    i = y.argmin(-1)
    at, value = x[i], np.take_along_axis(y, i[..., None], -1)[..., 0]
    inner = np.clip(i, 1, max(len(x) - 2, 1))
    if len(x) >= 3:
        ya, yc = (
            np.take_along_axis(y, j[..., None], -1)[..., 0] - np.where(np.isfinite(value), value, 0)
            for j in (inner - 1, inner + 1)
        )
        serves = (i == inner) & (np.maximum(ya, yc) <= np.log(2)) & (np.maximum(ya, yc) > 0)
        ya, yc = np.where(serves, ya, 1), np.where(serves, yc, 1)
        a, c = x[inner - 1] - x[inner], x[inner + 1] - x[inner]
        # y = value + qu + pu² through (a, ya), (0, 0), (c, yc); p > 0 as both are above 0.
        p = (ya / a - yc / c) / (a - c)
        q = ya / a - p * a
        at = at - np.where(serves, q / (2 * p), 0)
        value = value - np.where(serves, q**2 / (4 * p), 0)
    return np.where(np.isfinite(value), at, np.nan), value


_ENTRIES = 4_000_000  # of log steps drawn at once


def _resampled(
    logs: np.ndarray, x: np.ndarray, middle: Callable[[np.ndarray], np.ndarray], resamples: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return log rates and log steps, (N, B) each, of seeds drawn with replacement."""
    B, _, S = logs.shape
    drawn = rng.integers(S, size=(resamples, S))
    found = np.empty((2, resamples, B))
    size = max(1, _ENTRIES // logs.size)
    for start in range(0, resamples, size):
        part = slice(start, start + size)
        y_BRn = middle(logs[:, :, drawn[part]])
        found[:, part] = least(x, y_BRn.transpose(2, 0, 1))
    return found[0], found[1]


def _optimism(logs: np.ndarray, middle: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return steps of seeds at the others' pick of the rate, over those at all seeds' pick."""
    B, _, S = logs.shape
    if S < 2:
        return np.full(B, np.nan)
    others = np.array([[j for j in range(S) if j != k] for k in range(S)])
    y_BRS = middle(logs[:, :, others])
    picked = y_BRS.argmin(1)
    held_out = middle(np.take_along_axis(logs, picked[:, None], 1)[:, 0])
    same = middle(logs).min(-1)
    known = np.isfinite(same)
    return np.where(known, np.exp(held_out - np.where(known, same, 0)), np.nan)


def intervals(
    point: np.ndarray,
    resampled: np.ndarray,
    seeds: int,
    level: float = 0.95,
    *,
    log: bool = True,
    flattery: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Compute intervals (…, 2) of estimates (…) from their bootstrap resamples (N, …).

    exp(log θ ± t σ √(S/(S − 1))), one end further out by the bias

    σ is the standard deviation of the resamples' logarithm, t the quantile of Student's t at S − 1
    degrees of freedom; the root corrects the resamples' variance. The bias is the resamples' mean
    less the estimate; the end opposite the mean moves out by it. Percentiles of a few seeds'
    resamples are far too narrow: none is below the least seed. But where more than a tail's share
    of the resamples is infinite, 0, or NaN, that end is infinite (or 0), and the other is a
    percentile, as far out as t is.

    Args:
      point: (…) estimates.
      resampled: (N, …).
      seeds: S, at least 2.
      level: 0.95 for 95 %.
      log: whether the quantity is positive, and the interval on a logarithmic scale.
      flattery: (…) how far the estimates are known to be too small, in the logarithm: log of
        `optimism`. The bias is at least as large.

    Source: Hesterberg 2015 (arXiv:1411.5279): t intervals with bootstrap standard errors, and
    percentiles widened in the same way.
    """
    tail = (1 - level) / 2
    t = stats.t.ppf(1 - tail, seeds - 1) * np.sqrt(seeds / (seeds - 1))
    with np.errstate(divide="ignore"):
        rows, y = (np.log(v) if log else np.asarray(v, float) for v in (resampled, point))
    known = np.isfinite(rows)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, rows, 0).sum(0) / count
    off = np.where(known, rows, 0) - mean
    bias = np.where(np.isfinite(y), mean - np.where(np.isfinite(y), y, 0), 0)
    bias = np.where(np.asarray(flattery) > 0, np.minimum(bias, -np.asarray(flattery)), bias)
    half = t * np.sqrt(np.where(known, off**2, 0).sum(0) / count)
    no_low = np.mean(np.isnan(rows) | (rows == -np.inf), axis=0) > tail
    no_high = np.mean(np.isnan(rows) | (rows == np.inf), axis=0) > tail
    last = len(rows) - 1
    k = int(stats.norm.cdf(-t) * last)
    below = np.sort(np.where(np.isnan(rows), -np.inf, rows), axis=0)[k]
    above = np.sort(np.where(np.isnan(rows), np.inf, rows), axis=0)[last - k]
    low = np.where(
        no_low, -np.inf, np.where(no_high | ~np.isfinite(y), below, y - half - np.maximum(bias, 0))
    )
    high = np.where(
        no_high, np.inf, np.where(no_low | ~np.isfinite(y), above, y + half - np.minimum(bias, 0))
    )
    ends = np.stack([low, high], -1)
    return np.exp(ends) if log else ends
