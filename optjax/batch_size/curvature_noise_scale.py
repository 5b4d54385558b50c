"""The noise scale with curvature, B_noise = tr(HΣ)/GᵀHG, and the learning rates it predicts.

A step of rate ε along a batch's gradient changes the loss, to second order, by
−ε|G|² + ½ε²(GᵀHG + tr(HΣ)/B) in the mean. The best rate is ε_max/(1 + B_noise/B), and the gain of
the best step shrinks by the same factor. H is the Hessian of the problem's objective (in
evaluation mode, with the l2 penalty if there is one). It is never formed, only multiplied.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optjax.batch_size import gradients
from optjax.batch_size.gradients import GradientPoint, like, spread, vector
from optjax.batch_size.measured_noise_scale import can_draw, drawn_gradients, single_gradients
from optjax.batch_size.noise_scale import from_deviations, from_spread
from optjax.batch_size.ratio import quotient, ratio, student
from optjax.run.core import hyper_dtype, penalised
from optjax.run.problems import LossFn, Problem
from optjax.support.errors import UserError, whole
from optjax.support.types import Array, HParams, Key, PyTree


class CurvatureNoiseScale(NamedTuple):
    """B_noise = tr(HΣ)/GᵀHG, in examples, with its confidence interval."""

    value: Array  # () ratio of the estimates; ∞ where that of GᵀHG is not above 0
    low: Array  # ()
    high: Array  # () ∞ where GᵀHG is not distinguishable from 0
    gradient_curvature: Array  # () GᵀHG
    trace: Array  # () tr(HΣ)
    gradient_square: Array  # () |G|²
    resolved: Array  # () bool, whether GᵀHG is distinguishable from 0 and positive
    draws: Array  # () int32, gradients or probes that the interval rests on


def curvature_noise_scale(
    problem: Problem,
    params: PyTree,
    key: Key,
    *,
    batch_size: int = 1,
    groups: int = 64,
    model_state: PyTree = None,
    hparams: HParams | None = None,
    chunk: int | None = None,
    confidence: float = 0.95,
) -> CurvatureNoiseScale:
    """Estimate B_noise from m batches of b examples, drawn with replacement.

    tr(HΣ) = (b/(m − 1)) Σ (gₖ − ḡ)ᵀH(gₖ − ḡ),  GᵀHG = ḡᵀHḡ − tr(HΣ)/(bm)

    Both are unbiased and cost one Hessian-vector product per batch, over all data. The interval is
    that of `from_deviations` in the inner product aᵀHb. Where H has negative curvature along G the
    quadratic has no best rate: GᵀHG ≤ 0, and the result is not resolved. Memory: `chunk` gradients,
    and the backward pass over all data.

    Args:
      problem: as in `two_batch_noise_scale`, like all that follows except `groups`.
      params: a tree like the problem's own.
      key: of the draws.
      batch_size: b.
      groups: m ≥ 3.
      model_state: the problem's initial one by default.
      hparams: those of a run.
      chunk: gradients computed at once.
      confidence: of the interval.

    Raises:
      UserError: as `two_batch_noise_scale`.

    >>> import optjax as oj
    >>> problem = oj.quadratic([4.0, 1.0], [3.0, 1.0], noise=[1.0, 6.0])
    >>> found = curvature_noise_scale(problem, jnp.array([3.0, 1.0]), jax.random.key(0))
    >>> bool(found.low < 40 / 577 < found.high)
    True

    Source: McCandlish et al. 2018 (arXiv:1812.06162), equation 2.8.
    """
    b, m = whole("batch_size", batch_size, 1), whole("groups", groups, 3)
    student(confidence, 1)
    at = gradients.point(problem, params, model_state, hparams)
    can_draw(problem)
    gradients.refuse_coupled(at.model_state, b)
    most = gradients.at_once(chunk, at.params, b, m)
    functions = problem.loss, problem.objective
    (square, about), products = _sampled(functions, problem.n, (b, m, most), at, key)
    curvature, deviations, along = products
    found = from_deviations(curvature, deviations, along, b, confidence)
    unbiased = from_spread(square, about, m).gradient_square
    fields = found._asdict()
    fields["gradient_curvature"] = fields.pop("gradient_square")
    return CurvatureNoiseScale(**fields, gradient_square=unbiased)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sampled(
    functions: tuple[LossFn, Any], n: int, sizes: tuple[int, int, int], at: GradientPoint, key: Key
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    """Return |ḡ|² and Σ|gₖ − ḡ|²; ḡᵀHḡ, (gₖ − ḡ)ᵀH(gₖ − ḡ) and (gₖ − ḡ)ᵀHḡ."""
    loss, objective = functions
    b, m, most = sizes
    gradient = drawn_gradients(loss, n, b, m, at, key, jnp.zeros((), jnp.int32))
    product = hessian_product(objective, at)
    mean, square = spread(gradient, m, most)
    H_mean = product(mean)

    def one(k: Array) -> tuple[Array, Array]:
        off = gradient(k) - mean
        return off @ product(off), off @ H_mean

    deviations, along = jax.lax.map(one, jnp.arange(m, dtype=jnp.int32))
    return (mean @ mean, square), (mean @ H_mean, deviations, along)


def hessian_product(objective: Any, at: GradientPoint) -> Callable[[Array], Array]:
    """Return v ↦ Hv for H the Hessian of the penalised objective, (d,) → (d,)."""
    dtype = hyper_dtype(at.params)

    def value(params: PyTree) -> Array:
        mean = objective(params, at.model_state, at.data, at.hparams)
        return penalised(mean, at.hparams.get("l2"), params)

    def product(v: Array) -> Array:
        moved = jax.jvp(jax.grad(value), (at.params,), (like(v, at.params),))[1]
        return vector(moved, dtype)

    return product


def full_curvature_noise_scale(
    problem: Problem,
    params: PyTree,
    key: Key,
    *,
    probes: int = 16,
    model_state: PyTree = None,
    hparams: HParams | None = None,
    chunk: int | None = None,
    confidence: float = 0.95,
) -> CurvatureNoiseScale:
    """Estimate B_noise of all the data by Hutchinson's probes, one Hessian-vector product each.

    z = Σ εᵢ(gᵢ − ḡ)/√n with signs εᵢ = ±1 has covariance Σ, hence E zᵀHz = tr(HΣ). G, H and Σ
    (divisor n) are the data's own, with no sampling error: the interval, Student's, holds the error
    of the probes alone, and is resolved wherever GᵀHG > 0. For many parameters it is narrow: the
    relative variance of a probe is about 2 tr((HΣ)²)/tr(HΣ)². Memory: K + `chunk` gradients.

    Args:
      problem: any with examples.
      params: a tree like the problem's own.
      key: of the probes.
      probes: K ≥ 2.
      model_state: as in `per_example_noise_scale`, like all that follows.
      hparams: those of a run.
      chunk: gradients held at once.
      confidence: of the interval.

    Raises:
      UserError: fewer than two probes, no examples, a model with batch statistics.

    >>> import numpy as np, optjax as oj
    >>> problem = oj.least_squares(np.eye(4), [1.0, 2.0, 3.0, 4.0])  # H = I/2
    >>> found = full_curvature_noise_scale(problem, jnp.zeros(4), jax.random.key(0))
    >>> float(found.gradient_curvature), bool(found.low < 3.0 < found.high)
    (3.75, True)

    Source: Hutchinson 1990; McCandlish et al. 2018, equation 2.8.
    """
    count = whole("probes", probes, 2)
    t = student(confidence, count - 1)
    at = gradients.point(problem, params, model_state, hparams)
    if not problem.n:
        raise UserError(f"{problem.name} has no examples: use curvature_noise_scale")
    gradients.refuse_coupled(at.model_state, instead="use curvature_noise_scale")
    most = gradients.at_once(chunk, at.params, 1, problem.n)
    functions = problem.loss, problem.objective
    square, curvature, traces = _probed(functions, (problem.n, count, most), at, key)
    found = ratio(jnp.mean(traces), curvature, (jnp.var(traces, ddof=1) / count, 0, 0), t)
    return CurvatureNoiseScale(
        value=found.value,
        low=found.low,
        high=found.high,
        gradient_curvature=curvature,
        trace=jnp.mean(traces),
        gradient_square=square,
        resolved=found.resolved,
        draws=jnp.asarray(count, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probed(
    functions: tuple[LossFn, Any], sizes: tuple[int, int, int], at: GradientPoint, key: Key
) -> tuple[Array, Array, Array]:
    """Return |G|² (), GᵀHG () and zᵀHz (K,)."""
    loss, objective = functions
    n, count, most = sizes
    gradient = single_gradients(loss, n, n, False, at, key)
    product = hessian_product(objective, at)
    mean = spread(gradient, n, most).mean
    signs_nK = jax.random.rademacher(jax.random.fold_in(key, 2), (n, count), mean.dtype)

    def added(z_Kd: Array, indices: Array) -> tuple[Array, None]:
        off_cd = jax.vmap(gradient)(indices) - mean[None]
        return z_Kd + signs_nK[indices].T @ off_cd, None

    order, whole_chunks = jnp.arange(n, dtype=jnp.int32), n - n % most
    z_Kd = jnp.zeros((count, mean.size), mean.dtype)
    z_Kd, _ = jax.lax.scan(added, z_Kd, order[:whole_chunks].reshape(-1, most))
    if n % most:
        z_Kd, _ = added(z_Kd, order[whole_chunks:])
    traces = jax.lax.map(lambda z: z @ product(z), z_Kd) / n
    return mean @ mean, mean @ product(mean), traces


def max_rate(gradient_square: ArrayLike, gradient_curvature: ArrayLike) -> Array:
    """Return ε_max = |G|²/GᵀHG, the best rate along the full gradient; ∞ without curvature.

    Args:
      gradient_square: |G|².
      gradient_curvature: GᵀHG, of the same shape.

    >>> float(max_rate(10.0, 4.0))
    2.5

    Source: McCandlish et al. 2018, equation 2.5.
    """
    square, curvature = jnp.asarray(gradient_square), jnp.asarray(gradient_curvature)
    return quotient(square, curvature)


def optimal_rate(max_rate: ArrayLike, scale: ArrayLike, batch_size: ArrayLike) -> Array:
    """Return ε_opt = ε_max/(1 + B_noise/B), the best rate of one step at batch size B.

    The gain of the step has the same factor: ΔL_opt = ΔL_max/(1 + B_noise/B).

    Args:
      max_rate: ε_max.
      scale: B_noise, a number or of the same shape.
      batch_size: B, a number or of the same shape.

    >>> float(optimal_rate(2.5, scale=48.0, batch_size=16))
    0.625

    Source: McCandlish et al. 2018, equations 2.6 and 2.7.
    """
    rate = jnp.asarray(max_rate, jnp.result_type(float, max_rate))
    size, noise = (jnp.asarray(v).astype(rate.dtype) for v in (batch_size, scale))
    return rate / (1 + noise / size)
