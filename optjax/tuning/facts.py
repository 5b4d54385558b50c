"""What makes two tunings the same tuning: all that the path depends on, as names and text."""

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from optjax.hypergradients.hypergradient import HypergradFn
from optjax.support.files import plainly
from optjax.support.types import HParams
from optjax.sweeps.buckets import Point
from optjax.sweeps.grid import Grid
from optjax.sweeps.identity import difference, identity
from optjax.tuning.space import named_leaves


def described(what: str, hparams: HParams) -> dict[str, str]:
    """Hyperparameters in short: numbers as they are, arrays by shape and fingerprint.

    >>> described("start of ", {"learning_rate": np.array(0.1)})["start of learning_rate"]
    '0.1'
    """
    found = {f"{what}{name}": _value(leaf) for name, leaf in named_leaves(hparams).items()}
    # A schedule's kind is no array of it.
    return found | {f"{what}all": _cut(plainly(jax.tree.structure(dict(hparams))))}


def everything(
    gradient: HypergradFn, outer: optax.GradientTransformation, rule: Any
) -> dict[str, str]:
    """The problem, its data, the run, what is tuned for, both optimisers, and the code of all."""
    run = gradient.run
    made_of = {"what of computes": gradient.job.of, "outer": outer, "mode": gradient.mode}
    found = identity([Point(run, (), {}, run.plan.steps)], Grid({}, {}), {**made_of, "rule": rule})
    # Functions of one file and name differ in their code alone.
    own = ("init", "loss", "objective", "metrics", "optimizer")
    parts = made_of | {name: getattr(run.plan, name) for name in own}
    return found | {f"code of {name}": _code(part) for name, part in parts.items()}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing that differs, and how many more do; None where nothing does.

    >>> changed({"steps": "9", "seed": "0"}, {"steps": "8", "seed": "1"})
    "steps was '9' and is '8' (and 1 more)"
    """
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if not names:
        return None
    first = names[0]
    said = difference({first: before.get(first)}, {first: now.get(first)})
    return f"{said} (and {len(names) - 1} more)" if len(names) > 1 else said


def _value(leaf: Any) -> str:
    array = np.asarray(leaf)
    if array.ndim == 0:
        return repr(array.item())
    return f"{array.dtype} {array.shape} #{hashlib.sha256(array.tobytes()).hexdigest()[:8]}"


def _cut(text: str) -> str:
    if len(text) <= 60:
        return text
    return f"{text[:40]}… #{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _code(part: Any) -> str:
    digest = hashlib.sha256()
    for code in _codes(part, 0):
        digest.update(code.co_code + repr(code.co_names).encode())
        for constant in code.co_consts:
            if isinstance(constant, frozenset):  # in another order in every process
                constant = sorted(constant, key=repr)
            if not isinstance(constant, types.CodeType):
                digest.update(repr(constant).encode())
    return digest.hexdigest()[:16]


def _codes(part: Any, depth: int) -> Iterator[types.CodeType]:
    """Of a function, of those it encloses, and of those it is made of."""
    if depth > 8:
        return
    inner: list[Any] = []
    if isinstance(part, types.CodeType):
        yield part
        inner = [c for c in part.co_consts if isinstance(c, types.CodeType)]
    elif isinstance(part, types.FunctionType):
        cells = [cell.cell_contents for cell in part.__closure__ or () if _full(cell)]
        inner = [part.__code__, *cells]
    elif isinstance(part, functools.partial):
        inner = [part.func, *part.args, *part.keywords.values()]
    elif isinstance(part, list | tuple):
        inner = list(part)
    elif hasattr(part, "__wrapped__"):
        inner = [part.__wrapped__]
    for other in inner:
        yield from _codes(other, depth + 1)


def _full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
