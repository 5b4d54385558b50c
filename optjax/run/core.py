"""The pure core of a run: its state, one step, and the scan over steps."""

import dataclasses
import enum
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax.run import batching, optimizers
from optjax.run.batching import Batch, Sampler
from optjax.run.computation import Finished
from optjax.run.loops import Loop, counted, walk
from optjax.run.piecewise import Piecewise
from optjax.run.problems import Data, checked_init, checked_loss
from optjax.support.types import Array, HParams, Key, PyTree


class Status(enum.IntEnum):
    """The way a run ended; divergence is data, not an exception."""

    COMPLETED = 0  # it took all its steps
    CONVERGED = 1  # the largest gradient entry of the last step is within the tolerance
    DIVERGED = 2  # a parameter or a reported loss is NaN or infinite
    STOPPED = 3  # ended by a stop rule of a sweep
    RUNNING = 4  # it has not ended: of a sweep under way


class Records(NamedTuple):
    """The values recorded along a run, one row a record."""

    step: Array  # (R,) int32, updates done when the record was taken: k, 2k, …
    loss: Array  # (R,) mean mini-batch loss over the k steps up to the record; see `mean_loss`
    metrics: dict[str, Array]  # (R,) each, at the parameters of the record
    path: PyTree  # parameters at each record, leaves (R, ...); None unless asked for


class RunState(NamedTuple):
    """The values that persist from one step to the next: enough to resume a run."""

    step: Array  # () int32, updates done
    key: Key  # () the run's own key
    params: PyTree
    model_state: PyTree  # a network's batch statistics and the like
    opt_state: PyTree
    order: Array  # (n,) int32, this epoch's order of the examples; (0,) for other samplers
    gradient: Array  # () largest absolute entry of the last gradient
    diverged_at: Array  # () int32, the first step at which a value stopped being finite; −1


class Outcome(NamedTuple):
    """The outcome of a run, judged at its last state."""

    final_loss: Array  # () loss over all training data at the final parameters, without l2 term
    status: Array  # () int32, a Status
    diverged_at: Array  # () int32, the step at which a value stopped being finite; −1 if none did


class Trajectory(NamedTuple):
    """A whole run: its records and its outcome."""

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
class Plan:
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
    counts: bool  # a batch is all n examples, masked by how often each is drawn; same draws
    record_every: int
    record_path: bool
    tolerance: float | None
    own: frozenset[str]  # hyperparameters that go to the optimiser's factory
    final: Any = None  # (params, model_state, data) → arrays that a sweep keeps of a run's end
    evaluate_at: Any = None  # (params, opt_state) → the parameters to judge

    def start(self, data: Data, hparams: HParams, key: Key) -> RunState:
        """Return the state before the first step."""
        return init(self, data, hparams, key)

    def advance(
        self, data: Data, hparams: HParams, state: RunState, steps: Array
    ) -> tuple[RunState, dict[str, Array]]:
        """Take `steps` steps; return the state, the steps' mean loss and the problem's metrics."""

        def one(state: RunState, _: None) -> tuple[RunState, Array]:
            return _step(self, data, hparams, state)

        def recorded(state: RunState, losses: Array) -> dict[str, Array]:
            found = record(self, data, hparams, state, mean_loss(state, losses))
            return {"loss": found.loss, **found.metrics}

        state, values = walk(steps, steps, one, recorded, state, None, counted)
        return state, {name: value[0] for name, value in values.items()}

    def finish(self, data: Data, hparams: HParams, state: RunState) -> Finished:
        """Return the status, the final loss and the arrays of `final`."""
        found = outcome(self, data, hparams, state)
        kept = {"final_loss": found.final_loss}
        if self.final is not None:
            kept |= self.final(judged_params(self, state), state.model_state, data)
        return Finished(found.status, found.diverged_at, kept)


_INIT, _DRAW, _NOISE = 0, 1, 2  # folded into the run's key: independent streams


def hyper_dtype(params: PyTree) -> Any:
    """Return the dtype of hyperparameters: the parameters', but at least float32."""
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(params))
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def hparams_at(plan: Plan, hparams: HParams, params: PyTree, step: Array) -> dict[str, Any]:
    """Evaluate the hyperparameters at a step: in `hyper_dtype`, a number of examples in int32."""
    dtype = hyper_dtype(params)

    def at(name: str, value: Any) -> Any:
        value = value.at(step, plan.steps) if isinstance(value, Piecewise) else value
        kind = jnp.int32 if name == "batch_size" and plan.n else dtype
        return jax.tree.map(lambda v: jnp.asarray(v).astype(kind), value)

    return {name: at(name, v) for name, v in hparams.items() if name != "initial_params"}


def optimizer_of(plan: Plan, hparams: HParams) -> optax.GradientTransformationExtraArgs:
    """Make the optimiser from hyperparameters that `hparams_at` gives."""
    own = {name: value for name, value in hparams.items() if name in plan.own}
    if optimizers.takes_steps(plan.optimizer):
        own["steps"] = plan.steps
    with optimizers.no_tracer_decides(own):
        return optimizers.differentiable(plan.optimizer(**own))


@functools.partial(jax.jit, static_argnums=0)
def init(plan: Plan, data: Data, hparams: HParams, key: Key) -> RunState:
    """Return the state before the first step; a traced batch size out of range diverges at 0."""
    params, model_state = checked_init(plan.init(jax.random.fold_in(key, _INIT), data))
    if "initial_params" in hparams:
        params = _given(params, hparams["initial_params"])
    start = jnp.zeros((), jnp.int32)
    now = hparams_at(plan, hparams, params, start)
    size, good = now.get("batch_size"), jnp.array(True)
    if size is not None and plan.n:
        good = (size >= 1) & (size <= plan.slots)
    return RunState(
        step=start,
        key=key,
        params=params,
        model_state=model_state,
        # Some states of optax hold Python bools.
        opt_state=jax.tree.map(jnp.asarray, optimizer_of(plan, now).init(params)),
        order=batching.initial_order(plan.sampler, jax.random.fold_in(key, _DRAW), plan.n),
        gradient=jnp.full((), jnp.inf, hyper_dtype(params)),
        diverged_at=jnp.where(good, -1, 0).astype(jnp.int32),
    )


def _given(params: PyTree, initial: PyTree) -> PyTree:
    """Cast the initial parameters that the hyperparameters give to the problem's dtypes."""
    return jax.tree.map(lambda w, v: jnp.asarray(v).astype(w.dtype), params, initial)


def _for_each(value: PyTree, params: PyTree) -> PyTree:
    """Return a hyperparameter as a tree like the parameters; one number serves every leaf."""
    if jax.tree.structure(value) == jax.tree.structure(params):
        return value
    return jax.tree.map(lambda _: value, params)


def penalised(loss: Array, l2: PyTree | None, params: PyTree) -> Array:
    """Add the penalty Σ λ̃ w² to a loss, for one λ̃, one for each parameter, or none."""
    if l2 is None:
        return loss
    dtype = hyper_dtype(params)
    terms = jax.tree.map(
        lambda k, w: jnp.sum(k.astype(w.dtype) * jnp.square(w)).astype(dtype),
        _for_each(l2, params),
        params,
    )
    return loss + sum(jax.tree.leaves(terms), jnp.zeros((), dtype)).astype(loss.dtype)


def step(plan: Plan, data: Data, hparams: HParams, state: RunState) -> tuple[RunState, Array]:
    """Update the parameters once; return the new state, and the mini-batch loss before it."""
    numbers = hparams_at(plan, hparams, state.params, state.step)
    tx, size = optimizer_of(plan, numbers), numbers.get("batch_size")
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
    if indices is not None and plan.counts:
        mask = batching.counts(indices, mask, plan.n, hyper_dtype(state.params))
    elif indices is not None:
        examples = jax.tree.map(lambda a: a[indices], examples)
    weights = numbers.get("example_weights")
    if weights is not None and indices is not None and not plan.counts:
        weights = weights[indices]
    noise = jax.random.fold_in(jax.random.fold_in(state.key, _NOISE), state.step)
    batch = Batch(examples, mask, noise, data.shared, weights)

    def value(params: PyTree) -> tuple[Array, PyTree]:
        return checked_loss(plan.loss(params, state.model_state, batch, numbers))

    (loss, model_state), grads = jax.value_and_grad(value, has_aux=True)(state.params)
    l2 = numbers.get("l2")
    if l2 is not None:
        grads = jax.tree.map(
            lambda g, k, w: g + 2 * k.astype(w.dtype) * w,
            grads,
            _for_each(l2, state.params),
            state.params,
        )

    def penalised_value(params: PyTree, *_: Any) -> Array:
        return penalised(value(params)[0], l2, params)

    with optimizers.no_tracer_decides(numbers):
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            value=penalised(loss, l2, state.params),  # a line search must see the penalty too
            grad=grads,
            value_fn=penalised_value,
            grad_fn=jax.grad(penalised_value),
        )
    # A float32 coefficient must not widen the state of a bfloat16 run, nor float64 data that of a
    # float32 network.
    opt_state = _as_before(opt_state, state.opt_state)
    model_state = _as_before(model_state, state.model_state)
    params = cast(PyTree, optax.apply_updates(state.params, updates))

    largest = [jnp.max(jnp.abs(g)).astype(hyper_dtype(params)) for g in jax.tree.leaves(grads)]
    top = jnp.max(jnp.stack(largest))
    top = jax.lax.stop_gradient(top)
    # A gradient that is not finite, and parameters that are: the optimiser skipped the step.
    ended = jnp.where(jnp.isfinite(top), ~jnp.isfinite(loss), ~_all_finite(params))
    fresh = ended & (state.diverged_at < 0)
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


def _as_before(new: PyTree, old: PyTree) -> PyTree:
    """Cast a state to the dtypes that it had before the step."""
    return jax.tree.map(lambda a, b: a if a.dtype == b.dtype else a.astype(b.dtype), new, old)


def _all_finite(tree: PyTree) -> Array:
    """Tell whether all numbers of a tree are finite, ()."""
    each = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, each, jnp.array(True))


def mean_loss(state: RunState, losses: Array) -> Array:
    """Average the losses of the steps before a record, without those that were skipped.

    In a run that has not diverged a loss that is not finite is of a step that the optimiser
    skipped. Where all were skipped, and where the run has diverged, the mean is NaN.
    """
    good = jnp.isfinite(losses) & (state.diverged_at < 0)
    count = jnp.sum(good).astype(losses.dtype)
    return jnp.sum(jnp.where(good, losses, jnp.zeros_like(losses))) / count


def judged_params(plan: Plan, state: RunState) -> PyTree:
    """Return the parameters to judge: those of the state, or where `evaluate_at` says."""
    if plan.evaluate_at is not None:
        return plan.evaluate_at(state.params, state.opt_state)
    return optimizers.evaluated(state.params, state.opt_state)


def record(plan: Plan, data: Data, hparams: HParams, state: RunState, loss: Array) -> Records:
    """Record a state, given the mean loss of the steps before it.

    A schedule has the value of the last step taken.
    """
    numbers = hparams_at(plan, hparams, state.params, state.step - 1)
    metrics = plan.metrics(judged_params(plan, state), state.model_state, data, numbers)
    return Records(state.step, loss, metrics, state.params if plan.record_path else None)


# Jitted by itself, so that JAX traces it once, however often a sweep asks for its shapes.
_step = functools.partial(jax.jit, static_argnums=0)(step)


def steps_of(
    plan: Plan,
    steps: int,
    data: Data,
    hparams: HParams,
    state: RunState,
    loop: Loop = jax.lax.scan,
) -> tuple[RunState, Records]:
    """Take `steps` more steps; return the state after them, and their `Records`."""
    # A schedule enters as one value a step: its derivative is then one row a step, not a sum of T
    # arrays of length K.
    moving = {name: value for name, value in hparams.items() if isinstance(value, Piecewise)}
    fixed = {name: value for name, value in hparams.items() if name not in moving}
    when = state.step + jnp.arange(steps, dtype=jnp.int32)
    rows = {name: value.at(when, plan.steps) for name, value in moving.items()}

    def one(state: RunState, row: HParams) -> tuple[RunState, Array]:
        return step(plan, data, {**fixed, **row}, state)

    def recorded(state: RunState, losses: Array) -> Records:
        return record(plan, data, hparams, state, mean_loss(state, losses))

    return walk(steps, plan.record_every, one, recorded, state, rows, loop)


@functools.partial(jax.jit, static_argnums=(0, 1))
def advance(plan: Plan, steps: int, data: Data, hparams: HParams, state: RunState):
    """Compile and run `steps_of`."""
    return steps_of(plan, steps, data, hparams, state)


def outcome(plan: Plan, data: Data, hparams: HParams, state: RunState) -> Outcome:
    """Judge a run that ends in `state`."""
    numbers = hparams_at(plan, hparams, state.params, state.step)
    final_loss = plan.objective(judged_params(plan, state), state.model_state, data, numbers)
    finite = jnp.isfinite(final_loss) & _all_finite(state.params)
    diverged_at = jnp.where(~finite & (state.diverged_at < 0), state.step, state.diverged_at)
    status = jnp.full((), Status.COMPLETED, jnp.int32)
    if plan.tolerance is not None:
        status = jnp.where(state.gradient <= plan.tolerance, Status.CONVERGED, status)
    status = jnp.where(diverged_at >= 0, Status.DIVERGED, status).astype(jnp.int32)
    return Outcome(final_loss, status, diverged_at)


@functools.partial(jax.jit, static_argnums=0)
def finish(
    plan: Plan, data: Data, hparams: HParams, start: PyTree, state: RunState, records: Records
) -> Trajectory:
    """Return the trajectory of a run from the parameters `start` to `state`."""
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
        **outcome(plan, data, hparams, state)._asdict(),
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(
    plan: Plan, data: Data, hparams: HParams, key: Key, loop: Loop = jax.lax.scan
) -> Trajectory:
    """Carry out the whole run in one program."""
    start = init(plan, data, hparams, key)
    end, records = steps_of(plan, plan.steps, data, hparams, start, loop)
    return finish(plan, data, hparams, start.params, end, records)
