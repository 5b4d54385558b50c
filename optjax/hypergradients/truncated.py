"""Reverse mode through the last k steps alone: cheap, and biased.

What came before them is taken as given. For gradient descent at a constant rate η on a quadratic
loss the derivative by η comes out as exactly k/T of the true one, since

    L_T = Σ (1 − ηh)^{2T} c,   dL_T/dη = −2T Σ h (1 − ηh)^{2T−1} c,

and the truncated one differentiates only k of the T equal factors. In general directions of small
curvature, which remember longest, are cut the most.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optjax.hypergradients.job import Job, looks_inside
from optjax.hypergradients.mode import Footprint, Found, Mode
from optjax.hypergradients.reverse import Reverse
from optjax.run import core
from optjax.run.core import Outcome, Records
from optjax.run.problems import Data
from optjax.support.errors import UserError, whole
from optjax.support.types import Array, HParams, Key


@dataclasses.dataclass(frozen=True)
class Truncated(Mode):
    """The last `steps` steps alone (Shaban et al. 2019, K-RMD). O(k) memory.

    Args:
      steps: k, 1 … T; where the objective is a function, a multiple of the run's record_every.
    """

    steps: int

    name = "truncated"

    def check(self, job: Job, names: frozenset[str]) -> None:
        """K must fit the run."""
        whole("Truncated: steps", self.steps, 1)
        total, every = job.plan.steps, job.plan.record_every
        if self.steps > total:
            raise UserError(f"truncated({self.steps}): expected 1 to the run's {total} steps")
        if "initial_params" in names and self.steps < total:
            raise UserError(
                f"truncated({self.steps}) and 'initial_params': they act before its steps, the "
                "gradient would be 0; leave them out of wrt, or take mode 'segmented'"
            )
        if looks_inside(job) and self.steps % every:
            raise UserError(
                f"truncated({self.steps}): expected a multiple of the run's record_every = {every}"
            )

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count the residuals of the last steps."""
        return found.step * self.steps + found.rest

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count a run, and reverse mode through its last steps."""
        return 1.0 + 4.0 * self.steps / job.plan.steps

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        plan, last = job.plan, self.steps
        first = plan.steps - last
        if not first:
            return Reverse()(job, data, theta, rest, key)
        given = {**rest, **jax.tree.map(jax.lax.stop_gradient, theta)}
        start = core.init(plan, data, given, key)
        begin, before = core.steps_of(_part(job, first), first, data, given, start)

        def run(theta: HParams) -> tuple[Array, Outcome]:
            hparams = {**rest, **theta}
            end, after = core.steps_of(_part(job, last), last, data, hparams, begin)
            records = _joined(job, before, after, first, last)
            return job.judge(core.finish(plan, data, hparams, start.params, end, records))

        (value, outcome), gradient = jax.value_and_grad(run, has_aux=True)(theta)
        return Found(value, gradient, outcome, {})


def _part(job: Job, steps: int) -> Any:
    """Return the plan of a part of the run: one record, unless records are looked at."""
    if looks_inside(job):
        return job.plan
    return dataclasses.replace(job.plan, record_every=steps)


def _joined(job: Job, before: Records, after: Records, first: int, last: int) -> Records:
    if looks_inside(job):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), before, after)
    share = last / (first + last)
    return after._replace(loss=(1 - share) * before.loss + share * after.loss)
