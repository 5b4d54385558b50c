"""Published scaling laws of language models: the loss for a model size, data and steps.

N is the number of parameters, D of tokens, S of steps, B the batch in tokens, C the floating-point
operations of training, all real numbers or arrays that broadcast; a loss is in nats per token.
Every function is plain `jax.numpy`: batch over the laws' fields or differentiate by them at will.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optjax.support.types import Array

Number = Any
"""A float, or an array of them for many laws at once."""


class Hoffmann(NamedTuple):
    """Parameters of L(N, D) = E + A/N^α + B/D^β."""

    E: Number  # () irreducible loss, nats per token
    A: Number  # ()
    B: Number  # ()
    alpha: Number  # ()
    beta: Number  # ()


class Power(NamedTuple):
    """Parameters of L(x) = E + (scale/x)^exponent."""

    scale: Number  # () Kaplan's N_c or D_c, in units of x
    exponent: Number  # () α_N or α_D
    E: Number = 0.0  # () irreducible loss; none in Kaplan's laws


class KaplanND(NamedTuple):
    """Parameters of L(N, D) = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D."""

    N_c: Number  # () parameters
    D_c: Number  # () tokens
    alpha_N: Number  # ()
    alpha_D: Number  # ()


class KaplanNS(NamedTuple):
    """Parameters of L(N, S_min) = (N_c/N)^α_N + (S_c/S_min)^α_S."""

    N_c: Number  # () parameters
    S_c: Number  # () steps
    alpha_N: Number  # ()
    alpha_S: Number  # ()


class KaplanBatch(NamedTuple):
    """Parameters of B_crit(L) = B*/L^(1/α_B)."""

    B_star: Number  # () tokens
    alpha_B: Number  # ()


KAPLAN_N = Power(8.8e13, 0.076)
"""Kaplan et al. 2020, eq. 1.1 and table 5: parameters without the embedding."""

KAPLAN_D = Power(5.4e13, 0.095)
"""Kaplan et al. 2020, eq. 1.2 and table 5."""

KAPLAN_ND = KaplanND(6.4e13, 1.8e13, 0.076, 0.103)
"""Kaplan et al. 2020, table 2."""

KAPLAN_NS = KaplanNS(6.5e13, 2.1e3, 0.077, 0.76)
"""Kaplan et al. 2020, table 3."""

KAPLAN_BATCH = KaplanBatch(2e8, 0.21)
"""Kaplan et al. 2020, eq. 1.4; their table 5 prints 2.1e8."""

HOFFMANN_2022 = Hoffmann(1.69, 406.4, 410.7, 0.34, 0.28)
"""Hoffmann et al. 2022, eq. 10, as printed: the rounding of the exponents matters."""

BESIROGLU_2024 = Hoffmann(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""Besiroglu et al. 2024, table 1: the same law fitted again to points read off a figure."""


def as_size(x: ArrayLike) -> Array:
    """Convert a size to floats: JAX's integers have too few bits for tokens and FLOPs."""
    if isinstance(x, int):
        x = float(x)
    array = jnp.asarray(x if isinstance(x, jax.Array) else np.asarray(x, float))
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)


def hoffmann_loss(law: Hoffmann, N: ArrayLike, D: ArrayLike) -> Array:
    """Predict the loss of N parameters trained on D tokens.

    L(N, D) = E + A/N^α + B/D^β

    Args:
      law: parameters of the law.
      N: parameters of the model.
      D: tokens; N and D broadcast.

    >>> round(float(hoffmann_loss(HOFFMANN_2022, 70e9, 1.4e12)), 2)
    1.94

    Source: Hoffmann et al. 2022 (arXiv:2203.15556), equation 2.
    """
    E, A, B, alpha, beta = law
    return E + A * as_size(N) ** -alpha + B * as_size(D) ** -beta


def power_loss(law: Power, x: ArrayLike) -> Array:
    """Predict the loss where one size alone binds.

    L(x) = E + (scale/x)^exponent

    Args:
      law: parameters of the law.
      x: the size, in units of the law's scale: parameters or tokens.

    >>> round(float(power_loss(KAPLAN_N, 1.5e9)), 2)
    2.3

    Source: Kaplan et al. 2020 (arXiv:2001.08361), equations 1.1 and 1.2, where E = 0.
    """
    scale, exponent, E = law
    return E + (scale / as_size(x)) ** exponent


def kaplan_nd_loss(law: KaplanND, N: ArrayLike, D: ArrayLike) -> Array:
    """Predict the loss of N parameters on D tokens, training stopped before it overfits.

    L(N, D) = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D

    Args:
      law: parameters of the law.
      N: parameters of the model.
      D: tokens; N and D broadcast.

    >>> round(float(kaplan_nd_loss(KAPLAN_ND, 1.5e9, 22e9)), 2)
    2.31

    Source: Kaplan et al. 2020 (arXiv:2001.08361), equation 1.5.
    """
    N_c, D_c, alpha_N, alpha_D = law
    return ((N_c / as_size(N)) ** (alpha_N / alpha_D) + D_c / as_size(D)) ** alpha_D


def kaplan_ns_loss(law: KaplanNS, N: ArrayLike, S_min: ArrayLike) -> Array:
    """Predict the loss of N parameters after S_min steps on unlimited data.

    L(N, S_min) = (N_c/N)^α_N + (S_c/S_min)^α_S

    Args:
      law: parameters of the law.
      N: parameters of the model.
      S_min: steps at a batch far above the critical one, as from `least_steps`.

    >>> round(float(kaplan_ns_loss(KAPLAN_NS, 1.5e9, 1e5)), 2)
    2.33

    Source: Kaplan et al. 2020 (arXiv:2001.08361), equation 1.6.
    """
    N_c, S_c, alpha_N, alpha_S = law
    return (N_c / as_size(N)) ** alpha_N + (S_c / as_size(S_min)) ** alpha_S


def critical_batch(law: KaplanBatch, loss: ArrayLike) -> Array:
    """Return the batch at which a loss takes twice the least steps and twice the least tokens.

    B_crit(L) = B*/L^(1/α_B), in tokens

    Args:
      law: constants of B_crit.
      loss: L, nats per token.

    >>> round(float(critical_batch(KAPLAN_BATCH, 2.5)) / 1e6, 1)
    2.5

    Source: Kaplan et al. 2020 (arXiv:2001.08361), equation 1.4.
    """
    B_star, alpha_B = law
    return B_star * as_size(loss) ** (-1 / alpha_B)


def least_steps(S: ArrayLike, B: ArrayLike, B_crit: ArrayLike) -> Array:
    """Return the steps that an unbounded batch would have needed where S were taken at B.

    S_min = S/(1 + B_crit/B)

    Args:
      S: steps taken.
      B: batch, in tokens.
      B_crit: critical batch, in tokens.

    >>> float(least_steps(1000.0, 2e6, 2e6))
    500.0

    Source: Kaplan et al. 2020 (arXiv:2001.08361), equation 5.4.
    """
    return as_size(S) / (1 + as_size(B_crit) / as_size(B))


def training_flops(N: ArrayLike, B: ArrayLike, S: ArrayLike) -> Array:
    """Count the floating-point operations of S steps at a batch of B tokens.

    C = 6NBS: per parameter and token two forwards and four backwards; D = BS tokens in all.

    Args:
      N: parameters of the model.
      B: batch, in tokens.
      S: steps.

    >>> f"{float(training_flops(1e9, 1e6, 1e4)):.3g}"
    '6e+19'

    Source: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1.
    """
    return 6 * as_size(N) * as_size(B) * as_size(S)
