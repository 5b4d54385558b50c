"""Gradient descent on least squares in closed form: one step, and T steps in the SVD basis.

Notation and checks are those of `optjax.theory.solutions`; X may have any shape and rank. The loss
is k‖Xw − t‖², with k = `scale`, or 1/n if that is None. Every function takes X (n, d), t (n,), w0
(d,) and, where it has them, eta () for the learning rate η and steps () for T, traced or not; it
raises UserError where shapes do not fit or a value is not finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from optjax.run.problems import numbers
from optjax.support.errors import UserError
from optjax.theory import solutions


def _start(
    X: ArrayLike, t: ArrayLike, w0: ArrayLike, scale: float | None
) -> tuple[Array, Array, Array, float]:
    """Check the arguments; return X, w0, the residual a = Xw0 − t and the loss's factor k."""
    X = numbers("X", X, 2)
    t, w0 = solutions.targets(X, t), solutions.weights(X, w0)
    return X, w0, X @ w0 - t, 1.0 / X.shape[0] if scale is None else scale


def one_step_loss(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    eta: ArrayLike,
    scale: float | None = None,
) -> Float[Array, ""]:
    """Return the loss after one gradient step on k‖Xw − t‖².

    L1(η) = k‖(I − 2kη XXᵀ)a‖²

    >>> float(one_step_loss([[1.0]], [1.0], [0.0], eta=0.5))
    0.0
    """
    X, _, a, k = _start(X, t, w0, scale)
    residual = a - 2 * k * eta * (X @ (X.T @ a))
    return k * (residual @ residual)


def one_step_hypergradient(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    eta: ArrayLike,
    scale: float | None = None,
) -> Float[Array, ""]:
    """Return the derivative of `one_step_loss` with respect to the learning rate.

    dL1/dη = −4k² aᵀXXᵀ(I − 2kη XXᵀ)a

    >>> float(one_step_hypergradient([[1.0]], [1.0], [0.0], eta=0.0))
    -4.0
    """
    X, _, a, k = _start(X, t, w0, scale)
    XXta = X @ (X.T @ a)
    return -4 * k * k * (XXta @ (a - 2 * k * eta * XXta))


def optimal_learning_rate(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    scale: float | None = None,
    *,
    batch_size: ArrayLike | None = None,
    replacement: bool = True,
) -> Float[Array, ""]:
    """Return the learning rate that minimises `one_step_loss`, or `one_step_expected_loss`.

    η* = ‖Xᵀa‖²/(2k‖XXᵀa‖²), with k = 1/n: (n/2)‖Xᵀa‖²/‖XXᵀa‖²

    For mini-batches η* = ‖g‖²/(gᵀHg + tr(HC_b)), with g the gradient, H = 2kXᵀX the curvature
    and C_b the covariance of the mini-batch gradient. The rate is greedy: best for one step.

    Args:
      X, t, scale: as above.
      w0: where the gradient does not vanish.
      batch_size: () examples b of a mini-batch, may be traced; all n if None.
      replacement: whether a mini-batch is drawn with replacement.

    Raises:
      UserError: also a batch size out of range, or a gradient at w0 that is exactly zero (with
        mini-batches: that of every example).

    >>> float(optimal_learning_rate([[1.0]], [1.0], [0.0]))
    0.5
    """
    X, _, a, k = _start(X, t, w0, scale)
    Xta = X.T @ a
    noise = 0.0 if batch_size is None else _noise_cost(X, a, k, batch_size, replacement)
    still = not isinstance(Xta, Tracer) and not np.asarray(Xta).any()
    if still and not isinstance(noise, Tracer) and noise == 0:
        raise UserError(
            "the gradient at w0 is zero, so every learning rate leaves the loss as it is; "
            "give another w0"
        )
    XXta = X @ Xta
    return (Xta @ Xta) / (2 * k * (XXta @ XXta) + noise / (4 * k**2))


def one_step_expected_loss(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    eta: ArrayLike,
    scale: float | None = None,
    *,
    batch_size: ArrayLike,
    replacement: bool = True,
) -> Float[Array, ""]:
    """Return the expected loss after one step along the gradient of a random mini-batch.

    E L1(η) = L1(η) + ½η² tr(HC_b), C_b = C/b · (1, or without replacement (n − b)/(n − 1))

    with H = 2kXᵀX and C the covariance of the gradient of one example. tr(HC) is exact, from all
    n gradients, for O(nd min(n, d)) operations.

    Args:
      X, t, w0, eta, scale: as above.
      batch_size: () examples b of the mini-batch; may be traced.
      replacement: whether the mini-batch is drawn with replacement.

    Raises:
      UserError: also a batch size out of range.

    >>> float(one_step_expected_loss([[1.0], [1.0]], [1.0, 3.0], [2.0], 0.5, batch_size=1))
    2.0
    """
    X, _, a, k = _start(X, t, w0, scale)
    noise = _noise_cost(X, a, k, batch_size, replacement)
    return one_step_loss(X, t, w0, eta, scale) + 0.5 * eta**2 * noise


def _noise_cost(
    X: Array, a: Array, k: float, batch_size: ArrayLike, replacement: bool
) -> Float[Array, ""]:
    """Return tr(HC_b), twice the loss that the noise of a mini-batch gradient adds at η = 1."""
    n, d = X.shape
    b = jnp.asarray(batch_size)
    if not isinstance(b, Tracer) and not (1 <= float(b) <= (np.inf if replacement else n)):
        most = "" if replacement else f" and at most n = {n}"
        raise UserError(f"batch_size is {float(b):g}: expected at least 1{most}")
    b = b.astype(X.dtype)
    gradients_nd = 2 * k * n * a[:, None] * X
    noise_nd = gradients_nd - jnp.mean(gradients_nd, axis=0, keepdims=True)
    # ‖Xv‖ = ‖Rv‖: take the smaller of n × d and d × d.
    root = X if n <= d else jnp.linalg.qr(X, mode="r")
    cost = 2 * k * jnp.sum((noise_nd @ root.T) ** 2) / n
    return cost / b if replacement else cost / b * (n - b) / max(n - 1, 1)


def _power(r: Array, steps: int | Int[Array, ""]) -> Array:
    """Return r^T for an integer T, traced or not, and r of either sign."""
    half = jnp.asarray(steps // 2).astype(r.dtype)
    odd = jnp.asarray(steps % 2).astype(bool)
    return jnp.power(r * r, half) * jnp.where(odd, r, jnp.ones_like(r))


def gradient_descent_loss(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    eta: ArrayLike,
    steps: int | Int[Array, ""],
    scale: float | None = None,
) -> Float[Array, ""]:
    """Return the loss after T full-batch gradient steps, from the SVD and without iterating.

    L_T = k(Σ (1 − 2kησ²)^{2T} c² + ‖a − Uc‖²), X = UΣVᵀ, c = Uᵀa (the last term 0 if n ≤ d)

    >>> float(gradient_descent_loss([[1.0]], [1.0], [0.0], eta=0.25, steps=2))
    0.0625
    """
    X, _, a, k = _start(X, t, w0, scale)
    U, s, _ = jnp.linalg.svd(X, full_matrices=False)
    c = U.T @ a
    rest = a - U @ c
    r = jnp.asarray(1 - 2 * k * eta * s**2)
    return k * (jnp.sum((_power(r, steps) * c) ** 2) + rest @ rest)


def gradient_descent_hypergradient(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    eta: ArrayLike,
    steps: int | Int[Array, ""],
    scale: float | None = None,
) -> Float[Array, ""]:
    """Return the derivative of `gradient_descent_loss` with respect to the learning rate.

    dL_T/dη = −4k²T Σ σ²(1 − 2kησ²)^{2T−1} c²

    T ≥ 1.

    >>> float(gradient_descent_hypergradient([[1.0]], [1.0], [0.0], eta=0.25, steps=1))
    -2.0
    """
    X, _, a, k = _start(X, t, w0, scale)
    U, s, _ = jnp.linalg.svd(X, full_matrices=False)
    c = U.T @ a
    r = jnp.asarray(1 - 2 * k * eta * s**2)
    total = jnp.sum(s**2 * _power(r, 2 * steps - 1) * c**2)
    return -4 * k * k * jnp.asarray(steps).astype(total.dtype) * total


def _momentum_factor(
    curvature: Array, eta: ArrayLike, momentum: ArrayLike, nesterov: bool, steps: ArrayLike
) -> Array:
    """Return ρ_T/ρ_0, what T steps leave of the residual of each curvature s, from velocity 0.

    (ρ, u)' = M(ρ, u): u' = βu + sρ, ρ' = ρ − ηu' (Nesterov: ρ − η(βu' + sρ)); M^T by squaring.
    """
    s, beta, eta = jnp.broadcast_arrays(curvature, momentum, eta)
    own, other = (s * (1 + beta), beta**2) if nesterov else (s, beta)
    M = jnp.stack([jnp.stack([1 - eta * own, -eta * other], -1), jnp.stack([s, beta], -1)], -2)
    steps = jnp.asarray(steps).astype(jnp.int32)

    def bit(i: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        power, square = carry
        power = jnp.where((steps >> i) % 2 == 1, square @ power, power)
        # A square that no later bit uses may overflow, and 0 · ∞ would make derivatives NaN.
        return power, jnp.where((steps >> i) > 1, square @ square, jnp.zeros_like(square))

    one = jnp.broadcast_to(jnp.eye(2, dtype=M.dtype), M.shape)
    return jax.lax.fori_loop(0, 31, bit, (one, M))[0][..., 0, 0]


def gradient_descent_iterate(
    X: Float[Array, "n d"],
    t: Float[Array, "n"],
    w0: Float[Array, "d"],
    eta: ArrayLike,
    steps: int | Int[Array, ""],
    scale: float | None = None,
    *,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
) -> Float[Array, "d"]:
    """Return the parameters after T full-batch steps, from the SVD and without iterating.

    w_T = w0 + V ((r_T − 1)/σ) c, X = UΣVᵀ, c = Uᵀa; a direction of σ = 0 does not move

    with r_T = (1 − 2kησ²)^T, or with momentum β the first entry of the T-th power of the 2 × 2
    matrix of a step, `optax.sgd`'s: v' = βv + g, w' = w − ηv', or w − η(βv' + g) for Nesterov.

    Args:
      X, t, w0, eta, steps, scale: as above.
      momentum: β; None for gradient descent.
      nesterov: Nesterov's form of momentum.

    >>> float(gradient_descent_iterate([[1.0]], [1.0], [0.0], eta=0.25, steps=2)[0])
    0.75
    >>> float(gradient_descent_iterate([[1.0]], [1.0], [0.0], 0.25, 2, momentum=0.5)[0])
    1.0

    Source: Polyak (1964); Nesterov (1983); optax's `trace`.
    """
    X, w0, a, k = _start(X, t, w0, scale)
    U, s, Vt = jnp.linalg.svd(X, full_matrices=False)
    if momentum is None:
        left = _power(jnp.asarray(1 - 2 * k * eta * s**2), steps)
    else:
        left = _momentum_factor(2 * k * s**2, eta, momentum, nesterov, steps)
    moves = s > 0
    gain = jnp.where(moves, (left - 1) / jnp.where(moves, s, 1.0), 0.0)
    return w0 + Vt.T @ (gain * (U.T @ a))
