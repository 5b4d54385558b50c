"""The three convolutions of a trilinear form on accelerators, for one run and for many.

For one run, each is one `jax.lax` convolution. For many runs, each with a kernel of its own, there
are three ways, of which `choice` takes the fastest:

- "one by one": a loop over the runs;
- "grouped": one convolution with a group for each run, as `jax.vmap` gives;
- "product": a copy of the pixels that each output sees, and one batched matrix product, which
  suits tensor cores.

There are R runs, N = B·OH·OW outputs of a run, and κ taps of the kernel.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from optjax.convnets.window import LAYOUT, Window
from optjax.support.types import Array

Way = Literal["one by one", "grouped", "product"]

_FEW = 128
"""Terms of an output up to which all taps are copied at once: a narrower product is slow."""


def conv(x: Array, w: Array, *, window: Window) -> Array:
    """Convolve x by w."""
    return lax.conv_general_dilated(x, w, window.stride, window.padding, dimension_numbers=LAYOUT)


def to_input(y: Array, w: Array, *, window: Window) -> Array:
    """Convolve y, with zeros between its pixels, by the reversed kernel.

    XLA hands this form to cuDNN and MIOpen as a gradient by the input, and to a TPU's own emitter;
    none multiplies the zeros.
    """
    edges = [
        (k - 1 - before, n + before - (o - 1) * s - 1)
        for n, k, s, (before, _), o in zip(*window[:4], window.out, strict=True)
    ]
    return lax.conv_general_dilated(
        y,
        jnp.flip(w, (0, 1)).swapaxes(2, 3),
        (1, 1),
        edges,
        lhs_dilation=window.stride,
        dimension_numbers=LAYOUT,
    )


def to_kernel(x: Array, y: Array, *, window: Window) -> Array:
    """Apply the transpose of w ↦ conv(x, w) to y."""
    kernel = jax.ShapeDtypeStruct((*window.kernel, x.shape[-1], y.shape[-1]), x.dtype)
    (grad,) = jax.linear_transpose(lambda w: conv(x, w, window=window), kernel)(y)
    return grad


def _cuts(window: Window, channels: int) -> Iterator[slice]:
    """Yield rows of the kernel to copy at once: one, a copy of kw times x, or all if narrow."""
    kh, kw = window.kernel
    rows = kh if kh * kw * channels <= _FEW else 1
    return (slice(i, i + rows) for i in range(0, kh, rows))


def _taps(x: Array, window: Window, rows: slice) -> Array:
    """Copy the pixels under some rows of the kernel, (R, B, H, W, C) → (R, N, κ·C)."""
    (sh, sw), (oh, ow) = window.stride, window.out
    x = jnp.pad(x, ((0, 0), (0, 0), *window.padding, (0, 0)))
    views = [
        x[:, :, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw]
        for i in range(rows.start, rows.stop)
        for j in range(window.kernel[1])
    ]
    taps = jnp.concatenate(views, axis=-1)
    return taps.reshape(x.shape[0], -1, taps.shape[-1])


def _product(a: Array, b: Array, terms: str) -> Array:
    """Multiply batches of matrices, with sums in float32 at least."""
    exact = a.dtype if a.dtype.itemsize >= 4 else jnp.float32
    return jnp.einsum(terms, a, b, preferred_element_type=exact)


def _conv_product(x: Array, w: Array, *, window: Window) -> Array:
    R, B, F = x.shape[0], x.shape[1], w.shape[-1]
    parts = [
        _product(_taps(x, window, rows), w[:, rows].reshape(R, -1, F), "rnk,rkf->rnf")
        for rows in _cuts(window, x.shape[-1])
    ]
    return sum(parts[1:], parts[0]).reshape(R, B, *window.out, F).astype(x.dtype)


def _to_input_product(y: Array, w: Array, *, window: Window) -> Array:
    """Multiply y by all taps, and add up where the taps fall: no inserted zero is multiplied."""
    R, B, C, F = y.shape[0], y.shape[1], w.shape[3], y.shape[-1]
    y_RxNxF, total = y.reshape(R, -1, F), None
    for rows in _cuts(window, C):
        taps = _product(y_RxNxF, w[:, rows].reshape(R, -1, F), "rnf,rkf->rnk")
        x = jax.ShapeDtypeStruct((R, B, *window.size, C), taps.dtype)
        (part,) = jax.linear_transpose(partial(_taps, window=window, rows=rows), x)(taps)
        total = part if total is None else total + part
    assert total is not None
    return total.astype(y.dtype)


def _to_kernel_product(x: Array, y: Array, *, window: Window) -> Array:
    R, C, F = x.shape[0], x.shape[-1], y.shape[-1]
    y_RxNxF = y.reshape(R, -1, F)
    parts = [_product(_taps(x, window, rows), y_RxNxF, "rnk,rnf->rkf") for rows in _cuts(window, C)]
    return jnp.concatenate(parts, axis=1).reshape(R, *window.kernel, C, F).astype(x.dtype)


FORMS = {"conv": conv, "conv_to_input": to_input, "conv_to_kernel": to_kernel}
"""Each primitive as one `jax.lax` convolution: (a, b, window=...) → result."""

_PRODUCTS = {
    "conv": _conv_product,
    "conv_to_input": _to_input_product,
    "conv_to_kernel": _to_kernel_product,
}


def of_runs(name: str, way: Way, window: Window) -> Callable[[Array, Array], Array]:
    """Return a primitive over many runs in one of the ways; both arguments are (R, ...)."""
    if way == "product":
        return partial(_PRODUCTS[name], window=window)
    one = partial(FORMS[name], window=window)
    return jax.vmap(one) if way == "grouped" else lambda a, b: lax.map(lambda ab: one(*ab), (a, b))
