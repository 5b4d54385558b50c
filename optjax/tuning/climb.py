"""One outer step of every start: look at its runs, then move on or come back."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax.hypergradients import kept_bytes
from optjax.hypergradients.hypergradient import HypergradFn, Pinned
from optjax.run.core import Status
from optjax.run.problems import Data
from optjax.support.types import Array, HParams, PyTree
from optjax.tuning.space import Space, named_leaves


class Climber(NamedTuple):
    """Where one start has come to."""

    u: HParams  # the point to look at next
    good: HParams  # its last point whose runs stayed finite
    known: Array  # () bool, whether there is one
    opt_state: PyTree


class State(NamedTuple):
    """Where all starts have come to."""

    climbers: Climber  # leaves (restarts, ...)
    best: HParams  # the best point seen
    value: Array  # () of it; infinite before there is one


@dataclasses.dataclass(frozen=True)
class Program:
    """The static part of an outer step; tunings of equal parts share what is compiled."""

    gradient: Pinned
    space: Space
    outer: optax.GradientTransformation
    starts: int  # side by side
    seeds: int  # of a start, side by side


def make_program(
    fn: HypergradFn,
    space: Space,
    outer: optax.GradientTransformation,
    theta: HParams,
    rest: HParams,
    restarts: int,
    seeds: int,
) -> Program:
    """With its mode chosen, and as many runs side by side as fit."""
    pinned = fn.pinned(theta, rest)
    fit = kept_bytes.lanes(pinned.mode, fn.job, fn.run.problem.data, theta, rest)
    starts = max(1, min(restarts, fit // seeds))
    return Program(pinned, space, outer, starts, min(seeds, fit))


def start(program: Program, theta: HParams, restarts: int, spread: float, seed: int) -> State:
    """The given start first, the others drawn about it."""
    centre = program.space.outside(theta)
    leaves, structure = jax.tree.flatten(centre)
    rng = np.random.default_rng(seed)
    moved = []
    for leaf in leaves:
        shift = spread * rng.normal(size=(restarts, *leaf.shape))
        shift[0] = 0
        moved.append(leaf[None] + jnp.asarray(shift, leaf.dtype))
    u = jax.tree.unflatten(structure, moved)
    climbers = Climber(u, u, jnp.zeros(restarts, bool), jax.vmap(program.outer.init)(u))
    return State(climbers, centre, jnp.asarray(jnp.inf, leaves[0].dtype))


@functools.partial(jax.jit, static_argnums=0)
def advance(
    program: Program, data: Data, rest: HParams, state: State, seeds: Array
) -> tuple[State, dict[str, Array]]:
    """Every start's next point, and what was seen at the points before it, (restarts, ...)."""
    climbers = state.climbers
    seen, slope = jax.lax.map(
        lambda u: _look(program, data, rest, u, seeds), climbers.u, batch_size=program.starts
    )
    values = jnp.where(seen["finite"], seen["value"], jnp.inf).astype(state.value.dtype)
    r = jnp.argmin(values)
    best = _pick(values[r] < state.value, jax.tree.map(lambda u: u[r], climbers.u), state.best)
    value = jnp.minimum(values[r], state.value)
    move = functools.partial(_moved, program, best, jnp.isfinite(value))
    return State(jax.vmap(move)(climbers, slope, seen["finite"]), best, value), seen


def _look(
    program: Program, data: Data, rest: HParams, u: HParams, seeds: Array
) -> tuple[dict[str, Array], HParams]:
    """A point's value and the like, and dF/du (0 where it is not finite)."""
    theta = program.space.inside(u)

    def alone(seed: Array) -> Any:
        return program.gradient.pure(data, {**rest, **theta}, jax.random.key(seed))

    if program.seeds < len(seeds):
        each = jax.lax.map(alone, seeds, batch_size=program.seeds)
    else:
        each = jax.vmap(alone)(seeds)
    by_u = program.space.pulled_back(u, jax.tree.map(lambda g: jnp.mean(g, axis=0), each.gradient))
    # Squares, as optimisers keep them: where they overflow a step of Adam would be 0 for good.
    squares = sum(jnp.sum(g * g) for g in jax.tree.leaves(by_u))
    finite = jnp.all(each.finite) & jnp.isfinite(squares)
    seen = {
        "value": jnp.where(finite, jnp.mean(each.value), jnp.nan),
        "finite": finite,
        "diverged": jnp.any(each.status == Status.DIVERGED),
        "gradient_norm": jnp.where(finite, jnp.sqrt(squares), jnp.nan),
        **named_leaves(theta),
    }
    if len(seeds) > 1:
        spread = jnp.std(each.value, ddof=1)
        error = spread / jnp.sqrt(jnp.asarray(len(seeds), spread.dtype))
        seen["value_error"] = jnp.where(finite, error, jnp.nan)
    return seen, jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), by_u)


def _moved(
    program: Program, best: HParams, found: Array, one: Climber, slope: HParams, finite: Array
) -> Climber:
    """A step of the outer optimiser; from a point that diverged, half-way back."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = program.outer.update(slope, one.opt_state, one.u)
        ahead = optax.apply_updates(one.u, updates)
    sound = finite & jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(ahead)])
    )
    home = _pick(one.known, one.good, best)
    half = jax.tree.map(lambda u, h: h + 0.5 * (u - h), one.u, home)
    back = _pick(one.known | found, half, program.space.shrunk(one.u))
    return Climber(
        _pick(sound, ahead, _pick(finite, one.u, back)),
        _pick(finite, one.u, one.good),
        one.known | finite,
        _pick(sound, opt_state, one.opt_state),
    )


def _pick(which: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old)
