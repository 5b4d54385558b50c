"""Learning rates for the noisy quadratic: greedy, constant, or the best schedule.

The greedy rate is the best for the next step alone. A larger rate gains in the flat directions,
which shows only after many steps: greedy schedules decay too early, the more so the longer the
horizon (short-horizon bias, Wu et al. 2018).

Each function takes a model from `noisy_quadratic` and a whole number T ≥ 1 of steps; UserError
otherwise, and where only plain SGD is meant and the model has momentum or an average.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optjax.support.errors import whole
from optjax.support.types import Array
from optjax.theory.moments import final_risk, risks, segments
from optjax.theory.noisy_quadratic import (
    NoisyQuadratic,
    moved,
    numbers,
    require_above,
    require_sgd,
    risk,
    seen,
)


class GreedySchedule(NamedTuple):
    """A schedule of greedy rates, and the risk along it."""

    rates: Array  # (T,)
    risks: Array  # (T + 1,) before the first step and after each


class BestSchedule(NamedTuple):
    """A schedule of least final risk, and how nearly stationary it is."""

    rates: Array  # (T,)
    risks: Array  # (T + 1,) before the first step and after each
    gradient: Array  # () largest |∂ log risk_T / ∂ log α_t| of a rate that is free to move
    sweeps: Array  # () int32, from the best start


def _least(k: Array, q: Array, s: Array, weight: Array, otherwise: ArrayLike) -> Array:
    """Return the rate that minimises Σ weight · s'; `otherwise` where no rate changes it."""
    gain, cost = jnp.sum(weight * k * s), jnp.sum(weight * (k**2 * s + q))
    return jnp.where(cost > 0, gain / jnp.where(cost > 0, cost, 1), otherwise)


def greedy_rate(model: NoisyQuadratic, s: Array) -> Array:
    """Return the rate of least risk after one step, η*; 0 where no rate changes the risk.

    α* = Σ hks / Σ h(k²s + q), without a preconditioner Σ h²s / Σ h(h²s + c/B)

    s (d,) are the second moments before the step. Plain SGD only.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> float(greedy_rate(noisy_quadratic([1.0], [1.0], batch_size=1), jnp.ones(1)))
    0.5

    Source: Wu et al. 2018 (arXiv:1803.02021), section 2, whose noise is c = h²σ².
    """
    require_sgd(model)
    return _greedy_rate(model, s)


def _greedy_rate(model: NoisyQuadratic, s: Array) -> Array:
    """Compute `greedy_rate`, unchecked."""
    k, q = seen(model)
    return _least(k, q, s, model.h, 0)


def greedy_schedule(
    model: NoisyQuadratic, steps: int, max_rate: ArrayLike = jnp.inf
) -> GreedySchedule:
    """Choose at every step the rate of least risk after it.

    The final risk is many times that of `best_schedule`. The risk is a parabola in the rate, so the
    best rate up to `max_rate` is the lesser of the two. Plain SGD only.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> [round(float(rate), 4) for rate in greedy_schedule(noisy_quadratic([1.0]), 3).rates]
    [0.5, 0.3333, 0.25]

    Source: Wu et al. 2018, section 2.
    """
    require_sgd(model)
    return _greedy_schedule(
        model, jnp.asarray(max_rate).astype(model.h.dtype), whole("steps", steps, 1)
    )


@functools.partial(jax.jit, static_argnums=2)
def _greedy_schedule(model: NoisyQuadratic, max_rate: Array, steps: int) -> GreedySchedule:
    k, q = seen(model)

    def one(s: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        rate = jnp.minimum(_least(k, q, s, model.h, 0), max_rate)
        s = moved(k, q, s, rate)
        return s, (rate, risk(model, s))

    rates, after = jax.lax.scan(one, model.s0, None, length=steps)[1]
    return GreedySchedule(rates, jnp.concatenate([risk(model, model.s0)[None], after]))


_GRID, _HALVINGS = 64, 48
_TRIAL = 5  # sweeps from each start of `best_schedule`


def best_constant_rate(model: NoisyQuadratic, steps: int) -> Array:
    """Return the constant rate of least risk after T steps, to rounding.

    A grid in log α brackets the rate and bisection on the sign of the slope narrows the bracket. A
    step of Newton's method ends the search and makes the rate differentiable by the model. The grid
    ends at α*/4T (α* the greedy rate), below which all of the risk falls, and at 1/min k, above
    which all grows.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> round(float(best_constant_rate(noisy_quadratic([1.0], [1.0]), 1)), 6)
    0.5
    """
    return _best_constant_rate(model, whole("steps", steps, 1))


@functools.partial(jax.jit, static_argnums=1)
def _best_constant_rate(model: NoisyQuadratic, steps: int) -> Array:
    def log_risk(x: Array, model: NoisyQuadratic) -> Array:
        return jnp.log(final_risk(model, jnp.exp(x), steps))

    slope = jax.grad(log_risk)
    fixed = jax.lax.stop_gradient(model)
    gentle = 1 if fixed.momentum is None else 1 - fixed.momentum
    low = jnp.log(gentle * _greedy_rate(fixed, fixed.s0) / (4 * steps))
    high = -jnp.log(jnp.min(seen(fixed)[0]))
    grid = jnp.linspace(low, high, _GRID)
    found = jax.lax.map(lambda x: log_risk(x, fixed), grid)
    i = jnp.argmin(jnp.where(jnp.isfinite(found), found, jnp.inf))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        falls = slope(middle, fixed) < 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    ends = grid[jnp.maximum(i - 1, 0)], grid[jnp.minimum(i + 1, _GRID - 1)]
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
    x = jax.lax.stop_gradient((low + high) / 2)
    curvature = jax.grad(slope)(x, fixed)
    newton = slope(x, model) / jnp.where(curvature > 0, curvature, 1)
    return jnp.exp(x - jnp.where(curvature > 0, newton, 0))


def best_schedule(
    model: NoisyQuadratic,
    steps: int,
    *,
    max_rate: ArrayLike | None = None,
    tolerance: float = 1e-11,
    max_sweeps: int = 200,
) -> BestSchedule:
    """Find the T rates of least risk after the last step.

    The derivative λ_t of the final risk by s_t is λ_T = h/2, λ_t = (1 − α_t k)²λ_{t+1}, and the
    hypergradient is ∂risk_T/∂α_t = 2α_t Σ λ_{t+1}(k²s_t + q) − 2Σ λ_{t+1}ks_t. The final risk is
    thus a parabola in any one rate, with its least value at

        α_t = Σ λ_{t+1}ks_t / Σ λ_{t+1}(k²s_t + q)

    which is the greedy rate with λ for the weights h. A sweep sets the rates so, one after the
    other, backwards and then forwards; it needs no line search and never raises the risk. Where
    noise is small there are several minima, some per cent apart: a few sweeps each are tried from
    `best_constant_rate`, from `greedy_schedule` and from max_rate throughout, and the best of the
    three is continued. The result is no worse than the first two, bounded by max_rate. The moments
    and λ are stored at √T steps and recomputed between: O(d√T) memory.

    Args:
      model, steps: as above.
      max_rate: () bound on the rates; by default 2/max k, beyond which a step makes the sharpest
        coordinate grow. Without a bound, huge rates that undo one another's damage (Agarwal et al.
        2021, "fractal" schedules) give still less risk, with many local minima and steps that
        floating point cannot undo.
      tolerance: sweeps end when no rate changes by more than this part of itself (float32: 1e-5).
      max_sweeps: bound on the sweeps.

    Returns:
      The schedule. Its risks are differentiable by the model (the rates are stationary, so they
      need not be differentiated); the rates themselves are not.

    Raises:
      UserError: also where max_rate is not positive. Plain SGD only.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> best = best_schedule(noisy_quadratic([1.0, 0.1]), 20)
    >>> bool(best.risks[-1] < greedy_schedule(noisy_quadratic([1.0, 0.1]), 20).risks[-1])
    True
    """
    require_sgd(model)
    if max_rate is None:
        max_rate = 2 / jnp.max(seen(model)[0])
    bound = numbers("max_rate", max_rate, 0, model.h.dtype)
    require_above("max_rate", bound)
    return _best_schedule(model, bound, whole("steps", steps, 1), float(tolerance), int(max_sweeps))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _best_schedule(
    model: NoisyQuadratic, max_rate: Array, steps: int, tolerance: float, max_sweeps: int
) -> BestSchedule:
    fixed, bound = jax.lax.stop_gradient((model, max_rate))
    flat = jnp.minimum(best_constant_rate(fixed, steps), bound)
    greedy = greedy_schedule(fixed, steps, bound).rates
    starts = jnp.stack([jnp.full(steps, flat), greedy, jnp.full(steps, bound)])

    def tried(start: Array) -> tuple[Array, Array]:
        rates = _swept(fixed, bound, start, tolerance, _TRIAL)[0]
        return rates, risks(fixed, rates)[-1]

    trials, ends = jax.lax.map(tried, starts)
    start = trials[jnp.argmin(jnp.where(jnp.isfinite(ends), ends, jnp.inf))]
    rates, sweeps = _swept(fixed, bound, start, tolerance, max_sweeps)

    def log_risk(rates: Array) -> Array:
        return jnp.log(risks(fixed, rates)[-1])

    slope = rates * jax.grad(log_risk)(rates)
    held = (rates >= bound) & (slope < 0)
    # A rate held at the bound moves with it, where the bound depends on the model.
    rates = jnp.where(held, max_rate, rates)
    gradient = jnp.max(jnp.where(held, 0, jnp.abs(slope)))
    return BestSchedule(rates, risks(model, rates), gradient, sweeps)


def _swept(
    model: NoisyQuadratic, bound: Array, rates: Array, tolerance: float, max_sweeps: int
) -> tuple[Array, Array]:
    """Improve `rates` by coordinate descent; return them and the number of sweeps."""
    k, q = seen(model)
    bounds_nm = segments(jnp.full_like(rates, bound))

    def chosen(s: Array, weight: Array, old: Array, bound: Array) -> Array:
        return jnp.clip(_least(k, q, s, weight, old), 0, bound)

    def push(s: Array, rate: Array) -> tuple[Array, Array]:
        return moved(k, q, s, rate), s

    def pull(weight: Array, rate: Array) -> tuple[Array, Array]:
        return (1 - rate * k) ** 2 * weight, weight

    def forwards(rates_nm: Array, weights_nd: Array) -> tuple[Array, Array]:
        """Return new rates, and the moments where each segment starts."""

        def one(s: Array, x: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            rate = chosen(s, *x)
            return moved(k, q, s, rate), rate

        def segment(s: Array, x: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            rates_m, bounds_m, weight = x
            weights_md = jax.lax.scan(pull, weight, rates_m, reverse=True)[1]
            end, new_m = jax.lax.scan(one, s, (weights_md, rates_m, bounds_m))
            return end, (new_m, s)

        return jax.lax.scan(segment, model.s0, (rates_nm, bounds_nm, weights_nd))[1]

    def backwards(rates_nm: Array, starts_nd: Array) -> tuple[Array, Array]:
        """Return new rates, and the weights where each segment ends."""

        def one(weight: Array, x: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            s, old, bound = x
            rate = chosen(s, weight, old, bound)
            return (1 - rate * k) ** 2 * weight, rate

        def segment(w: Array, x: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            rates_m, bounds_m, s = x
            moments_md = jax.lax.scan(push, s, rates_m)[1]
            start, new_m = jax.lax.scan(one, w, (moments_md, rates_m, bounds_m), reverse=True)
            return start, (new_m, w)

        last = 0.5 * model.h
        return jax.lax.scan(segment, last, (rates_nm, bounds_nm, starts_nd), reverse=True)[1]

    least_move = max(tolerance, 100 * float(jnp.finfo(rates.dtype).eps))

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        return (carry[2] > least_move) & (carry[3] < max_sweeps)

    def sweep(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        old_nm, starts_nd, _, count = carry
        new_nm, weights_nd = backwards(old_nm, starts_nd)
        new_nm, starts_nd = forwards(new_nm, weights_nd)
        scale_nm = jnp.where(new_nm > 0, new_nm, 1)
        return new_nm, starts_nd, jnp.max(jnp.abs(new_nm - old_nm) / scale_nm), count + 1

    rates_nm = segments(rates)
    starts_nd = jax.lax.scan(lambda s, r: (jax.lax.scan(push, s, r)[0], s), model.s0, rates_nm)[1]
    first = rates_nm, starts_nd, jnp.asarray(jnp.inf, rates.dtype), jnp.zeros((), jnp.int32)
    rates_nm, _, _, count = jax.lax.while_loop(unfinished, sweep, first)
    return rates_nm.reshape(-1)[: rates.shape[0]], count
