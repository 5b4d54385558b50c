"""A training run as a pure function of its hyperparameters and its seed: one scan.

`make_run` does the static work once; the run it returns is wholly traceable and written for one
run. `jit` compiles it, `vmap` batches it, `grad` differentiates it.
"""

import contextlib
import dataclasses
import enum
import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optjax import batching, optimizers
from optjax.batching import Batch, Sampler
from optjax.errors import UserError, nearest
from optjax.problems import Data, Problem
from optjax.types import Array, HParams, Key, PyTree


class Status(enum.IntEnum):
    """How a run ended; divergence is data, not an exception."""

    RUNNING = 0  # the budget of steps ended first
    CONVERGED = 1  # the largest gradient entry of the last step is within the tolerance
    DIVERGED = 2  # a loss, gradient or parameter is NaN or infinite
    STOPPED = 3  # ended from outside


class Records(NamedTuple):
    """What is looked at along a run, one row a record."""

    step: Array  # (R,) int32, updates done when the record was taken: k, 2k, …
    loss: Array  # (R,) mean mini-batch loss over the k steps up to the record
    metrics: dict[str, Array]  # (R,) each, at the parameters of the record
    path: PyTree  # parameters at each record, leaves (R, ...); None unless asked for


class RunState(NamedTuple):
    """What must persist from one step to the next; enough to resume a run."""

    step: Array  # () int32, updates done
    key: Key  # () the run's own key
    params: PyTree
    model_state: PyTree  # a network's batch statistics and the like
    opt_state: PyTree
    order: Array  # (n,) int32, this epoch's order of the examples; (0,) for other samplers
    gradient: Array  # () largest absolute entry of the last gradient
    diverged_at: Array  # () int32, the first step whose loss or gradient was not finite; −1


class Trajectory(NamedTuple):
    """The outcome of a run."""

    step: Array  # (R,) int32, updates done when the record was taken: k, 2k, …, T
    loss: Array  # (R,) mean mini-batch loss over the k steps up to the record, without l2 term
    metrics: dict[str, Array]  # (R,) each, at the parameters of the record
    path: PyTree  # leaves (R + 1, ...): w₀ and the parameters at each record; None unless asked
    params: PyTree  # final parameters
    model_state: PyTree  # final mutable state of the model
    final_loss: Array  # () loss over all training data at the final parameters, without l2 term
    status: Array  # () int32, a Status
    diverged_at: Array  # () int32, the step at which a value stopped being finite; −1 if none did


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a run: hashable, so that equal plans share a compiled program."""

    init: Any
    loss: Any
    objective: Any
    metrics: Any
    optimizer: Any
    steps: int
    sampler: Sampler
    n: int
    slots: int
    whole: bool  # without a batch size, every step sees all examples
    record_every: int
    record_path: bool
    tolerance: float | None
    own: frozenset[str]  # hyperparameters that go to the optimiser's factory


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training run: call it with ``(hparams, key)`` for a `Trajectory`. See `make_run`."""

    problem: Problem
    plan: _Plan

    def __call__(self, hparams: HParams, key: Key) -> Trajectory:
        return self.pure(self.problem.data, hparams, key)

    def pure(self, data: Data, hparams: HParams, key: Key) -> Trajectory:
        """The run with its data as an argument: what to `jit` where they are large.

        ``run(hparams, key)`` is itself compiled, once for all data of a shape. A user's own
        ``jax.jit(run)`` makes the data constants of the program it compiles (any array that a
        function closes over is); ``jax.jit(run.pure)(run.problem.data, hparams, key)`` does not.
        """
        return _run(self.plan, data, self._checked(hparams), key)

    def init(self, hparams: HParams, key: Key) -> RunState:
        """The state before the first step."""
        return _init(self.plan, self.problem.data, self._checked(hparams), key)

    def advance(
        self, state: RunState, hparams: HParams, steps: int, data: Data | None = None
    ) -> tuple[RunState, Records]:
        """`steps` more steps from `state`; the same values as in one piece.

        Args:
          data: the problem's own by default; an argument for the same reason as in `pure`.

        Raises:
          UserError: steps is not a positive multiple of the run's record_every.
        """
        every = self.plan.record_every
        if steps < 1 or steps % every:
            raise UserError(f"steps is {steps}: expected a positive multiple of {every}")
        data = self.problem.data if data is None else data
        return _advance(self.plan, steps, data, self._checked(hparams), state)

    def finish(self, start: RunState, end: RunState, records: Records, hparams: HParams):
        """The `Trajectory` of a run that was advanced from `start` to `end` in chunks."""
        hparams = self._checked(hparams)
        return _finish(self.plan, self.problem.data, hparams, start.params, end, records)

    def chunks(self, hparams: HParams, key: Key, steps: int) -> Iterator[tuple[RunState, Records]]:
        """The run in chunks of `steps`, from the host: for progress, stop rules, checkpoints.

        Raises:
          UserError: steps does not divide the run's own.
        """
        if steps < 1 or self.plan.steps % steps:
            raise UserError(f"chunk of {steps} steps: expected a divisor of {self.plan.steps}")
        state = self.init(hparams, key)
        for _ in range(self.plan.steps // steps):
            state, records = self.advance(state, hparams, steps)
            yield state, records

    def _checked(self, hparams: HParams) -> HParams:
        """Names against the factory's, and concrete values against what they can be."""
        plan = self.plan
        known = plan.own | {"l2", "batch_size"} | self.problem.hparams
        for name in hparams:
            if name not in known:
                raise UserError(f"unknown hyperparameter {name!r}: {nearest(name, known)}")
        missing = sorted(optimizers.required(plan.optimizer) - set(hparams))
        if missing:
            raise UserError(f"hyperparameters lack {missing[0]}: the optimiser needs it; add it")
        checked = {name: _number(name, value) for name, value in hparams.items()}
        for name in ("batch_size", "l2"):
            if name in checked and np.ndim(checked[name]):
                shape = np.shape(checked[name])
                raise UserError(f"{name} has shape {shape}: expected a number; vmap over several")
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


def _number(name: str, value: Any) -> Any:
    """A hyperparameter as it enters the program: one type for all Python and NumPy numbers."""
    if isinstance(value, (bool, str)) or value is None or callable(value):
        raise UserError(
            f"{name} is {value!r}: expected a number; give a flag or a schedule to the optimiser "
            f"with functools.partial(factory, {name}=...)"
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
) -> Run:
    """A pure ``run(hparams, key) -> Trajectory``, w_{t+1} = w_t + u(∇L_{S_t}(w_t) + 2 l2 w_t).

    Args:
      problem: what is minimised.
      optimizer: an optax factory (`optax.adam`, …), called with the hyperparameters by name. Its
        square roots get a derivative that is finite where a gradient is exactly zero.
      steps: T, updates of the parameters.
      sampler: ``"replacement"``; ``"epochs"``, a fresh permutation an epoch; ``"shuffle_once"``,
        one permutation for all epochs; or ``"full"``.
      max_batch_size: B, the slots of a batch; all n examples by default. ``batch_size`` in the
        hyperparameters may be anything from 1 to B, traced too, and is B when it is not given.
        Computation costs as much as B examples: set B to the largest batch of a sweep.
      record_every: k, steps from record to record; must divide T. A problem's metrics (the loss
        on held-out data) are computed at every record: give an epoch's steps where they cost.
      record_path: keep the parameters at every record.
      tolerance: a run whose last gradient has no entry above it is `Status.CONVERGED`.

    Returns:
      The run. ``hparams`` is a dict: the factory's keyword names, ``batch_size``, ``l2`` (λ̃ of a
      penalty λ̃‖w‖² on all parameters). Every value may be traced. Flags that shape the program
      (``nesterov``) go in by `functools.partial`.

      A traced ``batch_size`` outside 1 … B cannot raise: such a run is `Status.DIVERGED` at 0.

    Raises:
      UserError: steps, sizes or names that cannot be, each in a line.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=100)
    >>> slope = jax.grad(lambda rate: run({"learning_rate": rate}, jax.random.key(0)).final_loss)
    >>> bool(slope(0.1) < 0)  # a larger rate would have come further
    True
    """
    if not isinstance(problem, Problem):
        raise UserError(f"problem is {problem!r}: expected a Problem, as from oj.least_squares")
    if isinstance(optimizer, optax.GradientTransformation) or not callable(optimizer):
        raise UserError(
            f"optimizer is a {type(optimizer).__name__}: expected a factory, optax.adam and not "
            "optax.adam(0.1)"
        )
    steps, record_every = _whole("steps", steps), _whole("record_every", record_every)
    if steps < 1:
        raise UserError(f"steps is {steps}: expected a whole number of at least 1")
    if record_every < 1 or steps % record_every:
        raise UserError(f"record_every is {record_every}: expected a divisor of steps = {steps}")
    known = get_args(Sampler)
    if sampler not in known:
        raise UserError(f"unknown sampler {sampler!r}: {nearest(str(sampler), known)}")
    n = problem.n
    if max_batch_size is not None:
        max_batch_size = _whole("max_batch_size", max_batch_size)
        if sampler == "full" or not n:
            raise UserError(
                f"max_batch_size is {max_batch_size} where every step sees all data: leave it out"
            )
        if not 1 <= max_batch_size <= n:
            raise UserError(f"max_batch_size is {max_batch_size}: expected 1 to n = {n}")
    plan = _Plan(
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
        record_every=record_every,
        record_path=record_path,
        tolerance=None if tolerance is None else float(tolerance),
        own=frozenset(optimizers.keywords(optimizer)),
    )
    return Run(problem, plan)


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}: expected a whole number") from None


# ------------------------------------------------------------------------------ the pure core

_INIT, _DRAW, _NOISE = 0, 1, 2  # folded into the run's key: independent streams


def _dtype(params: PyTree) -> Any:
    """Hyperparameters enter in the parameters' dtype, but never below float32."""
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(params))
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


@contextlib.contextmanager
def _traced(hparams: HParams) -> Iterator[None]:
    """A hyperparameter that decides the optimiser's program cannot be traced: say so."""
    try:
        yield
    except jax.errors.ConcretizationTypeError:
        raise UserError(
            f"one of {', '.join(hparams)} shapes the optimiser's program and cannot be a "
            "hyperparameter: give it with functools.partial(factory, name=value)"
        ) from None


def _split(
    plan: _Plan, hparams: HParams, params: PyTree
) -> tuple[Any, dict[str, Array], Array | None]:
    """The optimiser, all hyperparameters in the parameters' dtype, and the batch size."""
    dtype = _dtype(params)
    size = hparams.get("batch_size")
    numbers = {k: jnp.asarray(v).astype(dtype) for k, v in hparams.items() if k != "batch_size"}
    own = {name: value for name, value in numbers.items() if name in plan.own}
    with _traced(own):
        tx = optimizers.differentiable(plan.optimizer(**own))
    if size is not None:
        size = jnp.asarray(size).astype(jnp.int32 if plan.n else dtype)
        numbers["batch_size"] = size
    return tx, numbers, size


@functools.partial(jax.jit, static_argnums=0)
def _init(plan: _Plan, data: Data, hparams: HParams, key: Key) -> RunState:
    params, model_state = plan.init(jax.random.fold_in(key, _INIT), data)
    tx, _, size = _split(plan, hparams, params)
    good = jnp.array(True)
    if size is not None and plan.n:
        good = (size >= 1) & (size <= plan.slots)
    return RunState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        model_state=model_state,
        opt_state=tx.init(params),
        order=batching.initial_order(plan.sampler, jax.random.fold_in(key, _DRAW), plan.n),
        gradient=jnp.full((), jnp.inf, _dtype(params)),
        diverged_at=jnp.where(good, -1, 0).astype(jnp.int32),
    )


def _step(plan: _Plan, data: Data, hparams: HParams, state: RunState) -> tuple[RunState, Array]:
    tx, numbers, size = _split(plan, hparams, state.params)
    if size is not None and plan.n:
        size = jnp.clip(size, 1, plan.slots)
    indices, mask, order = None, None, state.order
    if plan.n:
        sampler = "full" if size is None and plan.whole else plan.sampler
        draws = jax.random.fold_in(state.key, _DRAW)
        indices, mask, order = batching.draw(
            sampler, draws, state.step, state.order, plan.n, plan.slots, size
        )
    examples = data.examples
    if indices is not None:
        examples = jax.tree.map(lambda a: a[indices], examples)
    noise = jax.random.fold_in(jax.random.fold_in(state.key, _NOISE), state.step)
    batch = Batch(examples, mask, noise, data.shared)

    def value(params: PyTree) -> tuple[Array, PyTree]:
        return plan.loss(params, state.model_state, batch, numbers)

    (loss, model_state), grads = jax.value_and_grad(value, has_aux=True)(state.params)
    l2 = numbers.get("l2")

    def penalised(params: PyTree, loss: Array) -> Array:
        """What the optimiser minimises: a line search must see the penalty, too."""
        if l2 is None:
            return loss
        squares = sum(jnp.sum(jnp.square(w)).astype(loss.dtype) for w in jax.tree.leaves(params))
        return loss + l2.astype(loss.dtype) * squares

    if l2 is not None:
        grads = jax.tree.map(lambda g, w: g + 2 * l2.astype(w.dtype) * w, grads, state.params)
    with _traced(numbers):
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            value=penalised(state.params, loss),
            grad=grads,
            value_fn=lambda p: penalised(p, value(p)[0]),
        )
    # A float32 coefficient must not widen the state of a bfloat16 run.
    opt_state = jax.tree.map(
        lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype),
        opt_state,
        state.opt_state,
    )
    params = cast(PyTree, optax.apply_updates(state.params, updates))

    largest = [jnp.max(jnp.abs(g)).astype(_dtype(params)) for g in jax.tree.leaves(grads)]
    top = jnp.max(jnp.stack(largest))
    top = jax.lax.stop_gradient(top)
    finite = jnp.isfinite(top) & jnp.isfinite(loss)
    fresh = ~finite & (state.diverged_at < 0)
    state = RunState(
        step=state.step + 1,
        key=state.key,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        order=order,
        gradient=top,
        diverged_at=jnp.where(fresh, state.step, state.diverged_at),
    )
    return state, loss


def _scan(
    plan: _Plan, steps: int, data: Data, hparams: HParams, state: RunState
) -> tuple[RunState, Records]:
    every = plan.record_every

    def one(state: RunState, _: None) -> tuple[RunState, Array]:
        return _step(plan, data, hparams, state)

    def record(state: RunState, _: None) -> tuple[RunState, Records]:
        if every == 1:
            state, loss = one(state, None)
        else:
            state, losses = jax.lax.scan(one, state, None, length=every)
            loss = jnp.mean(losses)
        numbers = _split(plan, hparams, state.params)[1]
        metrics = plan.metrics(state.params, state.model_state, data, numbers)
        path = state.params if plan.record_path else None
        return state, Records(state.step, loss, metrics, path)

    return jax.lax.scan(record, state, None, length=steps // every)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(plan: _Plan, steps: int, data: Data, hparams: HParams, state: RunState):
    return _scan(plan, steps, data, hparams, state)


@functools.partial(jax.jit, static_argnums=0)
def _finish(
    plan: _Plan, data: Data, hparams: HParams, start: PyTree, state: RunState, records: Records
) -> Trajectory:
    numbers = _split(plan, hparams, state.params)[1]
    final_loss = plan.objective(state.params, state.model_state, data, numbers)
    finite = jnp.isfinite(final_loss)
    for leaf in jax.tree.leaves(state.params):
        finite &= jnp.all(jnp.isfinite(leaf))
    diverged_at = jnp.where(~finite & (state.diverged_at < 0), state.step, state.diverged_at)
    status = jnp.full((), Status.RUNNING, jnp.int32)
    if plan.tolerance is not None:
        status = jnp.where(state.gradient <= plan.tolerance, Status.CONVERGED, status)
    status = jnp.where(diverged_at >= 0, Status.DIVERGED, status).astype(jnp.int32)
    path = None
    if plan.record_path:
        path = jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest]), start, records.path
        )
    return Trajectory(
        step=records.step,
        loss=records.loss,
        metrics=records.metrics,
        path=path,
        params=state.params,
        model_state=state.model_state,
        final_loss=final_loss,
        status=status,
        diverged_at=diverged_at,
    )


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: _Plan, data: Data, hparams: HParams, key: Key) -> Trajectory:
    start = _init(plan, data, hparams, key)
    end, records = _scan(plan, plan.steps, data, hparams, start)
    return _finish(plan, data, hparams, start.params, end, records)
