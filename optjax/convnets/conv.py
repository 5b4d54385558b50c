"""Convolution as one trilinear form, fast inside a scan.

.. math:: T(x, w, y) = Σ_{b,o,κ,c,f} x[b, s·o + κ − p, c] · w[κ, c, f] · y[b, o, f]

A convolution, its gradient by the input (which is also the transposed convolution) and its
gradient by the kernel are the three ways to leave one argument of T open. Each is a JAX primitive,
bilinear in the two others, and each is the transpose of the rest, so the set is closed under
`grad`, `jvp` and `vmap` to any order.

Why not `jax.lax` alone: on the CPU, XLA turns a convolution into a fast matrix product only in the
layout NHWC × HWIO; the two gradients that autodiff builds have other layouts, and inside a scan
they fall to a plain loop (jax issue 12868). Under `vmap` over kernels they become grouped
convolutions whose cost grows with the square of the number of runs (jax issues 13800, 26568).
Here every program is written in the layout that is fast, and runs are mapped one by one on the
CPU. On other platforms a run's primitives are `jax.lax` convolutions, and `choice` picks the way
for many runs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from optjax.convnets import choice, cpu_forms, device_forms
from optjax.convnets.window import Window
from optjax.support.types import Array


def conv(x: Array, w: Array, window: Window) -> Array:
    """Convolve, y[b, o, f] = Σ_{κ,c} x[b, s·o + κ − p, c] w[κ, c, f], zeros outside the picture.

    Args:
      x: (B, H, W, C).
      w: (kh, kw, C, F).
      window: the sizes.

    Returns:
      (B, *window.out, F).

    >>> import jax.numpy as jnp
    >>> window = Window(size=(4, 4), kernel=(3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
    >>> conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), window)[0, :, :, 0].tolist()
    [[4.0, 6.0], [6.0, 9.0]]
    """
    return _conv.bind(x, w, window=window, runs=False)


def conv_transpose(y: Array, w: Array, window: Window) -> Array:
    """Apply the adjoint of `conv`, x[b, i, c] = Σ_{κ,o: s·o + κ − p = i} Σ_f y[b, o, f] w[κ, c, f].

    No inserted zero is multiplied: each of the s² phases of the output is a small dense
    convolution.

    Args:
      y: (B, *window.out, F), the small picture.
      w: (kh, kw, C, F), C channels come out.
      window: of the convolution that leads back from the large picture to the small one.

    Returns:
      (B, *window.size, C).

    >>> import jax.numpy as jnp
    >>> window = Window(size=(4, 4), kernel=(3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
    >>> conv_transpose(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)), window)[0, 0, :, 0].tolist()
    [1.0, 2.0, 1.0, 1.0]
    """
    return _to_input.bind(y, w, window=window, runs=False)


def _shape_conv(x: Any, w: Any, window: Window) -> tuple[int, ...]:
    return (x.shape[0], *window.out, w.shape[3])


def _shape_to_input(y: Any, w: Any, window: Window) -> tuple[int, ...]:
    return (y.shape[0], *window.size, w.shape[2])


def _shape_to_kernel(x: Any, y: Any, window: Window) -> tuple[int, ...]:
    return (*window.kernel, x.shape[3], y.shape[3])


def _make(name: str, shape: Any, has_kernel: bool) -> Primitive:
    """Make a primitive; with its parameter `runs`, both arguments have a leading axis of runs."""
    primitive = Primitive(name)
    cpu = cpu_forms.FORMS[name]

    def abstract(a: Any, b: Any, *, window: Window, runs: bool) -> Any:
        if a.dtype != b.dtype:
            raise TypeError(f"{name} of {a.dtype} and {b.dtype}: expected one dtype")
        one = [jax.ShapeDtypeStruct(v.shape[runs:], v.dtype) for v in (a, b)]
        out = shape(*one, window)
        return a.update(shape=(*a.shape[:1], *out) if runs else out)

    def on_cpu(a: Array, b: Array, *, window: Window, runs: bool) -> Array:
        if not runs:
            return cpu(a, b, window=window)
        return lax.map(lambda ab: cpu(*ab, window=window), (a, b))

    def elsewhere(ctx: Any, a: Any, b: Any, *, window: Window, runs: bool) -> Any:
        form = partial(device_forms.FORMS[name], window=window)
        if runs:
            kinds = ctx.avals_in
            convolution = choice.ConvolutionOfRuns(
                name, window, tuple(kind.shape for kind in kinds), kinds[0].dtype
            )
            platforms = tuple(ctx.platforms or ctx.module_context.platforms)
            form = device_forms.of_runs(name, choice.way(convolution, platforms), window)
        return mlir.lower_fun(form, multiple_results=False)(ctx, a, b)

    def batch(args: Any, axes: Any, *, window: Window, runs: bool) -> tuple[Array, int]:
        size = next(v.shape[d] for v, d in zip(args, axes, strict=True) if d is not None)
        if has_kernel and not runs and axes[1] is None:
            # A batch of batches under one kernel is a larger batch.
            a = jnp.moveaxis(args[0], axes[0], 0)
            merged = primitive.bind(a.reshape(-1, *a.shape[2:]), args[1], window=window, runs=False)
            return merged.reshape(*a.shape[:2], *merged.shape[1:]), 0
        a, b = (
            jnp.broadcast_to(v, (size, *v.shape)) if d is None else jnp.moveaxis(v, d, 0)
            for v, d in zip(args, axes, strict=True)
        )
        if not runs:
            return primitive.bind(a, b, window=window, runs=True), 0
        flat = [v.reshape(-1, *v.shape[2:]) for v in (a, b)]
        out = primitive.bind(*flat, window=window, runs=True)
        return out.reshape(*a.shape[:2], *out.shape[1:]), 0

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda a, b, **static: jax.jit(partial(primitive.bind, **static))(a, b))
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, elsewhere)
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return primitive


_conv = _make("conv", _shape_conv, has_kernel=True)
_to_input = _make("conv_to_input", _shape_to_input, has_kernel=True)
_to_kernel = _make("conv_to_kernel", _shape_to_kernel, has_kernel=False)

ad.defbilinear(
    _conv,
    lambda ct, x, w, **static: _to_input.bind(ct, w, **static),
    lambda ct, x, w, **static: _to_kernel.bind(x, ct, **static),
)
ad.defbilinear(
    _to_input,
    lambda ct, y, w, **static: _conv.bind(ct, w, **static),
    lambda ct, y, w, **static: _to_kernel.bind(ct, y, **static),
)
ad.defbilinear(
    _to_kernel,
    lambda ct, x, y, **static: _to_input.bind(y, ct, **static),
    lambda ct, x, y, **static: _conv.bind(x, ct, **static),
)
