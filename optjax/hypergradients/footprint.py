"""The bytes that a run's derivative is made of, found by tracing two and three of its steps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.hypergradients.job import Job, looks_inside, size
from optjax.hypergradients.mode import Footprint, Mode
from optjax.run import core
from optjax.run.problems import Data
from optjax.support.keys import make_key
from optjax.support.machine import free_memory
from optjax.support.types import HParams, PyTree


def of_run(job: Job, data: Data, theta: HParams, rest: HParams) -> Footprint:
    """Traced once for runs of a shape."""
    shapes = tuple(jax.tree.map(jax.typeof, (data, theta, rest)))
    leaves, structure = jax.tree.flatten(shapes)
    return _footprint(job, structure, tuple((a.shape, a.dtype) for a in leaves))


@functools.lru_cache(maxsize=256)
def _footprint(job: Job, structure: Any, leaves: tuple[Any, ...]) -> Footprint:
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves]
    data, theta, rest = jax.tree.unflatten(structure, arrays)
    key = jax.eval_shape(lambda: make_key(0))

    def state(data: Data, theta: HParams, rest: HParams, key: Any) -> Any:
        return core.init(job.plan, data, {**rest, **theta}, key)

    def kept(steps: int) -> int:
        """Bytes of the residuals of `steps` steps, the loop's and what it does not change."""
        plan = job.plan
        if not looks_inside(job):
            plan = dataclasses.replace(plan, record_every=1, metrics=_no_metrics)

        def residuals(data: Data, theta: HParams, rest: HParams, state: Any) -> Any:
            def run(theta: HParams) -> Any:
                end, records = core.steps_of(plan, steps, data, {**rest, **theta}, state)
                return end.params, records.metrics

            return jax.vjp(run, theta)[1]

        return _bytes(jax.eval_shape(residuals, data, theta, rest, start))

    def loops(data: Data, theta: HParams, rest: HParams, state: Any) -> Any:
        def total(theta: HParams) -> Any:
            after = core.step(job.plan, data, {**rest, **theta}, state)[0].params
            return sum(jnp.sum(leaf).astype(float) for leaf in jax.tree.leaves(after))

        return jax.grad(total)(theta)

    start = jax.eval_shape(state, data, theta, rest, key)
    every = job.plan.record_every if looks_inside(job) else 1
    each = (kept(3 * every) - kept(2 * every)) // every
    try:
        jax.eval_shape(loops, data, theta, rest, start)
    except ValueError:  # a while loop, which has no reverse mode
        reversible = False
    else:
        reversible = True
    rest = _bytes(start) + _bytes(theta)
    return Footprint(_bytes(start), _bytes(start.params), max(each, 1), rest, reversible)


def _no_metrics(*_: Any) -> dict[str, Any]:
    return {}


def _bytes(tree: PyTree) -> int:
    return sum(
        int(np.prod(leaf.shape)) * _itemsize(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "shape")
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def available() -> float:
    """Bytes that a derivative may take: half of what the default device has free."""
    return 0.5 * free_memory(jax.local_devices()[0])


def needed(mode: Mode, job: Job, data: Data, theta: HParams, rest: HParams) -> int:
    """Bytes of temporaries of one hypergradient in a mode."""
    return mode.bytes(job, of_run(job, data, theta, rest), size(theta))


def at_once(mode: Mode, job: Job, data: Data, theta: HParams, rest: HParams) -> int:
    """How many hypergradients fit side by side, at least one."""
    return max(1, int(available() // needed(mode, job, data, theta, rest)))


def readable(count: float) -> str:
    """Bytes for people.

    >>> readable(958 * 2**20), readable(2.3 * 2**30)
    ('958 MiB', '2.3 GiB')
    """
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
