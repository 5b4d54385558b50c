"""The noisy quadratic model: the risk of SGD along any schedule of rates, exactly.

The loss is ½Σ hᵢxᵢ², the gradient of a batch of B is hx + ξ with ξ ~ (0, c/B), and a step is
preconditioned by h^{−p}. In the eigenbasis of the curvature every coordinate goes its own way, so
the second moments sᵢ = E xᵢ² follow a recursion that needs no samples and no bins of the spectrum:

    s' = (1 − αk)²s + α²q,  k = h^{1−p},  q = h^{−2p}c/B,  risk = ½Σ hs

k is the curvature that a preconditioned step sees, q the variance of its noise. Which rates to
take is in `optjax.noise.rates`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from optjax.errors import UserError
from optjax.types import Array


class NoisyQuadratic(NamedTuple):
    """A noisy quadratic and how SGD meets it; `noisy_quadratic` checks it and fills it in."""

    h: Array  # (d,) curvatures, above 0
    c: Array  # (d,) variance of the gradient of one example
    s0: Array  # (d,) second moments of the parameters at the start, about the minimiser
    batch_size: Array  # () B
    power: Array  # () p of the preconditioner h^{−p}


def numbers(name: str, value: ArrayLike, ndim: int, dtype: Any = None) -> Array:
    """The value as a floating array of `ndim` axes; finite, where its numbers are known."""
    array = jnp.asarray(value if isinstance(value, jax.Array) else np.asarray(value))
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    if array.ndim != ndim or not array.size:
        expected = "one-dimensional, of at least one entry" if ndim else "a number"
        raise UserError(f"{name} has shape {array.shape}: expected {expected}")
    if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array)).all():
        raise UserError(f"{name} holds NaN or infinite values: expected finite numbers")
    return array if dtype is None else array.astype(dtype)


def require_above(name: str, array: Array, *, or_equal: bool = False) -> None:
    """A value that is not positive, where its numbers are known, is a user's mistake."""
    if isinstance(array, Tracer):
        return
    least = float(np.min(np.asarray(array)))
    if least < 0 or (least == 0 and not or_equal):
        raise UserError(f"{name} holds {least:g}: expected {'at least' if or_equal else 'above'} 0")


def noisy_quadratic(
    h: ArrayLike,
    c: ArrayLike | None = None,
    s0: ArrayLike | None = None,
    *,
    batch_size: ArrayLike = 1,
    power: ArrayLike = 0,
) -> NoisyQuadratic:
    """A noisy quadratic model, in the eigenbasis of its curvature.

    Args:
      h: (d,) curvatures, above 0.
      c: (d,) variance of the gradient of one example; h by default, as where the Fisher matrix
        is the Hessian.
      s0: (d,) second moments at the start; ones by default.
      batch_size: (), B; any positive number, so that it can be differentiated by.
      power: (), p of the preconditioner h^{−p}: 0 is SGD, 1 is Newton's method.

    Every value may be traced: `vmap` a function that builds the model to have many at once.

    Raises:
      UserError: shapes that do not fit, values that are not finite, a curvature or batch size
        that is not positive, a negative variance.

    >>> model = noisy_quadratic([1.0, 0.5], batch_size=4)
    >>> float(risk(model, model.s0))
    0.75

    Source: Zhang et al. 2019 (arXiv:1907.04164), section 3: c = h and s0 = 1.
    """
    h = numbers("h", h, 1)
    c = h if c is None else numbers("c", c, 1, h.dtype)
    s0 = jnp.ones_like(h) if s0 is None else numbers("s0", s0, 1, h.dtype)
    require_above("h", h)
    for name, value in (("c", c), ("s0", s0)):
        if value.shape != h.shape:
            raise UserError(f"{name} has shape {value.shape} and h {h.shape}: expected equal")
        require_above(name, value, or_equal=True)
    size = numbers("batch_size", batch_size, 0, h.dtype)
    require_above("batch_size", size)
    return NoisyQuadratic(h, c, s0, size, numbers("power", power, 0, h.dtype))


def seen(model: NoisyQuadratic) -> tuple[Array, Array]:
    """k and q, (d,) each: curvature and noise as the preconditioned step sees them."""
    h, c, _, B, p = model
    return h ** (1 - p), h ** (-2 * p) * c / B


def risk(model: NoisyQuadratic, s: Array) -> Array:
    """The expected loss where the second moments are s.

    ½Σ hs

    Args:
      s: (d,).

    >>> float(risk(noisy_quadratic([2.0]), jnp.array([3.0])))
    3.0
    """
    return 0.5 * jnp.sum(model.h * s)


def step(model: NoisyQuadratic, s: Array, rate: ArrayLike) -> Array:
    """The second moments after one step.

    s' = (1 − αh^{1−p})²s + α²h^{−2p}c/B

    Args:
      s: (d,) second moments before it.
      rate: (), α.

    >>> step(noisy_quadratic([1.0], [4.0], batch_size=2), jnp.ones(1), 0.5).tolist()
    [0.75]

    Source: Zhang et al. 2019, section 3.1.
    """
    k, q = seen(model)
    return moved(k, q, s, jnp.asarray(rate).astype(s.dtype))


def moved(k: Array, q: Array, s: Array, rate: Array) -> Array:
    """`step`, for k and q that a loop computes once."""
    return (1 - rate * k) ** 2 * s + rate**2 * q


def steps_at_once(model: NoisyQuadratic, s: Array, rate: ArrayLike, steps: int | Array) -> Array:
    """The second moments after T steps of one rate, in O(d log T).

    One step is s ↦ ρs + ν; twice that is s ↦ ρ²s + (1 + ρ)ν, and T is a sum of powers of two.
    Nothing is subtracted or divided, so the result and all its derivatives stay exact where the
    geometric sum (1 − ρ^T)/(1 − ρ) loses its digits: at ρ = 1, and nearby.

    Args:
      s: (d,) second moments before them.
      rate: (), α.
      steps: (), T ≥ 0, traced or not.

    >>> steps_at_once(noisy_quadratic([1.0], [0.0]), jnp.ones(1), 0.5, 3).tolist()
    [0.015625]
    """
    k, q = seen(model)
    rate = jnp.asarray(rate).astype(s.dtype)
    bits = 31 if isinstance(steps, Tracer) else int(steps).bit_length()
    steps = jnp.asarray(steps).astype(jnp.int32)

    def bit(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
        s, rho, nu = carry
        s = jnp.where((steps >> i) % 2 == 1, rho * s + nu, s)
        # A square that no later bit uses may overflow, and would make the derivative NaN.
        more = (steps >> i) > 1
        nu = jnp.where(more, nu + jnp.where(more, rho, 0) * nu, nu)
        rho = jnp.where(more, jnp.where(more, rho, 0) ** 2, rho)
        return (s, rho, nu), None

    start = (s, (1 - rate * k) ** 2, rate**2 * q)
    return jax.lax.scan(bit, start, jnp.arange(bits, dtype=jnp.int32))[0][0]


def segments(values: Array) -> Array:
    """(T,) → (⌈T/m⌉, m) with m = ⌊√T⌋, filled up with zeros: a step of rate 0 changes nothing."""
    steps = values.shape[0]
    m = math.isqrt(steps)
    return jnp.pad(values, (0, -steps % m)).reshape(-1, m)


def risks(model: NoisyQuadratic, rates: ArrayLike) -> Array:
    """The risk before the first step and after each, (T + 1,).

    Reverse mode keeps the moments at √T places and computes those between again: O(d√T) memory.

    Args:
      rates: (T,), α of each step.

    Raises:
      UserError: rates are not one-dimensional, or hold NaN.

    >>> risks(noisy_quadratic([1.0], [0.0]), [0.5, 0.5]).tolist()
    [0.5, 0.125, 0.03125]
    """
    return _risks(model, numbers("rates", rates, 1, model.h.dtype))


@jax.jit
def _risks(model: NoisyQuadratic, rates: Array) -> Array:
    k, q = seen(model)

    def one(s: Array, rate: Array) -> tuple[Array, Array]:
        s = moved(k, q, s, rate)
        return s, risk(model, s)

    @jax.checkpoint
    def segment(s: Array, rates_m: Array) -> tuple[Array, Array]:
        return jax.lax.scan(one, s, rates_m)

    after = jax.lax.scan(segment, model.s0, segments(rates))[1]
    first = risk(model, model.s0)[None]
    return jnp.concatenate([first, after.reshape(-1)[: rates.shape[0]]])
