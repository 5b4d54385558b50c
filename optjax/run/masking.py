"""Whether a loss counts only the slots of a batch that its mask counts.

A batch of b examples may have more slots than examples. A loss that takes a plain mean then counts
padding, and ignores the batch size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optjax.run import core
from optjax.run.batching import Batch
from optjax.run.core import Plan
from optjax.run.problems import Data
from optjax.support.errors import UserError
from optjax.support.keys import make_key
from optjax.support.machine import quick_jit
from optjax.support.types import HParams, Key, PyTree

_SLOTS = 4


def check(plan: Plan, data: Data, hparams: HParams) -> None:
    """Check that a run's loss counts no padding, where its batches have some.

    The loss is evaluated twice at the first parameters, with one example that counts and other
    padding: neither it nor the model's state may change. A loss whose attribute ``masks`` is True
    is trusted; where it is "traced", the loss refuses itself.

    Args:
      plan: of the run. data: its data; where they are traced, nothing is checked.
      hparams: checked, as they enter the program; tracers count as 1.

    Raises:
      UserError: it does, or refuses a mask itself.
    """
    epochs = plan.sampler in ("epochs", "shuffle_once")
    padded = "batch_size" in hparams or (epochs and plan.n % max(plan.slots, 1) != 0)
    known = getattr(plan.loss, "masks", None) is True
    if known or not padded or min(plan.n, plan.slots) < 2 or _traced(data):
        return
    leaves, structure = jax.tree.flatten((data, dict(hparams)))
    kinds = tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)
    seen = plan.init, plan.loss, min(plan.slots, _SLOTS), structure, kinds
    if seen not in _SEEN:
        if len(_SEEN) >= 256:
            _SEEN.clear()
        _SEEN[seen] = _refusal(plan, data, hparams)
    why = _SEEN[seen]
    if why is not None:
        raise UserError(why)


_SEEN: dict[Any, str | None] = {}


def _traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _refusal(plan: Plan, data: Data, hparams: HParams) -> str | None:
    slots = min(plan.n, plan.slots, _SLOTS)
    spread = np.linspace(0, plan.n - 1, slots).astype(int)
    hparams = jax.tree.map(lambda v: np.ones(v.shape) if isinstance(v, Tracer) else v, hparams)

    def look(which: Any, key: Key) -> tuple[Any, PyTree]:
        params, state = plan.init(key, data)
        numbers = core.hparams_at(plan, hparams, params, jnp.zeros((), jnp.int32))
        if "batch_size" in numbers:
            numbers["batch_size"] = jnp.ones((), jnp.int32)
        examples = jax.tree.map(lambda a: jnp.asarray(a)[which], data.examples)
        weights = numbers.get("example_weights")
        batch = Batch(
            examples,
            jnp.arange(slots) < 1,
            key,
            data.shared,
            None if weights is None else weights[which],
        )
        return plan.loss(params, state, batch, numbers)

    try:
        if getattr(plan.loss, "masks", None) == "traced":
            jax.eval_shape(look, spread, make_key(0))
            return None
        with jax.ensure_compile_time_eval():
            key = make_key(0)
            compiled = quick_jit(look)
            found = [
                jax.tree.map(np.asarray, compiled(which, key)) for which in (spread, 0 * spread)
            ]
    except UserError as error:
        return str(error)
    same = functools.partial(np.allclose, rtol=1e-4, atol=1e-30)
    pairs = zip(*map(jax.tree.leaves, found), strict=True)
    if all(same(a, b) for a, b in pairs if np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    return (
        "the problem's loss changes with the padding of a batch, so it would ignore batch_size: "
        "average by oj.masked_mean(values, batch.mask, batch.weights), not by jnp.mean"
    )
