"""A run of one step: no second derivatives are needed.

    w₁ = w₀ + u(g₀; θ),   dF(w₁)/dθ = ∇F(w₁) · ∂_θ u(g₀; θ)

since neither w₀ nor its gradient g₀ depends on θ; for gradient descent −∇L(w₁)·∇L(w₀). On least
squares with the whole batch, by the learning rate, the source's closed form is used:

    dL₁/dη = −4k² aᵀXXᵀ(I − 2kη XXᵀ)a,   a = Xw₀ − t, loss k‖Xw − t‖²
"""

import dataclasses

import jax.numpy as jnp
import optax

from optjax.hypergradients.job import Job, ends_in
from optjax.hypergradients.mode import Footprint, Found, Mode
from optjax.hypergradients.reverse import Reverse
from optjax.run import core, problems
from optjax.run.problems import Data
from optjax.support.errors import UserError
from optjax.support.types import HParams, Key
from optjax.theory import gradient_descent


@dataclasses.dataclass(frozen=True)
class OneStep(Mode):
    """The derivative through one step: closed form on least squares, else its general form."""

    name = "one_step"

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Check that the run is one step."""
        if job.plan.steps != 1:
            raise UserError(
                f"mode 'one_step' and a run of {job.plan.steps} steps: expected a run of one; "
                "Truncated(1) differentiates the last step of a longer one"
            )

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count the residuals of one step."""
        return found.step + found.rest

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count two gradients, one before and one after the step."""
        return 2.0

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        self.check(job, frozenset(theta))
        if not _has_closed_form(job, theta, rest):
            # The start carries no tangent, so what reverse mode writes is the general form above.
            return Reverse()(job, data, theta, rest, key)
        hparams = {**rest, **theta}
        w0 = core.init(job.plan, data, hparams, key).params
        X, t, k = data.examples["x"], data.examples["t"], data.shared["scale"]
        k = k / jnp.asarray(X.shape[0], X.dtype)
        rate = theta["learning_rate"]
        value = gradient_descent.one_step_loss(X, t, w0, rate, k)
        slope = gradient_descent.one_step_hypergradient(X, t, w0, rate, k)
        _, outcome = job.value(data, hparams, key)
        return Found(value, {"learning_rate": slope}, outcome, {})


def _has_closed_form(job: Job, theta: HParams, rest: HParams) -> bool:
    plan, given = job.plan, {*theta, *rest}
    return (
        plan.loss is problems.squares_loss
        and plan.optimizer is optax.sgd
        and plan.sampler == "full"
        and ends_in(job) == "final_loss"
        and set(theta) == {"learning_rate"}
        and getattr(theta["learning_rate"], "shape", None) == ()
        and given <= {"learning_rate", "initial_params"}
    )
