"""The pictures that a network learns to colour: a demo, a user's own, or CIFAR-10."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optjax.colourisation import cifar10, sources
from optjax.support.errors import UserError

DEMO_TRAIN = ("astronaut", "chelsea", "rocket")
DEMO_VALIDATION = ("coffee",)
DEMO_SCALES = (1, 2, 4)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Training and validation pictures of one size.

    Args:
      train: uint8 (n, H, W, 3), RGB, 0 to 255; H and W multiples of 4.
      validation: uint8 (m, H, W, 3).
      name: short label for figures and files.
      demo: True if figures of these pictures reproduce nothing published.
      note: a description of the pictures and of their split.

    Raises:
      UserError: a wrong dtype or shape, or sizes that differ.

    >>> tile = np.zeros((2, 32, 32, 3), np.uint8)
    >>> Pictures(tile, tile, "zeros").size
    (32, 32)
    """

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    name: str
    demo: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        sources.check_pictures(f"{self.name}: train", self.train.shape, self.train.dtype)
        sources.check_pictures(
            f"{self.name}: validation", self.validation.shape, self.validation.dtype
        )
        if self.train.shape[1:] != self.validation.shape[1:]:
            raise UserError(
                f"{self.name}: train {self.train.shape} and validation {self.validation.shape} "
                "differ in H or W"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.train.shape[1], self.train.shape[2]


def shrink(photograph: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Down-sample by area: each pixel is the rounded mean of a factor × factor square.

    Args:
      photograph: uint8 (H, W, 3); rows and columns past the last whole square are dropped.
      factor: side of a square in pixels.

    Returns:
      uint8 (H // factor, W // factor, 3).

    >>> shrink(8 * np.arange(12, dtype=np.uint8).reshape(2, 2, 3), 2)
    array([[[36, 44, 52]]], dtype=uint8)
    """
    height, width = (side // factor for side in photograph.shape[:2])
    blocks = photograph[: height * factor, : width * factor]
    blocks = blocks.reshape(height, factor, width, factor, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def cut_tiles(photograph: NDArray[np.uint8], size: int, stride: int) -> NDArray[np.uint8]:
    """Cut all size × size tiles whose corners lie on a grid of the given stride.

    Args:
      photograph: uint8 (H, W, 3).
      size: side of a tile in pixels.
      stride: distance between corners in pixels.

    Returns:
      uint8 (n, size, size, 3), row by row.

    >>> cut_tiles(np.zeros((64, 48, 3), np.uint8), size=32, stride=16).shape
    (6, 32, 32, 3)
    """
    if min(photograph.shape[:2]) < size:
        return np.empty((0, size, size, 3), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (size, size), axis=(0, 1))
    return windows[::stride, ::stride].transpose(0, 1, 3, 4, 2).reshape(-1, size, size, 3)


def demo_tiles(
    names: tuple[str, ...], size: int, scales: tuple[int, ...] = DEMO_SCALES
) -> NDArray[np.uint8]:
    """Cut tiles of scikit-image's photographs at full, half and quarter size, or other scales.

    The stride, the tile's side at full size, shrinks with the photograph: the tiles show the same
    places from further away.

    Args:
      names: photographs in scikit-image's wheel: astronaut (public domain), chelsea (CC0),
        coffee (CC0), rocket (CC0).
      size: side of a tile in pixels.
      scales: factors by which the photographs are shrunk.

    Returns:
      uint8 (n, size, size, 3).

    >>> demo_tiles(("coffee",), 32).shape
    (538, 32, 32, 3)
    """
    import skimage.data

    photographs = [np.asarray(getattr(skimage.data, name)()) for name in names]
    return np.concatenate(
        [
            cut_tiles(shrink(photograph, scale), size, max(1, size // scale))
            for photograph in photographs
            for scale in scales
        ]
    )


def _check_size(size: int) -> None:
    if size < 4 or size % 4:
        raise UserError(
            f"size {size}: expected a positive multiple of 4 (the networks halve H and W twice)"
        )


def demo_pictures(
    names: tuple[str, ...], size: int, scales: tuple[int, ...] = (1,), seed: int = 0
) -> Pictures:
    """Cut tiles of photographs and hold out a sixth of them, which show the same things.

    Args:
      names, size, scales: as of `demo_tiles`; at several scales tiles overlap.
      seed: draws those held out.

    >>> demo_pictures(("coffee",), 32).validation.shape
    (36, 32, 32, 3)
    """
    _check_size(size)
    tiles = demo_tiles(names, size, scales)
    note = f"demo: {len(tiles)} tiles of {size} × {size} of {', '.join(names)}; a sixth held out"
    return Pictures(*sources.split_sixth(tiles, seed), "demo", demo=True, note=note)


def _demo(size: int) -> Pictures:
    train, validation = (demo_tiles(names, size) for names in (DEMO_TRAIN, DEMO_VALIDATION))
    if not len(train) or not len(validation):
        raise UserError(f"size {size}: larger than the demo photographs; expected 300 or less")
    return Pictures(
        train,
        validation,
        name="demo",
        demo=True,
        note=f"demo: tiles of {size} × {size} at full, half and quarter size, split by photograph "
        f"(train: {', '.join(DEMO_TRAIN)}; validation: {', '.join(DEMO_VALIDATION)})",
    )


def load_pictures(
    data: str | None, *, class_name: str = "horse", size: int = 32, seed: int = 0
) -> Pictures:
    """Load the pictures that `--data` names.

    Args:
      data: None for the demo; "cifar10" (downloaded once, checked by hash); FILE.npz with uint8
        arrays `train` and `test`; a local cifar-10-binary.tar.gz; or FOLDER/ of pictures.
      class_name: the CIFAR-10 class.
      size: side in pixels of the demo's tiles and of a folder's pictures, a multiple of 4.
      seed: draws the split where the source has none.

    Raises:
      UserError: a size or a source that is not as described.

    >>> demo = load_pictures(None)
    >>> demo.train.shape, demo.validation.shape, demo.demo
    ((1604, 32, 32, 3), (538, 32, 32, 3), True)
    """
    _check_size(size)
    if data is None:
        return _demo(size)
    if data == "cifar10":
        cifar10.class_index(class_name)
        (train, validation), note = cifar10.read(cifar10.fetch(), class_name)
        return Pictures(train, validation, name=f"cifar10-{class_name}", note=note)
    path = Path(data)
    try:
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:
        raise UserError(f"data {data[:200]!r}: cannot be opened ({error.strerror})") from error
    if is_folder:
        (train, validation), note = sources.read_folder(path, size, seed)
    elif exists and not is_file:
        raise UserError(f"data {data!r}: not a regular file; expected FILE.npz or FOLDER/")
    elif not exists:
        raise UserError(f"data {data!r}: no such file; expected cifar10, FILE.npz or FOLDER/")
    elif path.suffix.lower() == ".npz":
        (train, validation), note = sources.read_npz(path, seed)
    elif path.name.lower().endswith(".tar.gz"):
        (train, validation), note = cifar10.read(path, class_name)
    else:
        raise UserError(f"data {data!r}: expected cifar10, a file ending in .npz, or a FOLDER/")
    return Pictures(train, validation, name=path.resolve().stem, note=note)
