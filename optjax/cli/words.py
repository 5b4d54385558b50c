"""The words of a command line, taken apart: what each option was given, and of what type."""

import contextlib
import importlib
import io
import math
import re
import signal
import sys
import types
import typing
from typing import Any

from optjax.support.errors import UserError

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def grouped(words: list[str]) -> dict[str, list[str]]:
    """Group the words by flag; a flag's underscores and hyphens are the same.

    >>> grouped(["--rate", "0.1", "--batch-size=8"])
    {'rate': ['0.1'], 'batch_size': ['8']}
    """
    groups: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            if name in groups:
                raise UserError(f"--{flag} is given twice")
            groups[name] = [value] if equals else []
        elif name is None:
            raise UserError(f"unexpected {word!r}; fields are given as --field value")
        else:
            groups[name].append(word)
    return groups


def one(groups: dict[str, list[str]], name: str, default: str | None = None) -> str:
    """Take the one value of an option, or its default.

    Raises:
        UserError: no value or several.
    """
    words = groups.pop(name, [] if default is None else [default])
    if len(words) != 1 or not words[0]:
        raise UserError(f"--{flag(name)} takes one value, got {' '.join(words) or 'none'!r}")
    return words[0]


def number(groups: dict[str, list[str]], name: str, default: str | None = None) -> int:
    """Take the one value of an option as a whole number."""
    return whole(name, one(groups, name, default))


def whole(name: str, word: str) -> int:
    """Parse a word as a whole number.

    >>> whole("batch", "32")
    32
    """
    if not re.fullmatch(r"\d{1,9}", word):
        raise UserError(f"--{flag(name)} is {word!r}: expected a whole number from 0 to 999999999")
    return int(word)


def real(
    groups: dict[str, list[str]], name: str, default: str, least: float, most: float = math.inf
) -> float:
    """Take the one value of an option as a finite number from `least` to `most`."""
    word = one(groups, name, default)
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and least <= value <= most):
        span = f"of at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise UserError(f"--{flag(name)} is {word!r}: expected a number {span}")
    return value


def switch(groups: dict[str, list[str]], name: str) -> bool:
    """Take an option that has no value, and tell whether it was given."""
    if words := groups.get(name):
        raise UserError(f"--{flag(name)} takes no value, got {' '.join(words)!r}")
    return groups.pop(name, None) is not None


def typed(name: str, kind: Any, words: list[str]) -> Any:
    """Parse the words of an option as a value of its type.

    Raises:
        UserError: they are none.

    >>> typed("rate", float, ["1e-3"]), typed("quick", bool, ["no"])
    (0.001, False)
    """
    if kind is bool:
        text = " ".join(words).lower()
        if text and text not in _BOOLEANS:
            raise _bad(name, kind, words)
        return _BOOLEANS.get(text, True)
    if typing.get_origin(kind) is tuple and len(words) == 1 and "," in words[0]:
        words = [word for word in words[0].split(",") if word]
    if kind is str and len(words) == 1:
        return words[0]
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            value = tyro.cli(kind, args=words)
    except SystemExit:
        raise _bad(name, kind, words) from None
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
            raise _bad(name, kind, words)
    return value


def _bad(name: str, kind: Any, words: list[str]) -> UserError:
    got = repr(" ".join(words)) if words else "no value"
    return UserError(f"--{flag(name)} got {got}, expected {described(kind)}")


_KINDS = {int: "whole number", float: "finite number", str: "word"}


def described(kind: Any) -> str:
    """Describe a type as a person would.

    >>> described(int), described(tuple[float, ...]), described(int | None)
    ('a whole number', 'finite numbers, by commas', 'a whole number')
    """
    parts = [part for part in typing.get_args(kind) if part not in (Ellipsis, types.NoneType)]
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if typing.get_origin(kind) is tuple:
        count = "" if ... in typing.get_args(kind) else f"{len(parts)} "
        return f"{count}{_KINDS.get(parts[0], 'value')}s, by commas"
    if parts:
        return " or ".join(map(described, parts))
    return "true or false" if kind is bool else f"a {_KINDS.get(kind, 'value')}"


def flag(name: str) -> str:
    """Spell a field's name as it is typed."""
    return name.replace("_", "-")


def module_of(what: str, name: str) -> tuple[types.ModuleType, str]:
    """Import the module of package.module:attribute; return it with the attribute's name.

    The working directory is searched, too.

    Raises:
      UserError: it does not import; `what` says what was named.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(module_name), attribute
    except (Exception, SystemExit) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"{what} {name!r}: {module_name} does not import ({type(error).__name__}: {line})"
        ) from None


def interrupted(error: KeyboardInterrupt) -> int:
    """Return the exit status of an interruption: 128 and the signal's number, by default SIGINT's.

    >>> interrupted(KeyboardInterrupt()), interrupted(KeyboardInterrupt(15))
    (130, 143)
    """
    number = error.args[0] if error.args else None
    return 128 + (number if isinstance(number, int) else signal.SIGINT)
