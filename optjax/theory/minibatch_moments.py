"""Exact first and second moments of mini-batch SGD on least squares, for each sampler.

A step is linear, z' = A_S z with z = (w − ŵ, 1), ŵ the least-squares solution nearest to w0 and S
the batch, so the second moments Z = E zzᵀ, which hold the first in their last column, obey

    Z' = E A_S Z A_Sᵀ = αM(Z) + (1 − α)ĀZĀᵀ,   M(Z) = (1/n) Σⱼ AⱼZAⱼᵀ,   Ā = (1/n) Σⱼ Aⱼ

with α = 1/b for draws with replacement and (n − b)/(b(n − 1)) for subsets drawn afresh at each
step. Within an epoch without replacement the batches depend on each other: there Z is summed over
the sets of examples that have been used, by dynamic programming.
"""

import itertools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from optjax.run.problems import finite
from optjax.support.errors import UserError, whole
from optjax.theory import least_norms

MOST = 200_000
"""Pairs of a set of used examples and its last batch, for "epochs"."""


class Moments(NamedTuple):
    """Moments of w after T steps, about the solution ŵ that SGD ends at."""

    end: Float[Array, "d"]  # ŵ, the least-squares solution nearest to w0
    mean: Float[Array, "d"]  # E w
    second: Float[Array, "d d"]  # E (w − ŵ)(w − ŵ)ᵀ; its trace is the expected squared distance


def minibatch_moments(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    eta: ArrayLike,
    steps: int,
    batch_size: int,
    sampler: Literal["replacement", "subsets", "epochs", "full"] = "replacement",
    scale: float | None = None,
) -> Moments:
    """Return the exact moments of w after T steps of SGD on k‖Xw − t‖².

    w' = w − (2knη/b) Σ_{j∈S} (xⱼᵀw − tⱼ) xⱼ, |S| = b (the last batch of an epoch may be smaller)

    "replacement", "epochs" and "full" are a run's samplers; "subsets": b different examples, drawn
    afresh at each step.

    Args:
      X, t, w0: (n, d) of any shape and rank, (n,), (d,).
      eta: () learning rate η.
      steps: T ≥ 0.
      batch_size: b, from 1 to n.
      sampler: how batches are drawn. "epochs" costs a matrix product for each set of whole batches
        and each of its last batches, at most 200,000: n = 14 at b = 1 or 6.
      scale: factor k of the loss; 1/n if None.

    Raises:
      UserError: shapes do not fit, a value is not finite or out of range, an unknown sampler, or
        too many sets.

    >>> found = minibatch_moments([[1.0], [1.0]], [0.0, 0.0], [1.0], 0.25, 2, batch_size=1)
    >>> float(found.mean[0]), float(found.second[0, 0])
    (0.25, 0.0625)
    """
    given, start = least_norms.equations(X, t), finite("w0", w0, 1)
    x = np.asarray(X, np.float64)
    n, d = x.shape
    if start.shape != (d,):
        raise UserError(f"w0 has shape {start.shape} and X {x.shape}: expected ({d},)")
    steps, b = whole("steps", steps, 0), whole("batch_size", batch_size, 1)
    if b > n:
        raise UserError(f"batch_size is {b}: expected at most n = {n}")
    end = given.nearest(start)
    with jax.enable_x64(True):
        c = jnp.asarray(2 * (1 / n if scale is None else scale) * n * jnp.asarray(eta, float))
        off = x @ end - np.asarray(t, np.float64)
        rows = jnp.asarray(np.hstack([x, off[:, None]]))  # xⱼᵀw − tⱼ = rowsⱼ z
        moves = jnp.asarray(np.hstack([x, np.zeros((n, 1))]))
        z = jnp.asarray(np.r_[start - end, 1.0])
        Z = jnp.outer(z, z)
        if sampler == "epochs":
            Z = _epochs(rows, moves, c, Z, steps, b)
        elif sampler in ("replacement", "subsets", "full"):
            alone = {"replacement": 1 / b, "subsets": (n - b) / (b * max(n - 1, 1)), "full": 0.0}
            Z = _afresh(rows, moves, c, Z, steps, alone[sampler])
        else:
            raise UserError(
                f"sampler is {sampler!r}: expected replacement, subsets, epochs or full"
            )
        w_end = jnp.asarray(end)
        return Moments(w_end, w_end + Z[:d, d], Z[:d, :d])


@jax.jit
def _afresh(rows: Array, moves: Array, c: Array, Z: Array, steps: int, alone: float) -> Array:
    """Apply steps whose batches are independent; `alone` is α, the weight of M."""
    n, m = rows.shape

    def step(_: int, Z: Array) -> Array:
        seen = rows @ Z  # (n, m)
        sizes = jnp.sum(seen * rows, axis=1, keepdims=True)
        cross = c / n * (moves.T @ seen)
        once = Z - cross - cross.T + c**2 / n * (moves.T @ (sizes * moves))
        mean = jnp.eye(m) - c / n * (moves.T @ rows)
        return alone * once + (1 - alone) * (mean @ Z @ mean.T)

    return jax.lax.fori_loop(0, steps, step, Z)


def _epochs(rows: Array, moves: Array, c: Array, Z: Array, steps: int, b: int) -> Array:
    """Apply steps of epochs without replacement: whole epochs, then the first batches of one."""
    n = rows.shape[0]
    batches = -(-n // b)
    pairs = sum(
        math.comb(n, min(k * b, n)) * math.comb(min(k * b, n), min(b, n - (k - 1) * b))
        for k in range(1, batches + 1)
    )
    sets = max(math.comb(n, min(k * b, n)) for k in range(1, batches + 1))
    if pairs > MOST or sets * rows.shape[1] ** 2 > 500 * MOST:
        raise UserError(
            f"epochs of {n} examples in batches of {b} have {pairs:,} sets to sum over: expected "
            f"at most {MOST:,}, and fewer with many columns; take fewer examples"
        )
    levels = [_level(n, b, k) for k in range(1, batches + 1)]

    def first(Z: Array, k: int) -> Array:
        """Return the moments after k batches: the mean over the sets that they may be."""
        by_set = Z[None]
        for masks, parents in levels[:k]:
            by_set = _extended(rows, moves, c, by_set, jnp.asarray(masks), jnp.asarray(parents))
        return jnp.mean(by_set, axis=0)

    for _ in range(steps // batches):
        Z = first(Z, batches)
    return first(Z, steps % batches)


def _level(n: int, b: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """List, for each set of the first k batches, its last batch and the set before it.

    As masks (sets, last batches, n), and as indices of sets one level down (sets, last batches).
    """
    before = {s: i for i, s in enumerate(itertools.combinations(range(n), (k - 1) * b))}
    masks, parents = [], []
    for used in itertools.combinations(range(n), min(k * b, n)):
        rows, indices = [], []
        for last in itertools.combinations(used, len(used) - (k - 1) * b):
            rows.append(np.isin(np.arange(n), last))
            indices.append(before[tuple(j for j in used if j not in last)])
        masks.append(rows)
        parents.append(indices)
    return np.array(masks), np.array(parents)


@jax.jit
def _extended(
    rows: Array, moves: Array, c: Array, by_set: Array, masks: Array, parents: Array
) -> Array:
    """Return Z of each larger set: the mean over its last batches B of A_B Z A_Bᵀ."""

    def of_set(masks: Array, parents: Array) -> Array:
        def after(mask: Array, parent: Array) -> Array:
            counted = mask.astype(rows.dtype)
            A = jnp.eye(rows.shape[1]) - c / jnp.sum(counted) * (
                moves.T @ (counted[:, None] * rows)
            )
            return A @ by_set[parent] @ A.T

        return jnp.mean(jax.vmap(after)(masks, parents), axis=0)

    return jax.lax.map(lambda pair: of_set(*pair), (masks, parents))
