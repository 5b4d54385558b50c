"""Counts of one operation of a traced program: connections, multiply-adds, FLOPs."""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import sympy

from optjax.accounting.operations import Dim, Op, Shape, as_sympy
from optjax.support.errors import UserError

# Free: they move, copy or relabel values.
DATA = frozenset(
    "reshape broadcast_in_dim transpose squeeze expand_dims slice dynamic_slice "
    "dynamic_update_slice concatenate pad rev convert_element_type bitcast_convert_type copy "
    "copy_p stop_gradient iota split scan_slice scan_stack loop_carry device_put pvary pcast tile "
    "sharding_constraint optimization_barrier reduce_precision real imag empty name "
    "random_seed random_fold_in random_wrap random_unwrap rearrange".split()
)
# One operation an element of the result.
ELEMENTWISE = frozenset(
    "add sub mul div rem max min neg abs sign select_n eq ne ge gt le lt and or not xor pow exp "
    "exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt square sin cos tan asin acos atan atan2 "
    "sinh cosh asinh acosh atanh erf erfc erf_inv lgamma digamma floor ceil round is_finite "
    "nextafter add_any conj complex shift_left shift_right_logical shift_right_arithmetic "
    "population_count clz cumsum cumprod cummax cummin cumlogsumexp".split()
)
REDUCE = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax "
    "argmin reduce".split()
)
WINDOWS = frozenset(
    "reduce_window reduce_window_sum reduce_window_max reduce_window_min "
    "select_and_scatter_add select_and_gather_add".split()
)
SCATTER = frozenset(
    "scatter scatter-add scatter_add scatter-mul scatter_mul scatter-min scatter-max".split()
)
PRODUCTS = frozenset(("conv_general_dilated", "dot_general"))


class Count(NamedTuple):
    """The counts of one operation, done once; `exact` leaves out taps on padding."""

    connections: Dim = 0
    exact: Dim = 0
    multiply_adds: Dim = 0
    flops: Dim = 0


def size(shape: Iterable[Dim]) -> Dim:
    """Return the number of elements."""
    return math.prod(shape)


Limits = dict[sympy.Symbol, int]
"""The least value of each symbol for which a count's formula is right."""


class Axis(NamedTuple):
    """One axis of a sliding window.

    Input i < n meets output o < out by tap t < k where i·d = o·s + t·e − p; all are at least 0.
    """

    n: Dim
    k: Dim
    out: Dim
    s: Dim = 1  # stride
    d: Dim = 1  # dilation of the input: a transposed convolution's stride
    e: Dim = 1  # dilation of the window
    p: Dim = 0  # padding before


def taps(axis: Axis, limits: Limits | None = None) -> Dim:
    """Count the triples (i, t, o) that meet, without those on padding.

    Lengths may be linear in a symbol. The count is then linear too, from a least value of the
    symbol on; `limits` collects that value.

    Raises:
      UserError: the lengths hold several symbols, or the count is not linear.

    >>> taps(Axis(n=32, k=3, out=32, p=1))  # 32 · 3, less one at each end
    94
    """
    symbols = set().union(*(v.free_symbols for v in axis if not isinstance(v, int)))
    if not symbols:
        return _taps(axis)
    if len(symbols) > 1:
        names = " and ".join(sorted(map(str, symbols)))
        raise UserError(
            f"one axis depends on {names}; its border cannot be counted in both: give numbers for "
            "all but one"
        )
    (x,) = symbols
    slope, constant, least = _line(axis, x)
    if limits is not None:
        limits[x] = max(limits.get(x, 1), least)
    return slope * x + constant


def taps_with_padding(axis: Axis) -> Dim:
    """Count the taps of a layer by the convention that has no borders.

    A convolution gives each of its outputs k taps; a transposed one gives k to each of its inputs
    (taps outside its output count, taps on an inserted zero do not). With stride 1
    the two are the same program, and it counts as a convolution.

    >>> taps_with_padding(Axis(n=32, k=3, out=32, p=1))
    96
    >>> taps_with_padding(Axis(n=16, k=3, out=32, d=2, p=1))  # transposed, stride 2
    48
    """
    return axis.k * (axis.out if axis.d == 1 else axis.n)


def taps_of_gradient(axis: Axis) -> Dim:
    """Count the taps of a convolution that may be a gradient: as many as its layer has.

    >>> taps_of_gradient(Axis(n=16, k=32, out=3, d=2, p=1))  # that layer's, by its kernel
    48
    """
    return axis.out * axis.k if axis.d == 1 else _least(axis.n * axis.k, axis.n * axis.out)


def _taps(axis: Axis) -> int:
    """Count the taps of an axis without symbols."""
    o, t = np.arange(axis.out)[:, None], np.arange(axis.k)
    i = o * axis.s + t * axis.e - axis.p
    return int(np.sum((i >= 0) & (i % axis.d == 0) & (i // axis.d < axis.n)))


@functools.cache
def _line(axis: Axis, x: sympy.Symbol) -> tuple[int, int, int]:
    """Return (slope, constant, least x) of the line that the taps follow from the least x on."""
    terms = [(0, v) if isinstance(v, int) else _linear(v, x) for v in axis]

    def at(value: int) -> int:
        return _taps(Axis(*(a * value + b for a, b in terms)))

    # Beyond this value the borders of the window no longer meet.
    _, kernel, _, stride, up, dilation, padding = (abs(a) + abs(b) for a, b in terms)
    reach = kernel * dilation + padding + stride + up
    start = 48 + reach
    slope, far = at(start + 1) - at(start), at(start)
    if any(at(start + step) != far + slope * step for step in (2, 3, 5, 7, 48)):
        raise UserError(f"the taps of one axis are not linear in {x}: give a number for it")
    least = start
    while least > 1 and at(least - 1) == far + slope * (least - 1 - start):
        least -= 1
    return slope, far - slope * start, least


def _linear(length: Any, x: sympy.Symbol) -> tuple[int, int]:
    """Split a length into (a, b) of a·x + b."""
    a, b = length.coeff(x, 1), length.coeff(x, 0)
    if sympy.expand(length - a * x - b) != 0 or not (a.is_Integer and b.is_Integer):
        raise UserError(f"a length is {length}, not of the form a·{x} + b: give a number")
    return int(a), int(b)


def _least(*values: Dim) -> Dim:
    """Return the least of some values, at large values of their symbols."""

    def far(value: Dim) -> float:
        value = sympy.sympify(value)
        return float(value.subs(dict.fromkeys(value.free_symbols, 10**6)))

    return min(values, key=far)


def _conv(op: Op, ins: list[Shape], out: Shape, limits: Limits | None, gradient: bool) -> Count:
    """Count a convolution."""
    spec, p = op.params["dimension_numbers"], op.params
    lhs, rhs = ins
    pairs = out[spec.out_spec[0]] * out[spec.out_spec[1]] * rhs[spec.rhs_spec[1]]
    axes = [
        Axis(lhs[a], rhs[b], out[c], s, d, e, as_sympy(before))
        for a, b, c, s, d, e, (before, _) in zip(
            spec.lhs_spec[2:],
            spec.rhs_spec[2:],
            spec.out_spec[2:],
            p["window_strides"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            p["padding"],
            strict=True,
        )
    ]
    terms = pairs * math.prod(map(taps_of_gradient if gradient else taps_with_padding, axes))
    if gradient:
        return Count(multiply_adds=terms, flops=2 * terms)
    exact = pairs * math.prod(taps(axis, limits) for axis in axes)
    return Count(terms, exact, terms, 2 * terms)


def _dot(op: Op, ins: list[Shape], out: Shape) -> Count:
    """Count a dot product."""
    (contracted, _), _ = op.params["dimension_numbers"]
    terms = size(out) * size(ins[0][axis] for axis in contracted)
    return Count(terms, terms, terms, 2 * terms)


def _window(op: Op, ins: list[Shape], out: Shape, limits: Limits | None) -> Count:
    """Count a reduction over windows, or the gradient of a pool."""
    p = op.params
    ones = (1,) * len(out)
    axes = [
        Axis(n, k, o, s, d, e, as_sympy(before))
        for n, k, o, s, d, e, (before, _) in zip(
            ins[0] if not op.primitive.startswith("select") else ins[-1],
            p["window_dimensions"],
            out,
            p["window_strides"],
            p.get("base_dilation", ones),
            p.get("window_dilation", ones),
            p["padding"],
            strict=True,
        )
    ]
    if op.primitive.startswith("select"):  # a pool's gradient: a comparison a tap
        least = _least(size(out), size(ins[0]))
        return Count(flops=least * math.prod(p["window_dimensions"]))
    terms = math.prod(map(taps_with_padding, axes))
    return Count(terms, math.prod(taps(axis, limits) for axis in axes), flops=terms)


def count(
    op: Op, shapes: list[Shape], limits: Limits | None = None, *, gradient: bool = False
) -> Count | None:
    """Count one turn of an operation; None where the operation is not known.

    A product (convolution, dot product) makes one connection per term; a reduction or a pool one
    per value it takes in. FLOPs: two per multiply-add, one per elementwise operation (a comparison,
    a root or an exponential too), one per value reduced.

    Args:
      op: an operation of a program.
      shapes: of the program's values.
      limits: collects the least values of symbols from which formulas hold.
      gradient: whether the program holds gradients too; connections are then not counted.
    """
    ins = [() if v is None else shapes[v] for v in op.ins]
    out = shapes[op.outs[0]] if op.outs else ()
    name = op.primitive
    if name in DATA:
        return Count()
    if name == "conv_general_dilated":
        return _conv(op, ins, out, limits, gradient)
    if name == "dot_general":
        return _dot(op, ins, out)
    if name in WINDOWS:
        return _window(op, ins, out, limits)
    if name == "gather":
        return Count(size(out), size(out))
    if name in ELEMENTWISE:
        return Count(flops=size(out))
    if name == "clamp":
        return Count(flops=2 * size(out))
    if name == "integer_pow":
        power = abs(int(op.params["y"]))
        products = power.bit_length() + power.bit_count() - 2  # by squaring
        return Count(flops=size(out) * (max(products, 0) + (op.params["y"] < 0)))
    if name in REDUCE:
        return Count(size(ins[0]), size(ins[0]), flops=size(ins[0]))
    if name in SCATTER:
        return Count(flops=size(ins[2]))
    return None
