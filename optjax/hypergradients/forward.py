"""Forward mode: tangents carried along the run, one for each number differentiated by.

    ż_{t+1} = ∂_z Φ(z_t, θ) ż_t + ∂_θ Φ(z_t, θ),   dF/dθ = ∂_z F · ż_T + ∂_θ F

z is the whole state (parameters, moments), Φ a step. Memory does not depend on T: a state for each
of the P numbers. Time grows with P, so it is for few of them: reverse mode takes about as long as
three to five tangents.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optjax.hypergradients.job import Found, Job, nothing_to_check
from optjax.problems import Data
from optjax.scan import Outcome
from optjax.types import Array, HParams, Key


@dataclasses.dataclass(frozen=True)
class Forward:
    """Tangents carried along the run (Franceschi et al. 2017, forward-HG).

    Args:
      tile: tangents carried at once; more than these take several passes.
    """

    tile: int = 32

    name = "forward"
    check = staticmethod(nothing_to_check)

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        flat, unravel = ravel_pytree(theta)
        count = flat.size

        def run(flat: Array) -> tuple[Array, Outcome]:
            return job.value(data, {**rest, **unravel(flat)}, key)

        def along(tangent: Array) -> tuple[Array, Array, Outcome]:
            return cast(
                tuple[Array, Array, Outcome], jax.jvp(run, (flat,), (tangent,), has_aux=True)
            )

        together = jax.vmap(along, out_axes=(None, 0, None))
        if count <= self.tile:
            value, slopes, outcome = together(jnp.eye(count, dtype=flat.dtype))
            return Found(value, unravel(slopes), outcome, {})

        # Rows past the last are zero tangents, whose slopes nobody reads.
        passes = -(-count // self.tile)

        def tile(start: Array) -> tuple[Array, Array, Outcome]:
            rows = start + jnp.arange(self.tile, dtype=start.dtype)
            columns = jnp.arange(count, dtype=start.dtype)
            return together((rows[:, None] == columns[None]).astype(flat.dtype))

        starts = self.tile * jnp.arange(passes, dtype=jnp.int32)
        values, slopes, outcomes = jax.lax.map(tile, starts)
        value, outcome = jax.tree.map(lambda a: a[0], (values, outcomes))
        return Found(value, unravel(slopes.reshape(-1)[:count]), outcome, {})
