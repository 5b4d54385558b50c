"""The three convolutions of a trilinear form as programs that XLA runs fast on the CPU."""

import math

import jax.numpy as jnp
from jax import lax

from optjax.convnets.window import LAYOUT, Window
from optjax.types import Array

_CHUNK = 10  # pictures whose kernel gradient is taken at once: their taps stay in the cache


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


FORMS = {"conv": conv, "conv_to_input": to_input, "conv_to_kernel": to_kernel}
"""Each primitive's program: (a, b, window=...) → result."""
