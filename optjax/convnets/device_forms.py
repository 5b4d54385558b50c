"""The three convolutions of a trilinear form on accelerators: each one `jax.lax` convolution."""

import jax
import jax.numpy as jnp
from jax import lax

from optjax.convnets.window import LAYOUT, Window
from optjax.types import Array


def conv(x: Array, w: Array, *, window: Window) -> Array:
    return lax.conv_general_dilated(x, w, window.stride, window.padding, dimension_numbers=LAYOUT)


def to_input(y: Array, w: Array, *, window: Window) -> Array:
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
    kernel = jax.ShapeDtypeStruct((*window.kernel, x.shape[-1], y.shape[-1]), x.dtype)
    (grad,) = jax.linear_transpose(lambda w: conv(x, w, window=window), kernel)(y)
    return grad


FORMS = {"conv": conv, "conv_to_input": to_input, "conv_to_kernel": to_kernel}
"""Each primitive as the one `jax.lax` convolution that it is: (a, b, window=...) → result."""
