"""Solutions of least squares: of minimum norm, nearest to a start; and projections.

Notation: X is (n, d) with n ≤ d and full row rank, t (n,), w (d,), a = Xw0 − t the residual at the
start, w* = Xᵀ(XXᵀ)⁻¹t the minimum-norm solution, P = Xᵀ(XXᵀ)⁻¹X the projection on the row space.

Each function is pure and can be jitted, and raises UserError where shapes do not fit, a value is
not finite, or X is rank-deficient. Shapes are always checked; values (NaN, rank) only where they
are concrete, since a traced array has none. For X of any rank see `optjax.theory.least_norms`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from optjax.run.problems import numbers
from optjax.support.errors import UserError


def _matrix(X: ArrayLike) -> Array:
    """Convert X to an array; check that n ≤ d and, where X is concrete, that its rank is n."""
    X = numbers("X", X, 2)
    n, d = X.shape
    if n > d:
        raise UserError(
            f"X has shape {X.shape}: {n} equations in {d} unknowns have in general no exact "
            "solution; give X with no more rows than columns"
        )
    if not isinstance(X, Tracer):
        rank = int(np.linalg.matrix_rank(np.asarray(X)))
        if rank < n:
            raise UserError(
                f"X has rank {rank} but n = {n} rows; remove the linearly dependent rows"
            )
    return X


def targets(X: Array, t: ArrayLike) -> Array:
    """Convert t to an array with one entry per row of X."""
    t = numbers("t", t, 1)
    if t.shape[0] != X.shape[0]:
        raise UserError(f"t has shape {t.shape} and X {X.shape}: expected an entry per row of X")
    return t


def weights(X: Array, w: ArrayLike, name: str = "w0") -> Array:
    """Convert w to an array with one entry per column of X."""
    w = numbers(name, w, 1)
    if w.shape[0] != X.shape[1]:
        raise UserError(
            f"{name} has shape {w.shape} and X {X.shape}: expected an entry per column of X"
        )
    return w


def minimum_norm_solution(X: Float[Array, "n d"], t: Float[Array, "n"]) -> Float[Array, "d"]:
    """Return the solution of Xw = t of least Euclidean norm.

    w* = Xᵀ(XXᵀ)⁻¹t = QR⁻ᵀt, where Xᵀ = QR

    The textbook form squares the condition number of X; the QR form does not, and unlike an SVD
    its derivative stays finite where two singular values meet.

    >>> [round(float(x), 4) for x in minimum_norm_solution([[2.0, 1.0]], [2.0])]
    [0.8, 0.4]
    """
    X = _matrix(X)
    t = targets(X, t)
    Q, R = jnp.linalg.qr(X.T)
    return Q @ jax.scipy.linalg.solve_triangular(R, t, trans="T")


def row_space_projection(X: Float[Array, "n d"], w: Float[Array, "*p d"]) -> Float[Array, "*p d"]:
    """Project w, one vector or many, onto the row space of X: Pw = QQᵀw, where Xᵀ = QR.

    >>> row_space_projection([[1.0, 1.0]], [3.0, 4.0]).round(6).tolist()
    [3.5, 3.5]
    """
    X = _matrix(X)
    w = jnp.asarray(w)
    if w.ndim == 0 or w.shape[-1] != X.shape[1]:
        raise UserError(
            f"w has shape {w.shape} and X {X.shape}: expected a last axis of an entry per column"
        )
    Q, _ = jnp.linalg.qr(X.T)
    return (w @ Q) @ Q.T


def off_row_space(X: Float[Array, "n d"], w: Float[Array, "*p d"]) -> Float[Array, "*p d"]:
    """Return the part of w, one vector or many, orthogonal to the row space of X: (I − P)w.

    >>> off_row_space([[1.0, 1.0]], [3.0, 4.0]).round(6).tolist()
    [-0.5, 0.5]
    """
    w = jnp.asarray(w)
    return w - row_space_projection(X, w)


def nearest_solution(
    X: Float[Array, "n d"], t: Float[Array, "n"], w0: Float[Array, "d"]
) -> Float[Array, "d"]:
    """Return the solution nearest to w0, where gradient descent from w0 ends: w* + (I − P)w0.

    >>> nearest_solution([[1.0, 1.0]], [2.0], [3.0, 4.0]).round(6).tolist()
    [0.5, 1.5]
    """
    X = _matrix(X)
    w0 = weights(X, w0)
    return minimum_norm_solution(X, t) + off_row_space(X, w0)
