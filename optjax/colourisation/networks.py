"""The three networks of the source: pictures (B, H, W, C) in, scores of K colours a pixel out.

Inside a block the order is the source's: (transposed) convolution, then pool or upsampling, then
batch normalisation, then ReLU. H and W are multiples of 4. The layers compute in `dtype` (bfloat16)
if there is one; then parameters and batch statistics stay in float32, and the scores are in the
input's dtype.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from optjax.convnets.layers import BatchNorm, Conv, ConvTranspose, max_pool, upsample
from optjax.support.errors import UserError, nearest
from optjax.support.types import Array


def _layers(kernel: int, dtype: DTypeLike | None) -> tuple[Any, Any, Any]:
    """Return the convolution, the transposed convolution and the normalisation of a network."""
    same = {"kernel": kernel, "dtype": dtype}
    return partial(Conv, **same), partial(ConvTranspose, **same), partial(BatchNorm, dtype=dtype)


class EncoderDecoder(nn.Module):
    """Halve a picture twice, double it back twice, score its colours.

    Whatever the ways down and up, the parameters are as many: 49,728 at the defaults.

    Attributes:
      filters: NF, channels of the first stage.
      colours: K.
      kernel: k of every layer.
      dtype: to compute in; None: the input's.
      down: ``"max-pool"`` after a convolution, or a convolution of ``"stride"`` 2.
      up: ``"nearest"`` upsampling after a convolution, or a ``"transpose"``d one.
    """

    filters: int = 32
    colours: int = 24
    kernel: int = 3
    dtype: DTypeLike | None = None
    down: str = "max-pool"
    up: str = "nearest"

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Score the colours, (B, H, W, C) → (B, H, W, K); mask (B,) bool or None."""
        given, nf, (conv, transposed, norm) = (
            x.dtype,
            self.filters,
            _layers(self.kernel, self.dtype),
        )
        for features in (nf, 2 * nf):
            strided = self.down == "stride"
            y = conv(features, stride=2)(x) if strided else max_pool(conv(features)(x))
            x = nn.relu(norm()(y, train, mask))
        for features in (nf, self.colours):
            doubled = self.up == "transpose"
            y = transposed(features)(x) if doubled else upsample(conv(features)(x))
            x = nn.relu(norm()(y, train, mask))
        return conv(self.colours)(x).astype(given)


class PoolUpsampleNet(EncoderDecoder):
    """Convolutions with max-pooling on the way down and nearest upsampling on the way up.

    Source: the source document, section 4, part A.
    """


class ConvTransposeNet(EncoderDecoder):
    """Strided convolutions on the way down and transposed convolutions on the way up.

    Source: the source document, section 4, part B.
    """

    down: str = "stride"
    up: str = "transpose"


class UNet(nn.Module):
    """ConvTransposeNet with skip connections from stage 1 and from the input.

    Source: Ronneberger et al. (2015); the source document, section 4, part C. 56,856 parameters.

    Attributes:
      filters, colours, kernel, dtype: as of `EncoderDecoder`.
      skips: which connections there are, of ``"stage"`` and ``"input"``.
    """

    filters: int = 32
    colours: int = 24
    kernel: int = 3
    dtype: DTypeLike | None = None
    skips: tuple[str, ...] = ("stage", "input")

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Score the colours, (B, H, W, C) → (B, H, W, K); mask (B,) bool or None."""
        nf, (conv, up, norm) = self.filters, _layers(self.kernel, self.dtype)
        first = nn.relu(norm()(conv(nf, stride=2)(x), train, mask))
        y = nn.relu(norm()(conv(2 * nf, stride=2)(first), train, mask))
        y = nn.relu(norm()(up(nf)(y), train, mask))
        if "stage" in self.skips:
            y = jnp.concatenate([y, first], axis=-1)
        y = nn.relu(norm()(up(self.colours)(y), train, mask))
        if "input" in self.skips:
            y = jnp.concatenate([y, x.astype(y.dtype)], axis=-1)
        return conv(self.colours)(y).astype(x.dtype)


class ResidualNet(nn.Module):
    """Residual blocks on half and quarter size, and each pixel's own grey level in the scores.

    The scores are a table's, of the pixel's grey level, plus those of a U: so the table can be the
    baseline that asks for a pixel's grey level alone, and the U adds what its surroundings say.

    Attributes:
      filters: NF, channels at half size.
      colours, kernel, dtype: as of the others.
      blocks: residual blocks at each of the two sizes.
      levels: of the table, in equal parts of [0, 1]; 0: no table.
    """

    filters: int = 32
    colours: int = 24
    kernel: int = 3
    dtype: DTypeLike | None = None
    blocks: int = 1
    levels: int = 256

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Score the colours, (B, H, W, 1) → (B, H, W, K); mask (B,) bool or None."""
        nf, (conv, up, norm) = self.filters, _layers(self.kernel, self.dtype)

        def block(y: Array, features: int) -> Array:
            z = conv(features)(nn.relu(norm()(y, train, mask)))
            return y + conv(features)(nn.relu(norm()(z, train, mask)))

        full = nn.relu(norm()(conv(nf // 2)(x), train, mask))
        half = conv(nf, stride=2)(full)
        for _ in range(self.blocks):
            half = block(half, nf)
        y = conv(2 * nf, stride=2)(nn.relu(norm()(half, train, mask)))
        for _ in range(self.blocks):
            y = block(y, 2 * nf)
        y = half + up(nf)(nn.relu(norm()(y, train, mask)))
        y = nn.relu(norm()(up(nf // 2)(nn.relu(norm()(y, train, mask))), train, mask))
        scores = conv(self.colours)(jnp.concatenate([y, full], axis=-1)).astype(x.dtype)
        if not self.levels:
            return scores
        # Grey is in thirds of 1/256: the thousandth keeps whole levels from rounding down.
        level = jnp.floor(x[..., 0] * self.levels + 1e-3).astype(jnp.int32)
        shape = (self.levels, self.colours)
        table = self.param("table", nn.initializers.zeros, shape, x.dtype)
        return scores + table[jnp.clip(level, 0, self.levels - 1)]


MODELS: dict[str, type[EncoderDecoder] | type[UNet]] = {
    "pool-upsample": PoolUpsampleNet,
    "conv-transpose": ConvTransposeNet,
    "unet": UNet,
}
"""The source's networks."""

NETWORKS: dict[str, Any] = {**MODELS, "residual": ResidualNet}
"""Those and ours."""


def model(
    name: str,
    *,
    filters: int = 32,
    colours: int = 24,
    kernel: int = 3,
    dtype: DTypeLike | None = None,
) -> nn.Module:
    """Make a network by its name.

    Args:
      name: one of `NETWORKS`.
      filters: channels of the first layer.
      colours: K.
      kernel: k of every layer.
      dtype: to compute in; None: the input's.

    Raises:
      UserError: an unknown name, fewer than one filter or colour, a kernel that is not 3, 4, 5, 7.

    >>> type(model("unet")).__name__
    'UNet'
    """
    if name not in NETWORKS:
        raise UserError(f"unknown net {name!r}: {nearest(name, NETWORKS)}")
    for setting, value in (("filters", filters), ("colours", colours)):
        if value < 1:
            raise UserError(f"{setting} is {value}: expected at least 1")
    if kernel not in (3, 4, 5, 7):
        raise UserError(f"kernel is {kernel}: expected 3, 4, 5 or 7")
    return NETWORKS[name](filters=filters, colours=colours, kernel=kernel, dtype=dtype)
