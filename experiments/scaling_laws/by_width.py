"""The trainings that `scaling_laws` rests on: widths, batch sizes and numbers of pictures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import optax
import xarray as xr
from numpy.typing import NDArray

from optjax.accounting.account import account
from optjax.colourisation import networks
from optjax.colourisation.palette import grey, kmeans_palette, nearest_colour
from optjax.colourisation.pictures import (
    DEMO_SCALES,
    DEMO_TRAIN,
    DEMO_VALIDATION,
    cut_tiles,
    load_pictures,
    shrink,
)
from optjax.colourisation.problem import colourisation_problem
from optjax.run.trajectory import Run, make_run
from optjax.support.errors import UserError
from optjax.sweeps import sweep

Progress = Callable[[str, float], None]
_EVERY_FIFTH = 5  # block of a photograph is held out


class Tiles(NamedTuple):
    """Grey levels and labels."""

    train: tuple[NDArray[np.float32], NDArray[np.int32]]  # (n, H, W, 1), (n, H, W)
    held_out: tuple[NDArray[np.float32], NDArray[np.int32]]
    name: str
    demo: bool


def photograph_tiles(size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Tiles of the embedded photographs, training and held-out, that share no pixel.

    A law is of one kind of pictures, and one photograph held out is another kind than three. So
    each is cut into blocks of 4·size, every fifth is held out, and tiles are cut within blocks.

    >>> train, held_out = photograph_tiles(16)
    >>> train.shape[1:], len(train) > 3 * len(held_out)
    ((16, 16, 3), True)
    """
    import skimage.data

    parts: tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]] = ([], [])
    names = (*DEMO_TRAIN, *DEMO_VALIDATION)
    blocks = [cut_tiles(np.asarray(getattr(skimage.data, n)()), 4 * size, 4 * size) for n in names]
    for i, block in enumerate(np.concatenate(blocks)):
        for scale in DEMO_SCALES:
            stride = max(1, size // (2 * scale))
            parts[i % _EVERY_FIFTH == 0].append(cut_tiles(shrink(block, scale), size, stride))
    return np.concatenate(parts[0]), np.concatenate(parts[1])


def _quarters(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Every picture cut into the tiles that fit, side by side."""
    n, height, width, _ = images.shape
    if min(height, width) < size:
        raise UserError(f"size is {size}: expected at most the pictures' {min(height, width)}")
    h, w = height // size, width // size
    tiles = images[:, : h * size, : w * size].reshape(n, h, size, w, size, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size, size, 3)


def tiles(
    data: str | None, size: int, colours: int, counts: tuple[int, int], multiple: int, seed: int
) -> Tiles:
    """So many training and held-out tiles, drawn at random.

    Args:
      data: as `load_pictures` takes it. size: of a tile, pixels. colours: of the palette.
      counts: training and held-out tiles, or what there is. multiple: of which the first is one.
    """
    if size < 4 or size % 4:
        raise UserError(f"size is {size}: expected a multiple of 4, at least 4")
    if data is None:
        parts, name = photograph_tiles(size), "photographs"
    else:
        found = load_pictures(data, size=size, seed=seed)
        parts = _quarters(found.train, size), _quarters(found.validation, size)
        name = found.name
    rng = np.random.default_rng(seed)
    train, held_out = (
        part[rng.permutation(len(part))[:count]] for part, count in zip(parts, counts, strict=True)
    )
    if len(train) < multiple:
        raise UserError(f"{len(train)} training tiles: expected at least the batch of {multiple}")
    train = train[: len(train) // multiple * multiple]
    palette = kmeans_palette(train, colours, seed)
    made = [(grey(part), nearest_colour(part, palette)) for part in (train, held_out)]
    return Tiles(made[0], made[1], name, data is None)


class NetworkSizes(NamedTuple):
    """What a network of each width has and costs."""

    parameters: NDArray[np.int64]  # (widths,)
    flops: NDArray[np.float64]  # (widths,) of training on one picture: 3 × 2 × multiply-adds


def sizes(net: str, widths: Sequence[int], colours: int, size: int) -> NetworkSizes:
    """Parameters and training FLOPs a picture; loss, optimiser and elementwise work left out.

    >>> sizes("conv-transpose", [4], 8, 16).parameters.tolist()
    [1556]
    """
    counts = [
        account(networks.model(net, filters=width, colours=colours), (size, size, 1))
        for width in widths
    ]
    return NetworkSizes(
        np.array([int(count.parameters) for count in counts]),
        np.array([6.0 * int(count.multiply_adds) for count in counts]),
    )


def train(
    net: str,
    widths: dict[int, int],
    batch: int,
    pictures: Tiles,
    rates: Sequence[float],
    seeds: int,
    every: int,
    progress: Progress,
    *,
    colours: int,
    subsets: Sequence[int] = (),
) -> xr.DataArray:
    """Held-out loss along training with Adam at constant rates.

    Args:
      net: the network. widths: NF → steps. batch: pictures a step. pictures: to learn and judge.
      rates: learning rates. seeds: runs of each. every: steps from record to record.
      subsets: numbers of pictures to train on, each a part of the next; all of them if empty.

    Returns:
      (filters, pictures, learning_rate, seed, step), nats a pixel; NaN beyond a width's steps and
      where a run has diverged.
    """
    n = len(pictures.train[0])
    counts = list(subsets) or [n]

    def make(filters: int, steps: int) -> Callable[[int], Run]:
        def of(pictures_used: int) -> Run:
            # Repeated, so that all subsets have one shape and share one program.
            which = np.resize(np.arange(pictures_used), n)
            data = tuple(part[which] for part in pictures.train)
            problem = colourisation_problem(
                networks.model(net, filters=filters, colours=colours),
                (data[0], data[1]), pictures.held_out, chunk=len(pictures.held_out[0]),
            )  # fmt: skip
            return make_run(
                problem, optax.adam, steps, sampler="epochs", max_batch_size=batch,
                record_every=every,
            )  # fmt: skip

        return of

    found = []
    for i, (filters, steps) in enumerate(widths.items()):
        runs = sweep(
            make(filters, steps),
            {"pictures_used": counts, "learning_rate": list(rates)},
            seeds,
            progress=lambda text, f, i=i, filters=filters: progress(
                f"{net}, NF = {filters}, batch {batch}: {text}", (i + f) / len(widths)
            ),
        )
        found.append(runs.validation_loss.rename(pictures_used="pictures"))
    together = xr.concat(found, "filters", join="outer", coords="minimal", compat="override")
    together = together.assign_coords(filters=list(widths))
    return together.transpose("filters", "pictures", "learning_rate", "seed", "step")
