"""The exact number of steps of the noisy quadratic to a target, and the rate that needs fewest.

The count at a rate is the first step whose risk is at or below the target. The search walks along
the run in strides of 2ʲ steps, each one map of the moments (`optjax.theory.moments`): longer and
longer while the target is far, shorter and shorter once a stride has passed it.

Each coordinate's moment of SGD rises or falls monotonically, so that

    ½Σ h min(s_a, s_b) > target

excludes that the risk has dipped to the target between steps a and b: for SGD the count is exactly
the first such step. With momentum the risk may oscillate; a stride is then at most 1/16 of the
steps so far, and a shorter dip can be missed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optjax.support.errors import UserError, whole
from optjax.support.types import Array
from optjax.theory.moments import Steps, after, looked_at, moved, one_step, start, steps_at_once
from optjax.theory.noisy_quadratic import NoisyQuadratic, numbers, require_above, risk, seen

MAX_STEPS = 2**24
_PER_STRIDE = 16  # where the risk may oscillate, a stride is at most 1/16 of the steps so far


def checked_steps(max_steps: int) -> int:
    """Check a bound on the steps, beyond which an int32 can still count.

    Raises:
      UserError: it is not a whole number from 1 to 2³⁰.
    """
    if whole("max_steps", max_steps, 1) > 2**30:
        raise UserError(f"max_steps is {max_steps}: expected at most 2**30")
    return int(max_steps)


class Reached(NamedTuple):
    """The step at which a run reaches the target."""

    steps: Array  # () the first step at or below the target; ∞ if none is
    crossing: Array  # () where log risk, a line between two steps, crosses the target


class Fewest(NamedTuple):
    """The rate that reaches the target in the fewest steps."""

    rate: Array  # () α
    steps: Array  # () ∞ if no rate reaches the target
    crossing: Array  # () as in `Reached`
    gradient: Array  # () ∂ log risk / ∂ log α at the crossing: 0 where no rate nearby is better


class _Walk(NamedTuple):
    """The state of a search along a run."""

    t: Array  # () int32, steps done; the target is not reached up to here
    moments: Array  # (m, m, d) after them
    level: Array  # () int32, j: the next stride is 2ʲ steps
    closing: Array  # () bool, the target is reached at t + 2ʲ⁺¹
    found: Array  # () bool, the target is reached at t + 1
    over: Array  # () bool


def steps_to(
    model: NoisyQuadratic, target: ArrayLike, rate: ArrayLike, *, max_steps: int = MAX_STEPS
) -> Reached:
    """Count the steps at one rate until the risk is at or below the target.

    ``steps`` is exact to rounding: use float64 for counts above a few hundred thousand.
    ``crossing`` lies between ``steps − 1`` and ``steps``; its derivatives, by the rate and
    the model, are those of the implicit function risk(t, ·) = target.

    Args:
      model: from `noisy_quadratic`.
      target: () risk to reach, above 0.
      rate: () learning rate α, above 0.
      max_steps: end of the search; a run that needs more steps counts as one that never arrives.

    Raises:
      UserError: target or rate is not positive; max_steps is not a whole number in range.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> [float(steps_to(noisy_quadratic([1.0], [0.0]), 0.01, rate).steps) for rate in (0.5, 3.0)]
    [3.0, inf]

    Source: Zhang et al. 2019 (arXiv:1907.04164), section 5, there with a spectrum in bins.
    """
    target, rate = (
        numbers(n, v, 0, model.h.dtype) for n, v in (("target", target), ("rate", rate))
    )
    require_above("target", target)
    require_above("rate", rate)
    return _steps_to(model, target, rate, checked_steps(max_steps))


@functools.partial(jax.jit, static_argnums=3)
def _steps_to(model: NoisyQuadratic, target: Array, rate: Array, max_steps: int) -> Reached:
    """Compute `steps_to`, unchecked; differentiate the last step of the search alone."""
    fixed = jax.lax.stop_gradient((model, target, rate))
    walk = _walked(*fixed, max_steps)
    # Repeat the way to the crossing, differentiably.
    t = jnp.where(walk.found, walk.t, 0)
    before = steps_at_once(model, start(model), rate, t, max_steps)
    return _reached(model, target, rate, walk, before)


def _reached(
    model: NoisyQuadratic, target: Array, rate: Array, walk: _Walk, before: Array
) -> Reached:
    """Convert a finished walk to a `Reached`; `before` are the moments where it ended."""
    count = (walk.t + 1).astype(model.h.dtype)
    first = risk(model, looked_at(model, start(model))) <= target
    steps = jnp.where(first, 0, jnp.where(walk.found, count, jnp.inf))
    low = risk(model, looked_at(model, moved(one_step(model, rate), before)))
    high = risk(model, looked_at(model, before))
    there = walk.found & (low < high) & ~first
    share = jnp.log(jnp.where(there, high / target, 2)) / jnp.log(jnp.where(there, high / low, 2))
    return Reached(steps, jnp.where(there, steps - 1 + share, steps))


def _walked(model: NoisyQuadratic, target: Array, rate: Array, max_steps: int) -> _Walk:
    """Walk along a run until it reaches the target, or no longer can."""
    levels = max_steps.bit_length()
    powers = jax.lax.scan(
        lambda power, _: (after(power, power), power), one_step(model, rate), None, length=levels
    )[1]
    steady = model.momentum is None and model.average is None
    half = 0.5 * model.h

    def unfinished(walk: _Walk) -> Array:
        return ~walk.over

    def stride(walk: _Walk) -> _Walk:
        power = jax.tree.map(lambda x: x[walk.level], powers)
        moments = moved(Steps(*power), walk.moments)
        a, b = looked_at(model, walk.moments), looked_at(model, moments)
        here = jnp.sum(half * b)
        least = jnp.sum(half * jnp.minimum(a, b))
        rising = jnp.sum(jnp.where(b >= a, half * b, 0))
        hit, single = here <= target, walk.level == 0
        finite = jnp.all(jnp.isfinite(moments))
        accept = jnp.where(single, ~hit, least > target) & finite
        t = jnp.where(accept, walk.t + (1 << walk.level), walk.t)
        # Lengthen, unless the target is known to lie within that distance.
        longest = jnp.where(walk.closing, 0, t if steady else t // _PER_STRIDE)
        longer = (2 << walk.level <= jnp.maximum(longest, 1)) & (walk.level < levels - 1)
        shorter = jnp.maximum(walk.level - 1, 0)
        onward = jnp.where(walk.closing, shorter, jnp.where(longer, walk.level + 1, walk.level))
        level = jnp.where(accept, onward, shorter)
        lost = (single & ~finite) | (t >= max_steps)
        if steady:  # a rising moment keeps rising
            lost |= accept & (rising > target)
        return _Walk(
            t=t,
            moments=jnp.where(accept, moments, walk.moments),
            level=level,
            closing=jnp.where(accept, walk.closing, hit),
            found=hit & single & finite,
            over=lost | (hit & single),
        )

    no = jnp.array(False)
    zero = jnp.zeros((), jnp.int32)
    over = jnp.sum(half * model.s0) <= target
    return jax.lax.while_loop(unfinished, stride, _Walk(zero, start(model), zero, no, no, over))


_GRID, _NEWTON, _ROUNDS = 64, 20, 12


def fewest_steps(model: NoisyQuadratic, target: ArrayLike, *, max_steps: int = MAX_STEPS) -> Fewest:
    """Find the constant rate that reaches the target in the fewest steps, by gradient.

    Two grids, the second around the best of the first, bracket the rate. Two steps then alternate:
    find where the risk crosses the target, and the rate of least log risk there (Newton's method on
    the hypergradient ∂ log risk / ∂ log α of the run). The search ends when the crossing comes no
    earlier. With momentum the risk at large rates oscillates and the count has many minima: the
    rate is then the best of the grids and their neighbourhood. The rate and the crossing are
    differentiable by the model.

    The arguments are those of `steps_to`.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> best = fewest_steps(noisy_quadratic([1.0, 0.1], batch_size=100), 0.02)
    >>> float(best.steps), round(float(best.rate), 2)
    (6.0, 1.19)
    """
    target = numbers("target", target, 0, model.h.dtype)
    require_above("target", target)
    return _fewest(model, target, checked_steps(max_steps))


class _At(NamedTuple):
    """A candidate rate and its crossing."""

    x: Array  # () log α
    steps: Array  # () int32
    share: Array  # () the crossing lies at steps − 1 + share
    gains: Array  # () bool
    rounds: Array  # () int32


@functools.partial(jax.jit, static_argnums=2)
def _fewest(model: NoisyQuadratic, target: Array, max_steps: int) -> Fewest:
    def log_risk(x: Array, steps: Array, share: Array, model: NoisyQuadratic) -> Array:
        """Return log risk on the line between two steps, at a fixed crossing."""
        rate = jnp.exp(x)
        missed = jnp.maximum(steps - 1, 0)
        before = steps_at_once(model, start(model), rate, missed, max_steps)
        then = moved(one_step(model, rate), before)
        logs = [jnp.log(risk(model, looked_at(model, moments))) for moments in (before, then)]
        return (1 - share) * logs[0] + share * logs[1]

    fixed, goal = jax.lax.stop_gradient((model, target))
    slope = jax.jacfwd(log_risk)
    curved = jax.jacfwd(lambda *args: (slope(*args),) * 2, has_aux=True)

    def reached(x: Array) -> tuple[Array, Array]:
        walk = _walked(fixed, goal, jnp.exp(x), max_steps)
        found = _reached(fixed, goal, jnp.exp(x), walk, walk.moments)
        reached = jnp.isfinite(found.steps)
        count = jnp.where(reached, found.steps, 0)
        share = jnp.where(reached, found.crossing - (count - 1), 1)
        # As integers: float32 may not hold max_steps + 1.
        return jnp.where(reached, count.astype(jnp.int32), max_steps + 1), share

    def tried(grid: Array) -> tuple[Array, tuple[Array, Array]]:
        """Return the best rate of a grid, and the next but one on both sides."""
        steps, share = jax.lax.map(reached, grid)
        i = jnp.argmin(steps.astype(share.dtype) + share)
        return grid[i], (grid[jnp.maximum(i - 2, 0)], grid[jnp.minimum(i + 2, _GRID - 1)])

    near = tried(_rates_worth_trying(fixed))[1]
    x, ends = tried(jnp.linspace(*near, _GRID, dtype=fixed.h.dtype))

    def better(at: _At) -> Array:
        """Return the rate of least risk at the crossing, between the ends."""

        def newton(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, low, high = carry
            curvature, falls = curved(x, at.steps, at.share, fixed)
            low, high = jnp.where(falls < 0, x, low), jnp.where(falls < 0, high, x)
            # Past the edge of stability the slope is exponential in x, and its arsinh a line.
            root = jnp.arcsinh(falls) * jnp.sqrt(1 + falls**2)
            step = x - root / jnp.where(curvature > 0, curvature, 1)
            inside = (curvature > 0) & (step > low) & (step < high)
            return jnp.where(inside, step, (low + high) / 2), low, high

        return jax.lax.fori_loop(0, _NEWTON, newton, (at.x, *ends))[0]

    def once(at: _At) -> _At:
        x = better(at)
        steps, share = reached(x)
        old, new = (n.astype(s.dtype) + s for n, s in ((at.steps, at.share), (steps, share)))
        kept, gains = new <= old, new < old * (1 - 1e-10)
        other = _At(x, steps, share, gains, at.rounds + 1)
        return jax.tree.map(
            lambda a, b: jnp.where(kept, a, b),
            other,
            at._replace(gains=jnp.array(False), rounds=at.rounds + 1),
        )

    steps, share = reached(x)
    possible = steps <= max_steps
    first = _At(x, steps, share, possible & (steps > 0), jnp.zeros((), jnp.int32))
    best = jax.lax.while_loop(lambda at: at.gains & (at.rounds < _ROUNDS), once, first)
    curvature, falls = curved(best.x, best.steps, best.share, fixed)
    # Another step of Newton's method, for its derivative by the model alone: the crossing moves
    # with the model, and not with the rate.
    crossing = _steps_to(model, target, jnp.exp(best.x), max_steps).crossing
    share = crossing - (best.steps - 1).astype(crossing.dtype)
    falls_again = slope(best.x, best.steps, jnp.where(possible, share, 1), model)
    moves = falls_again / jnp.where(curvature > 0, curvature, 1)
    rate = jnp.exp(best.x - jnp.where(curvature > 0, moves - jax.lax.stop_gradient(moves), 0))
    count = jnp.where(possible, best.steps.astype(model.h.dtype), jnp.inf)
    return Fewest(rate, count, crossing, falls)


def _rates_worth_trying(model: NoisyQuadratic) -> Array:
    """Return log α from where all coordinates are slow to where the sharpest is unstable."""
    k = seen(model)[0]
    beta = 0 if model.momentum is None else model.momentum
    limit = 2 * (1 + jnp.asarray(beta, k.dtype)) / jnp.max(k)
    return jnp.log(limit) + jnp.linspace(jnp.log(1e-7), 0.2, _GRID, dtype=k.dtype)
