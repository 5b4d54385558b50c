"""The best use of a budget of compute by each law, and where a paper contradicts itself.

C = 6ND floating-point operations, D = BS tokens. Hoffmann's law gives N and D in closed form.
Kaplan's gives N, the batch and the steps: training at a batch of κ B_crit costs (1 + κ) times the
least compute C_min of the same loss, and on C_min the optimum is in closed form too.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from optjax.scaling.laws import (
    HOFFMANN_2022,
    KAPLAN_BATCH,
    KAPLAN_NS,
    Hoffmann,
    KaplanBatch,
    KaplanNS,
    Number,
    as_size,
    critical_batch,
    hoffmann_loss,
)
from optjax.support.errors import UserError
from optjax.support.types import Array

PF_DAY = 1e15 * 24 * 3600
"""Floating-point operations in a petaflop/s-day."""


class Allocation(NamedTuple):
    """The best use of a budget."""

    N: Array  # parameters
    D: Array  # tokens
    loss: Array  # that the law predicts
    batch: Array | None = None  # tokens per step; Kaplan's laws
    steps: Array | None = None  # S; Kaplan's laws
    least_steps: Array | None = None  # S_min; Kaplan's laws


class KaplanFrontier(NamedTuple):
    """Kaplan's printed powers of C_min in PF-days: N = N_e C^p_N, and so on."""

    N_e: Number = 1.3e9
    p_N: Number = 0.73
    B_e: Number = 2.0e6
    p_B: Number = 0.24
    S_e: Number = 5.4e3
    p_S: Number = 0.03
    C_c: Number = 3.1e8  # L = (C_c/C_min)^α_C
    alpha_C: Number = 0.050


KAPLAN_FRONTIER = KaplanFrontier()
"""Kaplan et al. 2020, tables 5 and 6."""


class Exponents(NamedTuple):
    """The powers N ∝ C^N, D ∝ C^D; for Kaplan's laws also B ∝ C^B, S ∝ C^S and L ∝ C^−L."""

    N: Number
    D: Number
    B: Number = None
    S: Number = None
    L: Number = None


class Check(NamedTuple):
    """An exponent that a paper prints, and the one that follows from its printed constants."""

    what: str  # the exponent's name
    printed: float
    computed: float
    low: float  # least that rounding of the constants allows
    high: float  # most
    contradicts: bool  # whether printed is outside by more than its own rounding


def _budget(flops: ArrayLike) -> Array:
    """Check a budget and convert it to floats."""
    _require_positive("flops", flops)
    return as_size(flops)


def _require_positive(name: str, value: Any) -> None:
    """Check that concrete numbers are above 0 and within the process' floats."""
    if isinstance(value, Tracer):
        return
    most = float(jnp.finfo(jnp.result_type(float)).max)
    try:
        numbers = np.asarray(value, float)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is {value!r}: expected a finite number above 0") from None
    if not np.all((numbers > 0) & (numbers <= most)):
        raise UserError(f"{name} is {value}: expected a finite number above 0, at most {most:.2g}")


def allocate_hoffmann(law: Hoffmann, flops: ArrayLike) -> Allocation:
    """Find the parameters and tokens of least loss for a budget C = 6ND.

    N = G (C/6)^(β/(α+β)), D = (C/6)^(α/(α+β))/G, G = (αA/(βB))^(1/(α+β))

    Args:
      law: parameters of the law.
      flops: C.

    Raises:
      UserError: flops is not above 0.

    >>> from optjax.scaling.laws import BESIROGLU_2024
    >>> best = allocate_hoffmann(BESIROGLU_2024, 5.76e23)
    >>> round(float(best.D / best.N))
    18

    Source: Hoffmann et al. 2022 (arXiv:2203.15556), equation 4.
    """
    C = _budget(flops)
    _, A, B, alpha, beta = law
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    N = G * (C / 6) ** (beta / (alpha + beta))
    D = C / 6 / N
    return Allocation(N, D, hoffmann_loss(law, N, D))


def allocate_kaplan(
    flops: ArrayLike,
    law: KaplanNS = KAPLAN_NS,
    batch: KaplanBatch = KAPLAN_BATCH,
    *,
    ratio: Number = 1.0,
) -> Allocation:
    """Find the model, batch and steps of least loss for a budget, by Kaplan's L(N, S_min).

    C_min = C/(1 + κ), r = α_N/α_S, 1/α_C = 1/α_N + 1/α_S + 1/α_B,
    C_c = 6 N_c B* S_c (1 + r)^(1/α_S + 1/α_N) r^(−1/α_S),
    L = (C_c/C_min)^α_C, N = N_c ((1 + r)/L)^(1/α_N), S_min = C_min/(6 N B_crit)

    Args:
      flops: C.
      law: constants of L(N, S_min).
      batch: constants of B_crit(L).
      ratio: κ = B/B_crit. At κ = 1 twice the least compute and twice the least steps are spent;
        towards 0 all of the budget is C_min, as in the paper's derivation, and S has no bound.

    Raises:
      UserError: flops or ratio are not above 0.

    >>> best = allocate_kaplan(1e21)
    >>> bool(jnp.isclose(6 * best.N * best.batch * best.steps, 1e21))
    True

    Source: Kaplan et al. 2020 (arXiv:2001.08361), appendix B, whose C and S are C_min and S_min.
    """
    _require_positive("ratio", ratio)
    C_min = _budget(flops) / (1 + ratio)
    N_c, S_c, alpha_N, alpha_S = law
    B_star, alpha_B = batch
    r = alpha_N / alpha_S
    alpha_C = 1 / (1 / alpha_N + 1 / alpha_S + 1 / alpha_B)
    C_c = 6 * N_c * B_star * S_c * (1 + r) ** (1 / alpha_S + 1 / alpha_N) * r ** (-1 / alpha_S)
    loss = (C_c / C_min) ** alpha_C
    N = N_c * ((1 + r) / loss) ** (1 / alpha_N)
    B_crit = critical_batch(batch, loss)
    least = C_min / (6 * N * B_crit)
    B, S = ratio * B_crit, least * (1 + 1 / jnp.asarray(ratio))
    return Allocation(N, B * S, loss, B, S, least)


def allocate_frontier(
    flops: ArrayLike, frontier: KaplanFrontier = KAPLAN_FRONTIER, *, ratio: Number = 1.0
) -> Allocation:
    """Find the model, batch and steps for a budget by Kaplan's printed powers.

    N = 1.3e9 C^0.73, B_crit = 2.0e6 C^0.24, S_min = 5.4e3 C^0.03, C = C_min in PF-days

    The product 6NBS of these powers is 0.97 of C_min: D = BS is kept, not C.

    Args:
      flops: C, of which C/(1 + κ) is C_min.
      frontier: the printed powers.
      ratio: κ, as in `allocate_kaplan`.

    Raises:
      UserError: flops or ratio are not above 0.

    >>> round(float(allocate_frontier(PF_DAY, ratio=1e-9).N) / 1e9, 3)
    1.3

    Source: Kaplan et al. 2020 (arXiv:2001.08361), tables 5 and 6.
    """
    N_e, p_N, B_e, p_B, S_e, p_S, C_c, alpha_C = frontier
    _require_positive("ratio", ratio)
    C = _budget(flops) / (1 + ratio) / PF_DAY
    N, B_crit, least = N_e * C**p_N, B_e * C**p_B, S_e * C**p_S
    B, S = ratio * B_crit, least * (1 + 1 / jnp.asarray(ratio))
    return Allocation(N, B * S, (C_c / C) ** alpha_C, B, S, least)


def hoffmann_exponents(law: Hoffmann) -> Exponents:
    """Return the powers of the budget by which N and D grow: β/(α+β) and α/(α+β).

    >>> round(hoffmann_exponents(HOFFMANN_2022).N, 2)
    0.45
    """
    total = law.alpha + law.beta
    return Exponents(law.beta / total, law.alpha / total)


def kaplan_exponents(law: KaplanNS = KAPLAN_NS, batch: KaplanBatch = KAPLAN_BATCH) -> Exponents:
    """Return the powers of the budget by which N, B, S grow: α_C/α_N, α_C/α_B, α_C/α_S.

    >>> round(kaplan_exponents().N, 2)
    0.68

    Source: Kaplan et al. 2020 (arXiv:2001.08361), equations B.7 to B.10.
    """
    alpha_C = 1 / (1 / law.alpha_N + 1 / law.alpha_S + 1 / batch.alpha_B)
    N, B, S = alpha_C / law.alpha_N, alpha_C / batch.alpha_B, alpha_C / law.alpha_S
    return Exponents(N, B + S, B, S, alpha_C)


def _check(
    what: str, printed: float, of: Callable[..., float], *constants: tuple[float, float]
) -> Check:
    """Compare with of(*values), where each constant is a value and half its last digit."""
    computed = float(of(*(value for value, _ in constants)))
    corners = itertools.product(*((value - half, value + half) for value, half in constants))
    reach = [float(of(*corner)) for corner in corners]
    low, high = min(reach), max(reach)
    return Check(what, printed, computed, low, high, not low - 0.005 <= printed <= high + 0.005)


def contradictions() -> list[Check]:
    """Compare the papers' printed exponents with those of their printed constants.

    >>> [check.what for check in contradictions() if check.contradicts][0]
    'Kaplan: N ∝ C^p'

    Source: Kaplan et al. 2020, section 6.1; Hoffmann et al. 2022, table 2.
    """
    kaplan = (KAPLAN_NS.alpha_N, 5e-4), (KAPLAN_NS.alpha_S, 5e-3), (KAPLAN_BATCH.alpha_B, 5e-3)
    parametric = (HOFFMANN_2022.alpha, 5e-3), (HOFFMANN_2022.beta, 5e-3)

    def powers(name: str) -> Callable[..., float]:
        def of(alpha_N: float, alpha_S: float, alpha_B: float) -> float:
            law = KAPLAN_NS._replace(alpha_N=alpha_N, alpha_S=alpha_S)
            return getattr(kaplan_exponents(law, KAPLAN_BATCH._replace(alpha_B=alpha_B)), name)

        return of

    def share(alpha: float, beta: float) -> float:
        return beta / (alpha + beta)

    printed = KAPLAN_FRONTIER
    return [
        _check("Kaplan: N ∝ C^p", float(printed.p_N), powers("N"), *kaplan),
        _check("Kaplan: B ∝ C^p", float(printed.p_B), powers("B"), *kaplan),
        _check("Kaplan: S ∝ C^p", float(printed.p_S), powers("S"), *kaplan),
        _check("Hoffmann, approach 3 (this law): N ∝ C^a", 0.46, share, *parametric),
        _check("Hoffmann, approach 1 (training curves): N ∝ C^a", 0.50, share, *parametric),
        _check("Hoffmann, approach 2 (equal FLOPs): N ∝ C^a", 0.49, share, *parametric),
    ]
