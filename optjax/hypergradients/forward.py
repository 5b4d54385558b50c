"""Forward mode: tangents carried along the run, one for each number differentiated by.

    ż_{t+1} = ∂_z Φ(z_t, θ) ż_t + ∂_θ Φ(z_t, θ),   dF/dθ = ∂_z F · ż_T + ∂_θ F

z is the whole state (parameters, moments), Φ a step. Memory does not depend on T: a state for each
of the P numbers. Time grows with P, so it is for few of them: reverse mode takes about as long as
three to five tangents.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optjax.hypergradients.job import Job
from optjax.hypergradients.mode import Footprint, Found, Mode
from optjax.hypergradients.tangents import Dual, push
from optjax.run import core
from optjax.run.core import Outcome, Records, RunState
from optjax.run.loops import walk
from optjax.run.problems import Data
from optjax.support.errors import whole
from optjax.support.types import Array, HParams, Key


@dataclasses.dataclass(frozen=True)
class Forward(Mode):
    """Tangents carried along the run (Franceschi et al. 2017, forward-HG).

    Args:
      at_once: tangents carried at once; more than these take several passes.
      singly: up to so many are carried one by one, more as one batch.
    """

    at_once: int = 32
    singly: int = 4

    name = "forward"

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Tangents are whole numbers."""
        whole("Forward: at_once", self.at_once, 1)
        whole("Forward: singly", self.singly, 0)

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count a state, its tangents before and after a step, and the step."""
        tangents = min(numbers, self.at_once)
        return found.state * (1 + 2 * tangents) + found.step + found.rest

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count a run, and one more for every tangent."""
        return 1.0 + numbers

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        flat, unravel = ravel_pytree(theta)
        count = flat.size
        if count <= self.singly:
            return _singly(job, data, theta, rest, key)

        def run(flat: Array) -> tuple[Array, Outcome]:
            return job.value(data, {**rest, **unravel(flat)}, key)

        def along(tangent: Array) -> tuple[Array, Array, Outcome]:
            return cast(
                tuple[Array, Array, Outcome], jax.jvp(run, (flat,), (tangent,), has_aux=True)
            )

        together = jax.vmap(along, out_axes=(None, 0, None))
        if count <= self.at_once:
            value, slopes, outcome = together(jnp.eye(count, dtype=flat.dtype))
            return Found(value, unravel(slopes), outcome, {})

        # Rows past the last are zero tangents, whose slopes nobody reads.
        passes = -(-count // self.at_once)

        def several(start: Array) -> tuple[Array, Array, Outcome]:
            rows = start + jnp.arange(self.at_once, dtype=start.dtype)
            columns = jnp.arange(count, dtype=start.dtype)
            return together((rows[:, None] == columns[None]).astype(flat.dtype))

        starts = self.at_once * jnp.arange(passes, dtype=jnp.int32)
        values, slopes, outcomes = jax.lax.map(several, starts)
        value, outcome = jax.tree.map(lambda a: a[0], (values, outcomes))
        return Found(value, unravel(slopes.reshape(-1)[:count]), outcome, {})


def _singly(job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
    """Every step linearised once, and its linear map applied to each tangent."""
    plan = job.plan
    flat, unravel = ravel_pytree(theta)
    units = jnp.eye(flat.size, dtype=flat.dtype)
    at = Dual(theta, tuple(jax.tree.leaves(unravel(unit)) for unit in units))

    def start(theta: HParams) -> RunState:
        return core.init(plan, data, {**rest, **theta}, key)

    def step(theta: HParams, state: RunState) -> tuple[RunState, Array]:
        return core.step(plan, data, {**rest, **theta}, state)

    def record(theta: HParams, state: RunState, losses: Array) -> Records:
        return core.record(plan, data, {**rest, **theta}, state, core.mean_loss(state, losses))

    def judge(theta: HParams, start: Any, end: RunState, records: Records) -> Any:
        return job.judge(core.finish(plan, data, {**rest, **theta}, start, end, records))

    def one(state: Dual, _: None) -> tuple[Dual, Dual]:
        after = push(step, at, state)
        return _first(after), _second(after)

    def recorded(state: Dual, losses: Dual) -> Dual:
        return push(record, at, state, losses)

    begin = push(start, at)
    end, records = walk(plan.steps, plan.record_every, one, recorded, begin)
    first = push(lambda state: state.params, begin)
    judged = push(judge, at, first, end, records)
    value, outcome = judged.value
    slopes = jnp.stack([tangent[0] for tangent in judged.tangents])
    return Found(value, unravel(slopes.astype(flat.dtype)), outcome, {})


def _first(pair: Dual) -> Dual:
    return push(lambda pair: pair[0], pair)


def _second(pair: Dual) -> Dual:
    return push(lambda pair: pair[1], pair)
