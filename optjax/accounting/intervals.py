"""The pixels that outputs see along one axis, as intervals that repeat, and windows over them.

An output o sees the pixels first(o) to last(o). Through convolutions, pools and upsamplings both
repeat: first(o + P) = first(o) + Q, and last likewise, so that P of each are enough. Q/P is the
effective stride. Borders are left out: the axis has no end.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from optjax.support.errors import UserError


class Reach(NamedTuple):
    """The pixels that outputs 0 … P − 1 see along one axis; output o + P sees `shift` further."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    shift: int

    def at(self, o: int) -> tuple[int, int]:
        """Return the (first, last) pixel of any output o; pixels off the picture are padding."""
        turn, phase = divmod(o, len(self.first))
        return self.first[phase] + turn * self.shift, self.last[phase] + turn * self.shift

    @property
    def size(self) -> int:
        """Pixels seen by the output that sees most."""
        return max(b - a + 1 for a, b in zip(self.first, self.last, strict=True))

    @property
    def stride(self) -> Fraction:
        """Pixels from one output's view to the next's."""
        return Fraction(self.shift, len(self.first))

    @property
    def offset(self) -> Fraction:
        """The middle of output 0's view, in pixels from the middle of pixel 0."""
        return Fraction(self.first[0] + self.last[0], 2)


IDENTITY = Reach((0,), (0,), 1)


def windowed(
    reach: Reach, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, up: int = 1
) -> Reach:
    """Pass a reach through a window: output o sees inputs i with i·up = o·stride + t·dilation − p.

    Args:
      reach: of the inputs i.
      kernel: taps, t = 0, …, kernel − 1.
      stride: of the window.
      padding: p.
      dilation: of the window.
      up: zeros inserted between inputs, plus one (a transposed convolution's stride).

    Raises:
      UserError: an output sees no input.

    >>> windowed(IDENTITY, kernel=3, stride=2, padding=1)
    Reach(first=(-1,), last=(1,), shift=2)
    """
    period = len(reach.first) * up
    period //= math.gcd(period, stride)
    first, last = [], []
    for o in range(period):
        at = [o * stride + t * dilation - padding for t in range(kernel)]
        seen = [reach.at(i // up) for i in at if i % up == 0]
        if not seen:
            raise UserError(
                f"output {o} of a window of {kernel} taps over inputs {up} apart sees no input"
            )
        first.append(min(a for a, _ in seen))
        last.append(max(b for _, b in seen))
    after = period * stride // up
    return Reach(tuple(first), tuple(last), reach.at(after)[0] - reach.at(0)[0])


def repeated(reach: Reach, times: int) -> Reach:
    """Pass a reach through nearest upsampling: output o sees the pixels of input ⌊o/times⌋.

    >>> repeated(IDENTITY, 2)
    Reach(first=(0, 0), last=(0, 0), shift=1)
    """
    first = tuple(a for a in reach.first for _ in range(times))
    last = tuple(b for b in reach.last for _ in range(times))
    return Reach(first, last, reach.shift)


def union(a: Reach, b: Reach) -> Reach | None:
    """Unite the reaches of values that are added or concatenated; None if their strides differ."""
    if a.stride != b.stride:
        return None
    period = math.lcm(len(a.first), len(b.first))
    at = [(a.at(o), b.at(o)) for o in range(period)]
    return Reach(
        tuple(min(x[0], y[0]) for x, y in at),
        tuple(max(x[1], y[1]) for x, y in at),
        a.shift * period // len(a.first),
    )
