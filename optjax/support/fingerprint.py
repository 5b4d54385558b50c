"""Fingerprints, which tell one computation's results from another's.

A sweep, a tuning and the report's cache are named by their code, their settings, their data and
the versions of the libraries. Functions count by their code, constants and closures, not by their
addresses or line numbers.
"""

import contextlib
import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from optjax.support.files import plainly


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Say how the new facts differ from the old, in one line; None where they do not.

    >>> difference({"steps": "100", "sampler": "full"}, {"steps": "200", "sampler": "full"})
    "steps was '100' and is '200'"
    """
    changed = []
    for name, was in old.items():
        now = new.get(name)
        if was == now:
            continue
        if name.startswith("code of ") and now is not None:  # other changes may follow from it
            changed.insert(0, f"the {name} changed")
        elif name.startswith("code of "):
            changed.append(f"the {name} takes part no more")
        else:
            changed.append(f"{name} was {_short(was)} and is {_short(now)}")
    if not changed:
        return None
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return changed[0] + more


def of(*parts: Any) -> str:
    """Describe callables and values, and take a fingerprint of all their parts."""
    digest = hashlib.sha256()
    for part in parts:
        feed(digest, part)
    return f"{'; '.join(plainly(part) for part in parts)} #{digest.hexdigest()[:8]}"


def feed(digest: Any, value: Any, depth: int = 0) -> None:
    """Feed a value into a fingerprint: code, closures, arrays and fields, not addresses."""

    def deeper(*inner: Any) -> None:
        for item in inner:
            feed(digest, item, depth + 1)

    digest.update(f"|{type(value).__module__}.{type(value).__qualname__}:".encode())
    if depth > 12:
        return
    if isinstance(value, types.FunctionType):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
        if "<" in value.__qualname__ or not _has_file(value.__module__):
            # Functions of one file and name differ in their code alone.
            _feed_code(digest, value.__code__, value.__doc__)
        deeper(value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):
                deeper(cell.cell_contents)
        if not _has_file(value.__module__):
            known = (value.__globals__.get(name) for name in value.__code__.co_names)
            deeper(*(k for k in known if getattr(k, "__module__", None) == value.__module__))
    elif isinstance(value, types.MethodType):
        deeper(value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        deeper(value.func, value.args, dict(value.keywords))
    elif isinstance(value, type):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            deeper(key, value[key])
    elif isinstance(value, list | tuple):
        deeper(*value)
    elif dataclasses.is_dataclass(value):
        deeper(*(getattr(value, field.name, None) for field in dataclasses.fields(value)))
    else:
        digest.update(plainly(value).encode())
        if type(value).__repr__ is object.__repr__:
            deeper(dict(getattr(value, "__dict__", {})))


def _feed_code(digest: Any, code: types.CodeType, doc: str | None = None) -> None:
    """Feed a function's code into a fingerprint, without its docstring and line numbers."""
    digest.update(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _feed_code(digest, constant)
        elif isinstance(constant, frozenset):  # in another order in every process
            digest.update(repr(sorted(map(repr, constant))).encode())
        elif constant is None or constant != doc:
            digest.update(repr(constant).encode())


def _has_file(name: str | None) -> bool:
    """Tell whether a module's source is hashed as a whole: not a script's or a notebook's."""
    module = sys.modules.get(name or "")
    return name != "__main__" and bool(getattr(module, "__file__", None))


def modules_of(part: Any, depth: int = 0) -> set[types.ModuleType]:
    """Return the modules that a callable and its parts come from."""
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
            found |= modules_of(other, depth + 1)
    return found


def _own(name: str) -> bool:
    """Tell whether a module is ours or the user's: no version tells its code."""
    file = getattr(sys.modules[name], "__file__", None) or ""
    return _has_file(name) and (name.startswith("optjax") or "site-packages" not in file)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "…" + text[-16:]
