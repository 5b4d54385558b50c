"""A training run as a pure function of its hyperparameters and its seed: one scan.

`make_run` does the static work once; the run it returns is wholly traceable and written for one
run. `jit` compiles it, `vmap` batches it, `grad` differentiates it.
"""

import dataclasses
import enum
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

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
        return _run(self.plan, self.problem.data, self._checked(hparams), key)

    def init(self, hparams: HParams, key: Key) -> RunState:
        """The state before the first step."""
        return _init(self.plan, self.problem.data, self._checked(hparams), key)

    def advance(self, state: RunState, hparams: HParams, steps: int) -> tuple[RunState, Records]:
        """`steps` more steps from `state`; the same values as in one piece.

        Raises:
          UserError: steps is not a positive multiple of the run's record_every.
        """
        every = self.plan.record_every
        if steps < 1 or steps % every:
            raise UserError(f"steps is {steps}: expected a positive multiple of {every}")
        return _advance(self.plan, steps, self.problem.data, self._checked(hparams), state)

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
        for name, value in hparams.items():
            if name not in known:
                raise UserError(f"unknown hyperparameter {name!r}: {nearest(name, known)}")
            if isinstance(value, (bool, str)) or value is None:
                raise UserError(
                    f"{name} is {value!r}: expected a number; give a flag to the optimiser with "
                    f"functools.partial(factory, {name}={value!r})"
                )
        size = hparams.get("batch_size")
        if size is None or "batch_size" in self.problem.hparams:
            return hparams
        if plan.sampler == "full":
            raise UserError("batch_size is given and the sampler is 'full': leave out one of them")
        if not isinstance(size, Tracer):
            values = np.asarray(size)
            if values.size and not np.all((values >= 1) & (values <= plan.slots)):
                bad = values[(values < 1) | (values > plan.slots)].flat[0]
                limit = "max_batch_size" if plan.slots < plan.n else "the number of examples"
                raise UserError(f"batch_size is {bad}: expected 1 to {plan.slots}, {limit}")
            if not np.all(values == np.round(values)):
                raise UserError(f"batch_size is {size}: expected a whole number")
        return hparams


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
      sampler: ``"replacement"``, ``"epochs"`` (a fresh permutation an epoch) or ``"full"``.
      max_batch_size: B, the slots of a batch; all n examples by default. ``batch_size`` in the
        hyperparameters may be anything from 1 to B, traced too, and is B when it is not given.
        Computation costs as much as B examples: set B to the largest batch of a sweep.
      record_every: k, steps from record to record; must divide T.
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
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps is {steps}: expected a whole number of at least 1")
    if not isinstance(record_every, int) or record_every < 1 or steps % record_every:
        raise UserError(f"record_every is {record_every}: expected a divisor of steps = {steps}")
    if sampler not in ("replacement", "epochs", "full"):
        known = ["replacement", "epochs", "full"]
        raise UserError(f"unknown sampler {sampler!r}: {nearest(str(sampler), known)}")
    n = problem.n
    if max_batch_size is not None and not 1 <= max_batch_size <= max(n, 1):
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
        slots=n if max_batch_size is None or n == 0 else max_batch_size,
        record_every=record_every,
        record_path=record_path,
        tolerance=tolerance,
        own=frozenset(optimizers.keywords(optimizer)),
    )
    return Run(problem, plan)


# ------------------------------------------------------------------------------ the pure core

_INIT, _DRAW, _NOISE = 0, 1, 2  # folded into the run's key: independent streams


def _dtype(params: PyTree) -> Any:
    """Hyperparameters enter in the parameters' dtype, but never below float32."""
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(params))
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def _split(
    plan: _Plan, hparams: HParams, params: PyTree
) -> tuple[Any, dict[str, Array], Array | None]:
    """The optimiser, all hyperparameters in the parameters' dtype, and the batch size."""
    dtype = _dtype(params)
    size = hparams.get("batch_size")
    numbers = {k: jnp.asarray(v).astype(dtype) for k, v in hparams.items() if k != "batch_size"}
    own = {name: value for name, value in numbers.items() if name in plan.own}
    tx = optimizers.differentiable(plan.optimizer(**own))
    if size is not None:
        size = jnp.asarray(size).astype(jnp.int32)
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
        indices, mask, order = batching.draw(
            plan.sampler if size is not None or plan.slots < plan.n or plan.sampler == "epochs"
            else "full",
            jax.random.fold_in(state.key, _DRAW), state.step, state.order,
            plan.n, plan.slots, size,
        )  # fmt: skip
    examples = data.examples
    if indices is not None:
        examples = jax.tree.map(lambda a: a[indices], examples)
    noise = jax.random.fold_in(jax.random.fold_in(state.key, _NOISE), state.step)
    batch = Batch(examples, mask, noise, data.shared)

    def value(params: PyTree) -> tuple[Array, PyTree]:
        return plan.loss(params, state.model_state, batch, numbers)

    (loss, model_state), grads = jax.value_and_grad(value, has_aux=True)(state.params)
    if "l2" in numbers:
        l2 = numbers["l2"]
        grads = jax.tree.map(lambda g, w: g + 2 * l2.astype(w.dtype) * w, grads, state.params)
    extra = {"value": loss, "grad": grads, "value_fn": lambda p: value(p)[0]}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    params = cast(PyTree, optax.apply_updates(state.params, updates))

    top = jnp.max(jnp.stack([jnp.max(jnp.abs(g)).astype(_dtype(params))
                             for g in jax.tree.leaves(grads)]))  # fmt: skip
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
