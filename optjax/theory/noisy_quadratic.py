"""The noisy quadratic model: a loss with noisy gradients, and an optimiser that descends on it.

The loss is ½Σ hᵢxᵢ², the gradient of a batch of B is hx + ξ with ξ ~ (0, c/B), and a step is
preconditioned by h^{−p}. In the eigenbasis of the curvature the coordinates are independent, so
the second moments sᵢ = E xᵢ² follow a recursion that needs no samples and no bins of the spectrum.
For SGD it is

    s' = (1 − αk)²s + α²q,  k = h^{1−p},  q = h^{−2p}c/B,  risk = ½Σ hs

k is the curvature that a preconditioned step sees, q the variance of its noise.
`optjax.theory.moments` has momentum, averaged weights and many steps at once,
`optjax.theory.quadratic_steps` the steps to a target, `optjax.theory.quadratic_rates` the rates.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from optjax.run.problems import numbers
from optjax.support.errors import UserError
from optjax.support.types import Array


class NoisyQuadratic(NamedTuple):
    """A noisy quadratic and its optimiser; `noisy_quadratic` makes and checks one."""

    h: Array  # (d,) curvatures, above 0
    c: Array  # (d,) variance of the gradient of one example
    s0: Array  # (d,) second moments of the parameters at the start, about the minimiser
    batch_size: Array  # () B
    power: Array  # () p of the preconditioner h^{−p}
    momentum: Array | None = None  # () β; None: no velocity
    nesterov: Array | None = None  # () ν: 0 heavy ball, 1 Nesterov; None without momentum
    average: Array | None = None  # () γ of the averaged weights; None: the weights are not averaged


def require_above(name: str, array: Array, *, or_equal: bool = False) -> None:
    """Check that concrete numbers are above 0, or at least 0 with `or_equal`."""
    if isinstance(array, Tracer):
        return
    least = float(np.min(np.asarray(array)))
    if least < 0 or (least == 0 and not or_equal):
        raise UserError(f"{name} holds {least:g}: expected {'at least' if or_equal else 'above'} 0")


def noisy_quadratic(
    h: ArrayLike,
    c: ArrayLike | None = None,
    s0: ArrayLike | None = None,
    *,
    batch_size: ArrayLike = 1,
    power: ArrayLike = 0,
    momentum: ArrayLike | None = None,
    nesterov: ArrayLike = False,
    average: ArrayLike | None = None,
) -> NoisyQuadratic:
    """Make a noisy quadratic model, in the eigenbasis of its curvature.

    Every value may be traced: `vmap` a function that makes the model to have many at once.

    Args:
      h: (d,) curvatures, above 0.
      c: (d,) variance of one example's gradient; h by default, as if the Fisher matrix were
        diag(h).
      s0: (d,) second moments at the start; ones by default.
      batch_size: () B, any positive real number, so that one can differentiate by it.
      power: () p of the preconditioner h^{−p}: 0 is SGD, 1 is Newton's method.
      momentum: () β of v' = βv + h^{−p}g, at least 0 and below 1.
      nesterov: whether the step is −α(βv' + h^{−p}g) and not −αv', as in `optax.sgd`; a number
        between 0 and 1 mixes the two.
      average: () γ of e' = γe + (1 − γ)x', at least 0 and below 1. The risk is then that of the
        average e, which starts at x.

    Raises:
      UserError: shapes that do not fit, values that are not finite, a curvature or batch size that
        is not positive, a negative variance, momentum or an average outside [0, 1).

    >>> model = noisy_quadratic([1.0, 0.5], batch_size=4)
    >>> float(risk(model, model.s0))
    0.75

    Source: Zhang et al. 2019 (arXiv:1907.04164), section 3: c = h and s0 = 1.
    """
    h = numbers("h", h, 1)
    c = h if c is None else numbers("c", c, 1, h.dtype)
    s0 = jnp.ones_like(h) if s0 is None else numbers("s0", s0, 1, h.dtype)
    require_above("h", h)
    for name, value in (("c", c), ("s0", s0)):
        if value.shape != h.shape:
            raise UserError(f"{name} has shape {value.shape} and h {h.shape}: expected equal")
        require_above(name, value, or_equal=True)
    size = numbers("batch_size", batch_size, 0, h.dtype)
    require_above("batch_size", size)
    beta = None if momentum is None else _share("momentum", momentum, h.dtype)
    if beta is None and not isinstance(nesterov, Tracer) and np.any(nesterov):
        raise UserError(f"nesterov is {nesterov} and momentum is not given: give momentum too")
    return NoisyQuadratic(
        h,
        c,
        s0,
        size,
        numbers("power", power, 0, h.dtype),
        beta,
        None if beta is None else numbers("nesterov", nesterov, 0, h.dtype),
        None if average is None else _share("average", average, h.dtype),
    )


def _share(name: str, value: ArrayLike, dtype: Any) -> Array:
    """Convert a value to an array; a concrete number must be at least 0 and below 1."""
    array = numbers(name, value, 0, dtype)
    if not isinstance(array, Tracer) and not 0 <= float(array) < 1:
        raise UserError(f"{name} is {float(array):g}: expected at least 0 and below 1")
    return array


def seen(model: NoisyQuadratic) -> tuple[Array, Array]:
    """Return the curvature k and noise q that the preconditioned step sees, (d,) each."""
    h, c, B, p = model.h, model.c, model.batch_size, model.power
    return h ** (1 - p), h ** (-2 * p) * c / B


def risk(model: NoisyQuadratic, s: Array) -> Array:
    """Return the expected loss where the second moments are s.

    ½Σ hs

    Args:
      model: from `noisy_quadratic`.
      s: (d,).

    >>> float(risk(noisy_quadratic([2.0]), jnp.array([3.0])))
    3.0
    """
    return 0.5 * jnp.sum(model.h * s)


def step(model: NoisyQuadratic, s: Array, rate: ArrayLike) -> Array:
    """Return the second moments after one step of SGD.

    s' = (1 − αh^{1−p})²s + α²h^{−2p}c/B

    Args:
      model: from `noisy_quadratic`.
      s: (d,) second moments before the step.
      rate: () learning rate α.

    >>> step(noisy_quadratic([1.0], [4.0], batch_size=2), jnp.ones(1), 0.5).tolist()
    [0.75]

    Source: Zhang et al. 2019, section 3.1.
    """
    k, q = seen(model)
    return moved(k, q, s, jnp.asarray(rate).astype(s.dtype))


def moved(k: Array, q: Array, s: Array, rate: Array) -> Array:
    """Compute `step` from k and q, which a loop computes once."""
    return (1 - rate * k) ** 2 * s + rate**2 * q


def require_sgd(model: NoisyQuadratic) -> None:
    """Check that the model has neither momentum nor an average."""
    for name in ("momentum", "average"):
        if getattr(model, name) is not None:
            raise UserError(
                f"{name} is given: this rate is derived for SGD; leave {name} out, or use "
                "best_constant_rate or fewest_steps"
            )
