"""What a tuning is asked for, checked before anything is traced."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from optjax.support.errors import UserError
from optjax.support.types import Better, HParams
from optjax.sweeps.checks import chosen_seeds
from optjax.tuning.space import named_leaves


def spread(value: Any) -> float:
    """Check a finite number that is not negative."""
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"spread is {value!r}: expected a finite number, 0 or more")
    return number


def seeds(value: Any) -> np.ndarray:
    """Return the seeds, (S,) int."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    given: Any = list(value) if several else value
    return np.asarray(chosen_seeds(given))


def names(wrt: Any) -> tuple[str, ...] | None:
    """Return the names to tune; None for all."""
    if wrt is None:
        return None
    chosen = (wrt,) if isinstance(wrt, str) else tuple(wrt) if isinstance(wrt, Iterable) else ()
    if not chosen or not all(isinstance(name, str) for name in chosen):
        raise UserError(f"wrt is {wrt!r}: expected a name, or several")
    return chosen


def constraints_and_progress(constraints: Any, progress: Any) -> None:
    """Check that constraints are a mapping or None, and progress a function or None."""
    if constraints is not None and not isinstance(constraints, Mapping):
        raise UserError(f"constraints is {constraints!r}: expected a dict, name → (low, high)")
    if progress is not None and not callable(progress):
        raise UserError(f"progress is {progress!r}: expected a function (text, fraction)")


def directed(rule: Any, better: Better) -> Any:
    """Return a stop rule for which the same is better as for the tuning.

    Raises:
      UserError: the rule says high, the tuning low.
    """
    own = getattr(rule, "better", better)
    if own == "high" != better:
        raise UserError(f"{rule.name} has better='high', the tuning 'low': give tune better='high'")
    return rule if own == better else dataclasses.replace(rule, better=better)


_COLUMNS = frozenset("value finite diverged gradient_norm value_error restart outer_step".split())
"""Names of a tuning's own in its path."""


def columns(theta: HParams) -> None:
    """Refuse hyperparameters with the name of a column or an axis of the path."""
    leaves = named_leaves(theta)
    own = {axis for name, leaf in leaves.items() for axis in axes(name, np.ndim(leaf))}
    for name in sorted(leaves.keys() & (_COLUMNS | own)):
        raise UserError(
            f"a hyperparameter is named {name!r}, which the path has already: rename it"
        )


def axes(name: str, count: int) -> list[str]:
    """Name the own axes of a hyperparameter in the path."""
    return [f"{name}_{i}" if i else f"{name}_index" for i in range(count)]


def outer_optimizer(outer: Any, u: HParams) -> None:
    """Check that it is an optimiser, and that it takes a step from a gradient and a point."""
    if not isinstance(outer, optax.GradientTransformation):
        given = f"the function {outer.__name__}" if hasattr(outer, "__name__") else repr(outer)
        raise UserError(
            f"outer is {given}: expected an optimiser of optax, optax.adam(0.1) and not optax.adam"
        )

    def step(u: HParams) -> Any:
        return outer.update(u, outer.init(u), u)

    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            jax.eval_shape(step, u)
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"outer takes no step from a gradient and a point alone ({said[:100]}): expected one "
            "that does, as optax.adam(0.1)"
        ) from None
