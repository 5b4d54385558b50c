"""The sensitivity of a fitted law to outliers and single runs; its prediction of larger runs."""

from typing import Any, NamedTuple

import jax
import numpy as np

from optjax.scaling.bootstrap import bootstrap, predictions
from optjax.scaling.fit import DELTA, Fit, check, drop_highest, fit, logs, prepared
from optjax.scaling.forms import Form, form_of
from optjax.scaling.minimise import Minima, Progress, minimise
from optjax.scaling.table import Runs
from optjax.support.console import silent
from optjax.support.errors import UserError, whole
from optjax.support.keys import make_key
from optjax.support.types import Key

_STARTS = 16  # of each fit without outliers


class Sensitivity(NamedTuple):
    """A law fitted again without some of the runs."""

    left_out: np.ndarray  # (fits,) how many (`outliers`) or which run (`leave_one_out`)
    law: Any  # each field (fits,)
    objective: np.ndarray  # (fits,) over the runs that stayed
    converged: np.ndarray  # (fits,) bool


class Extrapolation(NamedTuple):
    """Larger runs predicted from smaller ones."""

    fit: Fit  # to the smaller runs
    held_out: Runs  # the larger ones
    predicted: np.ndarray  # (m,) loss
    low: np.ndarray  # (m,) 2.5 % quantile of a new run's loss, by refits and residuals
    high: np.ndarray  # (m,) 97.5 % quantile
    covered: float  # share of the held-out losses between low and high
    error: float  # root mean square of log measured − log predicted
    bias: float  # mean of the same: above 0 where runs were worse than predicted


def _refits(
    form: Form, z: Any, y: Any, weights: Any, starts: Any, delta: float, progress: Progress
) -> Minima:
    """Refit the law with weights (fits, n) of the runs."""
    return minimise(
        *(form, z, y, lambda first, count: weights[first : first + count], starts),
        delta=delta, progress=progress, text="refits",
    )  # fmt: skip


def outliers(
    points: Runs, law: str = "hoffmann", most: int = 10, *, delta: float = DELTA,
    progress: Progress = silent,
) -> Sensitivity:  # fmt: skip
    """Fit a law without the k highest losses, k = 0, …, most.

    Args:
      points: the runs, with outliers.
      law: as for `fit`.
      most: the largest k.
      delta: as for `fit`.
      progress: as for `fit`.

    Returns:
      The fits, each the best from 16 starts and from where the others ended.

    Raises:
      UserError: too few runs would stay.

    >>> from optjax.scaling.table import runs
    >>> N = np.geomspace(1e6, 1e9, 8)
    >>> loss = 5 * N**-0.1
    >>> loss[-1] *= 3
    >>> outliers(runs(loss, N), "power-n", 1).law.exponent.round(3).tolist()
    [0.1, 0.1]
    """
    most = whole("most", most, 0)
    form = form_of(law)
    check(form, drop_highest(points, most))
    means, z, y, starts = prepared(form, points, delta, _STARTS)
    order = np.argsort(points.loss, kind="stable")
    weights = np.ones((most + 1, len(order)))
    for k in range(1, most + 1):
        weights[k, order[-k:]] = 0

    def best(starts: np.ndarray) -> Minima:
        """Return the least minimum for each k; runs of weight 0 count as dropped."""
        tiled = np.tile(starts, (most + 1, 1))
        ends = _refits(form, z, y, np.repeat(weights, len(starts), axis=0), tiled, delta, progress)
        values = np.where(np.isfinite(ends.objective), ends.objective, np.inf)
        i = np.argmin(values.reshape(most + 1, -1), axis=1) + np.arange(most + 1) * len(starts)
        return Minima(*(x[i] for x in ends))

    # The starts are ranked on all runs; the ends of one k are starts for the others.
    ends = best(starts)
    ends = best(ends.theta)
    made = form.to_law(ends.theta, means)
    return Sensitivity(np.arange(most + 1), made, ends.objective, ends.converged)


def leave_one_out(found: Fit, *, progress: Progress = silent) -> Sensitivity:
    """Fit a law without each run in turn.

    Args:
      found: the fit to all runs, where each refit starts.
      progress: as for `fit`.

    Returns:
      The fits, one per run. How far a field moves from the fit's is the influence of that run.

    >>> from optjax.scaling.table import runs
    >>> N = np.geomspace(1e6, 1e9, 8)
    >>> without = leave_one_out(fit(runs(5 * N**-0.1, N), "power-n"))
    >>> bool(np.ptp(without.law.exponent) < 1e-9)
    True
    """
    n = len(found.runs.loss)
    starts = np.broadcast_to(found.theta, (n, len(found.theta)))
    z = logs(found.form, found.runs) - found.means[:, None]
    ends = _refits(
        *(found.form, z, np.log(found.runs.loss), 1 - np.eye(n), starts, found.delta, progress)
    )
    made = found.form.to_law(ends.theta, found.means)
    return Sensitivity(np.arange(n), made, ends.objective, ends.converged)


def extrapolate(
    points: Runs,
    law: str = "hoffmann",
    *,
    share: float = 0.7,
    by: str | None = None,
    resamples: int = 1000,
    key: Key | None = None,
    delta: float = DELTA,
    progress: Progress = silent,
) -> Extrapolation:
    """Fit the smaller runs, predict the larger ones, and measure the error.

    The interval of a held-out run is that of L(θ*) exp(r*): θ* a bootstrap refit of the smaller
    runs, r* one of their log residuals drawn at random. So it holds both how uncertain the law is
    and how far single runs lie from the law. It cannot hold a law that bends further out, or runs
    that scatter more there: on the published runs some 60 % of the largest lie within.

    Args:
      points: the runs.
      law: as for `fit`.
      share: the part of the runs, the smallest by `by`, that is fitted.
      by: "C", "N", "D" or "S"; by default C where it is known, else the law's last size.
      resamples: of the bootstrap.
      key: of the bootstrap; jax.random.key(0) if None.
      delta: as for `fit`.
      progress: as for `fit`.

    Returns:
      The predictions, and the share of the measured losses within their 95 % intervals.

    Raises:
      UserError: a share out of (0, 1), too few runs on either side, a size that is not known.

    >>> from optjax.scaling.table import runs
    >>> N = np.geomspace(1e6, 1e9, 12)
    >>> noisy = runs(5 * N**-0.1 * np.exp(0.01 * np.cos(9 * N)), N)
    >>> found = extrapolate(noisy, "power-n", resamples=50)
    >>> len(found.predicted), found.error < 0.02
    (4, True)
    """
    form = form_of(law)
    if not 0 < share < 1:
        raise UserError(f"share is {share!r}: expected a number between 0 and 1")
    if by is None:
        by = "C" if points.C is not None else form.sizes[-1]
    if by not in ("C", "N", "D", "S") or getattr(points, by) is None:
        raise UserError(f"by is {by!r}: expected one of C, N, D, S that the runs have")
    order = np.argsort(getattr(points, by), kind="stable")
    cut = round(share * len(order))
    if cut >= len(order):
        raise UserError(f"share is {share!r}: no run of {len(order)} is left to predict")
    small, large = points.take(np.sort(order[:cut])), points.take(np.sort(order[cut:]))
    check(form, small)
    found = fit(small, law, delta=delta, progress=progress)
    key = make_key(0) if key is None else key
    refits = bootstrap(found, resamples, key, progress=progress)
    sizes = [getattr(large, size) for size in form.sizes]
    with jax.enable_x64(True):
        predicted = np.asarray(form.loss(found.law, *sizes))
    many = predictions(refits, *sizes)
    drawn = jax.random.randint(jax.random.fold_in(key, resamples), many.shape, 0, len(small.loss))
    spread = many * np.exp(found.residuals[np.asarray(drawn)])
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    off = np.log(large.loss) - np.log(predicted)
    covered = float(np.mean((large.loss >= low) & (large.loss <= high)))
    error, bias = float(np.sqrt(np.mean(off**2))), float(np.mean(off))
    return Extrapolation(found, large, predicted, low, high, covered, error, bias)
