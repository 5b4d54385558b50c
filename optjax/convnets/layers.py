"""Layers as PyTorch defines them, on pictures (B, H, W, C), with masked batch statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike

from optjax.convnets.conv import conv, conv_transpose
from optjax.convnets.geometry import same_padding
from optjax.convnets.window import Window
from optjax.support.errors import UserError
from optjax.support.types import Array, Key, PyTree


def _window(size: tuple[int, int], kernel: int, stride: int) -> Window:
    """Make the window (H, W) → (H/s, W/s); an even kernel at stride 1 pads one more at the end."""
    if stride == 1:
        before = (kernel - 1) // 2
        edges = [(before, kernel - 1 - before)] * 2
    else:
        edges = [(p := same_padding(kernel, stride, n).padding, p) for n in size]
    return Window(size, (kernel, kernel), (stride, stride), (edges[0], edges[1]))


def _uniform_bias(fan_in: int):
    """Make an initialiser U(±1/√fan_in), PyTorch's default for biases."""

    def init(key: Key, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        known = isinstance(fan_in, int)  # else a symbol, and only shapes are needed
        bound = fan_in**-0.5 if known else jax.lax.rsqrt(jnp.asarray(fan_in, dtype))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _of_parameters(x: Array, dtype: DTypeLike | None) -> DTypeLike:
    """Return the parameters' dtype: the input's, or float32 under a `dtype` to compute in."""
    return x.dtype if dtype is None else jnp.float32


def _plus(y: Array, bias: Array) -> Array:
    """Add a bias in its own dtype, so that its gradient is summed over pixels in that dtype."""
    return (y.astype(bias.dtype) + bias.reshape(1, 1, 1, -1)).astype(y.dtype)


def _check_features(features: int) -> None:
    if features < 1:
        raise UserError(f"features is {features}: expected at least 1")


class Conv(nn.Module):
    """2-D convolution, H → H/s, weights and biases U(±1/√(k²·C_in)) as PyTorch initialises them.

    Attributes:
      features: channels out.
      kernel: k.
      stride: s, a divisor of H and W.
      dtype: to compute in, with parameters in float32; None: all in the input's.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolve, (B, H, W, C) → (B, H/s, W/s, features)."""
        _check_features(self.features)
        k, c, kept = self.kernel, x.shape[-1], _of_parameters(x, self.dtype)
        uniform = variance_scaling(1 / 3, "fan_in", "uniform")
        w = self.param("kernel", uniform, (k, k, c, self.features), kept)
        bias = self.param("bias", _uniform_bias(k * k * c), (self.features,), kept)
        x, w = (a.astype(self.dtype or x.dtype) for a in (x, w))
        y = conv(x, w, _window((x.shape[1], x.shape[2]), k, self.stride))
        return _plus(y, bias)


class ConvTranspose(nn.Module):
    """2-D transposed convolution, H → s·H, the adjoint of `Conv` with the same kernel and stride.

    Its kernel is stored as that convolution's, (k, k, out, in): PyTorch's weight (in, out, k, k)
    is ``kernel.transpose(3, 2, 0, 1)``. As in PyTorch, fan_in = out·k².

    Attributes:
      features: channels out.
      kernel: k.
      stride: s.
      dtype: as of `Conv`.
    """

    features: int
    kernel: int = 3
    stride: int = 2
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolve, (B, H, W, C) → (B, s·H, s·W, features)."""
        _check_features(self.features)
        k, c, kept = self.kernel, x.shape[-1], _of_parameters(x, self.dtype)
        uniform = variance_scaling(1 / 3, "fan_in", "uniform")
        shape = (k, k, self.features, c)
        w = self.param("kernel", uniform, shape, kept)
        bias = self.param("bias", _uniform_bias(k * k * self.features), (self.features,), kept)
        size = (x.shape[1] * self.stride, x.shape[2] * self.stride)
        x, w = (a.astype(self.dtype or x.dtype) for a in (x, w))
        y = conv_transpose(x, w, _window(size, k, self.stride))
        return _plus(y, bias)


class BatchNorm(nn.Module):
    """Batch normalisation, y = γ (x − μ)/√(σ² + ε) + δ, over the pictures that the mask counts.

    As PyTorch: ε = 1e-5, momentum 0.1 (running ← 0.9 running + 0.1 batch), and the running
    variance takes the unbiased estimate N/(N − 1) σ². A masked batch of b has exactly the
    statistics of a batch of b. Flax's own layer differs only in its biased running variance.

    Attributes:
      epsilon: ε.
      momentum: as above.
      dtype: of the result, with statistics and parameters in float32; None: all in the input's.

    Source: Ioffe and Szegedy (2015), algorithm 1.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        """Normalise (B, H, W, C) over the pictures that the mask, (B,) bool or None, counts."""
        c, out = x.shape[-1], self.dtype or x.dtype
        x = x.astype(_of_parameters(x, self.dtype))
        scale = self.param("scale", nn.initializers.ones, (c,), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), x.dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), x.dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,), x.dtype)
        if not train:
            mean, var = running_mean.value, running_var.value
        else:
            used = None if mask is None else mask.reshape(-1, 1, 1, 1)
            pixels = x.size // c
            if mask is not None:
                pixels = jnp.maximum(jnp.sum(mask), 1) * (pixels // x.shape[0])
            count = jnp.asarray(pixels).astype(x.dtype)

            def average(values: Array) -> Array:
                if used is not None:
                    values = jnp.where(used, values, jnp.zeros_like(values))
                return jnp.sum(values, axis=(0, 1, 2)) / count

            mean = average(x)
            var = average(jnp.square(x - mean.reshape(1, 1, 1, -1)))
            if not self.is_initializing():
                m = self.momentum
                unbiased = var * (count / jnp.maximum(count - 1, jnp.ones_like(count)))
                running_mean.value = (1 - m) * running_mean.value + m * mean
                running_var.value = (1 - m) * running_var.value + m * unbiased
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        y = x * gain.reshape(1, 1, 1, -1) + (bias - mean * gain).reshape(1, 1, 1, -1)
        return y.astype(out)


def population_statistics(model: nn.Module, variables: PyTree, inputs: Array, batch: int) -> PyTree:
    """Compute the batch statistics of fixed weights over many inputs, without running averages.

    μ = E[μ_B], σ² = E[N/(N − 1) σ_B²] over the whole batches B of `inputs`: the limit of
    `BatchNorm`'s running averages for fixed weights. While the weights move, the averages lag.
    A batch takes every m-th input: inputs side by side may be alike, and vary too little.

    Args:
      model: one whose statistics are kept by `BatchNorm`, called with ``train=True``.
      variables: {"params": ..., "batch_stats": ...}.
      inputs: (n, H, W, C).
      batch: pictures a batch, at most n; the remainder of n is not used: m batches.

    Returns:
      The new "batch_stats".

    Source: Ioffe and Szegedy (2015), algorithm 2, steps 8 to 10.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.arange(4.0).reshape(4, 1, 1, 1)
    >>> net = BatchNorm()
    >>> fixed = net.init(jax.random.key(0), x, train=False)
    >>> stats = population_statistics(net, fixed, x, batch=2)
    >>> round(float(stats["mean"][0]), 5), round(float(stats["var"][0]), 5)
    (1.5, 2.0)
    """
    whole = inputs[: len(inputs) - len(inputs) % batch].reshape(batch, -1, *inputs.shape[1:])
    batches = jnp.swapaxes(whole, 0, 1)
    # From running averages of zero, one batch leaves momentum times its own statistics.
    zero = jax.tree.map(jnp.zeros_like, variables["batch_stats"])

    def one(x: Array) -> PyTree:
        frozen = {"params": variables["params"], "batch_stats": zero}
        return model.apply(frozen, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return jax.tree.map(
        lambda leaf: jnp.mean(leaf, axis=0) / BatchNorm.momentum, jax.lax.map(one, batches)
    )


@jax.named_scope("max_pool")
def max_pool(x: Array) -> Array:
    """Max-pool 2 × 2 by pairs, (B, H, W, C) → (B, H/2, W/2, C).

    The gradient is many times faster on the CPU than that of a windowed reduction. Equal maxima
    share it; PyTorch gives it to the first.

    Raises:
      UserError: H or W is odd.
    """
    b, h, w, c = x.shape
    if h % 2 or w % 2:
        raise UserError(f"2 x 2 pooling does not divide a picture of {h} x {w}; take even sizes")
    return _largest(x.reshape(b, h // 2, 2, w // 2, 2, c))


@jax.custom_jvp
def _largest(x: Array) -> Array:
    """Return the maximum over axes 2 and 4, of two entries each.

    The derivative compares entries with each other. JAX's own compares them with the maximum: where
    XLA computes an entry twice, with two roundings, none equals it, and the derivative is 0/0.
    """
    return jnp.max(x, axis=(2, 4))


@_largest.defjvp
def _largest_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    for axis in (2, 3):
        a, b, da, db = (
            jax.lax.index_in_dim(v, i, axis, keepdims=False) for v in (x, dx) for i in (0, 1)
        )
        x = jnp.maximum(a, b)
        dx = jnp.where(a > b, da, jnp.where(a < b, db, (da + db) / 2))
    return x, dx


@jax.named_scope("upsample")
def upsample(x: Array) -> Array:
    """Upsample by 2 to the nearest neighbour, (B, H, W, C) → (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
