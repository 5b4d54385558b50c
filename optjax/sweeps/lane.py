"""One run of a sweep as its compiled programs see it: how it starts, goes on and is judged."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optjax.run import core
from optjax.run.core import Plan, RunState
from optjax.run.problems import Data
from optjax.support.types import Array, HParams, PyTree

Final = Callable[[PyTree, PyTree, Data], Mapping[str, Array]]
"""(params, model_state, data) → what is kept of a run that has ended, by name."""


class Lane(NamedTuple):
    """What persists of a run of a sweep from one record to the next."""

    run: RunState  # its `step` is None here: all lanes of a block share one clock
    rules: tuple[PyTree, ...]  # the state of each stop rule
    stopped_at: Array  # () int32, the step of the record at which a rule stopped it; −1
    stopped_by: Array  # () int32, which rule; −1


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one lane computes: the static part of a bucket's programs."""

    plan: Plan
    rules: tuple[Any, ...]
    capacity: int  # records that one call can hold
    drop_diverged: bool
    final: Final | None = None


class Inputs(NamedTuple):
    """What a run is given."""

    hparams: HParams
    which: Any  # () int32, which of the stacked data are its own; None: all share theirs


def likes(spec: Spec, data: Data, inputs: Inputs, seeds: Array) -> tuple[Lane, Lane]:
    """Shapes and dtypes of one lane, and of it with its keys as numbers.

    Args:
      data: shared, or stacked where the inputs say which. inputs, seeds: of a block, for theirs.
    """

    def first(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tree)

    data = data if inputs.which is None else first(data)
    args = data, first(inputs.hparams), first(seeds)
    typed_ = jax.eval_shape(functools.partial(start, spec), *args)
    return typed_, jax.eval_shape(plain, typed_)


def start(spec: Spec, data: Data, hparams: HParams, seed: Array) -> Lane:
    """The lane before its first step."""
    state = core.init(spec.plan, data, hparams, jax.random.key(seed))
    never = jnp.full((), -1, jnp.int32)
    rules = tuple(rule.init() for rule in spec.rules)
    return Lane(state._replace(step=None), rules, never, never)


# Compiled in themselves, so that JAX traces each once, however often it asks for its shapes.
_step = functools.partial(jax.jit, static_argnums=0)(core.step)


@functools.partial(jax.jit, static_argnums=0)
def record(
    spec: Spec, data: Data, hparams: HParams, lane: Lane, step: Array, every: Array
) -> tuple[Lane, dict[str, Array]]:
    """`every` steps and what is recorded after them; a lane that has stopped stays as it is."""
    start = lane.run._replace(step=step)
    kind = jax.eval_shape(functools.partial(_step, spec.plan), data, hparams, start)[1]

    def one(_: Array, carry: tuple[RunState, Array]) -> tuple[RunState, Array]:
        state, loss = _step(spec.plan, data, hparams, carry[0])
        return state, carry[1] + loss.astype(carry[1].dtype)

    # A sum over many steps loses too much in half precision.
    wide = widened(kind.dtype)
    state, total = lax.fori_loop(0, every, one, (start, jnp.zeros((), wide)))
    numbers = core.split(spec.plan, hparams, state.params, state.step - 1)[1]
    values = {
        "loss": (total / every.astype(wide)).astype(kind.dtype),
        **spec.plan.metrics(state.params, state.model_state, data, numbers),
    }
    fresh = lane._replace(run=state._replace(step=None))
    if not spec.rules:
        return fresh, values
    rules = []
    for i, rule in enumerate(spec.rules):
        rule_state, fires = rule.update(lane.rules[i], state.step, values)
        rules.append(rule_state)
        first = fires & (fresh.stopped_at < 0)
        if spec.drop_diverged:
            first &= state.diverged_at < 0
        fresh = fresh._replace(
            stopped_at=jnp.where(first, state.step, fresh.stopped_at).astype(jnp.int32),
            stopped_by=jnp.where(first, i, fresh.stopped_by).astype(jnp.int32),
        )
    fresh = fresh._replace(rules=tuple(rules))
    return _where(lane.stopped_at >= 0, lane, fresh), values


def widened(dtype: Any) -> Any:
    """A dtype to add and compare in: at least float32.

    >>> str(widened(jnp.dtype("bfloat16"))), str(widened(jnp.dtype("float64")))
    ('float32', 'float64')
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return jax.dtypes.canonicalize_dtype(float)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def _where(take: Array, one: PyTree, other: PyTree) -> PyTree:
    """`one` where `take` is true, leaf by leaf; keys too."""
    return jax.tree.map(functools.partial(jnp.where, take), one, other)


def outcome(
    spec: Spec, data: Data, hparams: HParams, lane: Lane, step: Array
) -> tuple[core.Outcome, dict[str, Array]]:
    """What the run of a lane has reached, and what is kept of it."""
    state = lane.run._replace(step=step)
    kept = {} if spec.final is None else spec.final(state.params, state.model_state, data)
    return core.outcome(spec.plan, data, hparams, state), dict(kept)


def plain(tree: PyTree) -> PyTree:
    """Keys as the numbers they are, so that all leaves can be saved and moved."""

    def leaf(a: Any) -> Any:
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(a) if is_key else a

    return jax.tree.map(leaf, tree)


def typed(tree: PyTree, like: PyTree) -> PyTree:
    """The inverse of `plain`, where `like` has the dtypes of one lane."""

    def leaf(a: Any, kind: Any) -> Any:
        is_key = jnp.issubdtype(kind.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(a, impl=_generator(kind)) if is_key else a

    return jax.tree.map(leaf, tree, like)


def _generator(kind: Any) -> Any:
    """The generator of a key of which only shape and dtype are known."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), kind)
    return found[0]
