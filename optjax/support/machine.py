"""The machine: its cores, its free memory, and concurrent calls of small programs."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")
_MOST = 8  # threads: each holds the memory of a call


def cores() -> int:
    """Return the number of cores that this process may use.

    >>> cores() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(device: Any = None) -> float:
    """Return the free bytes of a device, by default of the CPU.

    >>> free_memory() > 0
    True
    """
    stats = device.memory_stats() if device is not None and device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    import psutil

    return psutil.virtual_memory().available


def threads() -> int:
    """Return the number of calls to make at once: one on an accelerator, which one call fills."""
    import jax

    return 1 if jax.default_backend() != "cpu" else min(cores(), _MOST)


def concurrent_map(call: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Call a function on all items, a thread a core, with the caller's setting of float64.

    XLA runs a loop of small arrays on one core: many such calls keep all of them busy.

    >>> concurrent_map(lambda x: x + 1, [1, 2, 3])
    [2, 3, 4]
    """
    import jax
    import jax.numpy as jnp

    double = jnp.result_type(float) == jnp.float64

    def one(item: A) -> B:
        with jax.enable_x64(double):  # a thread has a setting of its own
            return call(item)

    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(one, items))


def hasty_options(haste: int = 2) -> dict[str, Any]:
    """Return options of XLA's CPU compiler for programs that take less time than compiling them.

    Args:
      haste: 0, none; 1, LLVM's level 1: half the time; 2, no fusion emitters either: a quarter of
        the time, and programs that may run a fifth slower. A user's own XLA_FLAGS stand.
    """
    options: dict[str, Any] = {}
    if haste >= 1:
        options["xla_backend_optimization_level"] = 1
    if haste >= 2:
        options["xla_cpu_parallel_codegen_split_count"] = 1
        if metadata.version("jax").startswith("0.10."):  # jax 0.12 has no other emitters
            options["xla_cpu_use_fusion_emitters"] = False
    given = os.environ.get("XLA_FLAGS", "")
    return {option: value for option, value in options.items() if option not in given}


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with little effort, as serves a program that is called once."""
    import jax

    options = hasty_options() if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)
