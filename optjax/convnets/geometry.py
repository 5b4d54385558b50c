"""Padding arithmetic: the sizes that convolutions give, and the paddings that give a size.

One axis at a time, in Python integers: a size is static, so nothing here needs an array. For the
networks, a size of `same_padding` may be one of JAX's symbols. The conventions are PyTorch's, whose
transposed convolution takes padding *off* its output.
"""

from typing import NamedTuple

from optjax.support.errors import UserError


class Padding(NamedTuple):
    """The padding of one axis, in pixels."""

    padding: int
    output_padding: int = 0  # of a transposed convolution
    dilation: int = 1  # of the kernel


def _check(least: int, **values: int) -> None:
    for name, value in values.items():
        # bool is an int, but a padding of True is a mistake.
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(
                f"{name.replace('_', ' ')} is {value!r}; give a whole number of at least {least}"
            )


def conv_output_size(
    size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> int:
    """Compute the output size of a convolution along one axis, in pixels.

    out = ⌊(in + 2p − d(k − 1) − 1)/s⌋ + 1

    Args:
      size: pixels in.
      kernel: taps k.
      stride: pixels s from one output to the next.
      padding: zeros p added at *each* end.
      dilation: pixels d from one tap to the next.

    Raises:
      UserError: an argument is no whole number in its range, or the kernel does not fit.

    >>> conv_output_size(32, kernel=4, stride=2, padding=1)
    16
    """
    _check(1, size=size, kernel=kernel, stride=stride, dilation=dilation)
    _check(0, padding=padding)
    extent = dilation * (kernel - 1) + 1
    if size + 2 * padding < extent:
        raise UserError(
            f"a kernel that spans {extent} pixels does not fit in {size} + 2 · {padding}; "
            f"pad by at least {-(-(extent - size) // 2)}"
        )
    return (size + 2 * padding - extent) // stride + 1


def transposed_output_size(
    size: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    dilation: int = 1,
) -> int:
    """Compute the output size of a transposed convolution along one axis, in pixels.

    out = (in − 1)s − 2p + d(k − 1) + 1 + output padding

    Args:
      size: pixels in.
      kernel: taps k.
      stride: pixels s between the places where two neighbouring inputs land.
      padding: pixels p taken off *each* end of the output.
      output_padding: pixels added at the far end; less than the larger of s and d.
      dilation: pixels d from one tap to the next.

    Raises:
      UserError: an argument is out of its range, or no pixel would be left.

    >>> transposed_output_size(16, kernel=5, stride=2, padding=2, output_padding=1)
    32
    """
    _check(1, size=size, kernel=kernel, stride=stride, dilation=dilation)
    _check(0, padding=padding, output_padding=output_padding)
    if output_padding >= max(stride, dilation):
        raise UserError(
            f"output padding is {output_padding}; it must be less than {max(stride, dilation)}, "
            f"the larger of stride {stride} and dilation {dilation}"
        )
    out = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + output_padding
    if out < 1:
        raise UserError(
            f"padding {padding} leaves {out} pixels of a transposed convolution of {size}; "
            f"take at least {-(-(1 - out) // 2)} less"
        )
    return out


def _conv_paddings(k: int, stride: int, size_in: int, size_out: int, dilation: int) -> list:
    # ⌊(in + 2p − e)/s⌋ + 1 = out  ⇔  s(out − 1) ≤ in + 2p − e < s·out, e = d(k − 1) + 1
    extent = dilation * (k - 1) + 1
    twice_least = stride * (size_out - 1) - size_in + extent
    twice_most = stride * size_out - 1 - size_in + extent
    every = range(max(0, -(-twice_least // 2)), twice_most // 2 + 1)
    return [Padding(p, 0, dilation) for p in every]


def _transposed_paddings(k: int, stride: int, size_in: int, size_out: int, dilation: int) -> list:
    # (in − 1)s − 2p + e + o = out  ⇔  2p = (in − 1)s + e − out + o, with 0 ≤ o < max(s, d)
    spare = (size_in - 1) * stride + dilation * (k - 1) + 1 - size_out
    return [
        Padding((spare + o) // 2, o, dilation)
        for o in range(max(stride, dilation))
        if spare + o >= 0 and (spare + o) % 2 == 0
    ]


def solve_padding(
    kernel: int,
    stride: int,
    size_in: int,
    size_out: int,
    transposed: bool = False,
    dilation: int | None = 1,
) -> list[Padding]:
    """Find every padding from `size_in` to `size_out`, smallest dilation and padding first.

    With e = d(k − 1) + 1, the pixels that the kernel spans,

    convolution: s(out − 1) ≤ in + 2p − e < s·out
    transposed:  2p = (in − 1)s + e − out + o, 0 ≤ o < max(s, d)

    Args:
      kernel: taps k.
      stride: pixels s.
      size_in: pixels in.
      size_out: pixels wanted.
      transposed: whether the convolution is a transposed one.
      dilation: pixels d from one tap to the next; None: all whose kernel fits into the larger
        of the two pictures.

    Raises:
      UserError: there is no such padding; the message says why.

    >>> solve_padding(4, 2, 32, 16)
    [Padding(padding=1, output_padding=0, dilation=1)]
    >>> [tuple(found) for found in solve_padding(5, 2, 16, 32, transposed=True)]
    [(2, 1, 1)]
    >>> [tuple(found) for found in solve_padding(3, 1, 8, 8, dilation=None)]
    [(1, 0, 1), (2, 0, 2), (3, 0, 3)]
    """
    _check(1, kernel=kernel, stride=stride, size_in=size_in, size_out=size_out)
    solve = _transposed_paddings if transposed else _conv_paddings
    if dilation is None:
        most = (max(size_in, size_out) - 1) // (kernel - 1) if kernel > 1 else 1
        dilations = range(1, max(most, 1) + 1)
    else:
        _check(1, dilation=dilation)
        dilations = range(dilation, dilation + 1)
    solutions = [found for d in dilations for found in solve(kernel, stride, size_in, size_out, d)]
    if solutions:
        return sorted(solutions, key=lambda found: (found.dilation, found))
    extent = dilations[0] * (kernel - 1) + 1
    name = "transposed convolution" if transposed else "convolution"
    if transposed:
        spread = max(stride, dilations[0])
        largest = (size_in - 1) * stride + extent + spread - 1
        why = (
            f"without padding and with the largest output padding it gives {largest}"
            if largest < size_out
            else f"output sizes go in twos from {largest - spread + 1}, "
            "and stride 1 has no output padding to make up the odd pixel"
        )
    else:
        # With p = 0 too many outputs already, or two neighbouring p that step over the target.
        unpadded = (size_in - extent) // stride + 1
        why = (
            f"without padding it gives {unpadded} already"
            if size_in >= extent and unpadded > size_out
            else "each step of padding adds two pixels, which steps over that size"
        )
    given = f", dilation {dilation}" if dilation not in (None, 1) else ""
    raise UserError(
        f"no padding takes {size_in} to {size_out} with a {name} of kernel {kernel}, "
        f"stride {stride}{given}: {why}; change the kernel or the stride"
    )


def same_padding(kernel: int, stride: int, size: int) -> Padding:
    """Find the smallest padding that takes `size` to `size`/`stride` by convolution, and back.

    The convolution and the transposed convolution back share `padding`; the second alone uses
    `output_padding`, the smallest for this padding.

    Args:
      kernel: taps k.
      stride: pixels s, a divisor of `size`.
      size: pixels in, and pixels back out.

    Raises:
      UserError: `stride` does not divide `size`, or no padding serves both ways.

    >>> [tuple(same_padding(k, stride=2, size=32)) for k in (3, 4)]
    [(1, 1, 1), (1, 0, 1)]
    """
    _check(1, kernel=kernel, stride=stride)
    if isinstance(size, int):
        _check(1, size=size)
    if size % stride:
        raise UserError(
            f"stride {stride} does not divide size {size}; take a size of {size - size % stride} "
            f"or {size - size % stride + stride}"
        )
    if not isinstance(size, int):
        size = stride * kernel  # which paddings serve does not depend on the size
    small = size // stride
    down = {p.padding for p in solve_padding(kernel, stride, size, small)}
    up = solve_padding(kernel, stride, small, size, transposed=True)
    both = [p for p in up if p.padding in down]
    if not both:
        raise UserError(
            f"no one padding takes {size} to {small} and back with kernel {kernel}, "
            f"stride {stride}: the convolution wants {sorted(down)}, the transposed one "
            f"{sorted({p.padding for p in up})}; change the kernel or the stride"
        )
    return both[0]
