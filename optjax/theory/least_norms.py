"""Solutions that a bias picks: of least ℓp norm, Bregman projections, and max-margin directions.

All are computed in float64, whatever JAX's default, and on the host: they are references for runs.
X is (n, d), of any shape and rank; t, y (n,), w0 (d,). Where no w solves Xw = t, the least-squares
solutions take the place of the solutions. UserError: shapes do not fit, or a value is not finite.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
from jaxtyping import ArrayLike, Float
from scipy import sparse

from optjax.run import geometries
from optjax.run.geometries import Potential
from optjax.run.problems import finite
from optjax.support.errors import UserError

Vector = Float[np.ndarray, "d"]


class Inseparable(UserError):
    """No direction separates the labels."""


class Equations(NamedTuple):
    """The equations that every least-squares solution of Xw = t fulfils, of full row rank."""

    X: np.ndarray  # (r, d) ΣVᵀ, r the rank
    t: np.ndarray  # (r,) Uᵀt
    row_space: np.ndarray  # (r, d) Vᵀ, orthonormal rows
    least_residual: float  # min ‖Xw − t‖ / ‖t‖, 0 where a solution interpolates
    condition: float  # σ_max / σ_min of the singular values that count

    def residual(self, w: np.ndarray) -> float:
        """Return ‖UUᵀ(Xw − t)‖ / ‖Uᵀt‖: how far w is from the least-squares solutions."""
        return float(np.linalg.norm(self.X @ w - self.t) / (np.linalg.norm(self.t) or 1.0))

    @property
    def values(self) -> np.ndarray:
        """Vᵀw of every solution, Σ⁻¹Uᵀt: the same equations with orthonormal rows."""
        return self.t / np.linalg.norm(self.X, axis=1)

    def solution(self) -> Vector:
        """Return the solution of least ℓ2 norm, V Σ⁻¹ Uᵀt."""
        return self.row_space.T @ self.values

    def nearest(self, w0: np.ndarray) -> Vector:
        """Return the solution nearest to w0, w* + (I − P)w0."""
        return self.solution() + w0 - self.row_space.T @ (self.row_space @ w0)


def equations(X: ArrayLike, t: ArrayLike) -> Equations:
    """Reduce Xw = t, X = UΣVᵀ, to ΣVᵀw = Uᵀt, whose solutions are the least-squares solutions.

    >>> equations([[1.0, 1.0], [2.0, 2.0]], [1.0, 2.0]).solution().round(6).tolist()
    [0.5, 0.5]
    """
    X, t = finite("X", X, 2), finite("t", t, 1)
    if len(t) != len(X):
        raise UserError(f"t has shape {t.shape} and X {X.shape}: expected an entry per row of X")
    U, s, Vt = scipy.linalg.svd(X, full_matrices=False)
    kept = s > max(X.shape) * np.finfo(float).eps * s[0]
    U, s, Vt = U[:, kept], s[kept], Vt[kept]
    ours = U.T @ t
    norm = np.linalg.norm(t) or 1.0
    off = float(np.linalg.norm(t - U @ ours) / norm)
    condition = float(s[0] / s[-1]) if len(s) else math.inf
    return Equations(s[:, None] * Vt, ours, Vt, off if off > 1e-12 else 0.0, condition)


def least_norm_solution(X: ArrayLike, t: ArrayLike, p: float = 2.0) -> Vector:
    """Return a solution of Xw = t of least ℓp norm, p from 1 to ∞.

    For 1 and ∞ by a linear program (HiGHS), one of what may be several; else by Newton's method.

    >>> least_norm_solution([[2.0, 1.0]], [2.0], 1).round(6).tolist()
    [1.0, 0.0]
    >>> least_norm_solution([[2.0, 1.0]], [2.0], math.inf).round(6).tolist()
    [0.666667, 0.666667]
    """
    if not p >= 1:
        raise UserError(f"p is {p:g}: expected at least 1, or inf")
    given = equations(X, t)
    if p == 2 or not given.t.any():
        return given.solution()
    if p in (1, math.inf):
        size = float(np.abs(given.solution()).max())
        found = _linear_program(given.row_space, given.values / size, p, equal=True)
        if found is None:
            raise UserError("HiGHS found no solution")
        return size * found
    return bregman_projection(X, t, np.zeros(given.X.shape[1]), geometries.power(p))


def bregman_projection(X: ArrayLike, t: ArrayLike, w0: ArrayLike, potential: Potential) -> Vector:
    """Return the solution of Xw = t that mirror descent from w0 reaches.

    argmin D_ψ(w, w0) subject to Xw = t:   ∇ψ(w) = ∇ψ(w0) + Xᵀλ

    by Newton's method on the equations X ∇ψ⁻¹(∇ψ(w0) + Xᵀλ) = t; where ∇ψ⁻¹ has infinite slopes
    (ℓp, p > 2), on those of the null space, Nᵀ∇ψ(w) = Nᵀ∇ψ(w0).

    Raises:
      UserError: also where w0 is outside of the domain of ψ, or no solution was found inside.

    >>> bregman_projection([[1.0, 2.0]], [1.0], [1.0, 1.0], geometries.entropy).round(6).tolist()
    [0.5, 0.25]

    Source: Gunasekar et al. (2018), theorem 1.
    """
    given, w0 = equations(X, t), finite("w0", w0, 1)
    if len(w0) != given.X.shape[1]:
        raise UserError(f"w0 has shape {w0.shape}: expected ({given.X.shape[1]},)")
    with jax.enable_x64(True):
        start = np.asarray(potential.mirror(jnp.asarray(w0)))
        if not np.isfinite(start).all():
            raise UserError(f"w0 is outside of the domain of {potential.name}: give another start")
        # From 0 a power's problem is homogeneous: solve it at size 1.
        free = bool(potential.power) and not start.any()
        size = float(np.abs(given.solution()).max() or 1.0) if free else 1.0
        V, values, least = given.row_space, given.values / size, given.solution() / size
        if potential.power > 2:
            if len(w0) > 5000:
                raise UserError(
                    f"p > 2 takes a {len(w0)} × {len(w0)} matrix: expected at most 5000"
                )
            N = scipy.linalg.null_space(V) if len(V) else np.eye(len(w0))
            z = _newton(N.T, potential.mirror, least, N.T @ start, np.zeros(N.shape[1]), potential)
            return size * (least + N @ z)
        x = _newton(V, potential.inverse, start, values, values if free else 0 * values, potential)
        return size * np.asarray(potential.inverse(jnp.asarray(start + V.T @ x)))


def _newton(B, f, c, b, x, potential: Potential) -> np.ndarray:
    """Solve B f(c + Bᵀx) = b, f increasing entry by entry, by Newton's method with backtracking."""

    def at(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = jnp.asarray(c + B.T @ x)
        value, slope = jax.jvp(f, (u,), (jnp.ones_like(u),))
        return B @ np.asarray(value) - b, np.asarray(slope)

    size = float(np.linalg.norm(b)) or 1.0
    with np.errstate(all="ignore"):
        F, slope = at(x)
        for _ in range(500):
            error = np.linalg.norm(F)
            if error <= 1e-15 * size or not np.isfinite(slope).all():
                break
            step = np.linalg.lstsq((B * slope) @ B.T, F)[0]
            for halvings in range(40):
                tried = x - 0.5**halvings * step
                F_tried, slope_tried = at(tried)
                if np.linalg.norm(F_tried) < error:  # False for NaN
                    break
            else:
                break
            x, F, slope = tried, F_tried, slope_tried
    if not np.linalg.norm(F) <= 1e-9 * max(size, 1.0):
        raise UserError(
            f"no solution inside the domain of {potential.name} was found (residual "
            f"{np.linalg.norm(F):.2g}): there may be none"
        )
    return x


def _linear_program(A: np.ndarray, b: np.ndarray, p: float, equal: bool) -> Vector | None:
    """Minimise ‖w‖_p, p = 1 or ∞, subject to Aw = b or Aw ≥ b; None if there is no such w."""
    n, d = A.shape
    if p == 1:  # w = u − v, u, v ≥ 0, the least Σ(u + v)
        cost, rows, bounds = np.ones(2 * d), np.hstack([A, -A]), (0, None)
        limits = sparse.csr_array((0, 2 * d))
    else:  # −s ≤ w ≤ s, the least s
        cost, rows, bounds = np.r_[np.zeros(d), 1.0], np.hstack([A, np.zeros((n, 1))]), (None, None)
        one, last = sparse.eye_array(d), -np.ones((d, 1))
        limits = sparse.block_array([[one, last], [-one, last]])
    most = np.zeros(0 if p == 1 else 2 * d)
    if equal:
        found = scipy.optimize.linprog(cost, limits, most, rows, b, bounds)
    else:
        limits, most = sparse.vstack([limits, -rows]), np.r_[most, -b]
        found = scipy.optimize.linprog(cost, limits, most, bounds=bounds)
    if found.x is None:
        return None
    return found.x[:d] - found.x[d:] if p == 1 else found.x[:d]


def max_margin_direction(X: ArrayLike, y: ArrayLike, p: float = 2.0) -> tuple[Vector, float]:
    """Return the direction of largest margin in the ℓp norm, and that margin.

    γ_p = max_w min_i yᵢ xᵢᵀw / ‖w‖_p

    For p = 2 by non-negative least squares on the dual, exact to rounding; for 1 and ∞ a linear
    program, whose solution may be one of several. The labels y are −1 and 1, and ‖w‖_p = 1.

    Raises:
      UserError: also where a label or p is another, or no direction separates the labels.

    >>> w, margin = max_margin_direction([[2.0, 0.0], [0.0, -2.0]], [1.0, -1.0])
    >>> w.round(4).tolist(), round(margin, 4)
    ([0.7071, 0.7071], 1.4142)

    Source: Lawson and Hanson (1974), section 23.4 (least distance programming).
    """
    X, y = finite("X", X, 2), finite("y", y, 1)
    if len(y) != len(X):
        raise UserError(f"y has shape {y.shape} and X {X.shape}: expected an entry per row of X")
    if not np.isin(y, (-1, 1)).all():
        odd = y[~np.isin(y, (-1, 1))][0]
        raise UserError(f"y holds the label {odd:g}: expected -1 and 1")
    if p not in (1, 2, math.inf):
        raise UserError(f"p is {p:g}: expected 1, 2 or inf")
    scale = float(np.linalg.norm(X, axis=1).max()) or 1.0
    A = y[:, None] * X / scale
    if p == 2:
        # min ‖w‖ with Aw ≥ 1: the residual of min ‖Aᵀu‖² + (1ᵀu − 1)², u ≥ 0, is ∝ (w, −1).
        E = np.vstack([A.T, np.ones(len(A))])
        goal = np.r_[np.zeros(A.shape[1]), 1.0]
        off = E @ scipy.optimize.nnls(E, goal)[0] - goal
        w = off[:-1] if np.linalg.norm(off) > 1e-10 else None
    else:
        w = _linear_program(A, np.ones(len(A)), p, equal=False)
    if w is None:
        raise Inseparable(
            "no direction through the origin separates the labels; for an intercept add a column "
            "of ones to X"
        )
    w = w / np.linalg.norm(w, p)
    return w, scale * float((A @ w).min())
