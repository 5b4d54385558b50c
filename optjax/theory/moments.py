"""Exact second moments of SGD, momentum, Nesterov's and averaged weights, many steps at once.

An optimiser of the noisy quadratic is linear. In each coordinate its state z is the weight x, the
velocity v where there is momentum, and the average e where weights are averaged; a step is

    z' = Mz + gξ,  ξ ~ (0, q)     so that    S' = MSMᵀ + N,  S = E zzᵀ,  N = q ggᵀ

A coordinate has m = 1, 2 or 3 numbers of state and m × m moments. Two steps are again such a map
(`after`), so T steps are a product of log₂ T squares. The published analysis of momentum bounds
the moments by a scalar; here they are exact.

    v' = βv + kx + ξ                              (the preconditioned gradient is kx + ξ)
    x' = x − α((1 − ν)v' + ν(βv' + kx + ξ))       (ν = 0 heavy ball, 1 Nesterov)
    e' = γe + (1 − γ)x'

Source: Zhang et al. 2019 (arXiv:1907.04164), sections 3 and 4. The second moments of momentum and
Nesterov's method in this form are derived here.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from optjax.support.errors import whole
from optjax.support.types import Array
from optjax.theory.noisy_quadratic import NoisyQuadratic, numbers, risk, seen


class Steps(NamedTuple):
    """A number of steps as one map of the moments, S ↦ MSMᵀ + N."""

    M: Array  # (m, m, d)
    N: Array  # (m, m, d) symmetric


def start(model: NoisyQuadratic) -> Array:
    """Return the moments before the first step, (m, m, d): s0 for x and e, 0 for v.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> start(noisy_quadratic([1.0], momentum=0.9)).shape
    (2, 2, 1)
    """
    z = [1.0, *([0.0] if model.momentum is not None else []), *([1.0] if _averaged(model) else [])]
    first = jnp.asarray(z, model.h.dtype)
    return jnp.multiply.outer(jnp.outer(first, first), model.s0)


def _averaged(model: NoisyQuadratic) -> bool:
    """Return whether the weights are averaged."""
    return model.average is not None


def looked_at(model: NoisyQuadratic, moments: Array) -> Array:
    """Return the second moments (d,) that enter the risk: the average's where there is one."""
    i = -1 if _averaged(model) else 0
    return moments[i, i]


def one_step(model: NoisyQuadratic, rate: Array) -> Steps:
    """Express a step of the model's optimiser at the rate α as a map of the moments."""
    k, q = seen(model)
    beta, nu, gamma = model.momentum, model.nesterov, model.average
    if beta is None or nu is None:
        rows, noise = [[1 - rate * k]], [-rate]
    else:
        mixed = 1 - nu + nu * beta  # weight of v' in the step; that of the gradient is ν
        rows = [[1 - rate * k * (mixed + nu), -rate * mixed * beta], [k, beta]]
        noise = [-rate * (mixed + nu), jnp.ones_like(rate)]
    if gamma is not None:
        rows = [[*row, jnp.zeros_like(rate)] for row in rows]
        rows.append([(1 - gamma) * entry for entry in rows[0][:-1]] + [gamma])
        noise = [*noise, (1 - gamma) * noise[0]]
    M = jnp.stack([jnp.stack([jnp.broadcast_to(x, k.shape) for x in row]) for row in rows])
    g = jnp.stack(noise)
    return Steps(M, jnp.multiply.outer(jnp.outer(g, g), q))


def _product(A: Array, B: Array) -> Array:
    """Return AB in each coordinate, (m, m, d); a batched matrix product is slow at this size."""
    return sum(
        (A[:, j, None] * B[None, j] for j in range(1, A.shape[1])), A[:, 0, None] * B[None, 0]
    )


def moved(steps: Steps, moments: Array) -> Array:
    """Apply a map to the moments: MSMᵀ + N."""
    return _product(_product(steps.M, moments), steps.M.swapaxes(0, 1)) + steps.N


def after(later: Steps, earlier: Steps) -> Steps:
    """Compose two maps, `earlier` first."""
    return Steps(_product(later.M, earlier.M), moved(later, earlier.N))


def steps_at_once(
    model: NoisyQuadratic,
    moments: Array,
    rate: ArrayLike,
    steps: int | Array,
    max_steps: int = 2**31 - 1,
) -> Array:
    """Return the moments after T steps at one rate, in O(d log T).

    A step is S ↦ MSMᵀ + N; two steps are the same with M² and MNMᵀ + N, and T is a sum of powers of
    two. There is no division, so the result and its derivatives stay exact where a geometric sum
    (1 − ρ^T)/(1 − ρ) or a diagonalisation loses digits: near ρ = 1 and near critical damping.

    Args:
      model: from `noisy_quadratic`.
      moments: (m, m, d), from `start` or another call.
      rate: () learning rate α.
      steps: () T ≥ 0, traced or not.
      max_steps: bound on a traced T; a lower one needs fewer squares.

    Raises:
      UserError: T is not a whole number of at least 0.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> model = noisy_quadratic([1.0], [0.0])
    >>> steps_at_once(model, start(model), 0.5, 3).tolist()
    [[[0.015625]]]
    """
    if not isinstance(steps, Tracer):
        steps = whole("steps", np.asarray(steps).item(), 0)
    bits = (max_steps if isinstance(steps, Tracer) else int(steps)).bit_length()
    steps = jnp.asarray(steps).astype(jnp.int32)

    def bit(carry: tuple[Array, Steps], i: Array) -> tuple[tuple[Array, Steps], None]:
        moments, power = carry
        moments = jnp.where((steps >> i) % 2 == 1, moved(power, moments), moments)
        # A square that no later bit uses may overflow, and would make the derivative NaN.
        more = (steps >> i) > 1
        used = jax.tree.map(lambda x: jnp.where(more, x, 0), power)
        power = jax.tree.map(lambda new, old: jnp.where(more, new, old), after(used, used), power)
        return (moments, power), None

    first = one_step(model, jnp.asarray(rate).astype(model.h.dtype))
    return jax.lax.scan(bit, (moments, first), jnp.arange(bits, dtype=jnp.int32))[0][0]


def final_risk(model: NoisyQuadratic, rate: ArrayLike, steps: int | Array) -> Array:
    """Return the risk after T steps at one rate from the start.

    The arguments are those of `steps_at_once`.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> float(final_risk(noisy_quadratic([1.0], [0.0]), 0.5, 2))
    0.03125
    """
    return risk(model, looked_at(model, steps_at_once(model, start(model), rate, steps)))


def segments(values: Array) -> Array:
    """Reshape (T,) to (⌈T/m⌉, m), m = ⌊√T⌋; pad with zeros after the last step."""
    steps = values.shape[0]
    m = math.isqrt(steps)
    return jnp.pad(values, (0, -steps % m)).reshape(-1, m)


def risks(model: NoisyQuadratic, rates: ArrayLike) -> Array:
    """Return the risk before the first step and after each, (T + 1,).

    Reverse mode stores the moments at √T steps and recomputes those between: O(d√T) memory.

    The rates α are (T,) finite numbers, of each step.

    >>> from optjax.theory.noisy_quadratic import noisy_quadratic
    >>> risks(noisy_quadratic([1.0], [0.0]), [0.5, 0.5]).tolist()
    [0.5, 0.125, 0.03125]
    >>> [round(float(r), 4) for r in risks(noisy_quadratic([1.0], [0.0], momentum=0.5), [0.5] * 3)]
    [0.5, 0.125, 0.0, 0.0312]
    """
    return _risks(model, numbers("rates", rates, 1, model.h.dtype))


@jax.jit
def _risks(model: NoisyQuadratic, rates: Array) -> Array:
    def one(moments: Array, rate: Array) -> tuple[Array, Array]:
        moments = moved(one_step(model, rate), moments)
        return moments, risk(model, looked_at(model, moments))

    @jax.checkpoint
    def segment(moments: Array, rates_m: Array) -> tuple[Array, Array]:
        return jax.lax.scan(one, moments, rates_m)

    after_each = jax.lax.scan(segment, start(model), segments(rates))[1]
    first = risk(model, model.s0)[None]
    return jnp.concatenate([first, after_each.reshape(-1)[: rates.shape[0]]])
