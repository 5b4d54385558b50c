"""The laws as they are fitted: log L in parameters that suit a minimiser.

Let z be the logarithms of the sizes, less their means over the runs. A sum of powers is

    log L = log Σ_m exp(u_m),  u_m = a_m − α_m z_m for a power,  u_m = a_m for the irreducible loss

and θ = (a, α): every coefficient is positive by construction, and subtracting the means keeps a
and α from moving together. The objective is that of Hoffmann et al.:
Σ w Huber_δ(log L − log measured).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optjax.scaling.laws import (
    Hoffmann,
    KaplanND,
    KaplanNS,
    Power,
    hoffmann_loss,
    kaplan_nd_loss,
    kaplan_ns_loss,
    power_loss,
)
from optjax.support.errors import UserError, nearest
from optjax.support.types import Array


class Parts(NamedTuple):
    """The objective at θ and its derivatives, which a step of the minimiser uses."""

    value: Array  # () the objective
    gradient: Array  # (p,)
    hessian: Array  # (p, p) exact, of either sign
    majoriser: Array  # (p, p) Gauss–Newton with weights min(1, δ/|r|): never negative


class Form(NamedTuple):
    """A law in the parameters of the fit."""

    name: str
    sizes: tuple[str, ...]  # of "N", "D", "S"
    floor: bool  # whether it has an irreducible loss
    kind: type  # Hoffmann, Power, KaplanND or KaplanNS
    loss: Callable[..., Array]  # (law, *sizes) -> loss
    parameters: int  # p
    log_loss: Callable[[Any, Any], Array]  # (θ (p,), z (k, n)) -> (n,)
    to_law: Callable[[Any, Any], Any]  # (θ (..., p), means (k,)) -> law, fields (...)
    from_law: Callable[[Any, Any], Any]  # its inverse
    powers: int  # k of a sum of powers; 0 for another law

    def parts(self, theta: Array, z: Array, y: Array, w: Array, delta: Array) -> Parts:
        """Compute the objective and its derivatives at θ.

        Args:
          theta: (p,).
          z: (k, n) centred log sizes.
          y: (n,) log losses.
          w: (n,) weights.
          delta: () δ, from where on a residual counts linearly.
        """
        if self.powers:
            return _power_parts(self.powers, self.floor, theta, z, y, w, delta)
        return _auto_parts(self.log_loss, theta, z, y, w, delta)


def huber(r: Any, delta: Any) -> Array:
    """Compute the Huber loss: ½r² up to δ, then δ(|r| − ½δ).

    >>> huber(jnp.array([0.5, 3.0]), jnp.array(1.0)).tolist()
    [0.125, 2.5]
    """
    size = jnp.abs(r)
    return jnp.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


def _weights(r: Array, w: Array, delta: Array) -> tuple[Array, Array, Array]:
    """Return the weights of each run in the gradient, the Hessian and the majoriser."""
    size = jnp.abs(r)
    inside = size <= delta
    scaled = jnp.where(inside, w, w * delta / jnp.where(inside, 1, size))
    return scaled * r, jnp.where(inside, w, 0), scaled


def _auto_parts(
    log_loss: Callable[[Array, Array], Array],
    theta: Array,
    z: Array,
    y: Array,
    w: Array,
    delta: Any,
) -> Parts:
    """Compute the parts of any law by automatic differentiation."""
    r, jacobian = log_loss(theta, z) - y, jax.jacfwd(log_loss)(theta, z)
    c, inside, scaled = _weights(r, w, delta)
    bent = jax.hessian(lambda theta: jnp.sum(c * log_loss(theta, z)))(theta)
    gram = jacobian.T @ (inside[:, None] * jacobian)
    major = jacobian.T @ (scaled[:, None] * jacobian)
    return Parts(jnp.sum(w * huber(r, delta)), c @ jacobian, gram + bent, major)


def _power_parts(
    powers: int, floor: bool, theta: Array, z: Array, y: Array, w: Array, delta: Any
) -> Parts:
    """Compute the parts of a sum of powers from sums of products of shares.

    With the shares π_m = exp(u_m)/Σ exp(u), ∂log L/∂θ_i = π_m(i) φ_i, where φ is 1 for a
    coefficient and −z for an exponent, and ∂²log L/∂θ_i∂θ_j = φ_i φ_j (π_m [m(i) = m(j)] − π_m(i)
    π_m(j)). All sums are one matrix product of shares and features.
    """
    terms = powers + floor
    u = [theta[m] - theta[terms + m] * z[m] for m in range(powers)]
    u += [jnp.broadcast_to(theta[powers], y.shape)] * floor
    top = u[0]
    for other in u[1:]:
        top = jnp.maximum(top, other)
    shares = [jnp.exp(x - top) for x in u]
    total = sum(shares[1:], shares[0])
    r = top + jnp.log(total) - y
    pi = [share / total for share in shares]
    c, inside, scaled = _weights(r, w, delta)
    bent = inside - c
    pairs = list(itertools.combinations_with_replacement(range(terms), 2))
    products = [pi[m] * pi[k] for m, k in pairs]
    rows = [c * p for p in pi] + [bent * p for p in products] + [scaled * p for p in products]
    one = jnp.ones_like(y)
    basis = [one, *(-z[k] for k in range(powers))]
    columns = list(itertools.combinations_with_replacement(range(powers + 1), 2))
    sums = jnp.stack(rows) @ jnp.stack([basis[i] * basis[j] for i, j in columns], axis=1)
    # The term of each entry of θ, and its feature in the basis.
    owner = [*range(terms), *range(powers)]
    feature = [0] * terms + [1 + k for k in range(powers)]

    def at(first: int, i: int, j: int) -> Array:
        pair = pairs.index((min(owner[i], owner[j]), max(owner[i], owner[j])))
        column = (min(feature[i], feature[j]), max(feature[i], feature[j]))
        return sums[first + pair, columns.index(column)]

    def second(i: int, j: int) -> Array:
        found = at(terms, i, j)
        if owner[i] != owner[j]:
            return found
        column = (min(feature[i], feature[j]), max(feature[i], feature[j]))
        return found + sums[owner[i], columns.index(column)]

    p = range(terms + powers)
    gradient = [sums[owner[i], columns.index((0, feature[i]))] for i in p]
    hessian = [jnp.stack([second(i, j) for j in p]) for i in p]
    major = [jnp.stack([at(terms + len(pairs), i, j) for j in p]) for i in p]
    value = jnp.sum(w * huber(r, delta))
    return Parts(value, jnp.stack(gradient), jnp.stack(hessian), jnp.stack(major))


def _sum_of_powers(powers: int, floor: bool) -> Callable[[Array, Array], Array]:
    """Make the log loss of a sum of powers, as a function of θ and z."""
    terms = powers + floor

    def log_loss(theta: Array, z: Array) -> Array:
        u = [theta[m] - theta[terms + m] * z[m] for m in range(powers)]
        u += [jnp.broadcast_to(theta[powers], z.shape[1:])] * floor
        return jax.nn.logsumexp(jnp.stack(u), axis=0)

    return log_loss


def _hoffmann(theta: Any, means: Any) -> Hoffmann:
    a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
    with np.errstate(over="ignore"):  # in refits that found no minimum
        A, B = np.exp(a + alpha * means[0]), np.exp(b + beta * means[1])
    return Hoffmann(np.exp(e), A, B, alpha, beta)


def _from_hoffmann(law: Hoffmann, means: Any) -> Any:
    E, A, B, alpha, beta = law
    a, b = np.log(A) - alpha * means[0], np.log(B) - beta * means[1]
    return np.stack([a, b, np.log(E), alpha, beta], axis=-1)


def _power(theta: Any, means: Any) -> Power:
    a, *e, alpha = np.moveaxis(theta, -1, 0)
    # (scale/x)^α = exp(a − α(log x − mean)); the scale overflows where the exponent is near 0.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return Power(np.exp(a / alpha + means[0]), alpha, np.exp(e[0]) if e else np.zeros_like(a))


def _from_power(floor: bool) -> Callable[[Power, Any], Any]:
    def back(law: Power, means: Any) -> Any:
        scale, alpha, E = law
        a = alpha * (np.log(scale) - means[0])
        return np.stack([a, *([np.log(E)] if floor else []), alpha], axis=-1)

    return back


def _kaplan_ns(theta: Any, means: Any) -> KaplanNS:
    a, b, alpha_N, alpha_S = np.moveaxis(theta, -1, 0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return KaplanNS(
            np.exp(a / alpha_N + means[0]), np.exp(b / alpha_S + means[1]), alpha_N, alpha_S
        )


def _from_kaplan_ns(law: KaplanNS, means: Any) -> Any:
    N_c, S_c, alpha_N, alpha_S = law
    a, b = alpha_N * (np.log(N_c) - means[0]), alpha_S * (np.log(S_c) - means[1])
    return np.stack([a, b, alpha_N, alpha_S], axis=-1)


def _log_kaplan_nd(theta: Array, z: Array) -> Array:
    """Compute log L of `KaplanND` in parameters of the size of log L.

    θ = (α_D log(N_c/N̄)·α_N/α_D, α_D log(D_c/D̄), α_N, α_D)
    """
    a, b, alpha_N, alpha_D = theta
    return alpha_D * jnp.logaddexp(
        (a - alpha_N * z[0]) / alpha_D,
        b / alpha_D - z[1],
    )


def _kaplan_nd(theta: Any, means: Any) -> KaplanND:
    a, b, alpha_N, alpha_D = np.moveaxis(theta, -1, 0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return KaplanND(
            np.exp(a / alpha_N + means[0]), np.exp(b / alpha_D + means[1]), alpha_N, alpha_D
        )


def _from_kaplan_nd(law: KaplanND, means: Any) -> Any:
    return _from_kaplan_ns(KaplanNS(*law), means)


def _powers(name: str, sizes: tuple[str, ...], floor: bool, *law: Any) -> Form:
    kind, loss, to_law, from_law = law
    k = len(sizes)
    log_loss = _sum_of_powers(k, floor)
    return Form(name, sizes, floor, kind, loss, 2 * k + floor, log_loss, to_law, from_law, k)


def _size(name: str, size: str, floor: bool) -> Form:
    return _powers(name, (size,), floor, Power, power_loss, _power, _from_power(floor))


FORMS = {
    form.name: form
    for form in (
        _powers("hoffmann", ("N", "D"), True, Hoffmann, hoffmann_loss, _hoffmann, _from_hoffmann),
        _size("power-n", "N", False),
        _size("power-n-floor", "N", True),
        _size("power-d", "D", False),
        _size("power-d-floor", "D", True),
        Form(
            *("kaplan-nd", ("N", "D"), False, KaplanND, kaplan_nd_loss, 4),
            *(_log_kaplan_nd, _kaplan_nd, _from_kaplan_nd, 0),
        ),
        _powers(
            *("kaplan-ns", ("N", "S"), False),
            *(KaplanNS, kaplan_ns_loss, _kaplan_ns, _from_kaplan_ns),
        ),
    )
}
"""The laws that can be fitted, by name."""


def form_of(name: str) -> Form:
    """Look up a law by its name.

    Raises:
      UserError: no law has the name.

    >>> form_of("hoffmann").parameters
    5
    """
    if name not in FORMS:
        raise UserError(f"unknown law {name!r}; {nearest(str(name), FORMS)}")
    return FORMS[name]
