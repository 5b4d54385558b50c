"""What makes two sweeps the same sweep, and what makes two runs of them the same run."""

import dataclasses
import functools
import hashlib
import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optjax import provenance
from optjax.errors import UserError
from optjax.files import plainly
from optjax.sweeps.buckets import Point
from optjax.sweeps.grid import Grid, label

_CORE = (
    "optjax.scan",
    "optjax.trajectory",
    "optjax.sweeps.lane",
    "optjax.sweeps.program",
    "optjax.sweeps.rules",
)


def identity(points: Sequence[Point], grid: Grid, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree for results to belong together, as names and text.

    Args:
      settings: the sweep's own that change results: stop rules, whether diverged runs are kept.
    """
    seen: dict[str, Point] = {}
    for point in points:
        seen.setdefault(", ".join(f"{k} = {label(v)}" for k, v in point.shape), point)
    facts: dict[str, Any] = {name: _functions(value) for name, value in settings.items()}
    modules: set[types.ModuleType] = {sys.modules[name] for name in _CORE}
    for value in settings.values():
        for part in jax.tree.leaves(value, is_leaf=callable):
            modules |= _modules(part)
    for shape, point in seen.items():
        plan, at = point.run.plan, f" ({shape})" if shape else ""
        facts[f"problem{at}"] = _functions(plan.init, plan.loss, plan.objective, plan.metrics)
        facts[f"optimizer{at}"] = _functions(plan.optimizer)
        facts[f"data{at}"] = _data_hash(point.run)
        for name in ("sampler", "record_every", "tolerance"):
            facts[f"{name}{at}"] = str(getattr(plan, name))
        if "steps" not in grid.columns:
            facts[f"steps{at}"] = str(plan.steps)
        if "batch_size" not in grid.columns:
            facts[f"max_batch_size{at}"] = str(plan.slots)
        for part in (plan.init, plan.loss, plan.objective, plan.metrics, plan.optimizer):
            modules |= _modules(part)
    facts["float64"] = str(jax.config.read("jax_enable_x64"))
    for name, version in provenance.versions().items():
        facts[f"version of {name}"] = version
    for name, source in provenance.source_hashes(modules).items():
        facts[f"code of {name}"] = source
    return facts


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What of the old differs in the new, in one line; None where nothing does.

    >>> difference({"steps": "100", "sampler": "full"}, {"steps": "200", "sampler": "full"})
    "steps was '100' and is '200'"
    """
    changed = []
    for name, was in old.items():
        now = new.get(name)
        if was == now:
            continue
        if name.startswith("code of "):
            changed.append(f"the {name} changed")
        else:
            changed.append(f"{name} was {_short(was)} and is {_short(now)}")
    if not changed:
        return None
    more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more


def run_ids(grid: Grid, steps: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
    """A number for every run, (P, S) uint64, by its own point, steps and seed alone."""
    ids = np.empty((len(grid), len(seeds)), np.uint64)
    for i in range(len(grid)):
        point = sorted((k, repr(label(v))) for k, v in grid.point(i).items())
        stem = json.dumps([point, steps[i]])
        for j, seed in enumerate(seeds):
            digest = hashlib.blake2b(f"{stem}|{seed}".encode(), digest_size=8).digest()
            ids[i, j] = int.from_bytes(digest, "little")
    return ids


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "…" + text[-16:]


def _functions(*parts: Any) -> str:
    return "; ".join(f"{plainly(part)}{_constants(part)}" for part in parts)


def _constants(part: Any) -> str:
    """The values that a function closes over: two lambdas may differ in them alone."""
    cells = getattr(part, "__closure__", None) or ()
    found = []
    for cell in cells:
        try:
            found.append(plainly(cell.cell_contents))
        except ValueError:
            continue
    return f" with {', '.join(found)}" if found else ""


def _data_hash(run: Any) -> str:
    digest = hashlib.sha256()
    leaves, tree = jax.tree.flatten(run.problem.data)
    digest.update(plainly(tree).encode())
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            raise UserError("the problem's data are traced: call sweep outside of jit and vmap")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _modules(part: Any, depth: int = 0) -> set[types.ModuleType]:
    """The modules that a callable and what it is made of come from."""
    found: set[types.ModuleType] = set()
    if depth > 6:
        return found
    name = getattr(part, "__module__", None)
    if isinstance(name, str) and name in sys.modules and _own(name):
        found.add(sys.modules[name])
    inner: Iterable[Any] = ()
    if isinstance(part, functools.partial):
        inner = (part.func, *part.args, *part.keywords.values())
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        inner = [getattr(part, f.name, None) for f in dataclasses.fields(part)]
    elif (wrapped := getattr(part, "__wrapped__", None)) is not None:
        inner = (wrapped,)
    for other in inner:
        if callable(other) or dataclasses.is_dataclass(other):
            found |= _modules(other, depth + 1)
    return found


def _own(name: str) -> bool:
    """Code that its version does not tell: ours and the user's, not an installed library's."""
    file = getattr(sys.modules[name], "__file__", None) or ""
    return name.startswith("optjax") or "site-packages" not in file
