"""The exception for a user's mistake, and checks that raise it."""

import difflib
import operator
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in the input, in one line: the value, the expected one, the remedy.

    The command line prints it after ``optjax:`` and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known names closest to `name`.

    >>> nearest("learning_rte", ["learning_rate", "eps"])
    "did you mean 'learning_rate'?"
    >>> nearest("zzz", ["learning_rate", "eps"])
    "known: 'eps', 'learning_rate'"
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(repr(k) for k in known)


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number of at least `least`, Python's or NumPy's, as an int.

    Raises:
      UserError: the value is no such number.

    >>> whole("steps", 3, 1)
    3
    """
    try:
        number = operator.index(value)
        # A flag is not a number; operator.index refuses NumPy's alone.
        if not isinstance(value, bool) and number >= least:
            return number
    except TypeError:
        pass
    raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")
