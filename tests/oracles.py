"""Independent references: slow, obviously right, built another way than what they check."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def transposed_convolution(y, weight, stride, padding, output_padding):
    """PyTorch's definition: each small pixel scatters its kernel into the large picture.

    y: (B, h, w, C_in); weight: PyTorch's (C_in, C_out, k, k). Returns (B, H, W, C_out).
    """
    batch, h, w, _ = y.shape
    c_out, k = weight.shape[1], weight.shape[2]
    full = np.zeros((batch, (h - 1) * stride + k, (w - 1) * stride + k, c_out))
    for i in range(h):
        for j in range(w):
            stamp = np.einsum("bc,cokl->bklo", y[:, i, j], weight)
            full[:, i * stride : i * stride + k, j * stride : j * stride + k] += stamp
    height = (h - 1) * stride - 2 * padding + k + output_padding
    width = (w - 1) * stride - 2 * padding + k + output_padding
    framed = np.zeros((batch, height + padding, width + padding, c_out))
    rows, columns = min(full.shape[1], height + padding), min(full.shape[2], width + padding)
    framed[:, :rows, :columns] = full[:, :rows, :columns]
    return framed[:, padding : padding + height, padding : padding + width]


def convolution(x, w, stride, before, out):
    """The sum over taps, one output pixel at a time. x: (B, H, W, C); w: (k, k, C, F)."""
    k = w.shape[0]
    y = np.zeros((x.shape[0], out, out, w.shape[3]))
    for i in range(out):
        for j in range(out):
            for a in range(k):
                for b in range(k):
                    row, column = i * stride + a - before, j * stride + b - before
                    if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                        y[:, i, j] += x[:, row, column] @ w[a, b]
    return y


def central_difference(f, x, step):
    """(f(x + h) − f(x − h)) / 2h."""
    return (f(x + step) - f(x - step)) / (2 * step)


RMSPROP = functools.partial(optax.rmsprop, eps_in_sqrt=False)
"""RMSProp as the source and PyTorch write it: ε outside the root."""


def rmsprop_outside(gradient, w, learning_rate, decay, eps, steps):
    """The source's RMSProp, written out: v ← βv + (1 − β)g², w ← w − ηg/(√v + ε)."""
    v, path = np.zeros_like(w), []
    for _ in range(steps):
        g = gradient(w)
        v = decay * v + (1 - decay) * g**2
        w = w - learning_rate * g / (np.sqrt(v) + eps)
        path.append(w)
    return np.array(path)


def cubic_derivatives(f):
    """(value, both gradients) of a cubic of f(x, w), and their derivatives along a line."""

    def gradients(x, w):
        return jax.value_and_grad(lambda x, w: jnp.sum(f(x, w) ** 3), (0, 1))(x, w)

    return lambda x, w: jax.jvp(gradients, (x, w), (jnp.cos(x), w))
