"""The one exception a user's mistake raises."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input, said in one line: the value, what was expected, what to do.

    The command line prints it after ``optjax:`` and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known names closest to `name`.

    >>> nearest("learning_rte", ["learning_rate", "eps"])
    "did you mean 'learning_rate'?"
    >>> nearest("zzz", ["learning_rate", "eps"])
    "known: 'eps', 'learning_rate'"
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(repr(k) for k in known)
