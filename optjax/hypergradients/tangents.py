"""Values and their tangents, pushed through functions: one linearisation, many tangents.

`vmap(jvp)` gives every array of a run a batch axis, and its products another layout; a few
tangents go faster one by one, through the linear map that one linearisation of a step gives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optjax.support.types import Array, PyTree


class Dual(NamedTuple):
    """A tree, and tangents for its floating leaves."""

    value: PyTree
    tangents: tuple[list[Array], ...]  # one list a tangent, in the order of the floating leaves


def push(function: Callable[..., PyTree], *duals: Dual) -> Dual:
    """Push values and tangents through a function, linearised once.

    >>> x = Dual({"x": jnp.array(3.0)}, ([jnp.array(1.0)], [jnp.array(2.0)]))
    >>> y = push(lambda d: d["x"] ** 2, x)
    >>> float(y.value), [float(t) for (t,) in y.tangents]
    (9.0, [6.0, 12.0])
    """
    leaves, structure = jax.tree.flatten([dual.value for dual in duals])
    floating, others = _floating(leaves)
    made: list[Any] = []

    def real(floating: list[Array]) -> tuple[list[Array], list[Any]]:
        result = function(*jax.tree.unflatten(structure, _merged(floating, others)))
        out, out_structure = jax.tree.flatten(result)
        made.append(out_structure)
        return _floating(out)

    value, slope, rest = jax.linearize(real, floating, has_aux=True)
    tangents = zip(*(dual.tangents for dual in duals), strict=True)
    moved = tuple(slope([t for part in parts for t in part]) for parts in tangents)
    return Dual(jax.tree.unflatten(made[-1], _merged(value, rest)), moved)


def _floating(leaves: list[Any]) -> tuple[list[Array], list[Any]]:
    """Split off the floating leaves; leave None in their places."""
    floats = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in leaves]
    return (
        [jnp.asarray(leaf) for leaf, yes in zip(leaves, floats, strict=True) if yes],
        [None if yes else leaf for leaf, yes in zip(leaves, floats, strict=True)],
    )


def _merged(floating: list[Array], others: list[Any]) -> list[Any]:
    rest = iter(floating)
    return [next(rest) if leaf is None else leaf for leaf in others]
