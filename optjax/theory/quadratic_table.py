"""Steps to a target for every batch size, preconditioner and rate of SGD, thousands at a time.

SGD at a constant rate has its moments in closed form, coordinate by coordinate,

    s_T = s∞ + (s0 − s∞) ρ^T,  ρ = (1 − αk)²,  s∞ = (α²q / (1 − ρ)) / B

so that a risk costs one exponential per coordinate. The coordinates that fall (s0 ≥ s∞, ρ < 1)
have a monotone sum F, which first reaches the target at some T₀, found by bracketing in
(log T, log F). The others only rise. Where their sum at T₀ is above the target the run never
arrives; where there are none T₀ is the count; the few entries between the two are left to
`optjax.theory.quadratic_steps`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optjax.support.machine import concurrent_map
from optjax.support.types import Array
from optjax.theory.noisy_quadratic import (
    NoisyQuadratic,
    noisy_quadratic,
    numbers,
    require_above,
    seen,
)
from optjax.theory.quadratic_steps import MAX_STEPS, checked_steps, steps_to

LANES = 8  # entries per call: at 10⁴ curvatures they stay in a second-level cache


def quadratic_steps(
    h: ArrayLike,
    c: ArrayLike | None = None,
    s0: ArrayLike | None = None,
    *,
    target: float,
    batch_sizes: ArrayLike,
    rates: ArrayLike,
    powers: Sequence[float] | Array = (0.0,),
    max_steps: int = MAX_STEPS,
) -> np.ndarray:
    """Count the steps of SGD to a risk at or below the target, (P, B, R); ∞ if it never arrives.

    The counts are those of `steps_to`, exact in float64. Without ``jax_enable_x64`` they are those
    of float32, off in the fifth digit.

    Args:
      h, c, s0: (d,), as in `noisy_quadratic`.
      target: risk to reach, above 0.
      batch_sizes: (B,), above 0.
      rates: (R,) learning rates α, above 0.
      powers: (P,) p of the preconditioner h^{−p}.
      max_steps: a run that needs more steps counts as one that never arrives.

    Raises:
      UserError: shapes that do not fit, values that are not positive.

    >>> quadratic_steps([1.0, 0.1], target=0.05, batch_sizes=[1, 100], rates=[0.1, 1.0]).tolist()
    [[[41.0, inf], [17.0, 1.0]]]

    Source: the model and table of Zhang et al. 2019 (arXiv:1907.04164), figure 3; the published
    notebook has 100 bins in place of the spectrum.
    """
    max_steps = checked_steps(max_steps)
    goal = numbers("target", target, 0)
    require_above("target", goal)
    model = noisy_quadratic(h, c, s0)
    dtype = model.h.dtype
    axes = {"powers": powers, "batch_sizes": batch_sizes, "rates": rates}
    chosen = {name: numbers(name, value, 1, dtype) for name, value in axes.items()}
    for name in ("batch_sizes", "rates"):
        require_above(name, chosen[name])
    sizes, steps = np.asarray(chosen["batch_sizes"]), []
    for power in chosen["powers"]:
        at = model._replace(power=power)
        steps.append(_of_power(at, goal.astype(dtype), sizes, chosen["rates"], max_steps))
    return np.stack(steps)


def _of_power(
    model: NoisyQuadratic, target: Array, sizes: np.ndarray, rates: Array, max_steps: int
) -> np.ndarray:
    """Count the steps with one preconditioner, (B, R)."""
    logs_Rd, ends_Rd = _closed_form(model, rates)
    size, rate = (x.ravel() for x in np.meshgrid(sizes, np.arange(len(rates)), indexing="ij"))
    floor = np.asarray(_floor(model, ends_Rd, jnp.asarray(sizes))).ravel()
    found = np.full(size.shape, np.inf)
    # Most entries end here: the falling coordinates alone stay above the target.
    open_ = np.flatnonzero(floor <= float(target))
    if not open_.size:
        return found.reshape(len(sizes), len(rates))
    t0, above = _in_lanes(
        lambda b, r: _root(model, target, logs_Rd, ends_Rd, b, r, max_steps),
        *(size[open_], rate[open_]),
    )
    found[open_] = np.where((above <= float(target)) & (t0 <= max_steps), t0, np.inf)
    for i in open_[(above > 0) & (above <= float(target)) & (t0 <= max_steps)]:
        at = model._replace(batch_size=jnp.asarray(size[i]))
        found[i] = float(steps_to(at, target, rates[rate[i]], max_steps=max_steps).steps)
    return found.reshape(len(sizes), len(rates))


def _in_lanes(call: Callable[..., tuple[Array, ...]], *inputs: np.ndarray) -> list[np.ndarray]:
    """Apply `call` to slices of one length; fill up the last with copies of its entries."""
    count = len(inputs[0])
    parts = [[x[i : i + LANES] for x in inputs] for i in range(0, count, LANES)]

    def called(part: list[np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(new) for new in call(*(np.resize(x, LANES) for x in part))]

    return [
        np.concatenate(column)[:count]
        for column in zip(*concurrent_map(called, parts), strict=True)
    ]


@jax.jit
def _closed_form(model: NoisyQuadratic, rates: Array) -> tuple[Array, Array]:
    """Return log ρ and s∞ at B = 1 for each rate, (R, d); s∞ = ∞ where ρ ≥ 1."""
    k, q = seen(model)
    x_Rd = rates[:, None] * k[None]
    lost = x_Rd * (2 - x_Rd)  # 1 − ρ, without a difference of near numbers
    ends = rates[:, None] ** 2 * q[None] / jnp.where(lost > 0, lost, 1)
    # A coordinate of ρ = 0 is at its end after a step: any small factor will do.
    logs = jnp.log1p(-jnp.minimum(lost, 1 - jnp.finfo(lost.dtype).eps))
    return jnp.where(lost > 0, logs, 0), jnp.where(lost > 0, ends, jnp.inf)


def _parts(model: NoisyQuadratic, ends_Ld: Array, size_L: Array) -> tuple[Array, Array]:
    """Return which coordinates fall, and the end s∞ of each, (L, d)."""
    ends_Ld = ends_Ld / size_L[:, None]
    return ends_Ld <= model.s0[None], ends_Ld


@jax.jit
def _floor(model: NoisyQuadratic, ends_Rd: Array, sizes_B: Array) -> Array:
    """Return the final risk of the falling coordinates, (B, R)."""

    def one(size: Array) -> Array:
        falls, ends = _parts(model, ends_Rd, size[None])
        return jnp.sum(jnp.where(falls, 0.5 * model.h[None] * ends, 0), axis=-1)

    return jax.lax.map(one, sizes_B)


@functools.partial(jax.jit, static_argnums=6)
def _root(
    model: NoisyQuadratic,
    target: Array,
    logs_Rd: Array,
    ends_Rd: Array,
    size_L: Array,
    rate_L: Array,
    max_steps: int,
) -> tuple[Array, Array]:
    """Return the step where the falling coordinates reach the target, and the others' risk then."""
    logs = logs_Rd[rate_L]
    falls, ends = _parts(model, ends_Rd[rate_L], size_L)
    half, start = 0.5 * model.h[None], model.s0[None]
    weight_Ld = jnp.where(falls, half * (start - ends), 0)
    floor_L = jnp.sum(jnp.where(falls, half * ends, 0), axis=-1)

    single = jnp.float32
    rough = _search(
        logs.astype(single),
        weight_Ld.astype(single),
        floor_L.astype(single),
        target.astype(single),
        jnp.zeros(size_L.shape, single),
        jnp.full(size_L.shape, max_steps, single),
    )
    # In half the bytes, and right to five or six digits: the bracket of the exact search.
    near = jnp.where(jnp.isfinite(rough.t), rough.t, max_steps)
    off = 1 + 2e-5 * near
    low, high = jnp.round(near - off), jnp.round(near + off)
    low = jnp.clip(low, 0, max_steps).astype(logs.dtype)
    high = jnp.clip(high, 0, max_steps).astype(logs.dtype)
    exact = functools.partial(_search, logs, weight_Ld, floor_L, target)
    found = exact(low, high)
    missed = ~found.inside & (floor_L < target)
    none, all_ = jnp.zeros_like(low), jnp.full_like(low, max_steps)
    found = jax.lax.cond(
        jnp.any(missed),
        lambda: exact(jnp.where(missed, none, low), jnp.where(missed, all_, high)),
        lambda: found,
    )
    t = found.t

    def risen() -> Array:
        """Return the others' risk at t, or at the start for those that rise without end."""
        bounded = ~falls & jnp.isfinite(ends)
        at = jnp.where(bounded, ends + (start - ends) * jnp.exp(t[:, None] * logs), start)
        rising = jnp.sum(jnp.where(falls, 0, half * at), axis=-1)
        return jnp.where(jnp.all(falls, -1), 0, jnp.maximum(rising, jnp.finfo(t.dtype).tiny))

    return t, jax.lax.cond(jnp.all(falls), lambda: jnp.zeros_like(t), risen)


class _Found(NamedTuple):
    """The result of `_search`."""

    t: Array  # (L,) first step at or below the target; low if that is, ∞ if high is not
    inside: Array  # (L,) bool, the target is crossed between low and high


def _search(
    logs_Ld: Array, weight_Ld: Array, floor_L: Array, target: Array, low_L: Array, high_L: Array
) -> _Found:
    """Find where floor + Σ weight · e^{T log ρ} falls to the target, for T from low to high."""
    digits = 64 * jnp.finfo(logs_Ld.dtype).eps

    def log_share(t_L: Array) -> Array:
        """Return log F/target; bounded, since F may underflow."""
        falling = floor_L + jnp.sum(weight_Ld * jnp.exp(t_L[:, None] * logs_Ld), axis=-1)
        return jnp.log(jnp.maximum(falling / target, 1e-30))

    def open_(at: _Bracket) -> Array:
        """Return whether more than a step, or than the dtype resolves, lies between the ends."""
        low, high = _steps(at)
        return high - low > jnp.maximum(1.5, digits * high)

    def narrow(at: _Bracket) -> _Bracket:
        x = _proposal(at)
        new = _narrowed(at, x, log_share(jnp.round(jnp.expm1(x))))
        return jax.tree.map(lambda new, old: jnp.where(open_(at), new, old), new, at)

    f_low, f_high = log_share(low_L), log_share(high_L)
    inside = (f_low > 0) & (f_high <= 0)
    a, b = (jnp.log1p(t) for t in (low_L, high_L))
    first = _Bracket(jnp.where(inside, a, b), b, b, f_low, f_high, f_high)
    last = jax.lax.while_loop(lambda at: jnp.any(open_(at)), narrow, first)
    t = jnp.where(f_low <= 0, low_L, jnp.where(inside, _steps(last)[1], jnp.inf))
    return _Found(t, inside | ((f_low <= 0) & (low_L == 0)))


class _Bracket(NamedTuple):
    """Chandrupatla's bracket (1997): the root is between a and b, and c is the point before."""

    a: Array  # (L,) log(1 + T), the latest
    b: Array  # (L,)
    c: Array  # (L,)
    f_a: Array  # (L,) log F/target
    f_b: Array
    f_c: Array


def _steps(at: _Bracket) -> tuple[Array, Array]:
    """Return the steps at the two ends, the fewer first, from their logarithms."""
    ends = (jnp.round(jnp.expm1(x)) for x in (at.a, at.b))
    a, b = ends
    return jnp.minimum(a, b), jnp.maximum(a, b)


def _proposal(at: _Bracket) -> Array:
    """Propose a step by inverse quadratic interpolation where safe, else the middle."""
    a, b, c, f_a, f_b, f_c = at
    wide, tall = jnp.where(c == b, 1, c - b), jnp.where(f_c == f_b, 1, f_c - f_b)
    xi, phi = (a - b) / wide, (f_a - f_b) / tall
    safe = (c != b) & (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
    across, back = jnp.where(f_b == f_a, 1, f_b - f_a), jnp.where(f_c == f_a, 1, f_c - f_a)
    inverse = f_a / across * f_c / -tall + (c - a) / (b - a) * f_a / back * f_b / tall
    x = a + jnp.where(safe, inverse, 0.5) * (b - a)
    low, high = _steps(at)
    return jnp.log1p(jnp.clip(jnp.ceil(jnp.expm1(x)), low + 1, high - 1))


def _narrowed(at: _Bracket, x: Array, f: Array) -> _Bracket:
    """Narrow the bracket by the value f at x."""
    same = (f > 0) == (at.f_a > 0)
    b, f_b = jnp.where(same, at.b, at.a), jnp.where(same, at.f_b, at.f_a)
    return _Bracket(x, b, jnp.where(same, at.a, at.b), f, f_b, jnp.where(same, at.f_a, at.f_b))
