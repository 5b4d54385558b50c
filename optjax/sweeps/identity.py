"""What makes two sweeps the same sweep, and what makes two runs of them the same run."""

import hashlib
import json
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optjax.support import fingerprint, provenance
from optjax.support.errors import UserError
from optjax.support.files import plainly
from optjax.sweeps.grid import Grid, Labelled, label
from optjax.sweeps.groups import Point

_CORE = (
    "optjax.run.core",
    "optjax.run.trajectory",
    "optjax.sweeps.swept_run",
    "optjax.sweeps.programs",
    "optjax.sweeps.stop_rules",
)


def identity(
    points: Sequence[Point],
    grid: Grid,
    settings: Mapping[str, Any],
    code: Sequence[types.ModuleType] = (),
    *,
    any_steps: bool = False,
) -> dict[str, Any]:
    """Describe all that must agree for results to belong together, as names and text.

    Args:
      settings: the sweep's own that change results: stop rules, whether diverged runs are kept.
      code: further modules that results depend on.
      any_steps: whether runs of other lengths belong together.
    """
    seen: dict[str, Point] = {}
    for point in points:
        seen.setdefault(", ".join(f"{k} = {label(v)}" for k, v in point.shape), point)
    facts: dict[str, Any] = {name: fingerprint.of(value) for name, value in settings.items()}
    modules: set[types.ModuleType] = {sys.modules[name] for name in _CORE} | set(code)
    for value in settings.values():
        for part in jax.tree.leaves(value, is_leaf=callable):
            modules |= fingerprint.modules_of(part)
    for shape, point in seen.items():
        plan, at = point.run.plan, f" ({shape})" if shape else ""
        facts[f"problem{at}"] = fingerprint.of(plan.init, plan.loss, plan.objective, plan.metrics)
        facts[f"optimizer{at}"] = fingerprint.of(plan.optimizer)
        facts[f"data{at}"] = _data_hash(point.run)
        if point.gradient is not None:
            fn = point.gradient
            facts[f"objective{at}"] = f"{fn.job.name}: {fingerprint.of(fn.job.objective)}"
            facts[f"mode{at}"], facts[f"wrt{at}"] = fingerprint.of(fn.mode), str(fn.wrt)
            own = ("optjax.hypergradients.hypergradient", type(fn.mode).__module__)
            modules |= fingerprint.modules_of(fn.job.objective) | {sys.modules[n] for n in own}
        for name in ("sampler", "record_every", "tolerance"):
            facts[f"{name}{at}"] = str(getattr(plan, name))
        if "steps" not in grid.columns:
            facts[f"steps{at}"] = "any (keep_states)" if any_steps else str(plan.steps)
        if "batch_size" not in grid.columns:
            facts[f"max_batch_size{at}"] = str(plan.slots)
        for part in (plan.init, plan.loss, plan.objective, plan.metrics, plan.optimizer):
            modules |= fingerprint.modules_of(part)
    for name in ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable"):
        facts[name] = str(getattr(jax.config, name))
    for name, version in provenance.versions().items():
        facts[f"version of {name}"] = version
    for name, source in provenance.source_hashes(modules).items():
        facts[f"code of {name}"] = source
    return facts


def run_ids(grid: Grid, steps: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
    """Give every run a number, (P, S) uint64, by its own point, steps and seed alone."""
    ids = np.empty((len(grid), len(seeds)), np.uint64)
    for i in range(len(grid)):
        point = sorted((k, _named(v)) for k, v in grid.point(i).items())
        stem = json.dumps([point, steps[i]])
        for j, seed in enumerate(seeds):
            digest = hashlib.blake2b(f"{stem}|{seed}".encode(), digest_size=8).digest()
            ids[i, j] = int.from_bytes(digest, "little")
    if len(np.unique(ids)) < ids.size:
        raise UserError("two runs of the grid have one name: give each point and seed once")
    return ids


def _named(value: Any) -> str:
    """Write a value of a point as text, 1 and 1.0 alike; arrays and functions by their content."""
    if isinstance(value, Labelled):
        return fingerprint.of(value.value)
    if callable(value):
        return fingerprint.of(value)
    known = label(value)
    return repr(float(known)) if isinstance(known, int | float) else repr(known)


def _data_hash(run: Any) -> str:
    digest = hashlib.sha256()
    leaves, tree = jax.tree.flatten(run.problem.data)
    digest.update(plainly(tree).encode())
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            raise UserError("the problem's data are traced: call sweep outside of jit and vmap")
        fingerprint.feed(digest, leaf)
    return digest.hexdigest()[:16]
