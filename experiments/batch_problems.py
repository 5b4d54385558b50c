"""The problems on which the experiments about batch sizes train."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from optjax.colourisation.palette import grey, kmeans_palette, nearest_colour
from optjax.colourisation.pictures import load_pictures
from optjax.run.batching import Batch
from optjax.run.problems import Data, LossFn, Metrics
from optjax.support.errors import UserError
from optjax.support.types import HParams, PyTree


@dataclass(frozen=True)
class WholeLoss:
    """The training loss of all examples as one batch, in training mode: no luck of a draw.

    In evaluation mode the running averages of a network of few steps would lag.
    """

    loss: LossFn

    def __call__(
        self, params: PyTree, model_state: PyTree, data: Data, hparams: HParams
    ) -> Metrics:
        batch = Batch(data.examples, None, jax.random.key(0), data.shared)
        return {"whole_loss": self.loss(params, model_state, batch, hparams)[0]}


class Squares(NamedTuple):
    """Least squares whose curvatures spread over a factor of 100."""

    X: NDArray[np.floating]  # (n, d)
    t: NDArray[np.floating]  # (n,), noise of variance 1
    least: float  # of the mean square
    cap: float  # 2/λ_max, for λ_max = 2σ²_max/n


def spread_squares(n: int, d: int, seed: int, signal: float = 1.0) -> Squares:
    """Columns of scales 1 to 1/10, weights of standard deviation `signal`.

    >>> spread_squares(20, 3, 0).X.shape
    (20, 3)
    """
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * np.geomspace(1, 0.1, d)
    t = X @ (signal * rng.normal(size=d)) + rng.normal(size=n)
    least = float(np.mean((t - X @ np.linalg.lstsq(X, t, rcond=None)[0]) ** 2))
    return Squares(X, t, least, float(n / np.linalg.norm(X, 2) ** 2))


def drawn_tiles(
    data: str | None,
    count: int,
    seed: int,
    batches: tuple[int, ...],
    *,
    size: int = 32,
    crop: int | None = None,
    colours: int = 24,
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Grey levels (n, H, W, 1) and labels (n, H, W) of training tiles drawn at random.

    Args:
      data, size: as `load_pictures` takes them. count: tiles, or what there is.
      batches: none may be larger than the number of tiles.
      crop: side of a square cut at random from each; None for the whole tile.
      colours: of the palette.

    Raises:
      UserError: a batch size that is larger.
    """
    pictures = load_pictures(data, size=size, seed=seed)
    rng = np.random.default_rng(seed)
    count = min(count, len(pictures.train))
    if max(batches) > count:
        raise UserError(f"net_batches holds {max(batches)}: expected 1 to {count}")
    tiles = pictures.train[np.sort(rng.choice(len(pictures.train), count, replace=False))]
    if crop is not None:
        corners = rng.integers(0, np.array(tiles.shape[1:3]) - crop + 1, (count, 2))
        pairs = zip(tiles, corners, strict=True)
        tiles = np.stack([tile[i : i + crop, j : j + crop] for tile, (i, j) in pairs])
    return grey(tiles), nearest_colour(tiles, kmeans_palette(tiles, colours, seed))
