"""What every mode is given: a run and a number that it makes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optjax.run import core
from optjax.run.core import Outcome, Plan, Trajectory
from optjax.run.loops import Loop
from optjax.run.problems import Data
from optjax.support.errors import UserError, nearest
from optjax.support.types import Array, HParams, Key, PyTree

Objective = str | Callable[[Trajectory], Array]


@dataclasses.dataclass(frozen=True)
class Job:
    """The static part of a hypergradient: hashable, so that equal jobs share a program.

    Attributes:
      plan: of the run; of one record where the objective looks at nothing else.
      objective: what is differentiated, a number of the trajectory.
      averages: the objective is the mean loss along the run, a sum over its parts.
      name: of the objective, for messages.
    """

    plan: Plan
    objective: Callable[[Trajectory], Array]
    averages: bool
    name: str

    def value(
        self, data: Data, hparams: HParams, key: Key, loop: Loop = jax.lax.scan
    ) -> tuple[Array, Outcome]:
        """Compute the objective, and how the run ended."""
        return self.judge(core.run(self.plan, data, hparams, key, loop))

    def judge(self, trajectory: Trajectory) -> tuple[Array, Outcome]:
        """Compute the objective of a trajectory, and how it ended."""
        value = jnp.asarray(self.objective(trajectory))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            given = f"{value.dtype} of shape {value.shape}"
            raise UserError(f"the objective gives {given}: expected one real number")
        ended = Outcome(trajectory.final_loss, trajectory.status, trajectory.diverged_at)
        return value, jax.tree.map(jax.lax.stop_gradient, ended)


def make_job(plan: Plan, objective: Objective, metrics: set[str]) -> Job:
    """Make the job of differentiating an objective.

    Raises:
      UserError: an unknown name.
    """
    if callable(objective):
        return Job(plan, objective, False, getattr(objective, "__name__", "objective"))
    known = {"final_loss", "mean_loss", *metrics}
    if objective not in known:
        raise UserError(
            f"unknown objective {objective!r}: {nearest(str(objective), known)}; or a function of "
            "Trajectory"
        )
    # Numbers of the end alone, and the mean of all steps, need one record.
    plan = dataclasses.replace(plan, record_every=plan.steps, record_path=False)
    if objective == "final_loss":
        return Job(plan, _final_loss, False, objective)
    if objective == "mean_loss":
        return Job(plan, _mean_loss, True, objective)
    return Job(plan, _LastMetric(objective), False, objective)


def _final_loss(trajectory: Trajectory) -> Array:
    return trajectory.final_loss


def _mean_loss(trajectory: Trajectory) -> Array:
    return jnp.mean(trajectory.loss)


@dataclasses.dataclass(frozen=True)
class _LastMetric:
    name: str

    def __call__(self, trajectory: Trajectory) -> Array:
        return trajectory.metrics[self.name][-1]


def with_records(job: Job, every: int) -> Job:
    """Return the same job with a record every so many steps."""
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, record_every=every))


def looks_inside(job: Job) -> bool:
    """Whether the number may depend on more than the end and the mean of the run."""
    return not (
        job.objective in (_final_loss, _mean_loss) or isinstance(job.objective, _LastMetric)
    )


def ends_in(job: Job) -> str | None:
    """Which of the numbers by name it is; None for a function of the trajectory."""
    return None if looks_inside(job) else job.name


def size(tree: PyTree) -> int:
    """Numbers in a tree of arrays."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))
