"""One sweep in many processes (`jax.distributed`): the first decides and writes, all compute."""

from typing import Any

import jax
import numpy as np

from optjax.support.types import PyTree


def agreed(*values: float) -> list[int]:
    """Whole numbers as process 0 has them: all processes must send off the same programs."""
    if jax.process_count() == 1:
        return [int(value) for value in values]
    from jax.experimental import multihost_utils

    told: Any = multihost_utils.broadcast_one_to_all(np.array(values, np.int64))
    return told.tolist()


def fetch(tree: PyTree) -> PyTree:
    """Arrays of the devices on the host; in every process all of them."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(
        lambda a: np.asarray(multihost_utils.process_allgather(a, tiled=True)), tree
    )
