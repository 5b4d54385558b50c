"""Confidence intervals for a ratio of non-negative quantities, honest where one may be zero.

The ratio of the estimates ± a standard error is no interval for x/y where y may be zero: the true
ratio then has no bound. Fieller's method takes all ratios ρ that the data do not reject,
(x − ρy)² ≤ t²·var(x − ρy). The variance is quadratic in ρ, and so is the inequality; its solution
is bounded exactly where y differs significantly from zero.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from optjax.support.errors import UserError
from optjax.support.types import Array


class Ratio(NamedTuple):
    """A ratio in [0, ∞] with its confidence interval."""

    value: Array  # () x/y; ∞ where the estimate of y is not above 0
    low: Array  # ()
    high: Array  # () ∞ where y is not distinguishable from 0
    resolved: Array  # () bool, whether the interval is bounded


def quotient(x: Array, y: Array) -> Array:
    """Divide estimates of non-negative quantities: ∞ where y is not above 0, NaN where x or y is.

    >>> quotient(jnp.array([3.0, 3.0]), jnp.array([2.0, -1.0])).tolist()
    [1.5, inf]
    """
    positive = y > 0
    found = jnp.where(positive, x / jnp.where(positive, y, 1), jnp.inf)
    return jnp.where(jnp.isnan(x) | jnp.isnan(y), jnp.nan, found)


def share(name: str, value: Any) -> None:
    """Check that a value is a float between 0 and 1."""
    known = isinstance(value, (float, np.floating))
    if not known or not 0 < value < 1:
        raise UserError(f"{name} is {value!r}: expected a number between 0 and 1, as 0.95")


def student(confidence: float, degrees: int) -> float:
    """Return the two-sided quantile t of Student's distribution: P(|T| ≤ t) = confidence.

    Raises:
      UserError: the confidence is not between 0 and 1.

    >>> round(student(0.95, 10), 3)
    2.228
    """
    share("confidence", confidence)
    return float(stdtrit(degrees, (1 + confidence) / 2))


def ratio(x: Array, y: Array, variance: tuple[Any, Any, Any], t: float) -> Ratio:
    """Return the interval of all ratios ρ ≥ 0 that the estimates do not reject.

    (x − ρy)² ≤ t² (A + Bρ + Cρ²),  a bounded set where y² > t²C

    Both true values are at least 0: an estimate below 0 counts as 0 in the interval, which can only
    widen it. The four forms of Fieller's set become three: [low, high]; [low, ∞], where y may be
    0 and x may not; [0, ∞], where either may.

    Args:
      x: () estimate of the numerator, of any sign.
      y: () estimate of the denominator, of any sign.
      variance: A, B, C.
      t: quantile, from `student`.

    Source: Fieller 1954, "Some problems in interval estimation".
    """
    A, B, C = variance
    u, v = jnp.maximum(x, 0), jnp.maximum(y, 0)
    a, b, c = v**2 - t**2 * C, u * v + t**2 * B / 2, u**2 - t**2 * A
    # The roots as c/q and q/a: neither subtracts numbers that are nearly equal.
    q = b + jnp.sqrt(jnp.maximum(b**2 - a * c, 0))
    resolved = (a > 0) & jnp.isfinite(q)
    low = jnp.where((c > 0) & (q > 0), c / jnp.where(q > 0, q, 1), 0)
    high = jnp.where(resolved, q / jnp.where(resolved, a, 1), jnp.inf)
    return Ratio(quotient(u, y), low, high, resolved)


def ratio_of_means(x: Array, y: Array, confidence: float = 0.95) -> Ratio:
    """Estimate mean(x)/mean(y) from independent pairs, with Fieller's interval.

    The x and y of a pair may be correlated.

    Args:
      x: (N,) estimates of the numerator, N ≥ 2, of any sign.
      y: (N,) estimates of the denominator, of any sign.
      confidence: of the interval.

    Raises:
      UserError: fewer than two pairs, or shapes that differ.

    >>> found = ratio_of_means(jnp.array([4.0, 5.0, 6.0]), jnp.array([1.0, 1.1, 0.9]))
    >>> round(float(found.value), 3), bool(found.resolved)
    (5.0, True)
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise UserError(f"estimates have shapes {x.shape} and {y.shape}: expected (N,) and equal")
    count = x.shape[0]
    if count < 2:
        raise UserError(f"{count} pair of estimates: expected at least 2; draw more")
    x_mean, y_mean = jnp.mean(x), jnp.mean(y)
    dx, dy = x - x_mean, y - y_mean
    xx, xy, yy = (jnp.sum(p) / (count * (count - 1)) for p in (dx * dx, dx * dy, dy * dy))
    return ratio(x_mean, y_mean, (xx, -2 * xy, yy), student(confidence, count - 1))
