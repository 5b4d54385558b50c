"""Optimisers that optax lacks, each with a geometry of its own: steepest, mirror, natural, Shampoo.

Each is an ordinary optax factory. A potential is separable, ψ(w) = Σ ψ(wᵢ): its mirror map is ∇ψ.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from optjax.support.errors import UserError
from optjax.support.types import Array, PyTree


class Potential(NamedTuple):
    """A strictly convex potential, by its mirror map and the inverse of that."""

    name: str
    mirror: Callable[[Array], Array]  # ∇ψ, entry by entry
    inverse: Callable[[Array], Array]  # ∇ψ⁻¹
    power: float = 0.0  # p of ψ(w) = Σ |w|ᵖ/p, which is homogeneous; 0 for any other


@cache
def power(p: float) -> Potential:
    """Return the potential ψ(w) = Σ |w|ᵖ/p, 1 < p < ∞, whose projection of 0 has the least ℓp norm.

    >>> import jax.numpy as jnp
    >>> power(3).mirror(jnp.array([-2.0])).tolist()
    [-4.0]
    """
    if not 1 < p < math.inf:
        raise UserError(f"p is {p:g}: expected a finite number above 1")

    def signed(exponent: float) -> Callable[[Array], Array]:
        return lambda x: jnp.sign(x) * jnp.abs(x) ** exponent

    return Potential(f"ℓ{p:.4g}", signed(p - 1), signed(1 / (p - 1)), p)


entropy = Potential("entropy", jnp.log, jnp.exp)
"""ψ(w) = Σ w log w − w, of weights above 0: mirror descent is exponentiated gradient."""


@cache
def hypentropy(beta: float) -> Potential:
    """Return ψ(w) = Σ w arsinh(w/β) − √(w² + β²): near ℓ1 for small β, near ℓ2 for large.

    Gradient flow of a diagonal linear network of two layers, w = u² − v², u = v = α at the start,
    is the mirror flow of this potential with β = 2α².

    Source: Ghai, Hazan and Singer (2020); Woodworth et al. (2020), theorem 1.
    """
    if not 0 < beta < math.inf:
        raise UserError(f"beta is {beta:g}: expected a finite number above 0")
    return Potential(
        f"hypentropy {beta:g}", lambda w: jnp.arcsinh(w / beta), lambda z: beta * jnp.sinh(z)
    )


def steepest_descent(
    learning_rate: optax.ScalarOrSchedule, p: float = 2.0, normalize: bool = False
) -> optax.GradientTransformation:
    """Make steepest descent in the ℓp norm of all parameters.

    .. math:: Δw = η · argmin_v ⟨g, v⟩ + ½‖v‖_p²,   Δwᵢ = −η ‖g‖_q^{2−q} |gᵢ|^{q−1} sign gᵢ

    with 1/p + 1/q = 1: gradient descent for p = 2, greedy coordinate descent for 1, sign descent
    scaled by ‖g‖₁ for ∞. With `normalize` the step is divided by ‖g‖_q, so that ‖Δw‖_p = η. p
    and `normalize` decide the program: give them with `functools.partial`.

    Raises:
      UserError: p is below 1.

    >>> import jax.numpy as jnp
    >>> tx = steepest_descent(0.5, p=1.0)
    >>> g = jnp.array([1.0, -4.0])
    >>> tx.update(g, tx.init(g))[0].tolist()
    [-0.0, 2.0]

    Source: Boyd and Vandenberghe (2004), section 9.4; Gunasekar et al. (2018), section 2.
    """
    if not p >= 1:
        raise UserError(f"p is {p:g}: expected at least 1, or inf")

    def direction(updates: PyTree, params: PyTree = None) -> PyTree:
        g, unravel = ravel_pytree(updates)
        size = jnp.abs(g)
        if p == 1:
            norm = jnp.max(size)
            unit = jnp.where(jnp.arange(g.size) == jnp.argmax(size), jnp.sign(g), 0)
        elif p == math.inf:
            norm, unit = jnp.sum(size), jnp.sign(g)
        else:
            q = p / (p - 1)
            most = jnp.max(size)
            scaled = size / jnp.where(most > 0, most, 1)  # |g|^q would underflow near the end
            root = jnp.sum(scaled**q) ** (1 / q)
            norm = most * root
            unit = jnp.sign(g) * (scaled / jnp.where(root > 0, root, 1)) ** (q - 1)
        return unravel((unit if normalize else norm * unit).astype(g.dtype))

    return optax.chain(optax.stateless(direction), optax.scale_by_learning_rate(learning_rate))


def mirror_descent(
    learning_rate: optax.ScalarOrSchedule,
    potential: Potential,
    momentum: Any = 0.0,
    primal: bool = False,
) -> optax.GradientTransformation:
    """Make mirror descent, with momentum in the dual or in the primal.

    .. math:: ∇ψ(w') = ∇ψ(w) + Δz,   Δz' = βΔz − ηg                    (dual)
    .. math:: ∇ψ(w') = ∇ψ(w + βΔw) − ηg                              (primal)

    With dual momentum every iterate keeps ∇ψ(w) − ∇ψ(w0) in the row space; with primal it does not.

    ψ and `primal` decide the program: give them with `functools.partial`.

    >>> import jax.numpy as jnp
    >>> tx = mirror_descent(0.5, entropy)
    >>> w, g = jnp.array([1.0]), jnp.array([2.0])
    >>> round(float(tx.update(g, tx.init(w), w)[0][0]), 4)  # exp(−1) − 1
    -0.6321

    Source: Gunasekar et al. (2018), section 2.
    """

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        if primal:
            steps = jax.tree.map(
                lambda u, s, w: potential.inverse(potential.mirror(w + momentum * s) + u) - w,
                updates, state, params,
            )  # fmt: skip
            return steps, steps
        moved = jax.tree.map(lambda u, z: momentum * z + u, updates, state)
        return jax.tree.map(
            lambda z, w: potential.inverse(potential.mirror(w) + z) - w, moved, params
        ), moved

    return optax.chain(
        optax.scale_by_learning_rate(learning_rate), optax.GradientTransformation(init, update)
    )


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule, potential: Potential
) -> optax.GradientTransformation:
    """Make natural gradient descent in the metric of a potential.

    .. math:: w' = w − η ∇²ψ(w)⁻¹ g

    It is mirror descent as η → 0; at other rates it ends elsewhere. ψ decides the program.

    >>> import jax.numpy as jnp
    >>> tx = natural_gradient(0.5, entropy)
    >>> w, g = jnp.array([3.0]), jnp.array([2.0])
    >>> tx.update(g, tx.init(w), w)[0].tolist()  # −η w g
    [-3.0]

    Source: Amari (1998); Gunasekar et al. (2018), section 2.
    """

    def scaled(u: Array, w: Array) -> Array:
        return u / jax.jvp(potential.mirror, (w,), (jnp.ones_like(w),))[1]

    return optax.chain(
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, params)),
    )


def shampoo(
    learning_rate: optax.ScalarOrSchedule, eps: Any = 1e-12
) -> optax.GradientTransformation:
    """Make Shampoo: a preconditioner for each axis of each array, from all gradients so far.

    .. math:: Hᵢ' = Hᵢ + Gᵢ Gᵢᵀ,   Δw = −η G ×₁ H₁^{−1/2k} … ×ₖ Hₖ^{−1/2k},   Hᵢ = εI at first

    with Gᵢ the gradient of k axes unfolded along axis i. Of a vector it is AdaGrad with the full
    matrix, which keeps the row space. The roots are exact, by eigenvalues at every step; ε > 0.

    >>> import jax.numpy as jnp
    >>> tx = shampoo(0.5)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -2.0]])
    >>> jnp.diag(tx.update(g, tx.init(g))[0]).round(4).tolist()  # −η UVᵀ, G = UΣVᵀ
    [-0.5, 0.5]

    Source: Gupta, Koren and Singer (2018), algorithms 1 and 2.
    """

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(lambda w: [eps * jnp.eye(n, dtype=w.dtype) for n in w.shape], params)

    def one(g: Array, factors: list[Array]) -> tuple[Array, list[Array]]:
        after, step = [], g
        for axis, H in enumerate(factors):
            unfolded = jnp.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
            H = H + unfolded @ unfolded.T
            values, vectors = jnp.linalg.eigh(H)
            scaled = vectors * jnp.maximum(values, eps)[None] ** (-0.5 / g.ndim)
            root = scaled @ vectors.T
            step = jnp.moveaxis(jnp.tensordot(root, step, (1, axis)), 0, axis)
            after.append(H)
        return step, after

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        leaves, tree = jax.tree.flatten(updates)
        found = [one(g, H) for g, H in zip(leaves, tree.flatten_up_to(state), strict=True)]
        return tuple(tree.unflatten([pair[i] for pair in found]) for i in (0, 1))  # pyright: ignore[reportReturnType]

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )
