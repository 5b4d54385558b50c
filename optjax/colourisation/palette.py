"""A palette of colours, each pixel's nearest one, and the grey that a network sees.

Pixels are divided by 256, as in the source's protocol: 255 becomes 0.99609375.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optjax.support.errors import UserError
from optjax.support.untrusted import read_npy_header

MAX_COLOURS = 65_536
CHUNK = 1 << 14


def grey(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute the networks' input: the grey of each pixel, (R + G + B) / (3 · 256).

    Args:
      pictures: uint8 (n, H, W, 3).

    Returns:
      float32 (n, H, W, 1), in [0, 1).

    >>> grey(np.full((1, 4, 4, 3), 128, np.uint8))[0, 0, 0]
    array([0.5], dtype=float32)
    """
    total = pictures.sum(axis=-1, keepdims=True, dtype=np.uint16)
    return total.astype(np.float32) / np.float32(768)


def nearest_colour(pictures: NDArray[np.uint8], palette: NDArray[np.float64]) -> NDArray[np.int32]:
    """Label each pixel with the nearest colour of the palette in RGB.

    label = argmin_k ‖pixel / 256 − palette_k‖², the lowest k of equals.

    Args:
      pictures: uint8 (n, H, W, 3).
      palette: (K, 3), in [0, 1].

    Returns:
      int32 (n, H, W).

    >>> palette = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> nearest_colour(np.array([[[[200, 10, 10], [20, 30, 40]]]], np.uint8), palette)
    array([[[1, 0]]], dtype=int32)
    """
    pixels = pictures.reshape(-1, 3)
    labels = np.empty(len(pixels), np.int32)
    for start in range(0, len(pixels), CHUNK):
        # One row a channel: a chunk stays in cache while all colours pass over it.
        red, green, blue = pixels[start : start + CHUNK].T / 256
        label = labels[start : start + CHUNK]
        label[:] = 0
        best = np.full(len(label), np.inf)
        for k, (r, g, b) in enumerate(palette):
            distance = np.square(red - r) + np.square(green - g) + np.square(blue - b)
            closer = distance < best
            label[closer] = k
            np.minimum(best, distance, out=best)
    return labels.reshape(pictures.shape[:-1])


def kmeans_palette(
    pictures: NDArray[np.uint8], colours: int = 24, seed: int = 0, sample: int = 20_000
) -> NDArray[np.float64]:
    """Make a palette from pictures: the centres of k-means on their pixels.

    It minimises Σ_pixels min_k ‖pixel / 256 − palette_k‖² over a sample of the pixels.

    Args:
      pictures: uint8 (n, H, W, 3), training pictures only.
      colours: K, the size of the palette.
      seed: draws the sample and the starting centres.
      sample: number of pixels to draw, without replacement.

    Returns:
      (K, 3), in [0, 1], from dark to light.

    Raises:
      UserError: K below 1, or more than the sample has distinct colours.

    >>> pictures = np.zeros((1, 4, 4, 3), np.uint8)
    >>> pictures[0, :2] = 128
    >>> kmeans_palette(pictures, colours=2)
    array([[0. , 0. , 0. ],
           [0.5, 0.5, 0.5]])
    """
    from sklearn.cluster import KMeans

    if colours < 1:
        raise UserError(f"colours {colours}: expected 1 or more")
    pixels = pictures.reshape(-1, 3)
    if sample < len(pixels):
        pixels = pixels[np.random.default_rng(seed).choice(len(pixels), sample, replace=False)]
    distinct = len(np.unique(pixels, axis=0))
    if distinct < colours:
        raise UserError(
            f"colours {colours}: the sampled pixels have {distinct} distinct colours; ask for fewer"
        )
    centres = KMeans(colours, n_init="auto", random_state=seed).fit(pixels / 256).cluster_centers_
    return np.clip(centres[np.argsort(centres.sum(axis=1), kind="stable")], 0, 1)


def load_palette(path: str | Path, colours: int | None = None) -> NDArray[np.float64]:
    """Load a palette saved with numpy.save.

    Args:
      path: an .npy file of numbers (K, 3), in [0, 1].
      colours: the K to expect; None: any.

    Returns:
      float64 (K, 3).

    Raises:
      UserError: unreadable, a pickle, a wrong shape, a value outside [0, 1] or not finite.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(Path(folder) / "palette.npy", np.eye(3))
    ...     load_palette(Path(folder) / "palette.npy", colours=3).shape
    (3, 3)
    """
    where = f"palette {str(path)!r}"
    try:
        with Path(path).open("rb") as stream:
            shape, dtype = read_npy_header(stream, where)
            if dtype.hasobject:
                raise UserError(f"{where}: an object array (a pickle) is never read; save numbers")
            if dtype.kind != "f":
                raise UserError(f"{where}: dtype {dtype}, expected floats in [0, 1]")
            expected = (colours, 3) if colours is not None else ("K", 3)
            if (
                len(shape) != 2
                or shape[1] != 3
                or not 1 <= shape[0] <= MAX_COLOURS
                or (colours is not None and shape[0] != colours)
            ):
                raise UserError(f"{where}: shape {shape}, expected ({expected[0]}, 3)")
            if Path(path).stat().st_size - stream.tell() < math.prod(shape) * dtype.itemsize:
                raise UserError(f"{where}: truncated; shape {shape} needs more bytes")
            stream.seek(0)
            palette = np.lib.format.read_array(stream, allow_pickle=False).astype(np.float64)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{where}: cannot be read ({reason})") from error
    if not np.isfinite(palette).all():
        raise UserError(f"{where}: holds NaN or infinity, expected numbers in [0, 1]")
    if palette.min() < 0 or palette.max() > 1:
        raise UserError(
            f"{where}: values from {palette.min():g} to {palette.max():g}, expected [0, 1]; "
            "divide by 256"
        )
    return palette
