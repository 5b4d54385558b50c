"""`oj.tune`: descend on the hyperparameters, many starts at once."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from optjax.hypergradients import hypergrad
from optjax.hypergradients.footprint import at_once
from optjax.hypergradients.hypergradient import HypergradientComputation, flat
from optjax.hypergradients.job import Objective
from optjax.hypergradients.mode import Mode
from optjax.run import masking
from optjax.run.trajectory import Run
from optjax.support import provenance
from optjax.support.errors import UserError, sign_of, whole
from optjax.support.files import plainly
from optjax.support.types import Better, HParams
from optjax.sweeps import stop_rules
from optjax.sweeps.grid import Grid
from optjax.sweeps.groups import Group, Point, columns
from optjax.sweeps.identity import identity, run_ids
from optjax.sweeps.results import Results
from optjax.sweeps.sweeping import carry_out
from optjax.sweeps.work import Settings, Work
from optjax.tuning import checks, outer_step
from optjax.tuning import space as spaces
from optjax.tuning.outer_step import BEST, NeverFinite, NoSlope, TuningComputation, starts
from optjax.tuning.space import Range, named_leaves

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Progress = Callable[[str, float], None]

_ADAM = optax.adam(0.1)  # one object: a second tuning shares the first one's program
_PATIENCE = 10
"""Outer steps without any finite run after which there is no point in going on."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `oj.tune` found.

    Attributes:
      hparams: the best point and the hyperparameters that were not tuned, as a run takes them.
      value: of it, the mean over the seeds. NaN, and ``hparams`` the start, where it was
        interrupted before any run stayed finite.
      path: a Dataset with axes ``restart`` and ``outer_step``: ``value``, ``finite``,
        ``diverged`` (any of the point's runs), ``gradient_norm`` (of dF/du), ``value_error`` (where
        there are several seeds), and every tuned hyperparameter (a schedule or array with an axis
        of its own).
    """

    hparams: dict[str, Any]
    value: float
    path: "xarray.Dataset"

    def figure(self) -> "Figure":
        """Draw the value and the hyperparameters along the outer steps, the best restart bold."""
        from optjax.tuning.picture import picture

        return picture(self.path)


class TuningInterrupted(KeyboardInterrupt):
    """Ctrl-C after the first outer step: ``.tuning`` holds what was found until then."""

    def __init__(self, tuning: Tuning, *number: int) -> None:
        super().__init__(*number)  # of the signal
        self.tuning = tuning

    def __str__(self) -> str:
        return "interrupted; .tuning holds what was found"


def tune(
    run: Run,
    objective: Objective,
    hparams: HParams,
    outer: optax.GradientTransformation | None = None,
    *,
    steps: int = 100,
    wrt: str | Iterable[str] | None = None,
    constraints: Mapping[str, Range | None] | None = None,
    better: Better = "low",
    seeds: int | Iterable[int] = 1,
    fresh_seeds: bool = False,
    restarts: int = 1,
    spread: float = 1.0,
    seed: int = 0,
    mode: str | Mode = "auto",
    stop: Any = (),
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Tuning:
    """Tune hyperparameters by gradient descent, u ← u + outer(dF/du), θ = θ(u).

    u is log θ for a positive hyperparameter and logit θ for a share (momentum, b1, …), so no step
    leaves the range and a step is relative. Where a point's runs diverge, or the square of their
    gradient overflows, the next is half-way back to that restart's last point where none did; if
    it has none, to the best point of all restarts; and if no run has stayed finite yet, the
    tuned learning_rate or max_learning_rate is made smaller by a factor of e.

    Args:
      run, objective, mode: as `oj.hypergrad`; F is its value, averaged over the seeds.
      hparams: the start; what is not tuned stays. A rate that changes along a run: `Piecewise`.
      outer: descends on u; Adam of rate 0.1 by default (a tenth of θ a step, at first). A new
        object is a new program: make it once, to tune several times.
      steps: outer steps.
      wrt: names to tune; all but the batch size by default.
      constraints: name → (low, high), or None for any number. By default (0, 1) for momentum, b1
        and other shares, (0, ∞) where the start is positive.
      better: whether F is to be made ``"low"`` or ``"high"``.
      seeds: how many, 0, 1, …; or which. The runs of all points see the same draws.
      fresh_seeds: new seeds at every outer step: F is then the mean over all runs there could be,
        and the last point, not the best seen, is the result.
      restarts: starts, all at once: the given one, and others drawn about it in u.
      spread: their standard deviation in u: 1 is a factor of e.
      seed: of these draws.
      stop: rules by which it ends early, by the best value so far: `Target`, `Plateau`; low or
        high is better in them as here.
      out: a folder that keeps the path and the state; the same call again resumes the tuning, or
        takes more outer steps.
      overwrite: drop what the folder holds.
      progress: called with (text, fraction); a bar or lines on stderr by default.

    Returns:
      A `Tuning`; ``.figure()`` draws it.

    Raises:
      UserError: as `oj.hypergrad`; a start outside its range; a folder that cannot be written or is
        of another tuning; no finite run in the first 10 outer steps.
      TuningInterrupted: on Ctrl-C, with what was found.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=10, sampler="full")
    >>> found = oj.tune(run, "final_loss", {"learning_rate": 0.01}, steps=30)
    >>> bool(found.value < run({"learning_rate": 0.01}, jax.random.key(0)).final_loss / 10)
    True

    Sources: Bengio (2000); Maclaurin et al. (2015).
    """
    steps, restarts = whole("steps", steps, 1), whole("restarts", restarts, 1)
    sign = sign_of(better)
    seed, spread = whole("seed", seed, 0), checks.spread(spread)
    chosen, names = checks.seeds(seeds), checks.names(wrt)
    checks.constraints_and_progress(constraints, progress)
    outer = _ADAM if outer is None else outer
    gradient = hypergrad(run, objective, names, mode)
    theta, rest = gradient.parted(hparams)
    masking.check(run.plan, run.problem.data, {**rest, **theta})
    space = spaces.make_space(theta, constraints or {})
    checks.columns(theta)
    checks.outer_optimizer(outer, space.outside(theta))
    data = run.problem.data
    taken = gradient.chosen(data, theta, rest).mode
    computation = HypergradientComputation(gradient.job, taken, gradient.wrt)
    fit = at_once(computation.mode, gradient.job, data, theta, rest)
    # Fresh ones must not meet those of another step.
    stride = int(np.ptp(chosen)) + 1 if fresh_seeds else 0
    tuning = TuningComputation(
        computation, space, outer, max(1, min(restarts, fit // len(chosen))),
        min(len(chosen), fit), tuple(chosen.tolist()), stride, sign,
    )  # fmt: skip
    given = {"start": starts(space.outside(theta), restarts, spread, seed), **rest}
    own_rules, halving = stop_rules.checked(stop, {BEST}, 1, BEST)
    own_rules = tuple(checks.directed(rule, better) for rule in own_rules)
    if halving is not None:
        raise UserError("Halving compares runs with each other: a tuning is one; leave it out")
    own = {
        **{f"start of {n}": v for n, v in named_leaves(theta).items()},
        **{f"fixed {n}": v for n, v in named_leaves(rest).items()},
        "structure": str(jax.tree.structure((theta, rest))), "stop": own_rules,
        "ranges": space.ranges, "seeds": chosen.tolist(), "fresh_seeds": bool(fresh_seeds),
        "restarts": restarts, "spread": spread, "seed": seed, "outer": outer, "better": better,
    }  # fmt: skip
    grid = Grid({}, {})
    rules = (NeverFinite(_PATIENCE), NoSlope(), *own_rules)
    inner = {n: checks.axes(n, np.ndim(leaf)) for n, leaf in named_leaves(theta).items()}
    inner |= {name: [] for name in ("value", "finite", "diverged", "gradient_norm", "value_error")}
    results = Results(
        {}, {}, [seed], [steps], 1, run_ids(grid, [0], [seed]), [rule.name for rule in rules],
        {name: ["restart", *own_axes] for name, own_axes in inner.items()}, "tuning",
    )  # fmt: skip
    begin = time.perf_counter()

    def attrs() -> dict[str, Any]:
        tuned = list(named_leaves(theta))
        logs = [name for name in tuned if space.logarithmic(name.partition(".")[0])]
        return {
            "tuned": json.dumps(tuned), "logarithmic": json.dumps(logs), "better": better,
            "settings": json.dumps(own, default=plainly), "commit": provenance.commit(),
            "versions": json.dumps(provenance.versions()), "seconds": time.perf_counter() - begin,
        }  # fmt: skip

    point = Point(run, (), {}, run.plan.steps, gradient)
    work = Work(
        results,
        [Group(run.plan, tuning, data, np.zeros(1, int), columns([given]), None, "tuning")],
        lambda: identity([point], grid, own, code=(outer_step, spaces)),
        rules,
        attrs=attrs,
        keep_states=True,
        describe=lambda: (
            f"outer step {int(results.done[0])} of {steps}, best {sign * _least(results, sign):.4g}"
        ),
    )
    settings = Settings([jax.devices()[0]], "loop", chunk_seconds=2.0, checkpoint_seconds=10.0)

    def found() -> Tuning:
        path = results.dataset().drop_vars(BEST)
        path.attrs |= attrs()
        return Tuning(*_best(path, sign, theta, rest, last=bool(fresh_seeds)), path)

    try:
        carry_out(work, settings, out, overwrite, progress)
    except KeyboardInterrupt as error:
        if not results.done[0]:
            raise
        raise TuningInterrupted(found(), *error.args) from None
    norms = results.values["gradient_norm"]
    if np.isfinite(norms).any() and not np.nan_to_num(norms).any():
        raise UserError(flat(gradient.job.name))
    if math.isnan(_least(results, sign)):
        raise UserError(_why(results, gradient.mode))
    return found()


def _least(results: Results, sign: int) -> float:
    """Return the smallest value so far, times the sign; NaN before there is one."""
    values = sign * results.values.get("value", np.full(1, np.nan))
    return float(np.nanmin(values)) if np.isfinite(values).any() else math.nan


def _best(
    path: "xarray.Dataset", sign: int, theta: HParams, rest: HParams, *, last: bool
) -> tuple[dict[str, Any], float]:
    """Return the best point and its value; the start and NaN if none is finite."""
    values = sign * path.value.values  # (restarts, K)
    good = np.isfinite(values)
    if not good.any():
        return {**rest, **jax.tree.map(np.asarray, dict(theta))}, math.nan
    if last:  # the latest step with a finite point, its best restart
        k = int(np.nonzero(good.any(axis=0))[0][-1])
        r = int(np.nanargmin(values[:, k]))
    else:
        r, k = (int(i) for i in np.unravel_index(np.nanargmin(values), values.shape))
    leaves = [path[name].values[r, k] for name in named_leaves(theta)]
    tuned = jax.tree.unflatten(jax.tree.structure(dict(theta)), leaves)
    return {**rest, **tuned}, sign * float(values[r, k])


def _why(results: Results, mode: Mode) -> str:
    """Say why no point was finite, in a line."""
    tried = f"of {int(results.done[0])} outer steps"
    if results.values["diverged"].any():
        return f"every point {tried} diverged: start from a smaller learning rate, or constrain it"
    return mode.never_finite.format(tried=tried)
