"""The regime of a batch size: noise, curvature or both limit the steps to a target.

The local slope d log S/d log B is −1 where noise dominates (a doubled batch halves the steps), and
0 where curvature does (it saves none); by the law it is −1/(1 + B/B_crit).
"""

import enum

import numpy as np
from numpy.typing import ArrayLike

from optjax.support.errors import UserError


class Regime(enum.IntEnum):
    """The limit on the steps at a batch size."""

    UNKNOWN = -1  # no rate there reaches the target
    NOISE = 0  # a larger batch saves steps in proportion
    TRANSITION = 1
    CURVATURE = 2  # a larger batch saves none; a better preconditioner might


def local_slope(sizes: ArrayLike, steps: ArrayLike) -> np.ndarray:
    """Return d log S/d log B of measured steps, (…, B), by centred or one-sided differences.

    Args:
      sizes: (B,) rising.
      steps: (…, B); the slope is NaN where a neighbour's are infinite or NaN.

    Raises:
      UserError: fewer than two sizes.

    >>> local_slope([1, 10, 100], [1000.0, 100.0, 100.0]).round(6).tolist()
    [-1.0, -0.5, 0.0]
    """
    x = np.log(np.asarray(sizes, float))
    if x.ndim != 1 or len(x) < 2:
        raise UserError(f"sizes has shape {x.shape}: expected at least two batch sizes")
    steps = np.asarray(steps, float)
    return np.gradient(np.log(np.where(np.isfinite(steps), steps, np.nan)), x, axis=-1)


def fitted_slope(sizes: ArrayLike, B_crit: ArrayLike) -> np.ndarray:
    """Return d log S/d log B of the law, (…, B).

    −1/(1 + B/B_crit)

    Args:
      sizes: (B,).
      B_crit: (…).

    >>> fitted_slope([1, 10], 10.0).round(3).tolist()
    [-0.909, -0.5]
    """
    # B_crit may be infinite, where the slope is −1, or 0, where it is 0.
    ratio = np.asarray(B_crit, float)[..., None] / np.asarray(sizes, float)
    return -1 / (1 + np.divide(1, ratio, out=np.full_like(ratio, np.inf), where=ratio != 0))


def regime(
    slope: ArrayLike, noise_below: float = -0.75, curvature_above: float = -0.25
) -> np.ndarray:
    """Return the `Regime` of each slope, (…) int; NaN is unknown.

    Args:
      slope: (…) d log S/d log B.
      noise_below: where noise ends; by the law −¾ is at B_crit/3.
      curvature_above: where curvature begins; by the law −¼ is at 3B_crit.

    Raises:
      UserError: thresholds out of order.

    >>> regime([-0.9, -0.5, 0.01, float("nan")]).tolist()
    [0, 1, 2, -1]
    """
    if not -1 < noise_below <= curvature_above < 0:
        raise UserError(
            f"noise_below is {noise_below} and curvature_above {curvature_above}: expected "
            "-1 < noise_below <= curvature_above < 0"
        )
    slope = np.asarray(slope, float)
    known = np.where(slope < noise_below, Regime.NOISE, Regime.TRANSITION)
    known = np.where(slope > curvature_above, Regime.CURVATURE, known)
    return np.where(np.isnan(slope), Regime.UNKNOWN, known)
