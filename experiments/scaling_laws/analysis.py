"""What the trainings of `scaling_laws` say: the best width of a budget, gains and elasticities."""

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from optjax import scaling
from optjax.support.errors import UserError

Floats = NDArray[np.floating[Any]]


def smoothed(losses: xr.DataArray, axis: str) -> xr.DataArray:
    """Each run's loss along its steps as a parabola of log loss in log steps, by least squares.

    At a constant rate the held-out loss jumps from record to record by more than a width changes
    it; three numbers of a whole run do not. The first record, of a network whose running averages
    are not yet its own, is left out of the fit; a run of fewer than four others stays as it is.

    >>> curve = xr.DataArray([9.0, 4.0, 2.0, 1.0, 0.5], [("step", [1, 2, 4, 8, 16])])
    >>> smoothed(curve, "step").values[1:].round(6).tolist()
    [4.0, 2.0, 1.0, 0.5]
    """
    log_steps = np.log(losses[axis].values.astype(float))

    def one(run: Floats) -> Floats:
        known = np.isfinite(run)
        fit = known & (np.arange(len(run)) > 0)
        if fit.sum() < 4:
            return run
        bends = np.polyfit(log_steps[fit], np.log(run[fit]), 2)
        return np.where(known, np.exp(np.polyval(bends, log_steps)), np.nan)

    place = losses.get_axis_num(axis)
    return losses.copy(data=np.apply_along_axis(one, place, losses.values))


def best_rate(losses: xr.DataArray) -> xr.DataArray:
    """Of each setting and record the smoothed losses at the rate of least mean over the seeds.

    Args:
      losses: (..., learning_rate, seed, step).

    Returns:
      (..., seed, step); NaN where every rate has a seed without a loss.
    """
    losses = smoothed(losses, next(str(d) for d in losses.dims if str(d).endswith("step")))
    mean = losses.mean("seed", skipna=False)
    none = mean.isnull().all("learning_rate")
    chosen = mean.fillna(np.inf).argmin("learning_rate")
    return losses.isel(learning_rate=chosen).where(~none).drop_vars("learning_rate")


class Frontier(NamedTuple):
    """What each budget buys."""

    budgets: Floats  # (budgets,) FLOPs
    loss: Floats  # (budgets, widths, seeds) interpolated between the records
    best: Floats  # (budgets, seeds) parameters of least loss
    at_end: Floats  # (budgets, seeds) 1 where the least or the greatest width was best


def frontier(curves: Floats, steps: Floats, N: Floats, cost: Floats, count: int) -> Frontier:
    """The best N of each budget that every width reaches within its run.

    The vertex of the parabola through the three widths about the least loss, in log N and log
    loss; the end itself where that is least.

    Args:
      curves: (widths, seeds, steps) loss, NaN beyond a width's steps. steps: (steps,) of records.
      N: (widths,) parameters. cost: (widths,) FLOPs a step. count: budgets.

    Source: Hoffmann et al. 2022 (arXiv:2203.15556), approach 2.
    """
    there = np.asarray(np.isfinite(curves).all(axis=1))
    last = np.array([steps[row].max() for row in there])
    # The first records are of networks whose running averages are not yet theirs.
    budgets = np.geomspace(steps[1] * cost.max(), (last * cost).min(), count)
    loss = np.empty((count, *curves.shape[:2]))
    for i, row in enumerate(there):
        for s in range(curves.shape[1]):
            x, y = np.log(steps[row] * cost[i]), np.log(curves[i, s, row])
            loss[:, i, s] = np.exp(np.interp(np.log(budgets), x, y))
    found = np.array([[vertex(N, loss[k, :, s]) for s in range(loss.shape[2])]
                      for k in range(count)])  # fmt: skip
    return Frontier(budgets, loss, found[..., 0], found[..., 1])


def vertex(N: Floats, loss: Floats) -> tuple[float, bool]:
    """The N of least loss, and whether it is an end of those tried.

    >>> N = np.array([1.0, 2.0, 4.0, 8.0])
    >>> found, end = vertex(N, np.exp(np.log(N / 3) ** 2))
    >>> round(found, 6), end
    (3.0, False)
    """
    i = int(np.argmin(loss))
    if i in (0, len(N) - 1):
        return float(N[i]), True
    x, y = np.log(N[i - 1 : i + 2] / N[i]), np.log(loss[i - 1 : i + 2])
    bend, slope, _ = np.polyfit(x, y, 2)
    shift = -slope / (2 * bend) if bend > 0 else 0.0
    return float(N[i] * np.exp(np.clip(shift, x[0], x[-1]))), False


def exponents(budgets: Floats, best: Floats) -> Floats:
    """The power of the budget by which each seed's best N grows, (seeds,)."""
    return np.polyfit(np.log(budgets), np.log(best), 1)[0]


def last_gains(curves: Floats, steps: Floats) -> Floats:
    """Log of the loss before each width's last doubling of steps over that after, (widths, seeds).

    >>> curve = 2.0 * np.array([[[8.0, 4.0, 3.0, 2.0]]]) ** 1
    >>> round(float(np.exp(last_gains(curve, np.array([1.0, 2.0, 3.0, 4.0]))[0, 0])), 6)
    2.0
    """
    gains = np.empty(curves.shape[:2])
    for i, row in enumerate(np.asarray(np.isfinite(curves).all(axis=1))):
        at = steps[row]
        for s in range(curves.shape[1]):
            y = np.log(curves[i, s, row])
            gains[i, s] = np.interp(np.log(at[-1] / 2), np.log(at), y) - y[-1]
    return gains


def elasticities(
    own: tuple[Floats, Floats],
    wider: tuple[Floats, Floats],
    batches: tuple[Floats, Floats],
    ratio: tuple[float, float],
    at: int,
) -> Floats:
    """−d log L/d log C by the width, the batch and the steps, each alone, (3, seeds).

    Central differences about one setting: from half to twice the steps, which costs a factor 4,
    from the next smaller width to the next larger and from a smaller batch to a larger.

    Args:
      own: (steps,) of records and (seeds, steps) loss of the setting itself.
      wider: the same, (2, seeds, steps), of the next smaller and larger width.
      batches: the same of a smaller and a larger batch.
      ratio: of the costs of the two widths and of the two batches. at: the steps S.
    """

    def after(steps: Floats, curves: Floats, S: float) -> Floats:
        one = [np.interp(np.log(S), np.log(steps), np.log(row)) for row in curves]
        return np.array(one)

    def between(pair: tuple[Floats, Floats], cost: float) -> Floats:
        steps, curves = pair
        return (after(steps, curves[0], at) - after(steps, curves[1], at)) / np.log(cost)

    by_steps = (after(*own, at / 2) - after(*own, 2 * at)) / np.log(4)
    return np.stack([between(wider, ratio[0]), between(batches, ratio[1]), by_steps])


def law_points(curves: Floats, steps: Floats, N: Floats, cost: Floats, batch: int) -> scaling.Runs:
    """A run each of a width and a record after the first, D the examples seen, C = our FLOPs.

    Args:
      curves: (widths, steps) loss. cost: (widths,) FLOPs a step.
    """
    i, j = np.nonzero(np.isfinite(curves) & (np.arange(len(steps)) > 0))
    return scaling.runs(curves[i, j], N[i], batch * steps[j], steps[j], cost[i] * steps[j])


def fitted(points: scaling.Runs, law: str) -> scaling.Fit | None:
    """The fit; None where the points cannot tell the law's parameters apart."""
    try:
        found = scaling.fit(points, law)
    except UserError:
        return None
    return found if found.converged else None


def foretold(law: Any, budgets: Floats, N: Floats, cost: Floats, batch: int) -> Floats:
    """The best N of each budget by a law L(N, D), among those between the widths tried.

    The FLOPs a step are a parabola of log N through those of the widths.
    """
    tried = np.geomspace(N.min(), N.max(), 400)
    power = min(2, len(N) - 1)
    price = np.exp(np.polyval(np.polyfit(np.log(N), np.log(cost), power), np.log(tried)))
    D = batch * budgets[:, None] / price
    return tried[np.argmin(law.A * tried**-law.alpha + law.B * D**-law.beta, axis=1)]
