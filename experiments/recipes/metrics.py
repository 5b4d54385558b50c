"""How good colours are: of scores for the colours of a palette, and of the pictures they give."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Calibration(NamedTuple):
    """How often a network is right, by how sure it is; of B equal ranges of its probability.

    >>> found = calibration(np.array([0.9, 0.9, 0.3, 0.3]), np.array([1, 0, 1, 0]), bins=2)
    >>> found.confidence.tolist(), found.accuracy.tolist(), round(found.error, 2)
    ([0.3, 0.9], [0.5, 0.5], 0.3)
    """

    confidence: Floats  # (B,), mean probability of the best colour; NaN where no pixel is
    accuracy: Floats  # (B,), share of pixels whose best colour is the label
    share: Floats  # (B,), of all pixels

    @property
    def error(self) -> float:
        """The expected calibration error, Σ_b share_b |accuracy_b − confidence_b|.

        Source: Naeini, Cooper and Hauskrecht (2015), equation 3; Guo et al. (2017), equation 3.
        """
        return float(np.nansum(self.share * np.abs(self.accuracy - self.confidence)))


def calibration(confidence: Floats, right: NDArray, bins: int = 15) -> Calibration:
    """Compare probabilities, (n,), with whether they came true, (n,), in equal ranges of [0, 1]."""
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins).astype(float)
    filled = np.where(count > 0, count, np.nan)
    sums = (np.bincount(at, weights=each, minlength=bins) for each in (confidence, right))
    return Calibration(*(total / filled for total in sums), count / max(len(at), 1))


def confusion(labels: NDArray[np.integer], found: NDArray[np.integer], colours: int) -> Floats:
    """Compute the share of each true colour's pixels that are given each colour.

    Args:
      labels, found: the same shape, in 0 … K − 1. colours: K.

    Returns:
      (K, K), rows sum to one; NaN for a colour that no pixel has.

    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    pairs = labels.ravel().astype(np.intp) * colours + found.ravel()
    counts = np.bincount(pairs, minlength=colours**2).reshape(colours, colours).astype(float)
    total = counts.sum(1, keepdims=True)
    return counts / np.where(total > 0, total, np.nan)


def label_scores(probabilities: Floats, labels: NDArray[np.integer]) -> dict[str, float]:
    """Score probabilities of colours against the true ones.

    Args:
      probabilities: (n, H, W, K). labels: (n, H, W), in 0 … K − 1.

    Returns:
      ``accuracy`` and ``top_5``, shares of the pixels; ``balanced_accuracy``, the mean over colours
      of the share of the colour's pixels that are right; ``loss``, nats a pixel; and
      ``calibration_error``.

    >>> sure = np.array([[[[0.9, 0.1], [0.9, 0.1]]]])
    >>> label_scores(sure, np.array([[[0, 1]]]))["balanced_accuracy"]
    0.5
    """
    true = np.take_along_axis(probabilities, labels[..., None], axis=-1)
    best = probabilities.argmax(-1)
    table = confusion(labels, best, probabilities.shape[-1])
    sure = calibration(probabilities.max(-1).ravel(), (best == labels).ravel())
    return {
        "accuracy": float((best == labels).mean()),
        "top_5": float(((probabilities > true).sum(-1) < 5).mean()),
        "balanced_accuracy": float(np.nanmean(np.diag(table))),
        "loss": float(-np.log(np.maximum(true, np.finfo(true.dtype).tiny)).mean()),
        "calibration_error": sure.error,
    }


def coloured(
    probabilities: Floats, palette: Floats, grey: Floats, temperature: float = 0.38
) -> NDArray[np.uint8]:
    """Give every pixel the annealed mean of the palette's colours, at its own grey level.

    Σ_k q_k c_k with q ∝ p^(1/T), moved along the grey axis to the pixel's own (R + G + B)/3.

    Args:
      probabilities: p, (n, H, W, K).
      palette: c, (K, 3), and grey: (n, H, W, 1), of pixels / 256.
      temperature: T > 0; towards 0 the most probable colour.

    Returns:
      uint8 (n, H, W, 3).

    Source: Zhang, Isola and Efros (2016), equation 5, of a palette in RGB.

    >>> two = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> coloured(np.array([[[[1.0, 0.0]]]]), two, np.full((1, 1, 1, 1), 1 / 3)).tolist()
    [[[[255, 0, 0]]]]
    """
    powers = (probabilities / probabilities.max(-1, keepdims=True)) ** (1 / temperature)
    mean = powers @ palette / powers.sum(-1, keepdims=True)
    moved = mean + grey - mean.mean(-1, keepdims=True)
    return np.rint(np.clip(256 * moved, 0, 255)).astype(np.uint8)


def psnr(pictures: NDArray[np.uint8], found: NDArray[np.uint8]) -> float:
    """Compute the peak signal-to-noise ratio, 10 log₁₀(255² / MSE) dB, of all pictures together.

    >>> round(psnr(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)), 6)
    0.0
    """
    error = np.mean((pictures.astype(np.float32) - found) ** 2, dtype=np.float64)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def ssim(pictures: NDArray[np.uint8], found: NDArray[np.uint8]) -> float:
    """Compute the mean structural similarity of colour pictures, (n, H, W, 3), H and W ≥ 7.

    Source: Wang et al. (2004), as scikit-image computes it, over the three channels.
    """
    from skimage.metrics import structural_similarity

    pairs = zip(pictures, found, strict=True)
    each = [structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs]
    return float(np.mean(each))


def colourfulness(pictures: NDArray[np.uint8]) -> float:
    """Compute the mean colourfulness of pictures, (n, H, W, 3): 0 of grey, above 60 vivid.

    σ + 0.3 μ, the spread and the distance from grey of rg = R − G and yb = (R + G)/2 − B.

    Source: Hasler and Süsstrunk (2003), section 7.

    >>> colourfulness(np.full((1, 4, 4, 3), 9, np.uint8))
    0.0
    """
    red, green, blue = np.moveaxis(pictures.astype(np.float64), -1, 0)
    opponent = np.stack([red - green, (red + green) / 2 - blue])
    spread = np.hypot(*opponent.std(axis=(-2, -1)))
    return float(np.mean(spread + 0.3 * np.hypot(*opponent.mean(axis=(-2, -1)))))
