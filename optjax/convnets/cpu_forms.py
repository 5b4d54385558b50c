"""The three convolutions of a trilinear form as programs that XLA runs fast on the CPU."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from optjax.convnets.window import LAYOUT, Window
from optjax.support.types import Array

_SMALL = 256  # pixels of a picture up to which a convolution is the fastest kernel gradient
_CHUNK_BYTES = 6 << 20  # shifted copies that a kernel gradient holds at once: they stay in cache


def conv(x: Array, w: Array, *, window: Window) -> Array:
    """Convolve x by w."""
    return lax.conv_general_dilated(x, w, window.stride, window.padding, dimension_numbers=LAYOUT)


def to_input(y: Array, w: Array, *, window: Window) -> Array:
    """Convolve y densely for each of the s × s phases of the output, and interleave the results.

    For large pictures one convolution gives all phases as channels: a tap that a phase lacks is a
    zero in its kernel, which costs less than interleaving the results of several convolutions.
    """
    (H, W), (kh, kw), (sh, sw), ((top, _), (left, _)) = window
    size = math.ceil(H / sh), math.ceil(W / sw)
    taps_h, taps_w = _phase_taps(kh, sh, top), _phase_taps(kw, sw, left)
    padded_w = jnp.pad(w, ((0, 1), (0, 1), (0, 0), (0, 0)))

    def phases(rows: list[dict[int, int]], columns: list[dict[int, int]]) -> Array:
        """Compute some phases, (B, *size, phases of the rows, phases of the columns, C)."""
        (low_h, at_h), (low_w, at_w) = _kernel_taps(rows, kh), _kernel_taps(columns, kw)
        kernel = padded_w[at_h][:, :, at_w]  # (dh, rows, dw, columns, C, F)
        dh, dw = len(at_h), len(at_w)
        edges = [
            (-low, n - 1 + low + d - m)
            for low, n, d, m in zip((low_h, low_w), size, (dh, dw), y.shape[1:3], strict=True)
        ]
        zero = jnp.zeros((), y.dtype)
        framed = lax.pad(y, zero, [(0, 0, 0), *((a, b, 0) for a, b in edges), (0, 0, 0)])
        flat = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(dh, dw, w.shape[3], -1)
        out = lax.conv_general_dilated(framed, flat, (1, 1), "VALID", dimension_numbers=LAYOUT)
        return out.reshape(-1, *size, len(rows), len(columns), w.shape[2])

    slots = len(_kernel_taps(taps_h, kh)[1]) * len(_kernel_taps(taps_w, kw)[1]) * sh * sw
    if size[0] * size[1] >= _SMALL and slots <= 2 * kh * kw:
        grid = phases(taps_h, taps_w)
    else:
        rows = [jnp.concatenate([phases([i], [j]) for j in taps_w], axis=4) for i in taps_h]
        grid = jnp.concatenate(rows, axis=3)
    grid = grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size[0] * sh, size[1] * sw, w.shape[2])
    return grid[:, :H, :W]


def _phase_taps(k: int, s: int, pad: int) -> list[dict[int, int]]:
    """Map, for each phase i mod s, the offset o − ⌊i/s⌋ of each output that reaches i to a tap."""
    return [
        {(phase + pad - tap) // s: tap for tap in range(k) if (phase + pad - tap) % s == 0}
        for phase in range(s)
    ]


def _kernel_taps(phases: list[dict[int, int]], k: int) -> tuple[int, np.ndarray]:
    """Return the lowest offset of the phases, and the tap at each (offset, phase), k for none."""
    offsets = sorted({offset for taps in phases for offset in taps} or {0})
    at = [[taps.get(o, k) for taps in phases] for o in range(offsets[0], offsets[-1] + 1)]
    return offsets[0], np.array(at)


def to_kernel(x: Array, y: Array, *, window: Window) -> Array:
    """Add up the kernel gradient over chunks of pictures whose copies stay in cache.

    The form is the fastest on two cores (AVX-512): patches for few channels, a convolution for
    small pictures, else a product of shifts.
    """
    (kh, kw), (oh, ow), c, f = window.kernel, window.out, x.shape[3], y.shape[3]
    form, copies = _by_shifts, kw * c + kh * f
    if kh * kw * c < copies:
        form, copies = _by_patches, kh * kw * c + f
    elif window.stride == (1, 1) and oh * ow <= _SMALL:
        form = _by_convolution
    chunk = max(1, _CHUNK_BYTES // (copies * oh * ow * x.dtype.itemsize))
    pictures = x.shape[0]
    if pictures <= chunk:
        return form(x, y, window)
    chunk = next((n for n in range(chunk, chunk // 2, -1) if pictures % n == 0), chunk)
    whole = pictures - pictures % chunk
    exact = x.dtype if x.dtype.itemsize >= 4 else jnp.float32
    total = jnp.zeros((kh, kw, c, f), exact)
    if whole < pictures:
        total = form(x[whole:], y[whole:], window).astype(exact)

    def add(i: Array, total: Array) -> Array:
        xs, ys = (lax.dynamic_slice_in_dim(a, i * chunk, chunk) for a in (x, y))
        # Without the barrier each shift would read its pictures from memory again.
        xs, ys = lax.optimization_barrier((xs, ys))
        return total + form(xs, ys, window).astype(exact)

    return lax.fori_loop(0, whole // chunk, add, total).astype(x.dtype)


def _by_convolution(x: Array, y: Array, window: Window) -> Array:
    """Convolve with the pictures as channels: one operand slides over the other."""
    (kh, kw), ((top, bottom), (left, right)) = window.kernel, window.padding
    if x.shape[3] <= y.shape[3]:
        image, kernel, edges = x, y, ((top, bottom), (left, right))
    else:
        image, kernel = y, x
        edges = ((kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right))
    slid = lax.conv_general_dilated(
        image.transpose(3, 1, 2, 0),
        kernel.transpose(1, 2, 0, 3),
        (1, 1),
        edges,
        dimension_numbers=LAYOUT,
    )
    if image is x:
        return slid.transpose(1, 2, 0, 3)
    return slid[:, ::-1, ::-1].transpose(1, 2, 3, 0)


def _by_shifts(x: Array, y: Array, window: Window) -> Array:
    """Multiply shifts of x by shifts of y, (kw·C) × (taps·F), once for each phase of the rows.

    The horizontal taps are shifts of x, the vertical ones shifts of y; the whole product is used.
    Row s·m + φ of the framed x meets the rows m − d of y, d = 0, 1, …, by tap s·d + φ.
    """
    (H, W), (kh, kw), (sh, sw), ((ph, _), (pw, _)) = window
    (oh, ow), c, f = window.out, x.shape[3], y.shape[3]
    zero = jnp.zeros((), x.dtype)
    last = (ow - 1) * sw
    rows = [jnp.zeros((0,))] * kh
    for phase in range(min(sh, kh)):
        first, final = -((phase - ph) // sh), (ph + H - 1 - phase) // sh
        taps = range(phase, kh, sh)
        x_rows = x[:, sh * first + phase - ph :: sh]
        columns = [
            lax.pad(
                x_rows, zero, [(0, 0, 0), (0, 0, 0), (pw - j, last + 1 - W - pw + j, 0), (0, 0, 0)]
            )[:, :, ::sw]
            for j in range(kw)
        ]
        shifts = [
            lax.pad(y, zero, [(0, 0, 0), (d - first, final - d - oh + 1, 0), (0, 0, 0), (0, 0, 0)])
            for d in range(len(taps))
        ]
        x_NxkC = jnp.concatenate(columns, axis=-1).reshape(-1, kw * c)
        y_NxdF = jnp.concatenate(shifts, axis=-1).reshape(-1, len(taps) * f)
        product = _gram(x_NxkC, y_NxdF).reshape(kw, c, len(taps), f)
        for d, tap in enumerate(taps):
            rows[tap] = product[:, :, d]
    return jnp.stack(rows)


def _by_patches(x: Array, y: Array, window: Window) -> Array:
    """Multiply all patches of x by y, (kh·kw·C) × F: for few channels."""
    (kh, kw), (sh, sw), (oh, ow) = window.kernel, window.stride, window.out
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    taps = [
        x[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    x_NxkkC = jnp.concatenate(taps, axis=-1).reshape(y[..., 0].size, -1)
    product = _gram(x_NxkkC, y.reshape(-1, y.shape[3]))
    return product.reshape(kh, kw, x.shape[3], y.shape[3])


def _gram(a_NxP: Array, b_NxQ: Array) -> Array:
    """Compute aᵀb with the operands in the faster order."""
    p, q = a_NxP.shape[1], b_NxQ.shape[1]
    # The wider operand second is up to twice as fast. But rows of 64 numbers do not come first, as
    # they share few cache lines.
    p_first = p <= q if min(p, q) % 64 or max(p, q) >= 2 * min(p, q) else p > q
    return a_NxP.T @ b_NxQ if p_first else (b_NxQ.T @ a_NxP).T


FORMS = {"conv": conv, "conv_to_input": to_input, "conv_to_kernel": to_kernel}
"""Each primitive's program: (a, b, window=...) → result."""
