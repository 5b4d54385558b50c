"""The other platforms' forms, run on the CPU: against the CPU's forms and `lax.conv`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import cubic_derivatives

from optjax.convnets import choice, cpu_forms, device_forms
from optjax.convnets.conv import conv
from optjax.convnets.layers import _window
from optjax.convnets.window import LAYOUT

SIZE, R, B, C, F = (4, 6), 3, 2, 2, 3
CASES = [(k, s) for k in range(1, 8) for s in (1, 2)]


def _draw(*shape, dtype=float):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def _same(found, expected, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("k", "s"), CASES)
def test_every_way_is_the_cpus_form(k, s):
    window = _window(SIZE, k, s)
    x, w = _draw(R, B, *SIZE, C, dtype=jnp.float32), _draw(R, k, k, C, F, dtype=jnp.float32)
    y = _draw(R, B, *window.out, F, dtype=jnp.float32)
    arguments = {"conv": (x, w), "conv_to_input": (y, w), "conv_to_kernel": (x, y)}

    @jax.jit
    def run(arguments):
        ours = {
            name: [device_forms.of_runs(name, way, window)(*ab) for way in choice.WAYS]
            for name, ab in arguments.items()
        }
        cpu = {
            name: jax.vmap(lambda a, b, name=name: cpu_forms.FORMS[name](a, b, window=window))(*ab)
            for name, ab in arguments.items()
        }
        return ours, cpu

    ours, cpu = run(arguments)
    for name, expected in cpu.items():
        for found in ours[name]:
            assert found.dtype == jnp.float32
            # Sums of at most 100 products of ordinary numbers, in another order.
            _same(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("k", "s"), [pytest.param(k, s, marks=() if k < 5 else pytest.mark.slow) for k, s in CASES]
)
def test_both_orders_of_derivatives_are_those_of_lax(as_a_device, k, s):
    as_a_device("product")
    window = _window(SIZE, k, s)

    def reference(x, w):
        return lax.conv_general_dilated(x, w, (s, s), window.padding, dimension_numbers=LAYOUT)

    x, w = _draw(R, B, *SIZE, C), _draw(R, k, k, C, F)
    ours = jax.jit(jax.vmap(cubic_derivatives(lambda x, w: conv(x, w, window))))(x, w)
    expected = jax.jit(jax.vmap(cubic_derivatives(reference)))(x, w)
    _same(ours, expected, 1e-11)


@pytest.mark.parametrize("way", [None, "one by one", "grouped"])
@pytest.mark.parametrize(("k", "s"), [(3, 2), (4, 1)])
def test_so_are_those_of_one_run_and_of_the_other_ways(as_a_device, k, s, way):
    as_a_device(way)
    window = _window(SIZE, k, s)
    x, w = _draw(R, B, *SIZE, C), _draw(R, k, k, C, F)
    f = cubic_derivatives(lambda x, w: conv(x, w, window))
    ours = jax.jit(jax.vmap(f) if way else lambda x, w: f(x[0], w[0]))(x, w)

    def reference(x, w):
        return lax.conv_general_dilated(x, w, (s, s), window.padding, dimension_numbers=LAYOUT)

    expected = jax.jit(jax.vmap(cubic_derivatives(reference)))(x, w)
    _same(ours, expected if way else jax.tree.map(lambda a: a[0], expected), 1e-11)


def test_a_kernel_with_many_terms_goes_by_rows():
    """Above 128 terms of an output, where a row of the kernel is copied at a time."""
    window = _window(SIZE, 3, 2)
    x, w = _draw(R, B, *SIZE, 20), _draw(R, 3, 3, 20, F)
    y = _draw(R, B, *window.out, F)
    for name, ab in {"conv": (x, w), "conv_to_input": (y, w), "conv_to_kernel": (x, y)}.items():
        by_rows, grouped = (
            jax.jit(device_forms.of_runs(name, way, window)) for way in ("product", "grouped")
        )
        _same(by_rows(*ab), grouped(*ab), 1e-12)
        assert by_rows.lower(*ab).as_text().count("stablehlo.dot_general") == 3


@pytest.mark.parametrize("name", ["conv", "conv_to_input", "conv_to_kernel"])
def test_products_of_bfloat16_are_summed_in_float32(name):
    """One rounding of the result, at most half of 2⁻⁷, whatever the number of terms."""
    window = _window((8, 8), 3, 2)
    x, w = _draw(R, 8, 8, 8, 20), _draw(R, 3, 3, 20, 30)
    y = _draw(R, 8, *window.out, 30)
    args = {"conv": (x, w), "conv_to_input": (y, w), "conv_to_kernel": (x, y)}[name]
    small = [a.astype(jnp.bfloat16) for a in args]
    form = jax.jit(device_forms.of_runs(name, "product", window))
    found, exact = form(*small), form(*(a.astype(float) for a in small))
    assert found.dtype == jnp.bfloat16
    # Where terms cancel, float32's own rounding of them shows.
    np.testing.assert_allclose(found.astype(float), exact, rtol=2**-8, atol=1e-4)
