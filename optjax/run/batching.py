"""The draw of a batch, and the mean over the slots that count.

A batch has B slots (static). The first b of them count; b may be traced, so one program serves
every batch size up to B and a sweep can be vmapped over b. The draws of a step depend on the run's
key and the step alone, and a draw of b is the prefix of a draw of B: masked and separately compiled
runs see the same examples.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optjax.support.types import Array, Key, PyTree

Sampler = Literal["replacement", "epochs", "shuffle_once", "full"]


class Batch(NamedTuple):
    """The data that a loss sees at one step."""

    examples: PyTree  # every leaf (B, ...)
    mask: Array | None  # (B,) bool, which slots count; or numbers, how often; None: all, once
    key: Key  # () for dropout and other noise of this step
    shared: PyTree  # seen by every batch: held-out data, constants of the loss
    weights: Array | None = None  # (B,) float, of the slots' examples; None: all 1


def masked_mean(values: Array, mask: Array | None, weights: Array | None = None) -> Array:
    """Average over the examples that count, Σ mᵢ ωᵢ vᵢ / Σ mᵢ.

    Args:
      values: (B, ...), whose trailing axes are averaged too.
      mask: (B,) m, bool or how often each example counts; None: all count once.
      weights: (B,) ω, of any sign and not normalised; None: 1.

    Returns:
      The mean, ().

    >>> import jax.numpy as jnp
    >>> float(masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])))
    1.5
    >>> float(masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([3.0, 1.0, 0.0])))
    1.25
    >>> float(masked_mean(jnp.array([3.0, 1.0]), None, jnp.array([0.5, 0.0])))
    0.75
    """
    if weights is not None:
        weights = weights.reshape(weights.shape + (1,) * (values.ndim - 1)).astype(values.dtype)
        # An example of weight 0 may overflow, and 0 · ∞ is NaN: drop it. A finite one stays, so
        # that the derivative by its weight is its value.
        kept = (weights != 0) | jnp.isfinite(values)
        values = weights * jnp.where(kept, values, jnp.zeros_like(values))
    if mask is None:
        return jnp.mean(values)
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - 1))
    # An example that does not count may overflow too.
    drawn, counted = (mask, values) if mask.dtype == bool else (mask > 0, mask * values)
    total = jnp.sum(jnp.where(drawn, counted, jnp.zeros_like(counted)))
    slots_per_example = values.size // values.shape[0]
    count = jnp.maximum(jnp.sum(mask), 1) * slots_per_example
    return total / count.astype(values.dtype)


def counts(indices: Array, mask: Array | None, n: int, dtype: Any) -> Array:
    """Count how often each example is drawn, to write a batch's mean as one over all data.

    .. math:: \\frac1b \\sum_{i ∈ S} v_i = \\sum_j m_j v_j / \\sum_j m_j

    Runs vmapped together then share one matrix product with all examples, not a gather each.

    Args:
      indices: (B,) int32.
      mask: (B,) bool, which slots count; None: all.
      n: training examples.
      dtype: of the result.

    Returns:
      (n,) counts m.

    >>> import jax.numpy as jnp
    >>> counts(jnp.array([2, 0, 2, 1]), jnp.array([True, True, True, False]), 4, float).tolist()
    [1.0, 0.0, 2.0, 0.0]
    """
    hit_Bn = indices[:, None] == jnp.arange(n, dtype=indices.dtype)[None]
    if mask is not None:
        hit_Bn &= mask[:, None]
    return jnp.sum(hit_Bn, axis=0).astype(dtype)


def no_order() -> Array:
    """Return the order of a sampler that has none: (0,) int32."""
    return jnp.zeros((0,), jnp.int32)


def initial_order(sampler: Sampler, key: Key, n: int) -> Array:
    """Draw the first epoch's order, (n,) int32; (0,) for samplers without one."""
    if sampler not in ("epochs", "shuffle_once"):
        return no_order()
    return _permutation(key, jnp.zeros((), jnp.int32), n)


def draw(
    sampler: Sampler, key: Key, step: Array, order: Array, n: int, slots: int, size: Any
) -> tuple[Array | None, Array | None, Array]:
    """Draw the examples of a step.

    * ``"replacement"``: b examples drawn independently and uniformly.
    * ``"epochs"``: a fresh permutation an epoch, cut into ⌈n / b⌉ batches; each example is seen
      once an epoch, and the last batch of an epoch may be smaller.
    * ``"shuffle_once"``: the same, but the first epoch's permutation serves every epoch.
    * ``"full"``: every example at every step.

    Args:
      sampler: one of these.
      key: the run's key for draws.
      step: () int32, from 0.
      order: (n,) int32, the current epoch's order; (0,) for samplers without one.
      n: training examples.
      slots: B, static.
      size: b, an int, a traced () integer, or None for b = B.

    Returns:
      The indices, (B,) int32 (None: all examples, no gather); the mask of the slots that count,
      (B,) bool (None: all); the order for the next step. A slot that does not count holds the first
      example that does: a loss that is singular elsewhere has no NaN in its derivative.
    """
    slot = jnp.arange(slots, dtype=jnp.int32)
    if sampler == "full":
        return None, None, order
    if sampler == "replacement":
        indices = jax.random.randint(jax.random.fold_in(key, step), (slots,), 0, n, jnp.int32)
        mask = None if size is None else slot < size
        return _filled(indices, mask), mask, order

    b = jnp.asarray(slots if size is None else size, jnp.int32)
    batches = (n + b - 1) // b
    epoch, batch = step // batches, step % batches
    if sampler == "epochs":
        order = jax.lax.cond(
            (batch == 0) & (step > 0), lambda: _permutation(key, epoch, n), lambda: order
        )
    position = batch * b + slot
    indices = order[jnp.minimum(position, n - 1)]
    if size is None and n % slots == 0:
        return indices, None, order
    mask = (slot < b) & (position < n)
    return _filled(indices, mask), mask, order


def _filled(indices: Array, mask: Array | None) -> Array:
    """Let the slots that do not count hold the first example."""
    return indices if mask is None else jnp.where(mask, indices, indices[0])


def _permutation(key: Key, epoch: Array, n: int) -> Array:
    return jax.random.permutation(jax.random.fold_in(key, epoch), n).astype(jnp.int32)
