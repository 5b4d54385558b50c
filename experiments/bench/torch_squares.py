"""Least-squares runs in PyTorch, batched over runs, as one writes them there; needs torch."""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]


def step(w, v, rate, picks, X, t):
    """A step of RMSProp for every run, each on its own gathered rows."""
    rows = X[picks]
    residual = torch.bmm(rows, w[:, :, None])[..., 0] - t[picks]
    g = torch.bmm(residual[:, None], rows)[:, 0] * (2 / picks.shape[1])
    v = 0.9 * v + 0.1 * g * g
    return w - rate * g * torch.rsqrt(v + 1e-8), v


def trainer(
    X: np.ndarray, t: np.ndarray, rates: np.ndarray, batch_size: int, compiled: bool
) -> Callable[[int], torch.Tensor]:
    """A function of the number of steps that trains all runs from zero."""
    X_, t_ = torch.from_numpy(X), torch.from_numpy(t)
    rate = torch.from_numpy(np.array(rates, np.float32))[:, None]
    one = torch.compile(step, dynamic=False) if compiled else step

    def train(steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        w = torch.zeros(len(rates), X.shape[1])
        v = torch.zeros_like(w)
        with torch.no_grad():
            for _ in range(steps):
                picks = torch.randint(0, len(X), (len(rates), batch_size), generator=generator)
                w, v = one(w, v, rate, picks, X_, t_)
        return w

    return train
