"""Many robust fits at once: damped Newton steps in float64, lanes that take fit after fit.

With δ = 1e-3 the Huber objective is nearly a sum of absolute values: its Hessian sees the few runs
within δ alone and may have either sign, and quasi-Newton methods need fifty evaluations to learn
it. A step here solves (H + λG)s = −g, H exact and G the majoriser of iteratively reweighted least
squares: λ → 0 is Newton's method, which ends in few steps once the runs within δ stay the same; a
large λ is a small step in the metric of the reweighted problem. λ falls by 10 after a step that
lowers the objective and rises by 4 after one that does not, or whose matrix is not positive.

Most fits end in eight steps and few need thirty. So a tile is a queue of fits and fewer lanes that
step together; a lane whose fit has ended takes the next one, and none waits for the slowest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optjax.scaling.forms import Form, Parts
from optjax.support.console import silent
from optjax.support.machine import concurrent_map, threads
from optjax.support.types import Array

Progress = Callable[[str, float], None]
_TOLERANCE = 1e-10  # of the decrease that a step promises, relative to the objective
_ITERATIONS = 200
_DAMPING = 1e-2
_POINTS = 1 << 13  # runs × lanes of a tile: its arrays stay in a core's cache
_QUEUE = 16  # fits per lane of a tile


class Minima(NamedTuple):
    """The ends of the fits."""

    theta: Any  # (fits, p) float64
    objective: Any  # (fits,) float64
    converged: Any  # (fits,) bool: the next step promises no decrease
    steps: Any  # (fits,) int32


class _Lane(NamedTuple):
    """The state of one fit."""

    theta: Array  # (p,)
    parts: Any  # Parts at θ
    damping: Array  # () λ
    steps: Array  # () int32
    done: Array  # () bool
    converged: Array  # () bool


class _State(NamedTuple):
    """The state of a tile."""

    lanes: Any  # _Lane, each field (lanes, ...)
    fit: Array  # (lanes,) int32, index of its fit in the queue; beyond the queue: none
    taken: Array  # () int32, fits that some lane has taken
    ends: Minima  # each field (queue, ...)


def lanes_of(points: int) -> int:
    """Return how many fits of so many runs step together."""
    return max(1, min(32, _POINTS // max(points, 1)))


def memory(form: Form, points: int, lanes: int | None = None) -> int:
    """Count the bytes that the tiles in flight hold at once, whatever the number of fits.

    A tile keeps the weights of its queue and, per lane and run, the rows of sums (3 and twice 6 for
    Hoffmann's law) or the Jacobian and its derivatives, with as many again while they are computed.

    >>> from optjax.scaling.forms import FORMS
    >>> memory(FORMS["hoffmann"], 240, 32) < 2**23 * threads()
    True
    """
    terms = form.powers + form.floor
    rows = terms + terms * (terms + 1) if form.powers else form.parameters * (form.parameters + 2)
    tile = lanes_of(points) if lanes is None else lanes
    return threads() * tile * points * 8 * (_QUEUE + 2 * rows + 12)


def minimise(
    form: Form,
    z: np.ndarray,
    y: np.ndarray,
    weights: Callable[[int, int], Any],
    starts: np.ndarray,
    *,
    delta: float = 1e-3,
    progress: Progress = silent,
    text: str = "fits",
) -> Minima:
    """Minimise the objective of every fit from its start.

    Args:
      form: the law.
      z: (k, n) centred log sizes.
      y: (n,) log losses.
      weights: (first, count) -> (count, n), those of a tile's fits, made when the tile is run.
      starts: (fits, p) θ to start from.
      delta: δ of the Huber loss.
      progress: called after each tile with a text and the share done.
      text: name of the fits in that text.

    Returns:
      The end of each fit, in float64 whatever the precision of the process.
    """
    count, lanes = len(starts), lanes_of(len(y))
    queue = _QUEUE * lanes
    firsts = range(0, count, queue)
    done = 0

    def one(first: int) -> Minima:
        nonlocal done
        here = min(queue, count - first)
        # Filled up, so that one program serves all tiles.
        w, start = np.zeros((queue, len(y))), np.zeros((queue, starts.shape[1]))
        w[:here], start[:here] = weights(first, here), starts[first : first + here]
        found = _tile(form, lanes, z, y, w, start, np.int32(here), delta)
        result = Minima(*(np.asarray(x)[:here] for x in found))
        done += here
        progress(f"{done} of {count} {text}", done / count)
        return result

    with jax.enable_x64(True):
        pieces = concurrent_map(one, firsts)
    return Minima(*(np.concatenate(x) for x in zip(*pieces, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tile(
    form: Form, lanes: int, z: Array, y: Array, w: Array, starts: Array, count: Array, delta: Array
) -> Minima:
    """Run the first `count` fits of a queue on so many lanes."""
    queue, p = starts.shape
    least = 1e-12 * delta**2 * y.shape[0]
    empty = Minima(
        *(jnp.zeros_like(starts), jnp.zeros_like(starts[:, 0])),
        *(jnp.zeros(queue, bool), jnp.zeros(queue, jnp.int32)),
    )
    eye = jnp.eye(p, dtype=starts.dtype)

    def fresh(theta: Array) -> _Lane:
        """Make a lane whose first step does not move, and so evaluates the objective at θ."""
        no, worst = jnp.zeros((), bool), jnp.full((), jnp.inf, theta.dtype)
        first = Parts(worst, jnp.zeros_like(theta), eye, eye)
        damping = jnp.full((), 10 * _DAMPING, theta.dtype)
        return _Lane(theta, first, damping, jnp.full((), -1, jnp.int32), no, no)

    def step(state: _State) -> _State:
        at = jnp.minimum(state.fit, queue - 1)

        def one(lane: _Lane, w: Array) -> _Lane:
            return _step(lane, lambda theta: form.parts(theta, z, y, w, delta), least)

        now = jax.vmap(one)(state.lanes, w[at])
        busy = state.fit < count
        finished = now.done & busy
        where = jnp.where(finished, state.fit, queue)
        found = Minima(now.theta, now.parts.value, now.converged, now.steps)
        ends = jax.tree.map(lambda all, x: all.at[where].set(x, mode="drop"), state.ends, found)
        order = jnp.cumsum(finished, dtype=jnp.int32)
        fit = jnp.where(finished, state.taken + order - 1, state.fit)
        new = jax.vmap(fresh)(starts[jnp.minimum(fit, queue - 1)])

        def chosen(a: Array, b: Array) -> Array:
            return jnp.where(finished.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return _State(jax.tree.map(chosen, new, now), fit, state.taken + order[-1], ends)

    fit = jnp.arange(lanes, dtype=jnp.int32)
    first = _State(jax.vmap(fresh)(starts[:lanes]), fit, jnp.full((), lanes, jnp.int32), empty)
    return jax.lax.while_loop(lambda state: jnp.any(state.fit < count), step, first).ends


def _step(lane: _Lane, parts: Callable[[Array], Parts], least: Array) -> _Lane:
    """Take a damped Newton step, where it does not raise the objective."""
    theta, (value, g, hessian, major), damping = lane.theta, lane.parts, lane.damping
    ridge = 1e-9 * jnp.trace(major) * jnp.eye(theta.shape[0], dtype=theta.dtype)
    move = -_solve(hessian + damping * (major + ridge), g)
    sound = jnp.all(jnp.isfinite(move))
    move = jnp.where(sound, move, 0)
    promised = -jnp.sum(g * move)
    new = parts(theta + move)
    better = sound & (new.value <= value)
    # At the minimum rounding alone decides whether the objective falls; on exact data it is 0.
    small = promised <= _TOLERANCE * (value + least)
    ends = sound & small & (damping < 1) & jnp.isfinite(value)
    theta, kept = jax.tree.map(
        lambda a, b: jnp.where(better, a, b), (theta + move, new), (theta, lane.parts)
    )
    damping = jnp.where(better, damping / 10, 4 * jnp.maximum(damping, 1e-3))
    steps = lane.steps + 1
    done = ends | (damping > 1e12) | (steps >= _ITERATIONS)
    return _Lane(theta, kept, damping, steps, done, ends)


def _solve(matrix: Array, g: Array) -> Array:
    """Solve by Cholesky, written out (LAPACK is slow on 5 × 5); NaN if not positive definite."""
    p = g.shape[0]
    low: list[list[Any]] = [[None] * p for _ in range(p)]
    for j in range(p):
        for i in range(j, p):
            rest = matrix[i, j] - sum(low[i][k] * low[j][k] for k in range(j))
            low[i][j] = jnp.sqrt(rest) if i == j else rest / low[j][j]
    half: list[Any] = []
    for i in range(p):
        half.append((g[i] - sum(low[i][k] * half[k] for k in range(i))) / low[i][i])
    x: list[Any] = [None] * p
    for i in reversed(range(p)):
        x[i] = (half[i] - sum(low[k][i] * x[k] for k in range(i + 1, p))) / low[i][i]
    return jnp.stack(x)
