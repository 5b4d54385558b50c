"""Padding arithmetic against counting, against real convolutions, and its refusals."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optjax.convnets.geometry import (
    Padding,
    conv_output_size,
    same_padding,
    solve_padding,
    transposed_output_size,
)
from optjax.support.errors import UserError

small = st.integers(1, 9)
sizes = st.integers(1, 40)


def count_positions(size, kernel, stride, padding, dilation):
    """Slide the kernel and count the places where it fits."""
    extent = dilation * (kernel - 1) + 1
    return len(range(-padding, size + padding - extent + 1, stride))


def count_reached(size, kernel, stride, padding, dilation):
    """Scatter every input's taps and count the pixels between the ends, less the padding."""
    reached = {i * stride + j * dilation for i in range(size) for j in range(kernel)}
    return max(reached) - min(reached) + 1 - 2 * padding


@settings(max_examples=200, deadline=None)
@given(sizes, small, small, st.integers(0, 6), st.integers(1, 4))
def test_a_convolution_has_an_output_for_each_place_the_kernel_fits(size, k, s, p, d):
    counted = count_positions(size, k, s, p, d)
    if counted < 1:
        with pytest.raises(UserError, match="does not fit"):
            conv_output_size(size, k, s, p, d)
    else:
        assert conv_output_size(size, k, s, p, d) == counted


@settings(max_examples=200, deadline=None)
@given(sizes, small, small, st.integers(0, 6), st.integers(0, 8), st.integers(1, 4))
def test_a_transposed_convolution_covers_the_pixels_it_scatters_to(size, k, s, p, o, d):
    counted = count_reached(size, k, s, p, d) + o
    if o >= max(s, d):
        with pytest.raises(UserError, match="less than"):
            transposed_output_size(size, k, s, p, o, d)
    elif counted < 1:
        with pytest.raises(UserError, match="leaves"):
            transposed_output_size(size, k, s, p, o, d)
    else:
        assert transposed_output_size(size, k, s, p, o, d) == counted


@settings(max_examples=200, deadline=None)
@given(small, small, sizes, st.integers(1, 60), st.booleans(), st.integers(1, 4))
def test_solve_padding_finds_what_trying_every_padding_finds(
    k, s, size_in, size_out, transposed, d
):
    tried = []
    for p in range(d * k + s * (size_in + size_out)):
        for o in range(max(s, d) if transposed else 1):
            try:
                out = (
                    transposed_output_size(size_in, k, s, p, o, d)
                    if transposed
                    else conv_output_size(size_in, k, s, p, d)
                )
            except UserError:
                continue
            if out == size_out:
                tried.append(Padding(p, o, d))
    if tried:
        assert solve_padding(k, s, size_in, size_out, transposed, d) == tried
    else:
        with pytest.raises(UserError, match="no padding takes"):
            solve_padding(k, s, size_in, size_out, transposed, d)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), small, sizes, sizes, st.booleans())
def test_every_dilation_whose_kernel_fits_is_tried(k, s, size_in, size_out, transposed):
    expected = []
    for d in range(1, max(size_in, size_out) + 1):
        if d > 1 and d * (k - 1) + 1 > max(size_in, size_out):
            break
        with contextlib.suppress(UserError):
            expected += solve_padding(k, s, size_in, size_out, transposed, d)
    if expected:
        assert solve_padding(k, s, size_in, size_out, transposed, None) == expected
    else:
        with pytest.raises(UserError, match="no padding takes"):
            solve_padding(k, s, size_in, size_out, transposed, None)


@pytest.mark.parametrize("kernel", [3, 4, 5, 7])
def test_same_padding_makes_a_real_convolution_halve_and_a_real_transposed_one_double(kernel):
    p, o, _ = same_padding(kernel, 2, 32)
    weights = jnp.zeros((1, 1, kernel))
    down = jax.lax.conv_general_dilated(jnp.zeros((1, 1, 32)), weights, (2,), [(p, p)])
    q = kernel - 1 - p
    up = jax.lax.conv_general_dilated(down, weights, (1,), [(q, q + o)], lhs_dilation=(2,))
    assert (down.shape[-1], up.shape[-1]) == (16, 32)


@pytest.mark.parametrize(
    ("kernel", "expected"), [(3, (1, 1)), (4, (1, 0)), (5, (2, 1)), (7, (3, 1))]
)
def test_same_padding_of_the_kernels_that_the_nets_use(kernel, expected):
    assert same_padding(kernel, 2, 32) == (*expected, 1)
    if kernel % 2:
        assert same_padding(kernel, 1, 32) == (expected[0], 0, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: conv_output_size(0, 3), "size is 0; give a whole number of at least 1"),
        (lambda: conv_output_size(8, 3, padding=-1), "padding is -1"),
        (lambda: conv_output_size(8, 3.0), "kernel is 3.0"),  # pyright: ignore
        (lambda: conv_output_size(2, 5), "pad by at least 2"),
        (lambda: transposed_output_size(4, 3, 1, 0, 1), "less than 1"),
        (lambda: solve_padding(3, 2, 8, 2), "gives 3 already"),
        (lambda: solve_padding(4, 1, 8, 8), "steps over"),
        (lambda: solve_padding(4, 1, 8, 8, transposed=True), "go in twos"),
        (lambda: solve_padding(3, 2, 4, 40, transposed=True), "gives 10"),
        (lambda: solve_padding(3, 1, 8, 40, dilation=0), "dilation is 0"),
        (lambda: solve_padding(4, 1, 8, 8, dilation=3), "stride 1, dilation 3: each step"),
        (lambda: same_padding(3, 2, 33), "does not divide"),
        (lambda: same_padding(4, 1, 32), "change the kernel"),
    ],
)
def test_refusals_say_the_value_and_what_to_do(call, says):
    with pytest.raises(UserError, match=says):
        call()
