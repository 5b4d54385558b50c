"""What the device can do at most: bytes copied and matrix products, measured."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optjax.support.types import Array

from .measure import Entry, Side, seconds

PRECISIONS: dict[str, tuple[Any, str | None]] = {
    "float32": (jnp.float32, "highest"),
    "float32, default precision": (jnp.float32, None),  # tf32 on an NVIDIA GPU
    "bfloat16": (jnp.bfloat16, None),
}


class LimitSizes(NamedTuple):
    """Bytes that are copied, the side of the matrices, seconds of a measurement."""

    copied: int = 1 << 30  # many times what a cache holds
    side: int = 8192
    seconds: float = 0.2


CPU = LimitSizes(copied=1 << 28, side=1024)
QUICK = LimitSizes(copied=1 << 20, side=64, seconds=0.01)


def entries(sizes: LimitSizes) -> list[Entry]:
    """The copy bandwidth and the matrix peaks."""
    return [
        Entry(
            "limits/copy",
            f"{sizes.copied >> 20} MiB read, negated and written in place",
            "GB/s",
            None,
            lambda _: [_copy(sizes)],
            cost=lambda: 5 * sizes.seconds,
        ),
        Entry(
            "limits/matrix",
            f"a product of two matrices of {sizes.side} × {sizes.side}, normal numbers",
            "TFLOP/s",
            None,
            lambda _: [product(sizes, name) for name in PRECISIONS],
            cost=lambda: 15 * sizes.seconds,
        ),
    ]


def _copy(sizes: LimitSizes) -> Side:
    x = jax.random.normal(jax.random.key(0), (sizes.copied // 4,), jnp.float32)
    # In place: fresh pages of memory would cost the CPU more than writing them.
    negative = jax.jit(jnp.negative, donate_argnums=0)

    def call() -> Array:
        nonlocal x
        x = negative(x)
        return x

    return _rate("copy", call, 2 * x.nbytes / 1e9, sizes.seconds)


def product(sizes: LimitSizes, name: str) -> Side:
    """TFLOP/s of a large matrix product in one of the `PRECISIONS`."""
    dtype, precision = PRECISIONS[name]
    shape = (2, sizes.side, sizes.side)
    a, b = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
    return _rate(name, lambda: product(a, b), 2 * sizes.side**3 / 1e12, sizes.seconds)


def _rate(name: str, call: Callable[[], Array], amount: float, least: float) -> Side:
    """A side that does `amount` in each of many queued calls, and measures how much a second."""
    seconds(call)
    count = max(1, math.ceil(least / seconds(call)))

    def calls() -> Array:
        out = call()
        for _ in range(count - 1):
            out = call()  # the one before is dropped: all of them would not fit
        return out

    seconds(calls)
    return Side(name, lambda: amount * count / seconds(calls))
