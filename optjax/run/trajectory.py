"""A training run as a pure function of its hyperparameters and its seed: one scan.

`make_run` does the static work once; the run it returns is wholly traceable and written for one
run. `jit` compiles it, `vmap` batches it, `grad` differentiates it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optjax.run import core, masking, optimizers
from optjax.run.batching import Sampler
from optjax.run.core import Plan, Records, RunState, Trajectory
from optjax.run.piecewise import Piecewise
from optjax.run.problems import Data, Problem
from optjax.support.errors import UserError, nearest, whole
from optjax.support.keys import as_key, make_key
from optjax.support.types import HParams, Key


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training run: call it with ``(hparams, key)`` for a `Trajectory`. See `make_run`."""

    problem: Problem
    plan: Plan

    def __call__(self, hparams: HParams, key: Key | int) -> Trajectory:
        """Carry out the run; a whole number for a key is a seed."""
        return self.pure(self.problem.data, hparams, key)

    def pure(self, data: Data, hparams: HParams, key: Key | int) -> Trajectory:
        """Carry out the run with the data as an argument: `jit` this if the data are large.

        ``run(hparams, key)`` is itself compiled, once for all data of a shape. A user's own
        ``jax.jit(run)`` makes the data constants of its program, like every array that a function
        closes over; ``jax.jit(run.pure)(run.problem.data, hparams, key)`` does not.
        """
        return core.run(self.plan, data, self.entered(hparams), as_key(key))

    def init(self, hparams: HParams, key: Key | int) -> RunState:
        """Return the state before the first step."""
        return core.init(self.plan, self.problem.data, self.entered(hparams), as_key(key))

    def advance(
        self, state: RunState, hparams: HParams, steps: int, data: Data | None = None
    ) -> tuple[RunState, Records]:
        """Take `steps` more steps, with the same values as in an uninterrupted run.

        Args:
          state: the state to start from.
          hparams: as of the run.
          steps: a multiple of the run's record_every.
          data: the problem's own by default; an argument for the same reason as in `pure`.

        Returns:
          The state after the steps, and their records.

        Raises:
          UserError: steps is not a positive multiple of the run's record_every.
        """
        every = self.plan.record_every
        if steps < 1 or steps % every:
            raise UserError(f"steps is {steps}: expected a positive multiple of {every}")
        data = self.problem.data if data is None else data
        return core.advance(self.plan, steps, data, self.entered(hparams), state)

    def finish(self, start: RunState, end: RunState, records: Records, hparams: HParams):
        """Return the `Trajectory` of a run that was advanced from `start` to `end` in chunks."""
        hparams = self.checked(hparams)
        return core.finish(self.plan, self.problem.data, hparams, start.params, end, records)

    def chunks(
        self, hparams: HParams, key: Key | int, steps: int
    ) -> Iterator[tuple[RunState, Records]]:
        """Yield state and records after every `steps` steps, on the host: for stop rules, progress.

        Raises:
          UserError: `steps` does not divide the run's steps.
        """
        if steps < 1 or self.plan.steps % steps:
            raise UserError(f"chunk of {steps} steps: expected a divisor of {self.plan.steps}")
        state = self.init(hparams, key)
        for _ in range(self.plan.steps // steps):
            state, records = self.advance(state, hparams, steps)
            yield state, records

    def entered(self, hparams: HParams) -> HParams:
        """Check as `checked` does, and that the loss counts no padding where a batch has some."""
        checked = self.checked(hparams)
        masking.check(self.plan, self.problem.data, checked)
        return checked

    def checked(self, hparams: HParams) -> HParams:
        """Check the names and the concrete values; return all as they enter the program."""
        plan = self.plan
        if not isinstance(hparams, Mapping):
            raise UserError(f"hparams is a {type(hparams).__name__}: expected a dict of numbers")
        known = plan.own | {"l2", "batch_size", "initial_params"} | self.problem.hparams
        for name in hparams:
            if name not in known:
                raise UserError(f"unknown hyperparameter {name!r}: {nearest(name, known)}")
        missing = sorted(optimizers.required(plan.optimizer) - set(hparams))
        if missing:
            raise UserError(f"hyperparameters lack {missing[0]}: the optimiser needs it; add it")
        checked = {name: as_value(name, value, plan.steps) for name, value in hparams.items()}
        self._check_shapes(checked)
        size = checked.get("batch_size")
        if size is None:
            return checked
        if plan.sampler == "full" and plan.n:
            raise UserError("batch_size is given and the sampler is 'full': leave out one of them")
        if not isinstance(size, Tracer):
            value = float(size)
            if not plan.n:
                if not value > 0:
                    raise UserError(f"batch_size is {value:g}: expected a number above 0")
            elif not 1 <= value <= plan.slots:
                limit = "max_batch_size" if plan.slots < plan.n else "the number of examples"
                raise UserError(f"batch_size is {value:g}: expected 1 to {plan.slots}, {limit}")
            elif value != round(value):
                raise UserError(f"batch_size is {value:g}: expected a whole number")
        return checked

    def _check_shapes(self, hparams: HParams) -> None:
        size, weights = hparams.get("batch_size"), hparams.get("example_weights")
        if isinstance(size, Piecewise | dict) or np.ndim(cast(Any, size)):
            raise UserError("batch_size is not a single number: expected one; vmap over several")
        l2 = hparams.get("l2")
        if l2 is not None and not isinstance(l2, Piecewise) and not _is_number(l2):
            self._check_like_params("l2", l2, alone=((),))
        if "initial_params" in hparams:
            self._check_like_params("initial_params", hparams["initial_params"])
        if weights is not None:
            shape = tuple(getattr(weights, "shape", ()))
            if shape != (self.plan.n,):
                raise UserError(
                    f"example_weights have shape {shape}: expected {(self.plan.n,)}, one an example"
                )
        for name, value in hparams.items():
            if name in self.plan.own and np.ndim(value) and not self._scales(np.shape(value)):
                raise UserError(
                    f"{name} has shape {_described(value)}: expected one number (vmap over "
                    "several), or oj.Piecewise for one that changes along the run"
                )

    def _scales(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape can multiply every parameter."""
        shapes = [w.shape for w in jax.tree.leaves(self.params)]
        try:
            return all(np.broadcast_shapes(shape, own) == own for own in shapes)
        except ValueError:
            return False

    @functools.cached_property
    def params(self) -> Any:
        """The shapes and dtypes of the parameters, as `jax.eval_shape` gives them."""
        return jax.eval_shape(self.plan.init, make_key(0), self.problem.data)[0]

    def _check_like_params(self, name: str, tree: Any, alone: tuple[Any, ...] = ()) -> None:
        """Check that a tree is like the parameters; a leaf may have a shape in `alone` instead."""
        params = self.params
        same = jax.tree.structure(tree) == jax.tree.structure(params)
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=same)
        if not same or any(np.shape(v) not in (*alone, w.shape) for v, w in pairs):
            either = "one number (vmap over several), or " if alone else ""
            raise UserError(
                f"{name} has shape {_described(tree)}: expected {either}a tree like the "
                f"parameters, of shape {_described(params)}"
            )


def _is_number(value: Any) -> bool:
    return getattr(value, "shape", None) == ()


def _described(tree: Any) -> str:
    """Describe the shapes of a tree, by their paths, in one line."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = [(jax.tree_util.keystr(p, simple=True, separator="."), np.shape(v)) for p, v in found]
    shown = ", ".join(f"{name} {shape}".strip() for name, shape in named[:6])
    return shown + (f" and {len(named) - 6} more" if len(named) > 6 else "")


def as_value(name: str, value: Any, steps: int) -> Any:
    """Convert a hyperparameter to the number, the tree or the schedule that enters the program."""
    if isinstance(value, Piecewise):
        return _schedule(name, value, steps)
    if hasattr(value, "unfreeze"):  # a FrozenDict of Flax
        value = value.unfreeze()
    if callable(value) and not isinstance(value, type):
        return _of_steps(name, value, steps)
    if isinstance(value, Mapping | list | tuple) and _is_tree(value):
        return jax.tree.map(lambda leaf: _number(name, leaf), value)
    return _number(name, value)


def _is_tree(value: Any) -> bool:
    """Tell a tree of parameters from a list of numbers."""
    return isinstance(value, Mapping) or any(np.ndim(leaf) for leaf in jax.tree.leaves(value))


def _schedule(name: str, schedule: Piecewise, steps: int) -> Piecewise:
    values, linear = _number(name, schedule.values), schedule.linear
    count = np.size(values)
    if np.ndim(values) != 1 or count < 1 + linear:
        least = "two" if linear else "one"
        raise UserError(
            f"the schedule of {name} has shape {np.shape(values)}: expected (K,), at least {least}"
        )
    if not linear and (count > steps or steps % count):
        raise UserError(
            f"the schedule of {name} has {count} values: expected a divisor of steps = {steps}, or "
            "linear=True"
        )
    return Piecewise(values, linear)


def _of_steps(name: str, schedule: Callable[[Any], Any], steps: int) -> Piecewise:
    """Evaluate a schedule of optax, or any function of the step, at every step."""
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            values = jax.vmap(lambda t: jnp.asarray(schedule(t), float))(jnp.arange(steps))
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(
            f"{name} is a function that gives no number for a step ({said}): expected a schedule, "
            "as optax's"
        ) from None
    if values.shape != (steps,):
        raise UserError(
            f"{name} is a function that gives {values.shape[1:]} for a step: expected a number"
        )
    return Piecewise(values)


def _number(name: str, value: Any) -> Any:
    """Convert a number to its one type in the program, for all Python and NumPy numbers."""
    if isinstance(value, (bool, str)) or value is None or callable(value):
        raise UserError(
            f"{name} is {value!r}: expected a number; give a flag to the optimiser with "
            f"functools.partial(factory, {name}=...)"
        )
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value, float)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}: expected a number") from None


def make_run(
    problem: Problem,
    optimizer: optimizers.Factory,
    steps: int,
    *,
    sampler: Sampler = "replacement",
    max_batch_size: int | None = None,
    record_every: int = 1,
    record_path: bool = False,
    tolerance: float | None = None,
    evaluate_at: Callable[[Any, Any], Any] | None = None,
) -> Run:
    """Make a pure ``run(hparams, key)``, w_{t+1} = w_t + u(∇L_{S_t}(w_t) + 2 l2 w_t).

    Args:
      problem: the problem to minimise.
      optimizer: an optax factory (`optax.adam`, …), called with the hyperparameters by name. Its
        square roots get a derivative that is finite where a gradient is exactly zero.
      steps: T, updates of the parameters.
      sampler: ``"replacement"``; ``"epochs"``, a fresh permutation an epoch; ``"shuffle_once"``,
        one permutation for all epochs; or ``"full"``.
      max_batch_size: B, the slots of a batch; all n examples by default. ``batch_size`` in the
        hyperparameters may be 1 … B, also traced, and is B by default. A step costs as much as B
        examples: set B to the largest batch of a sweep.
      record_every: k, steps from record to record; must divide T. The problem's metrics (the loss
        on held-out data) are computed at every record: if they are slow, record once an epoch.
      record_path: keep the parameters at every record.
      tolerance: a run whose last gradient has no entry above it is `Status.CONVERGED`.
      evaluate_at: (params, opt_state) → the parameters that metrics, final loss, hypergradients
        and a sweep's `final` are of, where those are not the iterate: an average of the weights.
        By default the iterate, and the average of optax's schedule-free optimisers. `Trajectory`
        has the iterate.

    Returns:
      The `Run`. Its ``hparams`` are a dict. Every value may be traced. A `Piecewise` or a schedule
      of optax in place of a number changes along the run. The names:

      * the factory's keyword names; flags that decide the program (``nesterov``) go in by
        `functools.partial`. One that asks for ``steps`` is given the run's, for a schedule of its
        own: ``lambda peak, steps: optax.adam(optax.cosine_decay_schedule(peak, steps))``;
      * ``batch_size``, 1 … B;
      * ``l2``, λ̃ of a penalty λ̃‖w‖² on all parameters, or a tree like the parameters;
      * ``example_weights``, (n,): a batch's loss is (1/b) Σᵢ ωᵢ ℓᵢ, where the problem's loss
        weighs (least squares and Flax models do). ``final_loss`` is unweighted;
      * ``initial_params``, a tree like the problem's own initial parameters, in their place.

      A traced ``batch_size`` outside 1 … B cannot raise: such a run is `Status.DIVERGED` at 0.

    Raises:
      UserError: an impossible setting, named in one line.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=100)
    >>> slope = jax.grad(lambda rate: run({"learning_rate": rate}, jax.random.key(0)).final_loss)
    >>> bool(slope(0.1) < 0)  # a larger rate ends lower
    True
    """
    if not isinstance(problem, Problem):
        raise UserError(f"problem is {problem!r}: expected a Problem, as from oj.least_squares")
    if isinstance(optimizer, optax.GradientTransformation) or not callable(optimizer):
        raise UserError(
            f"optimizer is a {type(optimizer).__name__}: expected a factory, optax.adam and not "
            "optax.adam(0.1)"
        )
    steps, record_every = whole("steps", steps, 1), whole("record_every", record_every, 1)
    if steps % record_every:
        raise UserError(f"record_every is {record_every}: expected a divisor of steps = {steps}")
    known = get_args(Sampler)
    if sampler not in known:
        raise UserError(f"unknown sampler {sampler!r}: {nearest(str(sampler), known)}")
    n = problem.n
    if max_batch_size is not None:
        max_batch_size = whole("max_batch_size", max_batch_size, 1)
        if sampler == "full" or not n:
            raise UserError(
                f"max_batch_size is {max_batch_size} where every step sees all data: leave it out"
            )
        if max_batch_size > n:
            raise UserError(f"max_batch_size is {max_batch_size}: expected 1 to n = {n}")
    plan = Plan(
        init=problem.init,
        loss=problem.loss,
        objective=problem.objective,
        metrics=problem.metrics,
        optimizer=optimizer,
        steps=steps,
        sampler=sampler,
        n=n,
        slots=n if max_batch_size is None else max_batch_size,
        whole=max_batch_size is None and sampler in ("replacement", "full"),
        counts=False,
        record_every=record_every,
        record_path=record_path,
        tolerance=None if tolerance is None else float(tolerance),
        own=frozenset(optimizers.keywords(optimizer)),
        evaluate_at=evaluate_at,
    )
    return Run(problem, plan)
