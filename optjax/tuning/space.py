"""The space that is descended in: a range of a hyperparameter as all real numbers.

    (0, ∞): θ = e^u        (a, b): θ = a + (b − a)/(1 + e^{−u})        (−∞, ∞): θ = u

A step of 0.1 in u is a tenth of θ, whatever its size. No step leaves the range: where θ(u) rounds
to an end, it is the number next to the end.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optjax.run.piecewise import plain
from optjax.support.errors import UserError, nearest
from optjax.support.types import Array, HParams, PyTree

Range = tuple[float, float]

SHARES = frozenset("momentum b1 b2 b3 decay decay_rate rho beta adam_b1 adam_b2 eta_minus".split())
"""Hyperparameters that are shares: in (0, 1) unless a constraint says otherwise."""

RATES = frozenset({"learning_rate", "max_learning_rate"})
"""Hyperparameters that are made smaller where no run has stayed finite yet."""


class Space(NamedTuple):
    """A range for every hyperparameter; maps dicts of arrays leaf by leaf."""

    ranges: tuple[tuple[str, Range], ...]

    def inside(self, u: HParams) -> HParams:
        """θ(u)."""
        return {
            name: jax.tree.map(lambda v, r=span: _inside(v, r), u[name])
            for name, span in self.ranges
        }

    def outside(self, theta: HParams) -> HParams:
        """u(θ), the inverse."""
        return {
            name: jax.tree.map(lambda v, r=span: _outside(v, r), theta[name])
            for name, span in self.ranges
        }

    def pulled_back(self, u: HParams, gradient: HParams) -> HParams:
        """Return dF/du from dF/dθ."""
        theta, back = jax.vjp(self.inside, u)
        gradient = jax.tree.map(lambda g, v: g.astype(v.dtype), dict(gradient), theta)
        return back(gradient)[0]

    def shrunk(self, u: HParams) -> HParams:
        """U with positive learning rates smaller by a factor of e."""
        return {
            name: jax.tree.map(lambda v: v - 1, u[name])
            if name in RATES and span[0] >= 0
            else u[name]
            for name, span in self.ranges
        }

    def logarithmic(self, name: str) -> bool:
        """Whether the range is that of a positive number."""
        return dict(self.ranges)[name] == (0.0, math.inf)


def make_space(theta: HParams, constraints: Mapping[str, Range | None]) -> Space:
    """Make the ranges: those given; (0, 1) for shares; (0, ∞) for a positive start; else all.

    Raises:
      UserError: a constraint names no tuned hyperparameter or is no range; a start is not inside.

    >>> make_space({"learning_rate": np.array(0.1), "momentum": np.array(0.9)}, {}).ranges
    (('learning_rate', (0.0, inf)), ('momentum', (0.0, 1.0)))
    """
    for name in constraints:
        if name not in theta:
            raise UserError(f"constraints name {name!r}: {nearest(name, theta)}")
    found = []
    for name, value in theta.items():
        span = _range(name, value, constraints)
        low, high = span
        for leaf in jax.tree.leaves(value):
            array = np.asarray(leaf)
            if not (np.all(array > low) and np.all(array < high)):
                worst = array.ravel()[np.argmin(np.minimum(array - low, high - array))]
                raise UserError(
                    f"{name} starts at {float(worst):g}: expected a value inside ({low:g}, "
                    f"{high:g}); start inside, or give constraints={{{name!r}: (low, high)}}"
                )
        found.append((name, span))
    return Space(tuple(found))


def _range(name: str, value: PyTree, constraints: Mapping[str, Range | None]) -> Range:
    if name in constraints:
        span = constraints[name]
        if span is None:
            return -math.inf, math.inf
        try:
            low, high = (float(end) for end in span)
        except (TypeError, ValueError):
            raise UserError(f"constraint of {name} is {span!r}: expected (low, high)") from None
        if not low < high:
            raise UserError(f"constraint of {name} is ({low:g}, {high:g}): expected low < high")
        return low, high
    if name in SHARES:
        return 0.0, 1.0
    positive = all(np.all(np.asarray(leaf) > 0) for leaf in jax.tree.leaves(value))
    return (0.0, math.inf) if positive else (-math.inf, math.inf)


def _inside(u: Array, span: Range) -> Array:
    low, high = span
    if math.isinf(low) and math.isinf(high):
        return u
    if math.isinf(high):
        theta = low + jnp.exp(u)
    elif math.isinf(low):
        theta = high - jnp.exp(u)
    else:
        theta = low + (high - low) * jax.nn.sigmoid(u)
    return jnp.clip(theta, _next_to(low, math.inf, u.dtype), _next_to(high, -math.inf, u.dtype))


def _next_to(end: float, toward: float, dtype: Any) -> np.ndarray:
    """Return the number next to an end of a range; none so small that processors take it for 0."""
    found = np.nextafter(np.asarray(end, dtype), np.asarray(toward, dtype))
    tiny = jnp.finfo(dtype).tiny
    return np.asarray(math.copysign(tiny, toward) if abs(found) < tiny else found, dtype)


def _outside(theta: Any, span: Range) -> Array:
    low, high = span
    theta = jnp.asarray(theta)
    if math.isinf(low) and math.isinf(high):
        return theta
    if math.isinf(high):
        return jnp.log(theta - low)
    if math.isinf(low):
        return jnp.log(high - theta)
    return jnp.log(theta - low) - jnp.log(high - theta)


def named_leaves(theta: HParams) -> dict[str, Array]:
    """Every array of a dict of trees, by its name and its path in the tree, as jax orders them.

    Raises:
      UserError: two of them get one name.

    >>> list(named_leaves({"rate": 0.1, "initial_params": {"kernel": 1.0, "bias": 2.0}}))
    ['initial_params.bias', 'initial_params.kernel', 'rate']
    """
    trees = plain(dict(theta))
    named: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        # A slash would be a folder of the file.
        name = jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")
        if name in named:
            raise UserError(f"two hyperparameters are named {name!r} in the path: rename one")
        named[name] = leaf
    return named
