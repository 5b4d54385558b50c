"""Reverse mode, as `jax.grad` does it: every step's intermediate values are kept.

    λ_t = λ_{t+1} ∂_z Φ(z_t, θ),   dF/dθ = ∂_θ F + Σ_t λ_{t+1} ∂_θ Φ(z_t, θ)

Time does not depend on how many numbers are differentiated by; memory grows as T.
"""

import dataclasses

import jax

from optjax.hypergradients import footprint
from optjax.hypergradients.job import Job, size
from optjax.hypergradients.mode import Choice, Footprint, Found, Mode
from optjax.run.core import Outcome
from optjax.run.loops import Loop
from optjax.run.problems import Data
from optjax.support.errors import UserError
from optjax.support.types import Array, HParams, Key

_CACHE = 2**25
"""Bytes that stay near the processor: reverse mode that writes more waits for memory."""


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


class ReverseMode(Mode):
    """A mode that keeps what the reverse of every step needs, some of it at a time."""

    reverses = True

    def choice(self, job: Job, data: Data, theta: HParams, rest: HParams) -> Choice:
        """As `Mode.choice`; where it does not fit, name one that does."""
        from optjax.hypergradients.auto import EXACT

        found, free = footprint.of_run(job, data, theta, rest), footprint.available()
        numbers = size(theta)
        needed = self.bytes(job, found, numbers)
        if needed <= free:
            return super().choice(job, data, theta, rest)
        others = (m for m in (*EXACT[2:], EXACT[0]) if m != self)
        fits = [m.name for m in others if m.bytes(job, found, numbers) <= free]
        instead = f"mode {fits[0]!r} would" if fits else "no exact mode does; take fewer steps"
        raise UserError(
            f"mode {self.name!r} needs about {footprint.readable(needed)} for {job.plan.steps} "
            f"steps and {footprint.readable(free)} are free: {instead}"
        )


@dataclasses.dataclass(frozen=True)
class Reverse(ReverseMode):
    """Everything kept: the fastest of the reverse modes where it fits, O(T) memory."""

    name = "reverse"

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count the residuals of every step."""
        return found.step * job.plan.steps + found.rest

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count more where the residuals do not stay near the processor."""
        return 3.0 if self.bytes(job, found, numbers) <= _CACHE else 5.0

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        return reversed_through(jax.lax.scan, job, data, theta, rest, key)
