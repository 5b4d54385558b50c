"""A trained network that colours photographs of any size.

The network sees a small copy of the luminance and gives each of its pixels a distribution over
bins of chroma. Their annealed mean is upsampled along the edges of the full luminance and joined
with it, so that a picture keeps its size and its detail.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from optjax.colourisation import networks
from optjax.colourisation.photograph import Photograph
from optjax.support.errors import UserError
from optjax.support.files import write_bytes
from optjax.support.types import PyTree

MODEL_LIMIT_BYTES = 2**30
MOST_FILTERS = 4096
STRIP_PIXELS = 2**19
_MARK = "optjax colouriser"


class Lab(NamedTuple):
    """A picture in CIE Lab: lightness 0 to 100, and chroma."""

    light: NDArray[np.floating]  # (..., H, W)
    chroma: NDArray[np.floating]  # (..., H, W, 2)


def to_lab(pixels: NDArray[np.uint8]) -> Lab:
    """Convert sRGB, uint8 (..., H, W, 3), to CIE Lab under D65.

    >>> lab = to_lab(np.full((1, 1, 3), 255, np.uint8))
    >>> round(float(lab.light[0, 0]), 2), bool(abs(lab.chroma).max() < 0.01)
    (100.0, True)
    """
    from skimage.color import rgb2lab

    lab = rgb2lab(pixels.astype(np.float32) / np.float32(255))
    return Lab(lab[..., 0], lab[..., 1:])


def to_rgb(lab: Lab) -> NDArray[np.uint8]:
    """Convert CIE Lab to sRGB, uint8; chroma outside its gamut is shrunk, lightness kept.

    >>> vivid = Lab(np.full((1, 1), 97, np.float32), np.full((1, 1, 2), -80, np.float32))
    >>> abs(float(to_lab(to_rgb(vivid)).light[0, 0]) - 97) < 0.5
    True
    """
    shape, light = lab.light.shape, lab.light.reshape(-1)
    chroma = lab.chroma.reshape(-1, 2)
    linear = _linear(light, chroma)
    out = np.flatnonzero((linear.min(-1) < -_GAMUT) | (linear.max(-1) > 1 + _GAMUT))
    if len(out):
        low, high = np.zeros(len(out), np.float32), np.ones(len(out), np.float32)
        for _ in range(8):  # to 1/256
            share = (low + high) / 2
            tried = _linear(light[out], share[:, None] * chroma[out])
            inside = (tried.min(-1) >= -_GAMUT) & (tried.max(-1) <= 1 + _GAMUT)
            low, high = np.where(inside, share, low), np.where(inside, high, share)
        linear[out] = _linear(light[out], low[:, None] * chroma[out])
    linear = np.clip(linear, 0, 1)
    curved = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.rint(255 * curved).astype(np.uint8).reshape(*shape, 3)


_GAMUT = 2e-3
_WHITE = np.array([0.95047, 1.0, 1.08883], np.float32)


def _linear(light: NDArray[np.floating], chroma: NDArray[np.floating]) -> NDArray[np.float32]:
    """Convert Lab, (n) and (n, 2), to linear sRGB, (n, 3), where it may lie outside [0, 1]."""
    from skimage.color.colorconv import rgb_from_xyz

    y = (light + 16) / 116
    f = np.stack([y + chroma[:, 0] / 500, y, y - chroma[:, 1] / 200], axis=-1)
    xyz = _WHITE * np.where(f > 6 / 29, f**3, (f - 4 / 29) * (108 / 841))
    return (xyz @ rgb_from_xyz.T.astype(np.float32)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Colouriser:
    """A network with its chroma bins.

    Attributes:
      net: its name, of `networks.MODELS`; filters: NF.
      bins: (K, 2), the chroma (a, b) of each bin.
      variables: "params" and "batch_stats" of the network.
      note: what it was trained on.
    """

    net: str
    filters: int
    bins: NDArray[np.float32]
    variables: PyTree
    note: str = ""

    @functools.cached_property
    def _chroma(self) -> Any:
        net = networks.model(self.net, filters=self.filters, colours=len(self.bins))

        @jax.jit
        def chroma(variables: PyTree, light: jax.Array, temperature: jax.Array) -> jax.Array:
            scores: Any = net.apply(variables, light[None, :, :, None] / 100, train=False)
            return jax.nn.softmax(scores[0] / temperature) @ self.bins

        return chroma

    def chroma(self, light: NDArray[np.float32], temperature: float = 0.38) -> NDArray[np.float32]:
        """Predict the chroma of a small picture, (H, W) → (H, W, 2).

        The annealed mean Σ_k q_k c_k of the bins, q = softmax(scores / T): their mean at T = 1, the
        most probable one as T → 0.

        Args:
          light: lightness, 0 to 100; H and W multiples of 4.
          temperature: T > 0.

        Source: Zhang, Isola and Efros (2016), equation 5.
        """
        return np.asarray(self._chroma(self.variables, light, np.float32(temperature)))

    def colour(
        self,
        photograph: Photograph,
        work_size: int = 256,
        temperature: float = 0.38,
        saturation: float = 1.0,
    ) -> NDArray[np.uint8]:
        """Colour a photograph at its own size, uint8 (H, W, 3); its own colours are not looked at.

        Args:
          photograph: its lightness is kept.
          work_size: longer side in pixels at which colours are predicted, a multiple of 4.
          temperature: as in `chroma`.
          saturation: factor of the chroma; 0 gives grey.
        """
        from PIL import Image

        height, width = photograph.pixels.shape[:2]
        scale = min(1.0, work_size / max(height, width))
        small = max(1, round(scale * height)), max(1, round(scale * width))
        grey = grey_picture(photograph.pixels)
        shrunk = Image.fromarray(grey).resize((small[1], small[0]), Image.Resampling.BOX)
        light = to_lab(np.repeat(np.asarray(shrunk)[..., None], 3, axis=-1)).light
        # Padded to a square: one program serves all pictures.
        square = [(0, work_size - side) for side in small]
        found = self.chroma(np.pad(light, square, mode="edge"), temperature)
        slope, offset = guided(light, saturation * found[: small[0], : small[1]])
        return _joined(grey, slope, offset)

    def save(self, path: Path) -> None:
        """Write the model, as safetensors, whole or not at all."""
        from safetensors.numpy import save

        tensors = {name: np.asarray(leaf) for name, leaf in _named(self.variables).items()}
        about = {"net": self.net, "filters": self.filters, "note": self.note}
        content = save({**tensors, "bins": self.bins}, {_MARK: json.dumps(about)})
        try:
            write_bytes(path, content)
        except OSError as error:
            raise UserError(f"{str(path)!r}: cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: Path) -> "Colouriser":
        """Read a model.

        Raises:
          UserError: not a model of `save`, damaged, too large, or of another architecture.
        """
        from safetensors.numpy import load

        where = f"model {str(path)!r}"
        try:
            if path.stat().st_size > MODEL_LIMIT_BYTES:
                raise UserError(f"{where}: more than {MODEL_LIMIT_BYTES} bytes; expected a model")
            content = path.read_bytes()
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header["__metadata__"][_MARK])
            net, filters, note = str(about["net"]), int(about["filters"]), str(about["note"])
            bins = tensors.pop("bins")
            if not 1 <= filters <= MOST_FILTERS:
                raise UserError(f"{where}: {filters} filters, expected 1 to {MOST_FILTERS}")
            expected = variables_of(networks.model(net, filters=filters, colours=len(bins)))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        except Exception as error:  # a header is JSON: nearly anything may come back
            raise UserError(
                f"{where}: not a model of 'optjax train-colouriser', or damaged; train it again"
            ) from error
        needed = {name: leaf.shape for name, leaf in _named(expected).items()}
        for name, shape in {**needed, "bins": (len(bins), 2)}.items():
            there = bins if name == "bins" else tensors.get(name, np.zeros(0, np.float32))
            if there.shape != shape or there.dtype != np.float32 or not np.isfinite(there).all():
                raise UserError(
                    f"{where}: {name} is {there.dtype} {there.shape}, {net} of {filters} filters "
                    f"needs finite float32 {shape}"
                )
        leaves = [tensors[name] for name in needed]
        return cls(
            net, filters, bins, jax.tree.unflatten(jax.tree.structure(expected), leaves), note
        )


def variables_of(net: Any) -> PyTree:
    """Shapes and dtypes of a network's variables."""
    picture = jnp.zeros((1, 4, 4, 1), jnp.float32)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), picture))


def _named(variables: PyTree) -> dict[str, Any]:
    """Name the leaves by their paths."""
    pairs = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def grey_picture(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Compute the grey of the same lightness, (H, W, 3) → (H, W), strip by strip."""
    height, width, _ = pixels.shape
    grey = np.empty((height, width), np.uint8)
    for rows in strips(height, width):
        light = to_lab(pixels[rows]).light
        grey[rows] = to_rgb(Lab(light, np.zeros((*light.shape, 2), np.float32)))[..., 0]
    return grey


def strips(height: int, width: int) -> list[slice]:
    """Cut a picture into strips of whole rows, or pictures into parts, of half a million pixels."""
    step = max(1, STRIP_PIXELS // width)
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def guided(
    light: NDArray[np.float32], chroma: NDArray[np.float32], radius: int = 4, least: float = 2.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fit chroma = slope · light + offset in every window of a small picture.

    slope = cov(light, chroma) / (var(light) + ε), averaged over the windows that hold a pixel.
    Evaluated with the full light, it follows the edges of the large picture.

    Args:
      light: (h, w). chroma: (h, w, 2).
      radius: of a window, in pixels.
      least: √ε, the contrast of light below which chroma is smoothed.

    Returns:
      slope and offset, (h, w, 2).

    Source: He, Sun and Tang (2010), equations 5 to 8; He and Sun (2015), algorithm 2.

    >>> light = np.arange(64, dtype=np.float32).reshape(8, 8)
    >>> slope, _ = guided(light, np.stack([light, 0 * light], axis=-1), least=1e-3)
    >>> bool(abs(slope - [1, 0]).max() < 1e-3)
    True
    """
    from scipy.ndimage import uniform_filter

    size: Any = (2 * radius + 1, 2 * radius + 1, 0)

    def mean(values: NDArray[Any]) -> NDArray[Any]:
        return uniform_filter(values, size, mode="nearest")

    guide = light[..., None].astype(np.float64)
    centre, colour = mean(guide), mean(chroma.astype(np.float64))
    variance = np.maximum(mean(guide**2) - centre**2, 0)
    slope = (mean(guide * chroma) - centre * colour) / (variance + least**2)
    offset = colour - slope * centre
    return mean(slope).astype(np.float32), mean(offset).astype(np.float32)


def _joined(
    grey: NDArray[np.uint8], slope: NDArray[np.float32], offset: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Evaluate small coefficients at the full size, and join the chroma with the lightness."""
    height, width = grey.shape
    both = np.concatenate([slope, offset], axis=-1)
    left, right, across = _between(np.arange(width), width, both.shape[1])
    wide = both[:, left] * (1 - across)[None, :, None] + both[:, right] * across[None, :, None]
    pixels = np.empty((height, width, 3), np.uint8)
    for rows in strips(height, width):
        top, bottom, down = _between(np.arange(rows.start, rows.stop), height, both.shape[0])
        at = wide[top] * (1 - down)[:, None, None] + wide[bottom] * down[:, None, None]
        light = to_lab(np.repeat(grey[rows][..., None], 3, axis=-1)).light
        pixels[rows] = to_rgb(Lab(light, at[..., :2] * light[..., None] + at[..., 2:]))
    return pixels


def _between(at: NDArray[Any], full: int, small: int) -> tuple[NDArray[Any], ...]:
    """Return the two neighbours of positions in a smaller axis, and the share of the second."""
    place = np.clip((at + 0.5) * small / full - 0.5, 0, small - 1)
    first = np.floor(place).astype(int)
    return first, np.minimum(first + 1, small - 1), (place - first).astype(np.float32)


def chroma_bins(chroma: NDArray[np.float32], bins: int = 64, seed: int = 0) -> NDArray[np.float32]:
    """Choose bins of chroma: the centres of k-means, (n, 2) → (K, 2).

    They lie in the convex hull of the pictures' own chroma.

    Raises:
      UserError: more bins than there are distinct colours.
    """
    from sklearn.cluster import KMeans

    distinct = len(np.unique(np.round(chroma, 1), axis=0))
    if distinct < bins:
        raise UserError(f"bins is {bins}: the pictures have {distinct} distinct colours; ask fewer")
    return (
        KMeans(bins, n_init="auto", random_state=seed)
        .fit(chroma)
        .cluster_centers_.astype(np.float32)
    )


def nearest_bin(chroma: NDArray[np.float32], bins: NDArray[np.float32]) -> NDArray[np.int32]:
    """Label chroma with the nearest bin, (..., 2) → (...)."""
    from scipy.spatial import KDTree

    found = np.asarray(KDTree(bins).query(chroma.reshape(-1, 2))[1], np.int32)
    return found.reshape(chroma.shape[:-1])


def rebalanced(labels: NDArray[np.integer], bins: int, share: float = 0.5) -> NDArray[np.float32]:
    """Compute the weight of each bin's pixels in the loss: larger for rare colours.

    w ∝ 1 / ((1 − λ) p̃ + λ/K), scaled so that the mean weight of a pixel, Σ p̃ w, is 1.

    Source: Zhang, Isola and Efros (2016), equation 4, without smoothing.

    >>> rebalanced(np.array([0, 0, 0, 1]), 2).astype(float).round(3).tolist()
    [0.857, 1.429]
    """
    shares = np.bincount(labels.ravel(), minlength=bins) / labels.size
    weights = 1 / ((1 - share) * shares + share / bins)
    return (weights / math.fsum(shares * weights)).astype(np.float32)
