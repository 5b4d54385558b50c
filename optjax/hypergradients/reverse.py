"""Reverse mode, as `jax.grad` does it: every step's intermediate values are kept.

    λ_t = λ_{t+1} ∂_z Φ(z_t, θ),   dF/dθ = ∂_θ F + Σ_t λ_{t+1} ∂_θ Φ(z_t, θ)

Time does not depend on how many numbers are differentiated by; memory grows as T.
"""

import dataclasses

import jax

from optjax.hypergradients.job import Found, Job, nothing_to_check
from optjax.run.core import Loop, Outcome
from optjax.run.problems import Data
from optjax.support.errors import UserError
from optjax.support.types import Array, HParams, Key


def reversed_through(
    loop: Loop, job: Job, data: Data, theta: HParams, rest: HParams, key: Key
) -> Found:
    """Reverse mode through a loop that decides what is kept."""

    def run(theta: HParams) -> tuple[Array, Outcome]:
        return job.value(data, {**rest, **theta}, key, loop)

    try:
        (value, outcome), gradient = jax.value_and_grad(run, has_aux=True)(theta)
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        raise UserError(
            "the run has a while loop (a line search has one), which has no reverse mode: take "
            "mode 'forward' or 'es'"
        ) from None
    return Found(value, gradient, outcome, {})


@dataclasses.dataclass(frozen=True)
class Reverse:
    """Everything kept: the fastest of the reverse modes where it fits, O(T) memory."""

    name = "reverse"
    check = staticmethod(nothing_to_check)

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        return reversed_through(jax.lax.scan, job, data, theta, rest, key)
