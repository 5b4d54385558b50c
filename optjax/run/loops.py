"""The loop over steps and records, whatever a step is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optjax.support.types import Array, PyTree

Loop = Callable[..., tuple[Any, Any]]
"""`jax.lax.scan`, or a loop (body, carry, xs, length=…) of equal values and another derivative."""


def counted(body: Any, carry: PyTree, xs: None, length: Array) -> tuple[PyTree, Array]:
    """Loop a traced number of times, without inputs; a `Loop` that returns one output.

    It is the mean of the outputs that are finite; NaN if none is.
    """
    kind = jax.eval_shape(body, carry, xs)[1]
    # A sum over many steps loses too much in half precision.
    wide = widened(kind.dtype)

    def one(_: Array, all_of: tuple[PyTree, Array, Array]) -> tuple[PyTree, Array, Array]:
        carry, total, count = all_of
        carry, y = body(carry, None)
        good = jnp.isfinite(y)
        return carry, total + jnp.where(good, y.astype(wide), 0), count + good.astype(wide)

    zero = jnp.zeros((), wide)
    carry, total, count = jax.lax.fori_loop(0, length, one, (carry, zero, zero))
    return carry, (total / count).astype(kind.dtype)[None]


def widened(dtype: Any) -> Any:
    """Return a dtype to add and compare in: at least float32.

    >>> str(widened(jnp.dtype("bfloat16"))), str(widened(jnp.dtype("float64")))
    ('float32', 'float64')
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return jax.dtypes.canonicalize_dtype(float)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def walk(
    steps: Any,
    every: Any,
    one: Callable[..., tuple[Any, Any]],
    recorded: Callable[..., Any],
    state: Any,
    rows: PyTree = None,
    loop: Loop = jax.lax.scan,
) -> tuple[Any, Any]:
    """Loop over steps; return the state after them, and their stacked records.

    Args:
      steps: number of steps.
      every: k, steps from record to record; may be traced if it is `steps`, and `loop` takes that.
      one: (state, row) → (state, loss).
      recorded: (state, losses) → a record.
      state: the state to start from.
      rows: leaves (steps, ...), one row a step.
      loop: over steps, and over records.
    """

    def several(state: Any, rows: PyTree) -> tuple[Any, Any]:
        if isinstance(every, int) and every == 1:
            state, losses = one(state, jax.tree.map(lambda row: row[0], rows))
        else:
            state, losses = loop(one, state, rows, length=every)
        return state, recorded(state, losses)

    if steps is every or steps == every:
        # One record: a loop of one would only hide it from the compiler.
        state, record = several(state, rows)
        return state, jax.tree.map(lambda a: a[None], record)
    cut = jax.tree.map(lambda a: a.reshape(steps // every, every, *a.shape[1:]), rows)
    if loop is not jax.lax.scan and every > 1:
        # A loop that stores little must not store the residuals of a whole record's steps.
        several = jax.checkpoint(several, prevent_cse=False)
    return loop(several, state, cut, length=steps // every)
