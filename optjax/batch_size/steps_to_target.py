"""Steps to a target over batch sizes, learning rates and seeds, with runs that never reach it.

A run that ends above the target is *censored*: it needs more steps than it did. One that diverged
is censored for ever: no further step would have helped. `optjax.batch_size.tuned_rates` counts both
as infinitely many steps, so that a sweep with too few steps looks worse than it is, never better.

Shapes here and in the modules that read them: B batch sizes, R rates, S seeds, N resamples.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optjax.run.core import Status
from optjax.support.errors import UserError, nearest, sign_of, whole
from optjax.support.types import Better

if TYPE_CHECKING:
    import xarray as xr

AXES = ("batch_size", "learning_rate", "seed")


class StepsToTarget(NamedTuple):
    """The steps at which a sweep's runs reach a target; `steps_table` checks and sorts them."""

    sizes: np.ndarray  # (B,) batch sizes, rising
    rates: np.ndarray  # (R,) learning rates, rising
    steps: np.ndarray  # (B, R, S) steps to the target; if censored, steps done; if diverged, inf
    censored: np.ndarray  # (B, R, S) bool, the target was not reached


def steps_table(
    sizes: ArrayLike, rates: ArrayLike, steps: ArrayLike, censored: ArrayLike | None = None
) -> StepsToTarget:
    """Make a table of steps to a target that were measured elsewhere, for `tuned_rates`.

    Args:
      sizes: (B,) batch sizes, above 0.
      rates: (R,) learning rates, above 0.
      steps: (B, R, S) of each batch size, rate and seed, above 0; infinite where a run diverged.
      censored: (B, R, S) True where the run did these steps without reaching the target.

    Raises:
      UserError: shapes that do not fit, values that are not positive, a size or rate twice.

    >>> table = steps_table([8, 1], [0.1], [[[10, 12]], [[80, 75]]], [[[0, 0]], [[0, 1]]])
    >>> table.sizes.tolist(), table.steps[0, 0].tolist(), table.censored[0, 0].tolist()
    ([1.0, 8.0], [80.0, 75.0], [False, True])
    """
    sizes, rates = _axis("sizes", sizes), _axis("rates", rates)
    try:
        steps = np.asarray(steps, float)
    except (TypeError, ValueError):
        raise UserError(f"steps are {steps!r}: expected numbers") from None
    if steps.ndim != 3 or steps.shape[:2] != (len(sizes), len(rates)) or not steps.shape[2]:
        raise UserError(
            f"steps has shape {steps.shape}: expected ({len(sizes)} batch sizes, {len(rates)} "
            "rates, seeds)"
        )
    if not np.all(steps > 0):
        raise UserError(
            f"steps holds {steps[~(steps > 0)][0]:g}: expected above 0, and infinity for a run "
            "that diverged"
        )
    lost = np.zeros(steps.shape, bool) if censored is None else np.asarray(censored, bool)
    if lost.shape != steps.shape:
        raise UserError(f"censored has shape {lost.shape} and steps {steps.shape}: expected equal")
    by_size, by_rate = np.argsort(sizes), np.argsort(rates)
    steps, lost = steps[by_size][:, by_rate], (lost | np.isinf(steps))[by_size][:, by_rate]
    return StepsToTarget(sizes[by_size], rates[by_rate], steps, lost)


def _axis(name: str, values: ArrayLike) -> np.ndarray:
    """Check an axis of positive numbers, each once."""
    try:
        axis = np.asarray(values, float)
    except (TypeError, ValueError):
        raise UserError(f"{name} are {values!r}: expected numbers") from None
    if axis.ndim != 1 or not axis.size or not np.all((axis > 0) & np.isfinite(axis)):
        raise UserError(f"{name} are {axis.tolist()}: expected a list of numbers above 0")
    if len(np.unique(axis)) < len(axis):
        raise UserError(f"{name} are {axis.tolist()}: expected each once")
    return axis


def steps_to_target(
    dataset: "xr.Dataset",
    target: float,
    metric: str = "loss",
    better: Better = "low",
    *,
    interpolate: bool = True,
    window: int = 1,
) -> StepsToTarget:
    """Find the step at which each run of a sweep first reached a target.

    Args:
      dataset: from `sweep`, over ``batch_size`` and ``learning_rate``, with any seeds.
      target: value to reach, in the metric's unit.
      metric: ``"loss"`` or a metric of the problem, as recorded. A mini-batch loss reaches a target
        by luck, and the sooner the smaller the batch: take a metric over fixed data, or a window.
      better: whether the metric is to be ``"low"`` or ``"high"``.
      interpolate: whether to take the crossing between the last record before the target and the
        first beyond it, on a straight line in the metric's logarithm (in the metric, where one of
        the values is not positive), and not the step of the record.
      window: successive records that the metric is averaged over; the step is at their middle.

    Returns:
      The steps and which are censored. A run that a stop rule ended before it reached the target is
      censored at its last step, a diverged one for ever.

    Raises:
      UserError: an unknown metric, a target that no run reaches (the message names the best value)
        or that a run's first record has already reached, axes that are missing or too many.

    >>> import optax, optjax as oj
    >>> run = oj.make_run(oj.quadratic([1.0], [1.0]), optax.sgd, 8)
    >>> grid = {"learning_rate": [0.5, 0.75], "batch_size": [1, 2]}
    >>> found = steps_to_target(oj.sweep(run, grid), 0.5 * 0.25**3, interpolate=False)
    >>> found.steps[:, :, 0].tolist()  # the loss of a step is that before it: 0.5 · 0.25^(k − 1)
    [[4.0, 3.0], [4.0, 3.0]]
    """
    sign = sign_of(better)
    _check_target(target)
    values, status, done = _series(dataset, metric)
    goal = values.dtype.type(target)
    at, rows = _smoothed(
        dataset["step"].values.astype(float),
        values.values.astype(float),
        whole("window", window, 1),
        metric,
    )
    # NaN, after a run's end, counts as not reached.
    hit = sign * rows <= sign * float(goal)
    sizes, rates = dataset["batch_size"].values, dataset["learning_rate"].values
    if not hit.any():
        raise _unreached(sizes, rates, sign * rows, sign, target, metric)
    first, reached = hit.argmax(-1), hit.any(-1)
    if np.any(reached & (first == 0)):
        raise _too_sparse(sizes, rates, hit, rows, at[0], target, metric)
    steps = _crossing(at, rows, first, float(goal)) if interpolate else at[first]
    last = np.where(status == Status.DIVERGED, np.inf, np.maximum(done, at[0]))
    return steps_table(sizes, rates, np.where(reached, steps, last), ~reached)


def _check_target(target: Any) -> None:
    """Check a target."""
    if isinstance(target, bool) or not isinstance(target, int | float | np.number):
        raise UserError(f"target is {target!r}: expected a number")
    if not np.isfinite(target):
        raise UserError(f"target is {target}: expected a finite number")


def _series(dataset: "xr.Dataset", metric: str) -> tuple["xr.DataArray", np.ndarray, np.ndarray]:
    """Return the metric (B, R, S, records), and the runs' status and steps done (B, R, S)."""
    if "steps_done" not in getattr(dataset, "data_vars", ()):
        raise UserError(f"dataset is a {type(dataset).__name__}: expected a Dataset of oj.sweep")
    dims: set[Hashable] = set(dataset.dims)
    missing = [axis for axis in AXES[:2] if axis not in dims]
    if missing:
        raise UserError(
            f"dataset lacks the axis {' and '.join(missing)}: expected a sweep over a dict of "
            "batch_size and learning_rate"
        )
    known = [str(name) for name, v in dataset.data_vars.items() if "step" in v.dims]
    if metric not in known:
        raise UserError(f"unknown metric {metric!r}: {nearest(str(metric), known)}")
    values, status, done = dataset[metric], dataset["status"], dataset["steps_done"]
    extra = [str(d) for d in values.dims if d not in (*AXES, "step")]
    if extra:
        raise UserError(
            f"dataset also has the axis {' and '.join(extra)}: choose one value, as "
            f"dataset.isel({extra[0]}=0)"
        )
    if "seed" not in values.dims:
        values, status, done = (v.expand_dims("seed") for v in (values, status, done))
    runs = [v.transpose(*AXES).values for v in (status, done)]
    return values.transpose(*AXES, "step"), runs[0], runs[1].astype(float)


def _smoothed(
    at: np.ndarray, rows: np.ndarray, window: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Average over `window` records, the steps and the metric."""
    if window > len(at):
        raise UserError(f"window is {window}: expected at most the {len(at)} records of {metric}")
    if window == 1:
        return at, rows
    view = np.lib.stride_tricks.sliding_window_view
    return view(at, window).mean(-1), view(rows, window, axis=-1).mean(-1)


def _crossing(at: np.ndarray, rows: np.ndarray, first: np.ndarray, goal: float) -> np.ndarray:
    """Find where the line from the record before `first` to it meets the goal, (B, R, S)."""
    before = np.maximum(first - 1, 0)
    low, high = (np.take_along_axis(rows, i[..., None], -1)[..., 0] for i in (before, first))
    log = (low > 0) & (high > 0) & (goal > 0)
    a, b = (np.where(log, np.log(np.where(log, v, 1)), v) for v in (low, high))
    middle = np.where(log, np.log(goal) if goal > 0 else 0, goal)
    part = np.ones_like(a)
    # A record that is not finite gives no line: take the step of the first record beyond.
    known = np.isfinite(a) & np.isfinite(b) & (a != b)
    np.divide(middle - a, b - a, out=part, where=known)
    return at[before] + part * (at[first] - at[before])


def _unreached(
    sizes: np.ndarray, rates: np.ndarray, rows: np.ndarray, sign: float, target: float, metric: str
) -> UserError:
    """Make the error for a target that no run reaches; rows are `sign` times the metric."""
    rows = np.where(np.isnan(rows), np.inf, rows)
    i, j, *_ = np.unravel_index(np.argmin(rows), rows.shape)
    best = sign * rows.min()
    if not np.isfinite(best):
        return UserError(f"{metric} holds no finite value: no run can reach the target {target:g}")
    return UserError(
        f"target is {target:g}: no run reaches it; the best {metric} is {best:.6g}, of batch "
        f"{sizes[i]:g} at rate {rates[j]:g}: choose a target it reaches, or run more steps"
    )


def _too_sparse(
    sizes: np.ndarray, rates: np.ndarray, hit: np.ndarray, rows: np.ndarray, first: float,
    target: float, metric: str,
) -> UserError:  # fmt: skip
    """Make the error for a target that a first record has already reached."""
    i, j, k = np.argwhere(hit[..., 0])[0]
    more = ", or record more often" if first > 1 else ""
    return UserError(
        f"target is {target:g}: the first record (step {first:g}) of batch {sizes[i]:g} at rate "
        f"{rates[j]:g} has already reached it, with {metric} {rows[i, j, k, 0]:.6g}: choose a "
        f"harder target{more}"
    )
