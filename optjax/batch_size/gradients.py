"""Gradients of a problem's batches, as vectors, and their mean and spread in bounded memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optjax.run.batching import Batch
from optjax.run.core import hyper_dtype, penalised
from optjax.run.piecewise import Piecewise
from optjax.run.problems import Data, LossFn, Problem
from optjax.support.errors import UserError, whole
from optjax.support.keys import make_key
from optjax.support.types import Array, HParams, Key, PyTree

BUDGET = 2**24  # numbers in the gradients held at once, by default
MOST_EXAMPLES = 1024  # examples whose gradients are computed at once, by default


class GradientPoint(NamedTuple):
    """The parameters, data and hyperparameters at which gradients are taken."""

    params: PyTree
    model_state: PyTree
    data: Data
    hparams: HParams


def point(
    problem: Problem, params: PyTree, model_state: PyTree, hparams: HParams | None
) -> GradientPoint:
    """Make a checked point; without a model state, take that of the problem's start.

    Raises:
      UserError: no `Problem`, params of other shapes, a schedule as a hyperparameter.
    """
    if not isinstance(problem, Problem):
        raise UserError(f"problem is {problem!r}: expected a Problem, as from oj.least_squares")
    first, state = jax.eval_shape(problem.init, make_key(0), problem.data)
    params = jax.tree.map(jnp.asarray, params)
    shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (params, first)]
    if shapes[0] != shapes[1]:
        raise UserError(f"params have shapes {shapes[0]}: expected the problem's own, {shapes[1]}")
    if model_state is None:
        model_state = (
            problem.init(make_key(0), problem.data)[1] if len(jax.tree.leaves(state)) else state
        )
    given = dict(hparams or {})
    for name, value in given.items():
        if isinstance(value, Piecewise):
            raise UserError(f"{name} is a schedule: expected its value at these parameters")
    dtype = hyper_dtype(params)
    given.pop("initial_params", None)
    as_numbers = jax.tree.map(lambda v: jnp.asarray(v).astype(dtype), given)
    return GradientPoint(params, model_state, problem.data, as_numbers)


def couples(model_state: PyTree) -> bool:
    """Return whether the model carries batch statistics, which couple the examples of a batch.

    They are floating; counters and keys of dropout are not.
    """
    leaves = jax.tree.leaves(model_state)
    return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)


def refuse_coupled(
    model_state: PyTree, batch_size: int = 1, instead: str = "give the batch_size of the training"
) -> None:
    """Refuse a batch of one example if the model has batch statistics; advise `instead`."""
    if batch_size == 1 and couples(model_state):
        raise UserError(
            "the model has batch statistics: the gradient of one example alone is not that in a "
            f"batch; {instead}"
        )


def vector(tree: PyTree, dtype: Any) -> Array:
    """Concatenate the leaves of a tree to a vector, (d,)."""
    return jnp.concatenate([leaf.astype(dtype).ravel() for leaf in jax.tree.leaves(tree)])


def like(vector_d: Array, params: PyTree) -> PyTree:
    """Split a vector to a tree like the parameters, in their dtypes."""
    leaves, structure = jax.tree.flatten(params)
    cut, parts = 0, []
    for leaf in leaves:
        parts.append(vector_d[cut : cut + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        cut += leaf.size
    return jax.tree.unflatten(structure, parts)


def dimension(params: PyTree) -> int:
    """Return d, the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def batch_gradient(
    loss: LossFn, at: GradientPoint, indices: Array | None, size: int, key: Key
) -> Array:
    """Return the gradient (d,) of a batch's mean loss, with the l2 penalty if there is one.

    The penalty adds no noise: it moves G and leaves Σ, as in a step of training.

    Args:
      loss: the problem's.
      at: where to take the gradient.
      indices: (b,) int32 examples of the batch; None for a problem without examples.
      size: b.
      key: of dropout and other noise.
    """
    examples, weights = at.data.examples, at.hparams.get("example_weights")
    dtype = hyper_dtype(at.params)
    if indices is not None:
        examples = jax.tree.map(lambda a: a[indices], examples)
        weights = None if weights is None else weights[indices]
    batch = Batch(examples, None, key, at.data.shared, weights)
    number = jnp.asarray(size, dtype if indices is None else jnp.int32)
    hparams = {**at.hparams, "batch_size": number}

    def value(params: PyTree) -> Array:
        mean = loss(params, at.model_state, batch, hparams)[0]
        return penalised(mean, at.hparams.get("l2"), params)

    return vector(jax.grad(value)(at.params), dtype)


def at_once(chunk: int | None, params: PyTree, batch_size: int, count: int) -> int:
    """Return how many gradients to compute at once: `chunk`, or a moderate number.

    >>> at_once(None, [jnp.zeros(2**20)], 1, 500)
    16
    """
    if chunk is None:
        chunk = min(BUDGET // dimension(params), MOST_EXAMPLES // batch_size)
        return min(max(chunk, 1), count)
    return min(whole("chunk", chunk, 1), count)


class Spread(NamedTuple):
    """The mean of gradients, and Σ|gᵢ − ḡ|² about the mean."""

    mean: Array  # (d,)
    square: Array  # ()


def spread(gradient: Callable[[Array], Array], count: int, chunk: int) -> Spread:
    """Compute the mean and spread of `gradient(0), …, gradient(count − 1)`, by chunks.

    Chunks are merged by Chan's formula, in one pass and without a difference of large sums.
    """

    def of(indices: Array) -> Spread:
        g_cd = jax.vmap(gradient)(indices)
        mean = jnp.mean(g_cd, axis=0)
        return Spread(mean, jnp.sum(jnp.square(g_cd - mean[None])))

    def merged(a: Spread, n: Array, b: Spread, m: int) -> Spread:
        apart, share = b.mean - a.mean, m / (n + m)
        return Spread(
            a.mean + share * apart, a.square + b.square + n * share * jnp.sum(jnp.square(apart))
        )

    def one(carry: tuple[Spread, Array], indices: Array) -> tuple[tuple[Spread, Array], None]:
        so_far, n = carry
        return (merged(so_far, n, of(indices), chunk), n + chunk), None

    order = jnp.arange(count, dtype=jnp.int32)
    found = of(order[:chunk])
    n = jnp.asarray(chunk, found.square.dtype)
    steps = count // chunk - 1
    if steps:
        later = order[chunk : chunk * (steps + 1)].reshape(steps, chunk)
        (found, n), _ = jax.lax.scan(one, (found, n), later)
    rest = count % chunk
    if rest:
        found = merged(found, n, of(order[count - rest :]), rest)
    return found
