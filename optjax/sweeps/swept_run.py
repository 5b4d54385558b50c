"""One run of a sweep as its compiled programs see it: how it starts, advances and is judged."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optjax.run.computation import Computation, Finished
from optjax.run.problems import Data
from optjax.support.keys import make_key
from optjax.support.types import Array, HParams, PyTree


class SweptRun(NamedTuple):
    """What persists of a run of a sweep from one record to the next."""

    state: Any  # of the computation; its `step` is None: all runs of a batch share one clock
    rules: tuple[PyTree, ...]  # the state of each stop rule
    stopped_at: Array  # () int32, the step of the record at which a rule stopped it; −1
    stopped_by: Array  # () int32, which rule; −1


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """The static part of a group's programs."""

    computation: Computation
    rules: tuple[Any, ...]
    capacity: int  # records that one call can hold
    drop_diverged: bool


class Inputs(NamedTuple):
    """What a run is given."""

    hparams: HParams
    which: Any  # () int32, which of the stacked data are its own; None: all share theirs


def first(tree: PyTree) -> PyTree:
    """Shapes of one run, of arrays of several."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tree)


def likes(spec: RunSpec, data: Data, inputs: Inputs, seeds: Any) -> tuple[SweptRun, SweptRun]:
    """Shapes and dtypes of a run, and of it with its keys as numbers.

    Args:
      data: shared, or stacked where the inputs say which. inputs, seeds: of a batch of runs.
    """
    data = data if inputs.which is None else first(data)
    run = jax.eval_shape(functools.partial(start, spec), data, first(inputs.hparams), first(seeds))
    return run, jax.eval_shape(plain, run)


def shapes(spec: RunSpec, data: Data, inputs: Inputs, seeds: Any) -> tuple[Any, Finished]:
    """Shapes of a record and of what a run ends with; arguments as of `likes`."""

    def whole(data: Data, hparams: HParams, seed: Array) -> Any:
        computation = spec.computation
        state = computation.start(data, hparams, make_key(seed))
        one = jnp.ones((), jnp.int32)
        state, values = computation.advance(data, hparams, state, one)
        return values, computation.finish(data, hparams, state)

    data = data if inputs.which is None else first(data)
    return jax.eval_shape(whole, data, first(inputs.hparams), first(seeds))


def start(spec: RunSpec, data: Data, hparams: HParams, seed: Array) -> SweptRun:
    """Start the run."""
    state = spec.computation.start(data, hparams, make_key(seed))
    never = jnp.full((), -1, jnp.int32)
    rules = tuple(rule.init() for rule in spec.rules)
    return SweptRun(state._replace(step=None), rules, never, never)


@functools.partial(jax.jit, static_argnums=0)
def advance(
    spec: RunSpec, data: Data, hparams: HParams, run: SweptRun, step: Array, every: Array
) -> tuple[SweptRun, dict[str, Array]]:
    """Advance by `every` steps and record; a run that has stopped stays as it is."""
    before = run.state._replace(step=step)
    state, values = spec.computation.advance(data, hparams, before, every)
    fresh = run._replace(state=state._replace(step=None))
    if not spec.rules:
        return fresh, values
    rules = []
    for i, rule in enumerate(spec.rules):
        rule_state, fires = rule.update(run.rules[i], state.step, values)
        rules.append(rule_state)
        now = fires & (fresh.stopped_at < 0)
        if spec.drop_diverged:
            now &= state.diverged_at < 0
        fresh = fresh._replace(
            stopped_at=jnp.where(now, state.step, fresh.stopped_at).astype(jnp.int32),
            stopped_by=jnp.where(now, i, fresh.stopped_by).astype(jnp.int32),
        )
    fresh = fresh._replace(rules=tuple(rules))
    stopped = run.stopped_at >= 0
    return jax.tree.map(functools.partial(jnp.where, stopped), run, fresh), values


def finish(spec: RunSpec, data: Data, hparams: HParams, run: SweptRun, step: Array) -> Finished:
    """Judge the run at a step."""
    return spec.computation.finish(data, hparams, run.state._replace(step=step))


def plain(tree: PyTree) -> PyTree:
    """Keys as the numbers they are, so that all leaves can be saved and moved."""

    def leaf(a: Any) -> Any:
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(a) if is_key else a

    return jax.tree.map(leaf, tree)


def typed(tree: PyTree, like: PyTree) -> PyTree:
    """Invert `plain`, where `like` has the dtypes of one run."""

    def leaf(a: Any, kind: Any) -> Any:
        is_key = jnp.issubdtype(kind.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(a, impl=_generator(kind)) if is_key else a

    return jax.tree.map(leaf, tree, like)


def _generator(kind: Any) -> Any:
    """Return the generator of a key of which only shape and dtype are known."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), kind)
    return found[0]
