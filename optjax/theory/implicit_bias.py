"""Which solution did an optimiser pick? Certificates for over-parameterised problems.

`certificate` compares weights with the solutions of least norm and with Bregman projections;
`margin_certificate` compares a classifier's direction with those of largest margin. Both report
what they can where a condition fails, and name the condition.
"""

import fractions
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from optjax.run.geometries import Potential
from optjax.run.problems import finite
from optjax.support.errors import UserError
from optjax.theory import least_norms
from optjax.theory.least_norms import Equations, least_norm_solution

NORMS = (2.0, 1.0, math.inf)


class Certificate(NamedTuple):
    """What weights w are, among all solutions of Xw = t."""

    residual: float  # ‖Xw − t‖ / ‖t‖
    least_residual: float  # that of the best w; 0 where a solution interpolates
    rank: int  # of X
    condition: float  # σ_max / σ_min of X, over the singular values that count
    off_row_space: float  # ‖(I − P)(w − w0)‖ / ‖w − w0‖
    distances: dict[str, float]  # ‖w − s‖ / ‖s‖ for each solution s that a bias might pick
    norm_ratios: dict[str, float]  # ‖w‖_p / the least of any solution
    failed: tuple[str, ...]  # the conditions of the theory that do not hold, a line each
    picked: tuple[str, ...]  # which of those solutions w is, the nearest first; () if none
    found: str  # one sentence


def certificate(
    w: ArrayLike,
    X: ArrayLike,
    t: ArrayLike,
    *,
    w0: ArrayLike | None = None,
    norms: Sequence[float] = NORMS,
    potentials: Sequence[Potential] = (),
    tolerance: float = 1e-6,
) -> Certificate:
    """Tell which solution of Xw = t an optimiser has picked.

    Gradient descent from w0 picks the solution nearest to w0, w* + (I − P)w0; mirror descent
    the Bregman projection of w0; others one of least ℓp norm, or none of these. Where no w solves
    Xw = t, the solutions are those of least squares.

    Args:
      w: (d,), or of any shape with d entries.
      X: (n, d), of any shape and rank.
      t: (n,).
      w0: the start, as w; 0 by default.
      norms: p of the least-norm solutions, each from 1 to ∞.
      potentials: whose projections of w0 are tried, too.
      tolerance: of a solution's residual, and of its relative distance from another that counts
        as the same; of the latter also condition · residual, to which it is known, up to 0.01.

    Raises:
      UserError: shapes do not fit, X, t or w0 is not finite, or p is below 1.

    >>> X, t = [[2.0, 1.0]], [2.0]
    >>> certificate([0.8, 0.4], X, t).picked
    ('least ℓ2',)
    >>> certificate([0.7, 0.6], X, t, norms=[2]).found
    'none of those compared: 0.25 from the nearest (least ℓ2), 24 % off the row space'
    >>> certificate([0.0, 0.0], X, t).found
    'no solution yet: the relative residual is 1'

    Source: Gunasekar et al. (2018); Wilson et al. (2017).
    """
    given = least_norms.equations(X, t)
    (rank, d), n = given.X.shape, len(np.asarray(t))
    w = np.asarray(w, np.float64).ravel()
    w0 = np.zeros(d) if w0 is None else finite("w0", np.ravel(w0), 1)
    for name, value in (("w", w), ("w0", w0)):
        if value.shape != (d,):
            raise UserError(f"{name} has {value.size} entries: expected {d}, one per column of X")
    if not all(p >= 1 for p in norms):
        raise UserError(f"norms are {list(norms)}: expected numbers from 1, or inf")
    failed, V = _failed(given, n, d), given.row_space
    ways = {f"least {norm_name(p)}": partial(least_norm_solution, X, t, p) for p in norms}
    if w0.any():
        ways["nearest to the start"] = partial(given.nearest, w0)
    for psi in potentials:
        ways[f"Bregman, {psi.name}"] = partial(least_norms.bregman_projection, X, t, w0, psi)
    solutions = {}
    for name, way in ways.items():
        try:
            solutions[name] = way()
        except UserError as error:
            failed.append(f"{name}: {error}")
    gone, norm = w - w0, np.linalg.norm
    distances = {k: float(norm(w - s) / (norm(s) or 1.0)) for k, s in solutions.items()}
    ratios = {
        norm_name(p): float(norm(w, p) / (norm(solutions[f"least {norm_name(p)}"], p) or 1.0))
        for p in norms
        if f"least {norm_name(p)}" in solutions
    }
    excess = given.residual(w)
    off = float(norm(given.X @ w - given.t) / (norm(np.asarray(t, float)) or 1.0))
    residual = math.hypot(given.least_residual, off)
    off = float(norm(gone - V.T @ (V @ gone)) / (norm(gone) or 1.0))
    same = max(tolerance, min(given.condition * excess, 0.01)) if excess <= tolerance else -1.0
    picked = tuple(k for k in sorted(distances, key=lambda k: distances[k]) if distances[k] <= same)
    if not picked:  # the least ℓ1 or ℓ∞ norm may have many solutions
        picked = tuple(f"least {k}" for k in ("ℓ1", "ℓ∞") if ratios.get(k, math.inf) <= 1 + same)
    found = _sentence(excess, off, distances, picked, same)
    if given.least_residual and excess <= tolerance:
        found = f"of the least-squares solutions, {found}"
    return Certificate(
        residual, given.least_residual, rank, given.condition, off, distances, ratios,
        tuple(failed), picked, found,
    )  # fmt: skip


def norm_name(p: float) -> str:
    """Name a norm.

    >>> [norm_name(p) for p in (1, 4 / 3, math.inf)]
    ['ℓ1', 'ℓ4/3', 'ℓ∞']
    """
    if p == math.inf:
        return "ℓ∞"
    ratio = fractions.Fraction(p).limit_denominator(9)
    return f"ℓ{ratio}" if math.isclose(ratio, p) else f"ℓ{p:.4g}"


def _failed(given: Equations, n: int, d: int) -> list[str]:
    """List the conditions that fail: an over-parameterised X of full rank with a solution."""
    rank, failed = len(given.X), []
    if n > d:
        failed.append(f"X has {n} rows and {d} columns (n > d): it is not over-parameterised")
    if rank < min(n, d):
        failed.append(f"X has rank {rank}, less than its {min(n, d)} rows or columns")
    if given.least_residual:
        failed.append(
            f"no w solves Xw = t: the least relative residual is {given.least_residual:.3g}, and "
            "the least-squares solutions are compared"
        )
    if rank == d:
        failed.append(f"X has rank {rank} = d: there is one solution, and nothing to pick")
    return failed


def _sentence(
    excess: float, off: float, distances: dict[str, float], picked: tuple[str, ...], same: float
) -> str:
    """Say in a sentence which solution it is."""
    if not math.isfinite(excess):
        return "no solution: w is not finite"
    if same < 0:
        return f"no solution yet: the relative residual is {excess:.2g}"
    if not picked:
        name = min(distances, key=lambda key: distances[key], default=None)
        near = "" if name is None else f" {distances[name]:.2g} from the nearest ({name}),"
        return f"none of those compared:{near} {100 * off:.2g} % off the row space"
    names = " and ".join(
        name.replace("Bregman,", "of least Bregman divergence from the start,")
        if not name.startswith("least")
        else f"of {name} norm"
        for name in picked
    )
    far = max(distances[name] for name in picked)
    if far > same:
        return f"a solution {names}, one of several"
    return f"the solution {names} (relative distance {far:.1g})"


class MarginCertificate(NamedTuple):
    """What a linear classifier's direction is, among all that separate the labels."""

    training_error: float  # share of yᵢ xᵢᵀw ≤ 0
    angles: dict[str, float]  # radians between w and the direction of largest ℓp margin
    margin_shares: dict[str, float]  # minᵢ yᵢ xᵢᵀw / ‖w‖_p over the largest
    failed: tuple[str, ...]  # the conditions that do not hold, a line each
    found: str  # one sentence


def margin_certificate(
    w: ArrayLike, X: ArrayLike, y: ArrayLike, *, norms: Sequence[float] = NORMS
) -> MarginCertificate:
    """Tell how near a classifier's direction is to those of largest margin.

    On separable labels gradient descent on the logistic loss turns to the ℓ2 direction, its angle
    falling as 1/log t; sign descent and Adam turn to ℓ∞, coordinate descent to ℓ1.

    Args:
      w: (d,).
      X, y: (n, d) and (n,) labels, −1 or 1.
      norms: of 1, 2 and ∞.

    Raises:
      UserError: shapes do not fit, a value is not finite, or a label is another.

    >>> margin_certificate([1.0, 0.0], [[2.0, 1.0], [0.0, -2.0]], [1.0, -1.0], norms=[2]).found
    'no separation yet: 50 % of the labels are on the wrong side'

    Source: Soudry et al. (2018), theorem 3; Gunasekar et al. (2018), theorem 5.
    """
    X, y = finite("X", X, 2), finite("y", y, 1)
    w = finite("w", np.ravel(w), 1)
    if w.shape != X.shape[1:]:
        raise UserError(f"w has {w.size} entries: expected {X.shape[1]}, one per column of X")
    angles, shares, failed = {}, {}, []
    for p in norms:
        try:
            direction, margin = least_norms.max_margin_direction(X, y, p)
        except least_norms.Inseparable as error:
            failed.append(str(error))
            break
        unit, goal = w / (np.linalg.norm(w) or 1.0), direction / np.linalg.norm(direction)
        # Stable for small angles, where arccos of the product loses half of the digits.
        half = np.linalg.norm(unit - goal), np.linalg.norm(unit + goal)
        angles[norm_name(p)] = float(2 * np.arctan2(*half))
        shares[norm_name(p)] = float((y * (X @ w)).min() / (np.linalg.norm(w, p) or 1.0) / margin)
    error = float(np.mean(y * (X @ w) <= 0))
    if not angles:
        found = f"the labels cannot be separated; {100 * error:.2g} % are on the wrong side"
    elif error:
        found = f"no separation yet: {100 * error:.2g} % of the labels are on the wrong side"
    else:
        name = min(angles, key=lambda key: angles[key])
        found = (
            f"nearest to the largest {name} margin: {math.degrees(angles[name]):.2g} degrees, "
            f"{100 * shares[name]:.3g} % of that margin"
        )
    return MarginCertificate(error, angles, shares, tuple(failed), found)
