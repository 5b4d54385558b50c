"""The exception for a user's mistake, and checks that raise it."""

import difflib
import operator
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in the input, in one line: the value, the expected one, the remedy.

    The command line prints it after ``optjax:`` and exits with status 2.
    """


_USUAL = {
    "lr": "learning_rate", "eta": "learning_rate", "step_size": "learning_rate",
    "bs": "batch_size", "batch": "batch_size", "wd": "weight_decay", "l2_penalty": "l2",
    "beta1": "b1", "beta2": "b2", "betas": "b1", "epsilon": "eps", "epochs": "steps",
}  # fmt: skip
"""What others call what we call otherwise."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known names closest to `name`.

    >>> nearest("learning_rte", ["learning_rate", "eps"])
    "did you mean 'learning_rate'?"
    >>> nearest("lr", ["learning_rate", "eps"])
    "did you mean 'learning_rate'?"
    >>> nearest("zzz", ["learning_rate", "eps"])
    "known: 'eps', 'learning_rate'"
    """
    known = sorted(set(known))
    usual = _USUAL.get(str(name).lower().replace("-", "_"), "")
    if usual and (usual in known or usual.replace("_", "-") in known):
        return f"did you mean {usual if usual in known else usual.replace('_', '-')!r}?"
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(repr(k) for k in known)


def sign_of(better: Any) -> int:
    """Return 1 where a low value is better, −1 where a high one is.

    Raises:
      UserError: another word.

    >>> sign_of("high")
    -1
    """
    if better not in ("low", "high"):
        raise UserError(f"better is {better!r}: expected 'low' or 'high'")
    return 1 if better == "low" else -1


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


def one_line(error: BaseException) -> str:
    """Return an exception's text on one line of at most 200 characters, or its type's name."""
    return " ".join(str(error).split())[:200] or type(error).__name__
