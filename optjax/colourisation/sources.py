"""Pictures from a user's own .npz file or folder.

Every byte read here may be hostile: shapes and sizes are checked before anything is allocated,
nothing is unpickled and nothing is extracted to disk.
"""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optjax.colourisation.photograph import SUFFIXES, read_photograph
from optjax.support.errors import UserError, one_line
from optjax.support.untrusted import npz_arrays

FOLDER_LIMIT_BYTES = 4 * 2**30

Split = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def check_pictures(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse arrays that are not uint8 (n, H, W, 3) with H and W multiples of 4.

    The networks halve H and W twice. `where` is the array's name in messages.

    >>> check_pictures("train", (10, 32, 32, 3), np.dtype("uint8"))
    """
    if dtype != np.uint8:
        raise UserError(
            f"{where}: dtype {dtype}, expected uint8 (0 to 255); convert it before saving"
        )
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{where}: shape {shape}, expected (n, H, W, 3)")
    if shape[0] < 1:
        raise UserError(f"{where}: shape {shape} holds no picture; expected n of 1 or more")
    if min(shape[1:3]) < 4 or shape[1] % 4 or shape[2] % 4:
        raise UserError(
            f"{where}: shape {shape}, expected H and W to be multiples of 4; crop or resize"
        )


def split_sixth(pictures: NDArray[np.uint8], seed: int, where: str = "pictures") -> Split:
    """Split off a sixth of the pictures for validation.

    They are the last m = max(1, round(n / 6)) of a permutation of n, which the seed draws.

    Raises:
      UserError: fewer than two pictures; `where` is their name in the message.

    >>> train, validation = split_sixth(np.zeros((12, 4, 4, 3), np.uint8), seed=0)
    >>> train.shape[0], validation.shape[0]
    (10, 2)
    """
    n = len(pictures)
    if n < 2:
        raise UserError(f"{where}: {n} picture(s), expected 2 or more, to hold one out")
    order = np.random.default_rng(seed).permutation(n)
    cut = n - max(1, round(n / 6))
    # Sorted, so that a picture's neighbours in the file stay its neighbours.
    return pictures[np.sort(order[:cut])], pictures[np.sort(order[cut:])]


def _chosen(path: Path, names: list[str]) -> list[str]:
    """Choose the arrays of the training and, where there is one, of the validation pictures."""
    first = next((key for key in ("train", "images") if key in names), None)
    second = next((key for key in ("test", "validation") if key in names), None)
    if first is None:
        found = ", ".join(repr(name) for name in sorted(names)[:8]) or "nothing"
        raise UserError(f"{str(path)!r}: expected an array 'train' or 'images', found {found}")
    return [first] if second is None else [first, second]


def read_npz(path: Path, seed: int = 0) -> tuple[Split, str]:
    """Read the training and validation pictures of an .npz file.

    They are `train` and `test` (or `validation`); of only `train` or `images`, a sixth is held out.

    Args:
      path: the file; each array uint8 (n, H, W, 3).
      seed: draws the split where the file gives none.

    Returns:
      (train, validation), and a note of the split.

    Raises:
      UserError: unreadable, truncated, oversized, a zip bomb, a pickle, a wrong dtype or shape.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "pictures.npz"
    ...     np.savez(path, images=np.zeros((6, 8, 8, 3), np.uint8))
    ...     (train, validation), note = read_npz(path)
    >>> train.shape, validation.shape
    ((5, 8, 8, 3), (1, 8, 8, 3))
    """
    arrays = npz_arrays(path, lambda names: _chosen(path, names), check_pictures)
    first, *rest = arrays
    train = arrays[first]
    if not rest:
        return split_sixth(train, seed, repr(str(path))), (
            f"array {first!r}; a sixth split off for validation by seed {seed}"
        )
    second, held_out = rest[0], arrays[rest[0]]
    if train.shape[1:] != held_out.shape[1:]:
        raise UserError(
            f"{str(path)!r}: {first!r} has shape {train.shape} and {second!r} {held_out.shape}; "
            "expected the same H and W"
        )
    return (train, held_out), f"arrays {first!r} and {second!r} as the file splits them"


def _read_picture(path: Path, size: int) -> tuple[NDArray[np.uint8], bool]:
    """Read a picture's central square, and whether some of its pixels are transparent."""
    from PIL import Image, ImageOps

    found = read_photograph(path)
    square = ImageOps.fit(Image.fromarray(found.pixels), (size, size), method=Image.Resampling.BOX)
    return np.asarray(square, dtype=np.uint8), found.alpha is not None


def read_folder(folder: Path, size: int = 32, seed: int = 0) -> tuple[Split, str]:
    """Read a folder's pictures: crop to the central square, resize, split by file.

    Args:
      folder: its png, jpg, webp, tiff, bmp and gif files are read in the order of their names;
        hidden files and links that lead outside the folder are left out. A warning names what
        else is not read, and pictures with transparent pixels, whose colours are taken as stored.
      size: side of the square in pixels, a multiple of 4.
      seed: draws the sixth of the files held out for validation.

    Returns:
      (train, validation), and a note of the split.

    Raises:
      UserError: no pictures, an undecodable or oversized one, an unreadable folder.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(6):
    ...         Image.new("RGB", (20, 10), (40 * i, 0, 0)).save(Path(folder) / f"{i}.png")
    ...     (train, validation), note = read_folder(Path(folder), size=8)
    >>> train.shape, validation.shape
    ((5, 8, 8, 3), (1, 8, 8, 3))
    """
    try:
        root = folder.resolve(strict=True)
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        paths = [
            path
            for path in entries
            if path.suffix.lower() in SUFFIXES
            and path.is_file()
            and path.resolve().is_relative_to(root)
        ]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{str(folder)!r}: cannot be read ({one_line(error)})") from error
    if not paths:
        raise UserError(
            f"{str(folder)!r}: no pictures in this folder; expected files ending in "
            + ", ".join(SUFFIXES)
        )
    if len(paths) * size * size * 3 > FOLDER_LIMIT_BYTES:
        raise UserError(
            f"{str(folder)!r}: {len(paths)} pictures of {size} × {size} exceed "
            f"{FOLDER_LIMIT_BYTES} bytes; take fewer or a smaller size"
        )
    read = [_read_picture(path, size) for path in paths]
    clear = [path.name for path, (_, seen_through) in zip(paths, read, strict=True) if seen_through]
    taken = set(paths)
    _named(folder, "not read", [path.name for path in entries if path not in taken])
    _named(folder, "transparent in places, colours taken as stored", clear)
    pictures = np.stack([picture for picture, _ in read])
    return split_sixth(pictures, seed, repr(str(folder))), (
        f"{len(paths)} files cropped to a square of {size}; a sixth of the files split off for "
        f"validation by seed {seed}"
    )


def _named(folder: Path, what: str, names: list[str]) -> None:
    """Warn of some entries of a folder, by name."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        listed = ", ".join(map(repr, names[:5])) + more
        warnings.warn(f"{str(folder)!r}: {what}: {listed}", stacklevel=3)
