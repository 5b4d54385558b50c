"""Convolution as one trilinear form, fast inside a scan.

.. math:: T(x, w, y) = Σ_{b,o,κ,c,f} x[b, s·o + κ − p, c] · w[κ, c, f] · y[b, o, f]

A convolution, its gradient by the input (which is also the transposed convolution) and its
gradient by the kernel are the three ways to leave one argument of T open. Each is a JAX primitive,
bilinear in the two others, and each is the transpose of the rest, so the set is closed under
`grad`, `jvp` and `vmap` to any order.

Why not `jax.lax` alone: on the CPU, XLA turns a convolution into a fast matrix product only in the
layout NHWC × HWIO; the two gradients that autodiff builds have other layouts, and inside a scan
they fall to a plain loop (jax issue 12868). Under `vmap` over kernels they become grouped
convolutions whose cost grows with the square of the number of lanes (jax issues 13800, 26568).
Here every program is written in the layout that is fast, and lanes are mapped one by one on the
CPU. On other platforms the primitives are `jax.lax` convolutions.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from optjax.types import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_CHUNK = 10  # pictures whose kernel gradient is taken at once: their taps stay in the cache

Pair = tuple[int, int]


class Window(NamedTuple):
    """The static side of a convolution: which pixels each output looks at."""

    size: Pair  # (H, W) of x
    kernel: Pair  # (kh, kw)
    stride: Pair
    padding: tuple[Pair, Pair]  # (before, after) in each direction

    @property
    def out(self) -> Pair:
        """(H, W) of y: ⌊(in + 2p − k)/s⌋ + 1 in each direction."""
        h, w = (
            (n + sum(p) - k) // s + 1
            for n, k, s, p in zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        )
        return h, w


def conv(x: Array, w: Array, window: Window) -> Array:
    """y[b, o, f] = Σ_{κ,c} x[b, s·o + κ − p, c] w[κ, c, f], zeros outside the picture.

    Args:
      x: (B, H, W, C). w: (kh, kw, C, F). window: its sizes.

    Returns:
      (B, *window.out, F).

    >>> import jax.numpy as jnp
    >>> window = Window(size=(4, 4), kernel=(3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
    >>> conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), window)[0, :, :, 0].tolist()
    [[4.0, 6.0], [6.0, 9.0]]
    """
    return _conv.bind(x, w, window=window, lanes=False)


def conv_transpose(y: Array, w: Array, window: Window) -> Array:
    """x[b, i, c] = Σ_{κ,o: s·o + κ − p = i} Σ_f y[b, o, f] w[κ, c, f]: the adjoint of `conv`.

    Args:
      y: (B, *window.out, F), the small picture. w: (kh, kw, C, F), C channels come out.
      window: the convolution that would lead back from the large picture to the small one.

    Returns:
      (B, *window.size, C). No inserted zero is multiplied: each of the s² phases of the output
      is a small dense convolution.

    >>> import jax.numpy as jnp
    >>> window = Window(size=(4, 4), kernel=(3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
    >>> conv_transpose(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)), window)[0, 0, :, 0].tolist()
    [1.0, 2.0, 1.0, 1.0]
    """
    return _to_input.bind(y, w, window=window, lanes=False)


# ---------------------------------------------------------------- programs for one lane, the CPU


def _cpu_conv(x: Array, w: Array, *, window: Window) -> Array:
    return lax.conv_general_dilated(x, w, window.stride, window.padding, dimension_numbers=_LAYOUT)


def _phase_taps(k: int, s: int, pad: int, phase: int) -> tuple[list[int], int]:
    """Taps κ that reach inputs i ≡ phase (mod s), by rising o, and the first o − ⌊i/s⌋."""
    taps = [t for t in range(k) if (phase + pad - t) % s == 0][::-1]
    return taps, (phase + pad - taps[0]) // s if taps else 0


def _cpu_to_input(y: Array, w: Array, *, window: Window) -> Array:
    """Interleave s × s dense convolutions of y, one for each phase of the output."""
    (H, W), (kh, kw), (sh, sw), ((ph, _), (pw, _)) = window
    rows, columns = math.ceil(H / sh), math.ceil(W / sw)
    phases = []
    for i in range(sh):
        taps_i, first_i = _phase_taps(kh, sh, ph, i)
        for j in range(sw):
            taps_j, first_j = _phase_taps(kw, sw, pw, j)
            if not taps_i or not taps_j:
                phases.append(jnp.zeros((y.shape[0], rows, columns, w.shape[2]), y.dtype))
                continue
            kernel = w[jnp.array(taps_i)][:, jnp.array(taps_j)].swapaxes(2, 3)
            edges = (
                (-first_i, rows - 1 + first_i + len(taps_i) - y.shape[1]),
                (-first_j, columns - 1 + first_j + len(taps_j) - y.shape[2]),
            )
            zero = jnp.zeros((), y.dtype)
            framed = lax.pad(y, zero, [(0, 0, 0), *((a, b, 0) for a, b in edges), (0, 0, 0)])
            phases.append(
                lax.conv_general_dilated(framed, kernel, (1, 1), "VALID", dimension_numbers=_LAYOUT)
            )
    if sh == sw == 1:
        return phases[0]
    grid = jnp.stack(phases, axis=-2).reshape(-1, rows, columns, sh, sw, w.shape[2])
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * sh, columns * sw, w.shape[2])[
        :, :H, :W
    ]


def _cpu_to_kernel(x: Array, y: Array, *, window: Window) -> Array:
    """One matrix product a row of the kernel, in chunks of pictures that fit the cache.

    The kw horizontal shifts of x are laid side by side once; the kh vertical ones are views of
    that. A product for each of the kh·kw taps is narrower, one for all copies three times as much:
    both measured slower.
    """
    (kh, kw), (sh, sw), (oh, ow) = window.kernel, window.stride, window.out
    shape = (kh, kw, x.shape[-1], y.shape[-1])

    def part(x: Array, y: Array) -> Array:
        x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
        wide = [x[:, :, j : j + (ow - 1) * sw + 1 : sw] for j in range(kw)]
        x_BxHxWxkC = jnp.concatenate(wide, axis=-1)
        y_NxF = y.reshape(-1, y.shape[-1])
        rows = [x_BxHxWxkC[:, i : i + (oh - 1) * sh + 1 : sh] for i in range(kh)]
        return jnp.stack([row.reshape(y_NxF.shape[0], -1).T @ y_NxF for row in rows]).reshape(shape)

    whole = x.shape[0] - x.shape[0] % _CHUNK
    if whole <= _CHUNK:
        return part(x, y)
    xs, ys = (a[:whole].reshape(-1, _CHUNK, *a.shape[1:]) for a in (x, y))
    rest = part(x[whole:], y[whole:]) if whole < x.shape[0] else jnp.zeros(shape, x.dtype)
    return lax.scan(lambda total, xy: (total + part(*xy), None), rest, (xs, ys))[0]


# -------------------------------------------------------------- programs for one lane, elsewhere


def _lax_to_input(y: Array, w: Array, *, window: Window) -> Array:
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
        dimension_numbers=_LAYOUT,
    )


def _lax_to_kernel(x: Array, y: Array, *, window: Window) -> Array:
    kernel = jax.ShapeDtypeStruct((*window.kernel, x.shape[-1], y.shape[-1]), x.dtype)
    (grad,) = jax.linear_transpose(lambda w: _cpu_conv(x, w, window=window), kernel)(y)
    return grad


LAX_FORMS = {"conv": _cpu_conv, "conv_to_input": _lax_to_input, "conv_to_kernel": _lax_to_kernel}
"""Each primitive as the one `jax.lax` convolution that it is: (a, b, window=...) → result."""


# ------------------------------------------------------------------------------- the primitives


def _shape_conv(x: Any, w: Any, window: Window) -> tuple[int, ...]:
    return (x.shape[0], *window.out, w.shape[3])


def _shape_to_input(y: Any, w: Any, window: Window) -> tuple[int, ...]:
    return (y.shape[0], *window.size, w.shape[2])


def _shape_to_kernel(x: Any, y: Any, window: Window) -> tuple[int, ...]:
    return (*window.kernel, x.shape[3], y.shape[3])


def _make(name: str, shape: Any, cpu: Any, other: Any, has_kernel: bool) -> Primitive:
    primitive = Primitive(name)

    def abstract(a: Any, b: Any, *, window: Window, lanes: bool) -> Any:
        if a.dtype != b.dtype:
            raise TypeError(f"{name} of {a.dtype} and {b.dtype}: expected one dtype")
        one = [jax.ShapeDtypeStruct(v.shape[lanes:], v.dtype) for v in (a, b)]
        out = shape(*one, window)
        return a.update(shape=(*a.shape[:1], *out) if lanes else out)

    def on_cpu(a: Array, b: Array, *, window: Window, lanes: bool) -> Array:
        if not lanes:
            return cpu(a, b, window=window)
        return lax.map(lambda ab: cpu(*ab, window=window), (a, b))

    def elsewhere(a: Array, b: Array, *, window: Window, lanes: bool) -> Array:
        one = partial(other, window=window)
        return (jax.vmap(one) if lanes else one)(a, b)

    def batch(args: Any, axes: Any, *, window: Window, lanes: bool) -> tuple[Array, int]:
        size = next(v.shape[d] for v, d in zip(args, axes, strict=True) if d is not None)
        if has_kernel and not lanes and axes[1] is None:
            # A batch of batches under one kernel is a larger batch.
            a = jnp.moveaxis(args[0], axes[0], 0)
            merged = primitive.bind(
                a.reshape(-1, *a.shape[2:]), args[1], window=window, lanes=False
            )
            return merged.reshape(*a.shape[:2], *merged.shape[1:]), 0
        a, b = (
            jnp.broadcast_to(v, (size, *v.shape)) if d is None else jnp.moveaxis(v, d, 0)
            for v, d in zip(args, axes, strict=True)
        )
        if not lanes:
            return primitive.bind(a, b, window=window, lanes=True), 0
        flat = [v.reshape(-1, *v.shape[2:]) for v in (a, b)]
        out = primitive.bind(*flat, window=window, lanes=True)
        return out.reshape(*a.shape[:2], *out.shape[1:]), 0

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda a, b, **static: jax.jit(partial(primitive.bind, **static))(a, b))
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return primitive


_conv = _make("conv", _shape_conv, _cpu_conv, _cpu_conv, has_kernel=True)
_to_input = _make("conv_to_input", _shape_to_input, _cpu_to_input, _lax_to_input, has_kernel=True)
_to_kernel = _make(
    "conv_to_kernel", _shape_to_kernel, _cpu_to_kernel, _lax_to_kernel, has_kernel=False
)

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
