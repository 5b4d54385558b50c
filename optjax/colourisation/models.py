"""The three networks of the source: grey (B, H, W, NIC) in, scores of NC colours a pixel out.

Inside a block the order is the source's: (transposed) convolution, then pool or upsampling, then
batch normalisation, then ReLU. NF filters, NC colours; H and W are multiples of 4.
"""

import flax.linen as nn
import jax.numpy as jnp

from optjax.convnets.layers import BatchNorm, Conv, ConvTranspose, max_pool, upsample
from optjax.errors import UserError, nearest
from optjax.types import Array


class PoolUpsampleNet(nn.Module):
    """Convolutions with max-pooling on the way down and nearest upsampling on the way up.

    Source: the source document, section 4, part A. 49,728 parameters at the defaults.
    """

    filters: int = 32
    colours: int = 24
    kernel: int = 3

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """(B, H, W, NIC) → (B, H, W, NC)."""
        nf, k = self.filters, self.kernel
        for features in (nf, 2 * nf):
            x = nn.relu(BatchNorm()(max_pool(Conv(features, k)(x)), train, mask))
        for features in (nf, self.colours):
            x = nn.relu(BatchNorm()(upsample(Conv(features, k)(x)), train, mask))
        return Conv(self.colours, k)(x)


class ConvTransposeNet(nn.Module):
    """Strided convolutions on the way down and transposed convolutions on the way up.

    Source: the source document, section 4, part B. 49,728 parameters at the defaults.
    """

    filters: int = 32
    colours: int = 24
    kernel: int = 3

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """(B, H, W, NIC) → (B, H, W, NC)."""
        nf, k = self.filters, self.kernel
        for features in (nf, 2 * nf):
            x = nn.relu(BatchNorm()(Conv(features, k, stride=2)(x), train, mask))
        for features in (nf, self.colours):
            x = nn.relu(BatchNorm()(ConvTranspose(features, k)(x), train, mask))
        return Conv(self.colours, k)(x)


class UNet(nn.Module):
    """ConvTransposeNet with skip connections from stage 1 and from the input.

    Source: Ronneberger et al. (2015); the source document, section 4, part C. 56,856 parameters.
    """

    filters: int = 32
    colours: int = 24
    kernel: int = 3

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """(B, H, W, NIC) → (B, H, W, NC)."""
        nf, k = self.filters, self.kernel
        first = nn.relu(BatchNorm()(Conv(nf, k, stride=2)(x), train, mask))
        y = nn.relu(BatchNorm()(Conv(2 * nf, k, stride=2)(first), train, mask))
        y = nn.relu(BatchNorm()(ConvTranspose(nf, k)(y), train, mask))
        y = jnp.concatenate([y, first], axis=-1)
        y = nn.relu(BatchNorm()(ConvTranspose(self.colours, k)(y), train, mask))
        return Conv(self.colours, k)(jnp.concatenate([y, x], axis=-1))


MODELS: dict[str, type[PoolUpsampleNet] | type[ConvTransposeNet] | type[UNet]] = {
    "pool-upsample": PoolUpsampleNet,
    "conv-transpose": ConvTransposeNet,
    "unet": UNet,
}


def model(name: str, *, filters: int = 32, colours: int = 24, kernel: int = 3) -> nn.Module:
    """A network by its name.

    Raises:
      UserError: an unknown name, fewer than one filter or colour, a kernel that is not 3, 4, 5, 7.

    >>> type(model("unet")).__name__
    'UNet'
    """
    if name not in MODELS:
        raise UserError(f"unknown net {name!r}: {nearest(name, MODELS)}")
    for what, value in (("filters", filters), ("colours", colours)):
        if value < 1:
            raise UserError(f"{what} is {value}: expected at least 1")
    if kernel not in (3, 4, 5, 7):
        raise UserError(f"kernel is {kernel}: expected 3, 4, 5 or 7")
    return MODELS[name](filters=filters, colours=colours, kernel=kernel)
