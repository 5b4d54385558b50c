"""The static sizes of a convolution, and its layout."""

from typing import NamedTuple

Pair = tuple[int, int]

LAYOUT = ("NHWC", "HWIO", "NHWC")


class Window(NamedTuple):
    """The static sizes of a convolution: which pixels each output sees."""

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
