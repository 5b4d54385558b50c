"""One sweep in many processes (`jax.distributed`): all compute, the first writes."""

import os
from typing import Any

import jax
import numpy as np

from optjax.support.errors import UserError
from optjax.support.types import PyTree

HEARTBEAT = 20
"""Seconds without a sign of life, after which a process counts as dead and the others end."""


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the processes of a sweep, before anything is computed.

    Args:
      coordinator: host:port of the first process. processes: how many there are.
      process: which of them this is, from 0. What is not given is read from
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or is found by JAX: under
        Slurm, Open MPI and Kubernetes, and on TPU pods.

    Raises:
      UserError: something is neither given nor found, or the others do not answer.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            _known(processes, "JAX_NUM_PROCESSES"),
            _known(process, "JAX_PROCESS_ID"),
            initialization_timeout=3 * HEARTBEAT,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({' '.join(str(error).split())[:200]}): give "
            "--coordinator HOST:PORT, --processes N and --process I, the same port and count to all"
        ) from None


def _known(given: int | None, name: str) -> int | None:
    """Take what was given, or what the environment says."""
    return int(os.environ[name]) if given is None and name in os.environ else given


def agreed(*values: float) -> list[int]:
    """Whole numbers, of each the largest of any process: all must send off the same programs."""
    if jax.process_count() == 1:
        return [int(value) for value in values]
    from jax.experimental import multihost_utils

    told: Any = multihost_utils.process_allgather(np.array(values, np.int64))
    return np.max(told, axis=0).tolist()


def fetch(tree: PyTree) -> PyTree:
    """Arrays of the devices on the host; in every process all of them."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(
        lambda a: np.asarray(multihost_utils.process_allgather(a, tiled=True)), tree
    )
