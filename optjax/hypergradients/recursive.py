"""Reverse mode by recursive checkpoints: memory of b log_b T states.

A run of T steps is b parts, whose first states are kept; each part is run again when its turn
comes, as b parts of its own. A step is run once more for each of the log_b T levels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from optjax.hypergradients.job import Job
from optjax.hypergradients.mode import Footprint, Found
from optjax.hypergradients.reverse import ReverseMode, reversed_through
from optjax.hypergradients.segmented import in_parts
from optjax.run.problems import Data
from optjax.support.errors import whole
from optjax.support.types import HParams, Key, PyTree


@dataclasses.dataclass(frozen=True)
class RecursiveScan:
    """`jax.lax.scan` whose reverse keeps the carries of one path down a tree of parts."""

    branching: int = 16

    def __call__(
        self, body: Callable[..., Any], carry: PyTree, xs: PyTree, length: int
    ) -> tuple[PyTree, PyTree]:
        step = jax.checkpoint(body, prevent_cse=False)
        b = self.branching

        @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
        def part(carry: PyTree, xs: PyTree, steps: int) -> tuple[PyTree, PyTree]:
            if steps <= b:
                return jax.lax.scan(step, carry, xs, length=steps)
            return in_parts(part, carry, xs, steps, part_length(steps, b))

        return part(carry, xs, length)


def part_length(steps: int, branching: int) -> int:
    """Return the steps of a part: the largest power of the branching below `steps`.

    All parts but those at the end are then alike, and share their program.

    >>> part_length(6400, 16), part_length(256, 16), part_length(257, 16)
    (4096, 16, 256)
    """
    power = branching
    while power * branching < steps:
        power *= branching
    return power


@dataclasses.dataclass(frozen=True)
class Recursive(ReverseMode):
    """Recursive checkpoints (Griewank 1992): memory grows as log T, time as T log T.

    Args:
      branching: b ≥ 2, parts of a level. Fewer take less memory and more time.
    """

    branching: int = 16

    name = "recursive"

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Check that a part has at least two parts."""
        whole("Recursive: branching", self.branching, 2)

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count the states of one path down the tree of parts, and the residuals of a step."""
        levels = max(1, math.ceil(math.log(job.plan.steps, self.branching)))
        return found.state * levels * self.branching + found.step + found.rest

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count a run more for every level."""
        return 4.0 + math.log(job.plan.steps, self.branching)

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        return reversed_through(RecursiveScan(self.branching), job, data, theta, rest, key)
