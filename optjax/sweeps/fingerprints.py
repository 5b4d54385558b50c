"""What makes two sweeps the same sweep, and what makes two runs of them the same run."""

import contextlib
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

from optjax.support import provenance
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
) -> dict[str, Any]:
    """What must agree for results to belong together, as names and text.

    Args:
      settings: the sweep's own that change results: stop rules, whether diverged runs are kept.
      code: modules that results depend on beside those of runs.
    """
    seen: dict[str, Point] = {}
    for point in points:
        seen.setdefault(", ".join(f"{k} = {label(v)}" for k, v in point.shape), point)
    facts: dict[str, Any] = {name: _functions(value) for name, value in settings.items()}
    modules: set[types.ModuleType] = {sys.modules[name] for name in _CORE} | set(code)
    for value in settings.values():
        for part in jax.tree.leaves(value, is_leaf=callable):
            modules |= _modules(part)
    for shape, point in seen.items():
        plan, at = point.run.plan, f" ({shape})" if shape else ""
        facts[f"problem{at}"] = _functions(plan.init, plan.loss, plan.objective, plan.metrics)
        facts[f"optimizer{at}"] = _functions(plan.optimizer)
        facts[f"data{at}"] = _data_hash(point.run)
        if point.gradient is not None:
            fn = point.gradient
            facts[f"objective{at}"] = f"{fn.job.name}: {_functions(fn.job.objective)}"
            facts[f"mode{at}"], facts[f"wrt{at}"] = _functions(fn.mode), str(fn.wrt)
            modules |= _modules(fn.job.objective) | {sys.modules[type(fn.mode).__module__]}
        for name in ("sampler", "record_every", "tolerance"):
            facts[f"{name}{at}"] = str(getattr(plan, name))
        if "steps" not in grid.columns:
            facts[f"steps{at}"] = str(plan.steps)
        if "batch_size" not in grid.columns:
            facts[f"max_batch_size{at}"] = str(plan.slots)
        for part in (plan.init, plan.loss, plan.objective, plan.metrics, plan.optimizer):
            modules |= _modules(part)
    for name in ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable"):
        facts[name] = str(getattr(jax.config, name))
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
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return changed[0] + more


def run_ids(grid: Grid, steps: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
    """A number for every run, (P, S) uint64, by its own point, steps and seed alone."""
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "…" + text[-16:]


def _named(value: Any) -> str:
    """A value of a point as text, 1 and 1.0 alike; of arrays and functions, what is in them."""
    if isinstance(value, Labelled):
        return _functions(value.value)
    if callable(value):
        return _functions(value)
    known = label(value)
    return repr(float(known)) if isinstance(known, int | float) else repr(known)


def _functions(*parts: Any) -> str:
    """What callables and values are, readable, and a fingerprint of all that they are made of."""
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part, 0)
    return f"{'; '.join(plainly(part) for part in parts)} #{digest.hexdigest()[:8]}"


def _feed(digest: Any, value: Any, depth: int) -> None:
    """Feed a value into a fingerprint: code, closures, arrays and fields, not addresses."""

    def feed(*inner: Any) -> None:
        for item in inner:
            _feed(digest, item, depth + 1)

    digest.update(f"|{type(value).__module__}.{type(value).__qualname__}:".encode())
    if depth > 12:
        return
    if isinstance(value, types.FunctionType):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
        _feed_code(digest, value.__code__)
        feed(value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):
                feed(cell.cell_contents)
        if not _has_file(value.__module__):
            known = (value.__globals__.get(name) for name in value.__code__.co_names)
            feed(*(k for k in known if getattr(k, "__module__", None) == value.__module__))
    elif isinstance(value, types.MethodType):
        feed(value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        feed(value.func, value.args, dict(value.keywords))
    elif isinstance(value, type):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            feed(key, value[key])
    elif isinstance(value, list | tuple):
        feed(*value)
    elif dataclasses.is_dataclass(value):
        feed(*(getattr(value, field.name, None) for field in dataclasses.fields(value)))
    else:
        digest.update(plainly(value).encode())
        if type(value).__repr__ is object.__repr__:
            feed(dict(getattr(value, "__dict__", {})))


def _feed_code(digest: Any, code: types.CodeType) -> None:
    digest.update(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _feed_code(digest, constant)
        elif isinstance(constant, frozenset):  # in another order in every process
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(repr(constant).encode())


def _has_file(name: str | None) -> bool:
    """Whether a module's source is hashed as a whole: not a script's or a notebook's own."""
    module = sys.modules.get(name or "")
    return name != "__main__" and bool(getattr(module, "__file__", None))


def _data_hash(run: Any) -> str:
    digest = hashlib.sha256()
    leaves, tree = jax.tree.flatten(run.problem.data)
    digest.update(plainly(tree).encode())
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            raise UserError("the problem's data are traced: call sweep outside of jit and vmap")
        _feed(digest, leaf, 0)
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
    return _has_file(name) and (name.startswith("optjax") or "site-packages" not in file)
