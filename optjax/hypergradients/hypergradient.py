"""`oj.hypergrad`: the gradient of what a run makes by its hyperparameters, mode by mode."""

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optjax.hypergradients.auto import Auto
from optjax.hypergradients.evolution import ES
from optjax.hypergradients.footprint import at_once
from optjax.hypergradients.forward import Forward
from optjax.hypergradients.implicit import Implicit
from optjax.hypergradients.job import Job, Objective, make_job
from optjax.hypergradients.mode import Choice, Mode
from optjax.hypergradients.one_step import OneStep
from optjax.hypergradients.recursive import Recursive
from optjax.hypergradients.reverse import Reverse
from optjax.hypergradients.segmented import Segmented
from optjax.run import core, masking
from optjax.run.computation import Finished
from optjax.run.core import Status
from optjax.run.piecewise import plain
from optjax.run.problems import Data
from optjax.run.trajectory import Run
from optjax.support.console import Console
from optjax.support.errors import UserError, nearest
from optjax.support.keys import as_key, make_key
from optjax.support.types import Array, HParams, Key, PyTree

MODES: dict[str, Mode] = {
    "auto": Auto(),
    "one_step": OneStep(),
    "forward": Forward(),
    "reverse": Reverse(),
    "segmented": Segmented(),
    "recursive": Recursive(),
    "implicit": Implicit(),
    "es": ES(),
}
"""The modes that need no argument, by name; `Truncated` and `PES` need one."""


class NonFiniteHypergradient(UserWarning):
    """The run diverged, or its gradient overflowed: the gradient is NaN, and marked so."""


class FlatObjective(UserWarning):
    """Every derivative is exactly 0: the objective is a step function, as an accuracy is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypergradient:
    """A value and its gradient; unpacks as ``value, gradient``.

    Attributes:
      value: (), the objective.
      gradient: a dict, each entry like the hyperparameter of that name.
      finite: () bool. False where the run diverged or the gradient overflowed: then every entry
        of the gradient is NaN.
      status: () int32, the run's `Status`; diverged_at: () int32, its first bad step, or −1.
      aux: what the mode adds: standard errors, residuals.
    """

    value: Array
    gradient: dict[str, Any]
    finite: Array
    status: Array
    diverged_at: Array
    aux: dict[str, Any]

    def __iter__(self) -> Iterator[Any]:
        yield self.value
        yield self.gradient


class Estimate(NamedTuple):
    """Mean and standard error over seeds."""

    value: Array  # ()
    value_error: Array  # ()
    gradient: dict[str, Any]
    gradient_error: dict[str, Any]
    each: Hypergradient  # every leaf (seeds, ...)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compute(mode: Mode, job: Job, data: Data, theta: HParams, rest: HParams, key: Key):
    found = mode(job, data, theta, rest, key)
    diverged = found.outcome.status == Status.DIVERGED
    finite = jnp.isfinite(found.value) & ~diverged
    for leaf in jax.tree.leaves(found.gradient):
        finite &= jnp.all(jnp.isfinite(leaf))
    gradient = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), found.gradient)
    return Hypergradient(
        found.value,
        dict(gradient),
        finite,
        found.outcome.status,
        found.outcome.diverged_at,
        found.aux,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class HypergradFn:
    """What `oj.hypergrad` gives: call it with ``(hparams, key)``. See there."""

    run: Run = dataclasses.field(repr=False)
    job: Job = dataclasses.field(repr=False)
    wrt: tuple[str, ...] | None
    mode: Mode
    explained: bool = False
    _choices: dict[Any, Choice] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )  # by shapes

    def __call__(self, hparams: HParams, key: Key | int) -> Hypergradient:
        result = self.pure(self.run.problem.data, hparams, key)
        if not isinstance(result.finite, Tracer):
            self._judge(result)
        return result

    def pure(self, data: Data, hparams: HParams, key: Key | int) -> Hypergradient:
        """Compute the same with the data as an argument, unjudged: for `jax.jit`."""
        theta, rest = self.parted(hparams)
        masking.check(self.run.plan, self.run.problem.data, {**rest, **theta})
        mode = self.chosen(data, theta, rest).mode
        return _compute(mode, self.job, data, theta, rest, as_key(key))

    def explain(self, hparams: HParams) -> Choice:
        """Return the mode that is taken for these hyperparameters, and why."""
        theta, rest = self.parted(hparams)
        return self.mode.choice(self.job, self.run.problem.data, theta, rest)

    def over_seeds(self, hparams: HParams, seeds: int | Iterable[int]) -> Estimate:
        """Average over seeds, with the standard error s/√N; leave out seeds that diverged.

        Near the edge of stability gradients are heavy-tailed: rare runs carry the mean, and an
        error that has not seen them says nothing.

        Args:
          seeds: how many (0, 1, …), or which.

        Raises:
          UserError: fewer than two seeds.
        """
        which = np.asarray(seeds if np.ndim(np.asarray(seeds, object)) == 0 else list(seeds))  # pyright: ignore[reportArgumentType]
        if not np.issubdtype(which.dtype, np.integer):
            raise UserError(f"seeds is {seeds!r}: expected a whole number, or several")
        which = which if which.ndim else np.arange(int(which))
        if len(which) < 2 or len(set(which.tolist())) < len(which) or min(which) < 0:
            raise UserError(
                f"seeds is {seeds!r}: expected at least two, each once, for a standard error"
            )
        theta, rest = self.parted(hparams)
        data = self.run.problem.data
        mode = self.chosen(data, theta, rest).mode
        together = at_once(mode, self.job, data, theta, rest)
        each = jax.lax.map(
            lambda seed: self(hparams, make_key(seed)),
            jnp.asarray(which),
            batch_size=min(len(which), together),
        )
        mean, error = _mean_and_error((each.value, each.gradient), each.finite)
        return Estimate(mean[0], error[0], mean[1], error[1], each)

    def parted(self, hparams: HParams) -> tuple[HParams, HParams]:
        """Split the hyperparameters to differentiate by, as floating arrays, from the others."""
        checked = self.run.checked(hparams)
        for name in self.wrt or ():
            if name not in checked:
                raise UserError(f"wrt names {name!r}, which hparams lack: {nearest(name, checked)}")
            if name == "batch_size" and self.run.plan.n and not self.mode.perturbs:
                raise UserError(
                    "batch_size cannot be differentiated, it is a whole number: mode='es' "
                    "estimates how the smoothed value changes with it"
                )
        theta, rest = parted(checked, self.wrt, core.hyper_dtype(self.run.params))
        self.mode.check(self.job, frozenset(theta))
        return theta, rest

    def chosen(self, data: Data, theta: HParams, rest: HParams) -> Choice:
        """Choose the mode: the one that was asked for, if it fits, or the one of "auto"."""
        if not theta:
            raise UserError(
                "nothing to differentiate by: hparams hold no number for it; name one in wrt"
            )
        shapes, structure = jax.tree.flatten((data, theta, rest))
        kind = structure, tuple(np.shape(a) for a in shapes)
        if kind not in self._choices:
            choice = self.mode.choice(self.job, data, theta, rest)
            if self.explained and choice.mode is not self.mode:
                Console().line(f"hypergrad: {choice.reason}")
            self._choices[kind] = choice
        return self._choices[kind]

    def _judge(self, result: Hypergradient) -> None:
        """Say what a person who calls it would otherwise find out late."""
        if bool(np.all(np.asarray(result.finite))):
            if not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(result.gradient)):
                warnings.warn(flat(self.job.name), FlatObjective, stacklevel=3)
            return
        refusal = self.mode.refusal(result.aux, int(result.status), result.value.dtype)
        if refusal is not None:
            raise UserError(refusal)
        at = int(result.diverged_at)
        why = f"the run diverged at step {at}" if at >= 0 else self.mode.not_finite
        warnings.warn(f"{why}: the hypergradient is NaN", NonFiniteHypergradient, stacklevel=3)


def flat(objective: str) -> str:
    """Say that an objective has no slope, and what to do."""
    return (
        f"every derivative of {objective} is exactly 0: it has no slope here, as an accuracy has "
        "none; take a loss, or mode='es', which smooths it"
    )


def parted(hparams: HParams, wrt: tuple[str, ...] | None, dtype: Any) -> tuple[HParams, HParams]:
    """Split the hyperparameters to differentiate by, in a dtype, from the others."""
    names = [name for name in hparams if name != "batch_size"] if wrt is None else wrt
    theta = {name: jax.tree.map(lambda v: jnp.asarray(v, dtype), hparams[name]) for name in names}
    return theta, {name: value for name, value in hparams.items() if name not in theta}


class HypergradientState(NamedTuple):
    """A hypergradient under way: all of it is one step."""

    step: Any  # () int32
    key: Key
    found: Hypergradient  # zeros before the step
    diverged_at: Array  # () int32


@dataclasses.dataclass(frozen=True)
class HypergradientComputation:
    """A hypergradient as a sweep carries it out: see `Computation`. Its mode is chosen."""

    job: Job
    mode: Mode
    wrt: tuple[str, ...] | None

    def __call__(self, data: Data, hparams: HParams, key: Key) -> Hypergradient:
        """Compute the value and the gradient; check nothing."""
        params = jax.eval_shape(self.job.plan.init, key, data)[0]
        theta, rest = parted(hparams, self.wrt, core.hyper_dtype(params))
        return _compute(self.mode, self.job, data, theta, rest, key)

    def start(self, data: Data, hparams: HParams, key: Key) -> HypergradientState:
        """As `Computation.start`."""
        shapes = jax.eval_shape(self, data, hparams, key)
        found = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        zero = jnp.zeros((), jnp.int32)
        return HypergradientState(zero, key, found, zero - 1)

    def advance(
        self, data: Data, hparams: HParams, state: HypergradientState, steps: Array
    ) -> tuple[HypergradientState, dict[str, Array]]:
        """As `Computation.advance`: all of it, whatever `steps` says; nothing is recorded."""
        found = self(data, hparams, state.key)
        at = found.diverged_at.astype(jnp.int32)
        return HypergradientState(state.step + steps, state.key, found, at), {}

    def finish(self, data: Data, hparams: HParams, state: HypergradientState) -> Finished:
        """As `Computation.finish`: the value, the gradient's leaves and what the mode adds."""
        found = state.found
        kept = {"value": found.value}
        for first, tree in (("gradient", found.gradient), *found.aux.items()):
            for path, leaf in jax.tree_util.tree_leaves_with_path(plain(tree)):
                inner = jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")
                kept[f"{first}_{inner}" if inner else first] = leaf
        kept["finite"] = found.finite
        return Finished(found.status, found.diverged_at, kept)


def _mean_and_error(tree: PyTree, good: Array) -> tuple[PyTree, PyTree]:
    count = jnp.sum(good)

    def moments(a: Array) -> tuple[Array, Array]:
        keep = good.reshape(-1, *[1] * (a.ndim - 1))
        n = count.astype(a.dtype)
        mean = jnp.sum(jnp.where(keep, a, 0), axis=0) / n
        spread = jnp.sum(jnp.where(keep, (a - mean[None]) ** 2, 0), axis=0)
        return mean, jnp.sqrt(spread / (n * (n - 1)))

    leaves, structure = jax.tree.flatten(tree)
    both = [moments(leaf) for leaf in leaves]
    return tuple(jax.tree.unflatten(structure, [b[i] for b in both]) for i in (0, 1))  # pyright: ignore[reportReturnType]


def hypergrad(
    run: Run,
    objective: Objective = "final_loss",
    wrt: str | Iterable[str] | None = None,
    mode: str | Mode = "auto",
    *,
    explain: bool = False,
) -> HypergradFn:
    """Differentiate a number that a run makes by its hyperparameters, dF(run(θ))/dθ.

    Args:
      run: from `oj.make_run`.
      objective: F. "final_loss"; "mean_loss", the mean of the mini-batch losses along the run; a
        metric of the problem, at the end ("validation_loss"); or any function Trajectory → ().
        Each new function object is a new program: define it once.
      wrt: names of hyperparameters; all that are given, but the batch size, by default. A value
        may be a number, an array, a `Piecewise`, a tree (``initial_params``), ``example_weights``.
      mode: how, by name or as an object with settings (`optjax.hypergradients`):

        ============  ===========================================  ====================
        mode          gradient                                     memory, time (in runs)
        ============  ===========================================  ====================
        "forward"     exact, for few numbers P                     P states, 1 + P
        "reverse"     exact                                        T, 3 to 6
        "segmented"   exact                                        √T, 4
        "recursive"   exact                                        log T, 5 and more
        "one_step"    exact, for T = 1                             1
        "implicit"    exact at convergence, singular cases too     1, and a linear solve
        Truncated(k)  biased: the last k steps                     k, 1 + 4k/T
        "es"          of the smoothed F, by 2N runs                N runs side by side
        PES(K)        the same, a perturbation each K steps        N runs side by side
        "auto"        exact; the fastest predicted that fits       (says so by `explain`)
        ============  ===========================================  ====================

      explain: say on standard error what "auto" chose, and why; `.explain(hparams)` returns it.

    Returns:
      A function ``(hparams, key) -> (value, gradient)``: a `Hypergradient`, which unpacks so. The
      gradient is a dict like what it is taken by. The function goes through `jit` and `vmap`;
      ``.over_seeds(hparams, 64)`` gives means and standard errors, `oj.sweep` takes it in place
      of a run.

      Where the run diverged the gradient is NaN, ``finite`` is False, and a call outside of
      `jit` warns. So it does where every derivative is exactly 0.

    Raises:
      UserError: unknown names; what cannot be differentiated; a mode that cannot serve, or whose
        memory does not fit.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=100)
    >>> value, slope = oj.hypergrad(run)({"learning_rate": 0.1}, jax.random.key(0))
    >>> bool(slope["learning_rate"] < 0)  # a larger rate would have come further
    True

    Sources: Maclaurin et al. (2015); Franceschi et al. (2017) for forward and reverse mode; the
    other modes name theirs.
    """
    if not isinstance(run, Run):
        raise UserError(f"run is a {type(run).__name__}: expected one from oj.make_run")
    if isinstance(mode, str):
        if mode in ("truncated", "pes"):
            name, argument = {
                "truncated": ("Truncated", "k"),
                "pes": ("PES", "steps of a segment"),
            }[mode]
            raise UserError(f"mode {mode!r} needs an argument: mode={name}({argument})")
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}: {nearest(mode, {*MODES, 'truncated', 'pes'})}")
        chosen: Mode = MODES[mode]
    else:
        chosen = mode
    if isinstance(chosen, type) or not isinstance(chosen, Mode):
        raise UserError(
            f"mode is {mode!r}: expected a name, or an object such as Segmented() or Truncated(10)"
        )
    if wrt is not None and not isinstance(wrt, str | Iterable):
        raise UserError(f"wrt is {wrt!r}: expected a name, or several")
    names = None if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    job = make_job(run.plan, objective, _metrics(run))
    return HypergradFn(run, job, names, chosen, explain)


def _metrics(run: Run) -> set[str]:
    plan, data = run.plan, run.problem.data

    def look(data: Data) -> Any:
        params, state = plan.init(make_key(0), data)
        try:
            return plan.metrics(params, state, data, {})
        except KeyError:  # a metric that reads a hyperparameter
            return {}

    return set(jax.eval_shape(look, data))
