"""The law of steps against batch size, and how far a sweep obeys it.

    (S/S_min − 1)(E/E_min − 1) = 1,  E = BS

that is S(B) = S_min(1 + B_crit/B) and E(B) = E_min(1 + B/B_crit) with B_crit = E_min/S_min: more
than S_min steps and more than E_min examples at any batch size, and twice either at B_crit. The
functions here take numbers; `critical_batch_size` reads sweeps.

Source: McCandlish et al. 2018 (arXiv:1812.06162), equation 2.11.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optjax.support.errors import UserError


class CriticalBatch(NamedTuple):
    """The fitted law, for each of the leading axes of the steps."""

    S_min: np.ndarray  # (…) steps; 0 where the steps never stop falling
    E_min: np.ndarray  # (…) examples; 0 where the steps never fall
    B_crit: np.ndarray  # (…) examples; infinite where S_min is 0, 0 where E_min is


class Goodness(NamedTuple):
    """The goodness of the law's fit to some steps."""

    residual: np.ndarray  # (B,) log of the steps over the law's
    r2: float  # of the log steps, 1 − Σr²/Σ(y − ȳ)²; near 1 for any steps that fall by decades
    worst: float  # largest factor by which the law is off, at least 1
    worst_size: float  # the batch size where it is so far off


BEYOND = 1e4
"""A critical batch so many times outside the measured batch sizes counts as 0 or infinite."""
_GRID, _HALVINGS = 161, 60


def fit_critical_batch(
    sizes: ArrayLike, steps: ArrayLike, weights: ArrayLike | None = None
) -> CriticalBatch:
    """Fit S_min, E_min and B_crit by least squares in the logarithm of the steps.

    min Σ_b w_b (log S_b − log S_min − log(1 + B_crit/B_b))²

    Given B_crit, log S_min is a mean. A grid over log B_crit brackets the least sum, which may have
    several minima, and bisection on the sign of its slope narrows the bracket to rounding.

    Args:
      sizes: (B,) batch sizes, above 0.
      steps: (…, B) steps to the target; those that are infinite or NaN are left out.
      weights: (B,) inverse variance of each log steps, up to a factor; equal by default.

    Returns:
      The three, NaN where fewer than three batch sizes have steps.

    Raises:
      UserError: fewer than three batch sizes, one that is not positive or there twice, shapes that
        do not fit, a negative weight.

    >>> found = fit_critical_batch([1, 10, 100], [1100.0, 200.0, 110.0])
    >>> found.S_min.round(6), found.E_min.round(6), found.B_crit.round(6)
    (np.float64(100.0), np.float64(1000.0), np.float64(10.0))

    Source: McCandlish et al. 2018, equation 2.11.
    """
    sizes, steps = np.asarray(sizes, float), np.asarray(steps, float)
    weights = np.ones_like(sizes) if weights is None else np.asarray(weights, float)
    _check(sizes, steps, weights)
    x = np.log(sizes)
    known = np.isfinite(steps) & (steps > 0) & (weights > 0)
    y = np.log(np.where(known, steps, 1)).reshape(-1, len(x))
    w = np.where(known, weights, 0.0).reshape(-1, len(x))
    enough = (w > 0).sum(-1) >= 3
    w = np.where(enough[:, None], w, 1.0)
    w = w / w.sum(-1, keepdims=True)
    grid = np.linspace(x.min() - np.log(BEYOND), x.max() + np.log(BEYOND), _GRID)
    i = _left(x, y, w, grid).argmin(-1)
    low, high = grid[np.maximum(i - 1, 0)], grid[np.minimum(i + 1, _GRID - 1)]
    for _ in range(_HALVINGS):
        l = (low + high) / 2
        # The slope of the sum by log B_crit is −2Σwr/(1 + B/B_crit), as Σwr = 0.
        r = _residual(x, y, w, l)
        falls = np.sum(w * r / (1 + np.exp(x - l[:, None])), -1) > 0
        low, high = np.where(falls, l, low), np.where(falls, high, l)
    l = (low + high) / 2
    log_S = np.sum(w * (y - np.logaddexp(0, l[:, None] - x)), -1)
    never, flat = l > grid[-1] - 1e-6, l < grid[0] + 1e-6
    S_min = np.where(never, 0, np.exp(log_S))
    E_min = np.where(flat, 0, np.exp(log_S + l))
    B_crit = np.where(never, np.inf, np.where(flat, 0, np.exp(l)))
    found = [np.where(enough, v, np.nan).reshape(steps.shape[:-1]) for v in (S_min, E_min, B_crit)]
    return CriticalBatch(*(v[()] for v in found))


def _check(sizes: np.ndarray, steps: np.ndarray, weights: np.ndarray) -> None:
    """Check the arguments of `fit_critical_batch`."""
    if sizes.ndim != 1 or len(sizes) < 3:
        raise UserError(f"sizes has shape {sizes.shape}: expected at least three batch sizes")
    if not np.all((sizes > 0) & np.isfinite(sizes)) or len(np.unique(sizes)) < len(sizes):
        raise UserError(f"sizes are {sizes.tolist()}: expected numbers above 0, each once")
    if not steps.ndim or steps.shape[-1] != len(sizes):
        raise UserError(
            f"steps has shape {steps.shape}: expected one for each of {len(sizes)} sizes"
        )
    if weights.shape != sizes.shape or not np.all((weights >= 0) & np.isfinite(weights)):
        raise UserError(f"weights are {weights.tolist()}: expected {len(sizes)} of at least 0")
    if np.any(steps <= 0):
        raise UserError(f"steps holds {steps[steps <= 0][0]:g}: expected above 0")


def _left(x: np.ndarray, y: np.ndarray, w: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return Σwr² for each of N rows and each log B_crit of the grid, (N, G)."""
    m_GB = np.logaddexp(0, grid[:, None] - x)
    mean_NG = np.sum(w * y, -1, keepdims=True) - w @ m_GB.T
    squares_NG = np.sum(w * y**2, -1, keepdims=True) - 2 * (w * y) @ m_GB.T + w @ (m_GB**2).T
    return squares_NG - mean_NG**2


def _residual(x: np.ndarray, y: np.ndarray, w: np.ndarray, l: np.ndarray) -> np.ndarray:
    """Return the residuals r at log B_crit = l, (N, B)."""
    r = y - np.logaddexp(0, l[:, None] - x)
    return r - np.sum(w * r, -1, keepdims=True)


def law(sizes: ArrayLike, fit: CriticalBatch) -> np.ndarray:
    """Return the steps that the law predicts, (…, B).

    S = S_min + E_min/B

    Args:
      sizes: (B,).
      fit: (…) each.

    >>> law([1, 10], CriticalBatch(100.0, 1000.0, 10.0)).tolist()
    [1100.0, 200.0]
    """
    S_min, E_min = np.asarray(fit.S_min)[..., None], np.asarray(fit.E_min)[..., None]
    return S_min + E_min / np.asarray(sizes, float)


def goodness(sizes: ArrayLike, steps: ArrayLike, fit: CriticalBatch) -> Goodness:
    """Measure how far steps are from the law; residuals are NaN where steps are infinite or NaN.

    Args:
      sizes: (B,).
      steps: (B,).
      fit: of these steps, () each.

    >>> fit = fit_critical_batch([1, 10, 100], [1100.0, 200.0, 110.0])
    >>> round(goodness([1, 10, 100], [1100.0, 210.0, 110.0], fit).worst, 6)
    1.05
    """
    sizes, steps = np.asarray(sizes, float), np.asarray(steps, float)
    known = np.isfinite(steps)
    y = np.log(np.where(known, steps, np.nan))
    residual = y - np.log(law(sizes, fit))
    scatter = np.nansum((y - np.nanmean(y)) ** 2)
    r2 = 1 - np.nansum(residual**2) / scatter if scatter else np.nan
    i = int(np.nanargmax(np.abs(residual)))
    return Goodness(residual, float(r2), float(np.exp(abs(residual[i]))), float(sizes[i]))


class Parallel(NamedTuple):
    """The gain of data parallelism, against a batch B₀ of reference."""

    speedup: np.ndarray  # (…, B) S(B₀)/S(B), at equal time per step
    efficiency: np.ndarray  # (…, B) speed-up over B/B₀, that of perfect scaling


def data_parallel(sizes: ArrayLike, steps: ArrayLike, reference: int = 0) -> Parallel:
    """Compute the speed-up of a larger batch, its examples spread over as many more devices.

    speed-up S(B₀)/S(B); efficiency S(B₀)B₀/(S(B)B) = E(B₀)/E(B)

    By the law, the efficiency is (1 + B₀/B_crit)/(1 + B/B_crit): a half at B = B_crit ≫ B₀.

    Args:
      sizes: (B,).
      steps: (…, B).
      reference: index of B₀ in sizes.

    Raises:
      UserError: reference is out of range.

    >>> found = data_parallel([1, 10], [1100.0, 200.0])
    >>> found.speedup.tolist(), found.efficiency.tolist()
    ([1.0, 5.5], [1.0, 0.55])
    """
    sizes, steps = np.asarray(sizes, float), np.asarray(steps, float)
    if not 0 <= reference < len(sizes):
        raise UserError(
            f"reference is {reference}: expected 0 to {len(sizes) - 1}, one of the sizes"
        )
    speedup = steps[..., reference, None] / steps
    return Parallel(speedup, speedup * sizes[reference] / sizes)
