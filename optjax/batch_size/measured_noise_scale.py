"""The gradient noise scale of any problem at given parameters, by drawing from its examples."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optjax.batch_size import gradients
from optjax.batch_size.gradients import GradientPoint, batch_gradient, spread
from optjax.batch_size.noise_scale import (
    Estimates,
    NoiseScale,
    from_deviations,
    from_spread,
    noise_scale,
)
from optjax.batch_size.ratio import quotient, student
from optjax.run.batching import draw, no_order
from optjax.run.problems import LossFn, Problem
from optjax.support.errors import UserError, whole
from optjax.support.keys import make_key
from optjax.support.types import Array, HParams, Key, PyTree

_DRAW, _NOISE = 0, 1  # folded into the key: independent streams


def two_batch_noise_scale(
    problem: Problem,
    params: PyTree,
    key: Key,
    *,
    batch_size: int = 1,
    groups: int = 8,
    pairs: int = 64,
    model_state: PyTree = None,
    hparams: HParams | None = None,
    chunk: int | None = None,
    confidence: float = 0.95,
) -> NoiseScale:
    """Estimate B_simple from `pairs` draws of m batches of b, as data-parallel training sees them.

    A draw is m batches of b examples with replacement; the mean of their gradients is that of the
    batch of B = mb, so that one pass gives both norms (see `two_batch`). The estimate is of the
    data: Σ is the covariance over the n examples (divisor n), G the gradient of their mean loss.
    Where the batch couples its examples (batch statistics), it is G = E G_b and Σ = b·Cov(G_b) of
    batches of b in training mode. Dropout's noise is part of Σ. A problem without examples must
    read `batch_size`, as `oj.quadratic` does, and draw its noise by the batch's key.

    Args:
      problem: any problem.
      params: a tree like the problem's own.
      key: of the draws; draw i depends on the key and i alone.
      batch_size: b.
      groups: m ≥ 2.
      pairs: N ≥ 2; from 32 on the interval is honest.
      model_state: the problem's initial one by default.
      hparams: those of a run without the optimiser's: ``l2``, ``example_weights``, the problem's.
      chunk: gradients computed at once, in memory for chunk · d numbers. By default at most 2²⁴
        numbers (64 MiB in float32) and 1,024 examples.
      confidence: of the interval.

    Raises:
      UserError: sizes that are not whole or too small, a batch of one with batch statistics, a
        problem that has no examples and reads no `batch_size`.

    >>> import numpy as np, optjax as oj
    >>> problem = oj.least_squares(np.eye(4), [1.0, 2.0, 3.0, 4.0])
    >>> found = two_batch_noise_scale(problem, jnp.zeros(4), jax.random.key(0))
    >>> bool(found.low < 3.0 < found.high)  # tr Σ = 22.5, |G|² = 7.5
    True

    Source: McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1.
    """
    b, m = whole("batch_size", batch_size, 1), whole("groups", groups, 2)
    count = whole("pairs", pairs, 2)
    student(confidence, 1)
    at = gradients.point(problem, params, model_state, hparams)
    can_draw(problem)
    gradients.refuse_coupled(at.model_state, b)
    most = gradients.at_once(chunk, at.params, b, count * m)
    return noise_scale(_pairs(problem.loss, problem.n, (b, m, count, most), at, key), confidence)


def can_draw(problem: Problem) -> None:
    """Refuse a problem that has no examples and reads no batch_size."""
    if not problem.n and "batch_size" not in problem.hparams:
        raise UserError(
            f"{problem.name} has no examples and reads no batch_size: its noise is unknown; use "
            "two_batch on gradient norms of your own"
        )


def drawn_gradients(
    loss: LossFn, n: int, b: int, m: int, at: GradientPoint, key: Key, index: Array
) -> Callable[[Array], Array]:
    """Return k ↦ the gradient (d,) of the k-th of the m batches of draw `index`."""
    draws, noise = jax.random.fold_in(key, _DRAW), jax.random.fold_in(key, _NOISE)
    noise = jax.random.fold_in(noise, index)
    batches = None
    if n:
        indices = draw("replacement", draws, index, no_order(), n, m * b, None)[0]
        assert indices is not None
        batches = indices.reshape(m, b)

    def gradient(k: Array) -> Array:
        own = None if batches is None else batches[k]
        return batch_gradient(loss, at, own, b, jax.random.fold_in(noise, k))

    return gradient


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pairs(
    loss: LossFn, n: int, sizes: tuple[int, int, int, int], at: GradientPoint, key: Key
) -> Estimates:
    """Estimate |G|² and tr Σ from each draw, (N,) each."""
    b, m, count, most = sizes
    groups_at_once = min(m, most)

    def one(index: Array) -> Estimates:
        found = spread(drawn_gradients(loss, n, b, m, at, key, index), m, groups_at_once)
        return from_spread(jnp.sum(jnp.square(found.mean)), found.square, m, b)

    order = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.map(one, order, batch_size=max(1, most // groups_at_once))


def per_example_noise_scale(
    problem: Problem,
    params: PyTree,
    key: Key | None = None,
    *,
    examples: int | None = None,
    exact: bool = False,
    model_state: PyTree = None,
    hparams: HParams | None = None,
    chunk: int | None = None,
    confidence: float = 0.95,
) -> NoiseScale:
    """Estimate B_simple from the gradients of single examples.

    tr Σ = Σ|gᵢ − ḡ|²/(n − 1),  |G|² = |ḡ|² − tr Σ/n  (both unbiased)

    Args:
      problem: any with examples.
      params: a tree like the problem's own.
      key: of the draws, and of dropout; needed where `examples` is given.
      examples: how many to draw with replacement; Σ and G are then those of the data. By default
        all n, each once; Σ and G are then those of the distribution that the data were drawn from.
      exact: whether to take the n examples for the whole population: tr Σ = Σ|gᵢ − ḡ|²/n and
        |G|² = |ḡ|², as training with replacement on these data sees them. The interval is a point.
      model_state: as in `two_batch_noise_scale`.
      hparams: as in `two_batch_noise_scale`.
      chunk: gradients held at once, of d numbers each; more of them are computed twice.
      confidence: of the interval.

    Raises:
      UserError: fewer than three examples, a model with batch statistics (use
        `two_batch_noise_scale`), no key for draws.

    >>> import numpy as np, optjax as oj
    >>> problem = oj.least_squares(np.eye(4), [1.0, 2.0, 3.0, 4.0])
    >>> found = per_example_noise_scale(problem, jnp.zeros(4), exact=True)
    >>> float(found.trace), float(found.gradient_square), float(found.value)
    (22.5, 7.5, 3.0)
    """
    student(confidence, 1)
    at = gradients.point(problem, params, model_state, hparams)
    n = problem.n
    if not n:
        raise UserError(f"{problem.name} has no examples: use two_batch_noise_scale")
    gradients.refuse_coupled(at.model_state, instead="use two_batch_noise_scale")
    if examples is not None and (key is None or exact):
        instead = "leave out one of them" if exact else "give a key for the draws"
        raise UserError(
            f"examples is {examples!r}{' and exact is set' if exact else ''}: {instead}"
        )
    count = n if examples is None else whole("examples", examples, 3)
    if count < 3 and not exact:
        raise UserError(f"{problem.name} has {n} examples: expected at least 3")
    most = gradients.at_once(chunk, at.params, 1, count)
    key = make_key(0) if key is None else key
    drawn = examples is not None
    square, deviations, along = _deviations(problem.loss, n, (count, most, drawn), at, key)
    if not exact:
        return from_deviations(square, deviations, along, 1, confidence)
    trace = jnp.mean(deviations)
    value = quotient(trace, square)
    number = jnp.asarray(n, jnp.int32)
    return NoiseScale(value, value, value, square, trace, square > 0, number)


def single_gradients(
    loss: LossFn, n: int, count: int, drawn: bool, at: GradientPoint, key: Key
) -> Callable[[Array], Array]:
    """Return i ↦ the gradient (d,) of example i, of the data or of `count` draws from them."""
    if drawn:
        return drawn_gradients(loss, n, 1, count, at, key, jnp.zeros((), jnp.int32))
    noise = jax.random.fold_in(key, _NOISE)
    return lambda i: batch_gradient(loss, at, i[None], 1, jax.random.fold_in(noise, i))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _deviations(
    loss: LossFn, n: int, sizes: tuple[int, int, bool], at: GradientPoint, key: Key
) -> tuple[Array, Array, Array]:
    """Return |ḡ|² (), |gᵢ − ḡ|² (n,) and (gᵢ − ḡ)·ḡ (n,)."""
    count, most, drawn = sizes
    gradient = single_gradients(loss, n, count, drawn, at, key)
    order = jnp.arange(count, dtype=jnp.int32)
    mean = spread(gradient, count, most).mean

    def one(i: Array) -> tuple[Array, Array]:
        off = gradient(i) - mean
        return off @ off, off @ mean

    deviations, along = jax.lax.map(one, order, batch_size=most)
    return mean @ mean, deviations, along
