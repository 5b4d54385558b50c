"""The optimisers compared, each with a learning rate that suits a problem's scales."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from optjax.run.geometries import (
    hypentropy,
    mirror_descent,
    natural_gradient,
    shampoo,
    steepest_descent,
)
from optjax.run.optimizers import Factory
from optjax.run.problems import Data
from optjax.support.types import PyTree

HALVINGS = 40
"""How often the learning rate of an optimiser of fixed step length halves along a run."""
SOLVED = 1e-4
"""Relative residual of a solution, and the relative distance at which it is another."""
FACTORS = (0.25, 0.5, 1.0)
"""Of each optimiser's learning rate: does where it ends depend on the step size?"""
BETA = 0.1
"""β of the hypentropy: between the least ℓ1 and ℓ2 norms."""


class Scales(NamedTuple):
    """What a learning rate depends on."""

    curvature: float  # the largest, of the full loss
    size: float  # max |w*ᵢ| of the least ℓ2 solution
    steps: int


class Contender(NamedTuple):
    """An optimiser under test."""

    optimizer: Factory
    rate: Callable[[Scales], float]
    fixed: bool = False  # whether a step is as long as the rate, however small the gradient

    @property
    def factory(self) -> Factory:
        """The optimiser on least squares; of fixed length, its rate halves 40 times along a run."""
        return scheduled(self.optimizer, _halving) if self.fixed else self.optimizer


def scheduled(factory: Factory, share: Callable[[Any, Any], Any]) -> Factory:
    """Multiply an optimiser's learning rate by `share` of (steps done, steps of the run)."""

    def made(learning_rate: Any, steps: Any) -> optax.GradientTransformation:
        def schedule(count: Any) -> Any:
            return learning_rate * share(jnp.asarray(count).astype(jnp.result_type(float)), steps)

        return factory(schedule)

    return made


def _halving(done: Any, steps: Any) -> Any:
    return jnp.exp2(-HALVINGS * done / steps)


def _smooth(s: Scales) -> float:
    return 1 / s.curvature


def normalised(s: Scales) -> float:
    """A rate by which the run could go twenty times as far as the solution, in every weight."""
    return 20 * s.size * HALVINGS * np.log(2) / s.steps


def _accumulated(s: Scales) -> float:
    return s.size


def _mirrored(s: Scales) -> float:
    """1/L, L the curvature in the potential's metric √(w² + β²) at weights twice the size."""
    return 1 / (s.curvature * float(np.hypot(2 * s.size, BETA)))


_geometry = hypentropy(BETA)

CONTENDERS: dict[str, Contender] = {
    "sgd": Contender(optax.sgd, _smooth),
    "momentum": Contender(functools.partial(optax.sgd, momentum=0.9), _smooth),
    "nesterov": Contender(functools.partial(optax.sgd, momentum=0.9, nesterov=True), _smooth),
    "shampoo": Contender(shampoo, _accumulated),
    "rmsprop": Contender(optax.rmsprop, normalised, fixed=True),
    "adam": Contender(optax.adam, normalised, fixed=True),
    "adamw": Contender(optax.adamw, normalised, fixed=True),
    "adagrad": Contender(optax.adagrad, _accumulated),
    "sign_sgd": Contender(optax.sign_sgd, normalised, fixed=True),
    "lion": Contender(optax.lion, normalised, fixed=True),
    "steepest_l1": Contender(functools.partial(steepest_descent, p=1.0), _smooth),
    "steepest_l4/3": Contender(functools.partial(steepest_descent, p=4 / 3), _smooth),
    "mirror_descent": Contender(
        functools.partial(mirror_descent, potential=_geometry, momentum=0.9), _mirrored
    ),
    "natural_gradient": Contender(
        functools.partial(natural_gradient, potential=_geometry), _mirrored
    ),
    "muon": Contender(optax.contrib.muon, normalised, fixed=True),
}
"""By name; "muon" is for weights that are a matrix."""


def scales(X: np.ndarray, t: np.ndarray, steps: int) -> Scales:
    """Measure the scales of ½‖Xw − t‖²/n."""
    least = np.linalg.lstsq(X, t, rcond=None)[0]
    curvature = float(np.linalg.norm(X, 2) ** 2) / len(X)
    return Scales(curvature or 1.0, float(np.abs(least).max()) or 1.0, steps)


def final_weights(w: jax.Array, state: PyTree, data: Data) -> dict[str, jax.Array]:
    """Keep where a run ends, for `sweep(final=)`."""
    return {"weights": w.ravel()}
