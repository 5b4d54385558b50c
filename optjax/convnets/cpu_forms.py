"""The three convolutions of a trilinear form as programs that XLA runs fast on the CPU."""

import math

import jax.numpy as jnp
from jax import lax

from optjax.convnets.window import LAYOUT, Window
from optjax.types import Array

_SMALL = 256  # pixels of a picture up to which a convolution is the fastest kernel gradient
_CHUNK_BYTES = 6 << 20  # shifted copies that a kernel gradient holds at once: they stay in cache


def conv(x: Array, w: Array, *, window: Window) -> Array:
    return lax.conv_general_dilated(x, w, window.stride, window.padding, dimension_numbers=LAYOUT)


def _phase_taps(k: int, s: int, pad: int, phase: int) -> tuple[list[int], int]:
    """Taps κ that reach inputs i ≡ phase (mod s), by rising o, and the first o − ⌊i/s⌋."""
    taps = [t for t in range(k) if (phase + pad - t) % s == 0][::-1]
    return taps, (phase + pad - taps[0]) // s if taps else 0


def to_input(y: Array, w: Array, *, window: Window) -> Array:
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
                lax.conv_general_dilated(framed, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)
            )
    if sh == sw == 1:
        return phases[0]
    grid = jnp.stack(phases, axis=-2).reshape(-1, rows, columns, sh, sw, w.shape[2])
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * sh, columns * sw, w.shape[2])[
        :, :H, :W
    ]


def to_kernel(x: Array, y: Array, *, window: Window) -> Array:
    """The fastest of three forms, over so many pictures at once that their copies stay in cache.

    Measured on two cores (AVX-512): patches for few channels, a convolution for small pictures,
    else a product of shifts.
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
    xs, ys = (a[:whole].reshape(-1, chunk, *a.shape[1:]) for a in (x, y))
    rest = jnp.zeros((kh, kw, c, f), x.dtype)
    if whole < pictures:
        rest = form(x[whole:], y[whole:], window)
    return lax.scan(lambda total, xy: (total + form(*xy, window), None), rest, (xs, ys))[0]


def _by_convolution(x: Array, y: Array, window: Window) -> Array:
    """A convolution whose channels are the pictures: one operand slides over the other."""
    (kh, kw), ((top, bottom), (left, right)) = window.kernel, window.padding
    if x.shape[3] <= y.shape[3]:
        image, kernel, edges = x, y, ((top, bottom), (left, right))
    else:
        image, kernel = y, x
        edges = ((kh - 1 - bottom, kh - 1 - top), (kw - 1 - right, kw - 1 - left))
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
    """One product for each phase of the rows, (kw·C) × (taps of the phase·F).

    The horizontal taps are shifts of x, the vertical ones shifts of y; every block of the product
    is wanted. Row s·m + φ of the framed x meets the rows m − d of y, d = 0, 1, …, by tap s·d + φ.
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
    """One product of all patches, (kh·kw·C) × F: for few channels."""
    (kh, kw), (sh, sw), (oh, ow) = window.kernel, window.stride, window.out
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    patches = [
        x[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    x_NxkkC = jnp.concatenate(patches, axis=-1).reshape(-1, kh * kw * x.shape[3])
    return _gram(x_NxkkC, y.reshape(-1, y.shape[3])).reshape(kh, kw, x.shape[3], y.shape[3])


def _gram(a_NxP: Array, b_NxQ: Array) -> Array:
    """aᵀb, the operands in the order that the CPU's matrix product likes: the wider second."""
    p, q = a_NxP.shape[1], b_NxQ.shape[1]
    p_first = p <= q if min(p, q) % 64 or max(p, q) >= 2 * min(p, q) else p > q
    return a_NxP.T @ b_NxQ if p_first else (b_NxQ.T @ a_NxP).T


FORMS = {"conv": conv, "conv_to_input": to_input, "conv_to_kernel": to_kernel}
"""Each primitive's program: (a, b, window=...) → result."""
