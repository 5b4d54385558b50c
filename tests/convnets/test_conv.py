"""Convolutions against definitions written out in NumPy, and their derivatives against jax.lax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import convolution, cubic_derivatives, transposed_convolution

from optjax.convnets import cpu_forms
from optjax.convnets.conv import conv, conv_transpose
from optjax.convnets.layers import _window as layer_window
from optjax.convnets.window import LAYOUT, Window

CASES = [
    (3, 1, (1, 1)),
    (4, 1, (1, 2)),
    (3, 2, (1, 1)),
    (4, 2, (1, 1)),
    (5, 2, (2, 2)),
    (7, 2, (3, 3)),
]


def _window(k, s, edges, size=8):
    return Window((size, size), (k, k), (s, s), (edges, edges))


def _draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


@pytest.mark.parametrize(
    ("k", "s", "p", "op"), [(3, 2, 1, 1), (4, 2, 1, 0), (5, 2, 2, 1), (7, 2, 3, 1)]
)
def test_transposed_convolution_is_pytorchs_scatter(k, s, p, op):
    y, weight = _draw(2, 4, 4, 3), _draw(3, 5, k, k)
    size = (4 - 1) * s - 2 * p + k + op
    window = Window((size, size), (k, k), (s, s), ((p, p), (p, p)))
    assert window.out == (4, 4)
    ours = conv_transpose(jnp.asarray(y), jnp.asarray(weight.transpose(2, 3, 1, 0)), window)
    np.testing.assert_allclose(ours, transposed_convolution(y, weight, s, p, op), atol=1e-12)


@pytest.mark.parametrize(("k", "s", "edges"), CASES)
def test_convolution_is_its_sum_over_taps(k, s, edges):
    window = _window(k, s, edges)
    x, w = _draw(2, 8, 8, 2), _draw(k, k, 2, 3)
    expected = convolution(x, w, s, edges[0], window.out[0])
    np.testing.assert_allclose(conv(jnp.asarray(x), jnp.asarray(w), window), expected, atol=1e-12)


@pytest.mark.parametrize("small", [0, 256])  # pixels: forms for large pictures, for small ones
@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("k", range(1, 8))
def test_both_orders_of_derivatives_are_those_of_lax(monkeypatch, k, s, small):
    monkeypatch.setattr(cpu_forms, "_SMALL", small)
    monkeypatch.setattr(cpu_forms, "_CHUNK_BYTES", 6000)  # chunks of a few pictures, and a rest
    window = layer_window((4, 6), k, s)
    channels, features = ((1, 3), (2, 3), (4, 2))[k % 3]
    x, w = jnp.asarray(_draw(7, 4, 6, channels)), jnp.asarray(_draw(k, k, channels, features))

    def reference(x, w):
        return lax.conv_general_dilated(x, w, (s, s), window.padding, dimension_numbers=LAYOUT)

    expected = jax.jit(cubic_derivatives(reference))(x, w)
    ours = jax.jit(cubic_derivatives(lambda x, w: conv(x, w, window)))(x, w)
    for found, value in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        largest = float(jnp.max(jnp.abs(value)))
        np.testing.assert_allclose(found, value, rtol=1e-11, atol=1e-12 * largest)


def test_a_kernel_gradient_of_bfloat16_is_summed_over_chunks_in_float32(monkeypatch):
    """400 chunks: a sum kept in bfloat16 would stand still at 256 times its terms."""
    monkeypatch.setattr(cpu_forms, "_CHUNK_BYTES", 1)
    window = layer_window((4, 4), 3, 2)
    x, y = (jnp.asarray(1 + 0.1 * _draw(400, n, n, 2), jnp.bfloat16) for n in (4, 2))
    exact = cpu_forms.to_kernel(x.astype(float), y.astype(float), window=window)
    found = jax.jit(lambda x, y: cpu_forms.to_kernel(x, y, window=window))(x, y)
    assert found.dtype == jnp.bfloat16
    # The product of a chunk is rounded, and the whole sum once more.
    np.testing.assert_allclose(found.astype(float), exact, rtol=float(jnp.finfo(jnp.bfloat16).eps))


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmapped_convolutions_equal_looped_ones(axes):
    window = _window(3, 2, (1, 1))
    x, w = jnp.asarray(_draw(3, 2, 8, 8, 2)), jnp.asarray(_draw(3, 3, 3, 2, 4))
    x, w = (x if axes[0] == 0 else x[0]), (w if axes[1] == 0 else w[0])

    def one(x, w):
        return jax.grad(lambda x, w: jnp.sum(conv(x, w, window) ** 2), argnums=(0, 1))(x, w)

    together = jax.vmap(one, axes)(x, w)
    for i in range(3):
        alone = one(x[i] if axes[0] == 0 else x, w[i] if axes[1] == 0 else w)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-12)


def test_vmap_within_vmap():
    window = _window(3, 1, (1, 1))
    x, w = jnp.asarray(_draw(2, 1, 8, 8, 2)), jnp.asarray(_draw(3, 3, 3, 2, 4))
    table = jax.vmap(lambda w: jax.vmap(lambda x: conv(x, w, window))(x))(w)
    np.testing.assert_allclose(table[2, 1], conv(x[1], w[2], window), rtol=1e-12)
