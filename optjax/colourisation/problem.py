"""Colourisation as a training problem: pixelwise cross-entropy over the palette's colours."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optjax.run.flax_models import flax_problem
from optjax.run.problems import Problem
from optjax.support.types import Array


def pixelwise_cross_entropy(
    scores: Array, labels: Array, weights: ArrayLike | None = None
) -> Array:
    """Compute −(1/HW) Σ w[label] log softmax(scores)[label], nats a pixel, one value a picture.

    Args:
      scores: (B, H, W, K).
      labels: (B, H, W) integers below K.
      weights: w, (K,); None: 1.

    Returns:
      (B,).

    >>> import jax.numpy as jnp
    >>> loss = pixelwise_cross_entropy(jnp.zeros((1, 2, 2, 24)), jnp.zeros((1, 2, 2), int))
    >>> round(float(loss[0]), 4)  # log 24
    3.1781
    """
    # Compare with each colour: the gradient of a gather is a scatter, which is slow on the CPU.
    colours = jnp.arange(scores.shape[-1], dtype=labels.dtype).reshape(1, 1, 1, -1)
    hit = labels[..., None] == colours
    chosen = jnp.where(hit, scores, jnp.zeros_like(scores))
    loss = jax.nn.logsumexp(scores, axis=-1) - jnp.sum(chosen, axis=-1)
    if weights is not None:
        each = jnp.asarray(weights, scores.dtype).reshape(1, 1, 1, -1)
        loss = loss * jnp.sum(jnp.where(hit, each, jnp.zeros_like(each)), axis=-1)
    return jnp.mean(loss, axis=(1, 2))


def pixel_accuracy(scores: Array, labels: Array) -> dict[str, Array]:
    """Compute the fraction of pixels whose best colour is the label, (B,), as `accuracy`."""
    best = jnp.argmax(scores, axis=-1).astype(labels.dtype)
    return {"accuracy": jnp.mean((best == labels).astype(scores.dtype), axis=(1, 2))}


def colourisation_problem(
    model: nn.Module,
    train: tuple[ArrayLike, ArrayLike],
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    chunk: int = 100,
    weights: ArrayLike | None = None,
) -> Problem:
    """Make the problem of training a model to give each pixel's colour; see `flax_problem`.

    It records ``validation_loss`` (nats a pixel) and ``validation_accuracy`` (fraction of pixels).

    Args:
      model: (B, H, W, 1) → (B, H, W, K).
      train: (grey (n, H, W, 1), labels (n, H, W)).
      validation: the same, held out; None: no metrics.
      chunk: pictures evaluated at once.
      weights: of the colours in the loss, (K,); None: 1. With them, it also records
        ``validation_cross_entropy``, which does not weigh.
    """

    def loss(scores: Array, labels: Array) -> Array:
        return pixelwise_cross_entropy(scores, labels, weights)

    def score(scores: Array, labels: Array) -> dict[str, Array]:
        plain = {"cross_entropy": pixelwise_cross_entropy(scores, labels)}
        return pixel_accuracy(scores, labels) | ({} if weights is None else plain)

    return flax_problem(model, *train, loss, validation=validation, score=score, chunk=chunk)
