"""Reverse mode in √T segments: the states between segments are kept, each segment is run again.

Memory is √T states and √T steps' intermediate values; time one run more than plain reverse.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optjax.hypergradients.job import Job
from optjax.hypergradients.mode import Footprint, Found
from optjax.hypergradients.reverse import ReverseMode, reversed_through
from optjax.run.problems import Data
from optjax.support.errors import whole
from optjax.support.types import HParams, Key, PyTree


def in_parts(
    run: Callable[[PyTree, PyTree, int], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    length: int,
    each: int,
) -> tuple[PyTree, PyTree]:
    """Scan over parts of `each` steps, and a shorter one: `run(carry, xs, steps)` runs a part."""
    parts, rest = divmod(length, each)
    head = jax.tree.map(lambda a: a[: parts * each].reshape(parts, each, *a.shape[1:]), xs)
    carry, ys = jax.lax.scan(lambda c, x: run(c, x, each), carry, head, length=parts)
    ys = jax.tree.map(lambda a: a.reshape(parts * each, *a.shape[2:]), ys)
    if not rest:
        return carry, ys
    carry, tail = run(carry, jax.tree.map(lambda a: a[parts * each :], xs), rest)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, tail)


def segment_length(length: int) -> int:
    """Return the steps of a segment: the divisor of `length` near its root, if there is one.

    >>> segment_length(6400), segment_length(1000), segment_length(997)
    (80, 40, 32)
    """
    root = math.isqrt(length - 1) + 1
    near = [k for k in range(max(1, root * 3 // 4), root * 4 // 3 + 1) if length % k == 0]
    return min(near, key=lambda k: abs(math.log(k / root)), default=root)


@dataclasses.dataclass(frozen=True)
class SegmentedScan:
    """`jax.lax.scan` whose reverse keeps the carries between segments and runs each again."""

    segments: int | None = None

    def __call__(
        self, body: Callable[..., Any], carry: PyTree, xs: PyTree, length: int
    ) -> tuple[PyTree, PyTree]:
        each = -(-length // self.segments) if self.segments else segment_length(length)
        if each >= length:
            each = length

        @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
        def segment(carry: PyTree, xs: PyTree, steps: int) -> tuple[PyTree, PyTree]:
            return jax.lax.scan(body, carry, xs, length=steps)

        return in_parts(segment, carry, xs, length, each)


@dataclasses.dataclass(frozen=True)
class Segmented(ReverseMode):
    """√T segments (Chen et al. 2016, section 4.3): the reverse mode for long runs.

    Args:
      segments: how many; √T by default.
    """

    segments: int | None = None

    name = "segmented"

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Segments are a whole number."""
        if self.segments is not None:
            whole("Segmented: segments", self.segments, 1)

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count a state a segment, and the residuals of one segment."""
        steps = job.plan.steps
        each = -(-steps // self.segments) if self.segments else segment_length(steps)
        return found.state * -(-steps // each) + found.step * each + found.rest

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count a run more than reverse mode."""
        return 4.0

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        return reversed_through(SegmentedScan(self.segments), job, data, theta, rest, key)
