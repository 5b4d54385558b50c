"""The three networks in PyTorch, as one writes them there; needs torch."""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]


def _down(features_in: int, features: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(features_in, features, 3, stride=2, padding=1),
        nn.BatchNorm2d(features),
        nn.ReLU(),
    )


def _up(features_in: int, features: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(features_in, features, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(features),
        nn.ReLU(),
    )


def _resized(features_in: int, features: int, resize: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(features_in, features, 3, padding=1),
        resize,
        nn.BatchNorm2d(features),
        nn.ReLU(),
    )


def pool_upsample(nf: int, nc: int) -> nn.Module:
    """Convolutions with max-pooling down and nearest upsampling up."""
    return nn.Sequential(
        _resized(1, nf, nn.MaxPool2d(2)),
        _resized(nf, 2 * nf, nn.MaxPool2d(2)),
        _resized(2 * nf, nf, nn.Upsample(scale_factor=2)),
        _resized(nf, nc, nn.Upsample(scale_factor=2)),
        nn.Conv2d(nc, nc, 3, padding=1),
    )


def conv_transpose(nf: int, nc: int) -> nn.Module:
    """Strided convolutions down and transposed convolutions up."""
    return nn.Sequential(
        _down(1, nf),
        _down(nf, 2 * nf),
        _up(2 * nf, nf),
        _up(nf, nc),
        nn.Conv2d(nc, nc, 3, padding=1),
    )


class TorchUNet(nn.Module):
    """`conv_transpose` with skip connections from stage 1 and from the input."""

    def __init__(self, nf: int, nc: int) -> None:
        super().__init__()
        self.down1, self.down2 = _down(1, nf), _down(nf, 2 * nf)
        self.up1, self.up2 = _up(2 * nf, nf), _up(2 * nf, nc)
        self.last = nn.Conv2d(nc + 1, nc, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        y = self.up1(self.down2(first))
        y = self.up2(torch.cat([y, first], dim=1))
        return self.last(torch.cat([y, x], dim=1))


NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "pool-upsample": pool_upsample,
    "conv-transpose": conv_transpose,
    "unet": TorchUNet,
}


def has_gpu() -> bool:
    """Whether this build of torch sees a GPU."""
    return torch.cuda.is_available()


def trainer(
    net: nn.Module,
    grey: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    rate: float,
    gpu: bool,
    channels_last: bool = False,
    compiled: bool = False,
) -> Callable[[int], float]:
    """A function that takes so many steps of Adam on shuffled batches and gives the last loss.

    Args:
      net: (B, 1, H, W) → (B, NC, H, W). grey: (n, H, W, 1). labels: (n, H, W).
      channels_last: how the weights and the batches lie in memory. compiled: by `torch.compile`.
    """
    device = torch.device("cuda" if gpu else "cpu")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(device, memory_format=layout).train()
    forward = torch.compile(net) if compiled else net
    x = torch.from_numpy(grey.transpose(0, 3, 1, 2).copy()).to(device)
    labels_long = torch.from_numpy(labels.astype(np.int64)).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    order, at = torch.randperm(len(x), device=device), 0

    def train(steps: int) -> float:
        nonlocal order, at
        loss = torch.zeros((), device=device)
        for _ in range(steps):
            if at + batch_size > len(x):
                order, at = torch.randperm(len(x), device=device), 0
            picks = order[at : at + batch_size]
            at += batch_size
            optimizer.zero_grad()
            scores = forward(x[picks].contiguous(memory_format=layout))
            loss = F.cross_entropy(scores, labels_long[picks])
            loss.backward()
            optimizer.step()
        return loss.item()  # waits for the device

    return train
