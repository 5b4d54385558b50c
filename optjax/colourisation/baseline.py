"""The baseline that a network has to beat: the majority colour of each grey level."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optjax.support.errors import UserError

LEVELS = 256


class BaselineResult(NamedTuple):
    """The score of a baseline on pictures."""

    accuracy: float  # fraction of pixels
    loss: float  # mean cross-entropy a pixel, nats
    prediction: NDArray[np.int32]  # (n, H, W)


def grey_level(pictures: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Compute the grey level of each pixel, ⌊(R + G + B) / 3⌋.

    Args:
      pictures: uint8 (n, H, W, 3).

    Returns:
      int (n, H, W), 0 to 255.

    >>> grey_level(np.array([[[[255, 255, 254]]]], np.uint8))
    array([[[254]]])
    """
    return (pictures.sum(axis=-1, dtype=np.uint16) // 3).astype(np.intp)


class GreyLevelBaseline(NamedTuple):
    """A predictor of a pixel's colour from its own grey level alone.

    p(k | level) = (count(level, k) + α) / (Σ_k count(level, k) + α K)

    A level absent from training takes the distribution of the nearest level present (the darker of
    two equally near).

    >>> pictures = np.array([[[[0, 0, 0], [9, 9, 9], [9, 9, 9], [9, 9, 9]]]], np.uint8)
    >>> baseline = GreyLevelBaseline.fit(pictures, np.array([[[0, 1, 1, 0]]]), colours=2)
    >>> result = baseline.evaluate(pictures, np.array([[[0, 1, 1, 0]]]))
    >>> result.accuracy, result.prediction.tolist()
    (0.75, [[[0, 1, 1, 1]]])
    """

    probabilities: NDArray[np.float64]  # (256, K), rows sum to one

    @classmethod
    def fit(
        cls,
        pictures: NDArray[np.uint8],
        labels: NDArray[np.integer],
        colours: int,
        smoothing: float = 1.0,
    ) -> "GreyLevelBaseline":
        """Fit the baseline: count the labels of every grey level.

        Args:
          pictures: uint8 (n, H, W, 3), training pictures.
          labels: (n, H, W), in 0 … K − 1.
          colours: K.
          smoothing: α > 0, added to every count.

        Raises:
          UserError: shapes that differ, no pixels, a label outside the range, α not above 0.
        """
        _check(pictures, labels, colours)
        if not smoothing > 0:
            raise UserError(f"smoothing {smoothing}: expected a number above 0")
        pairs = grey_level(pictures).ravel() * colours + labels.ravel().astype(np.intp)
        counts = np.bincount(pairs, minlength=LEVELS * colours).reshape(LEVELS, colours)
        seen = np.flatnonzero(counts.sum(axis=1))
        distance = np.abs(np.arange(LEVELS)[:, None] - seen[None, :])
        counts = counts[seen[distance.argmin(axis=1)]] + smoothing
        return cls(counts / counts.sum(axis=1, keepdims=True))

    def predict(self, pictures: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Return the most frequent label of each pixel's grey level, int32 (n, H, W)."""
        return self.probabilities.argmax(axis=1).astype(np.int32)[grey_level(pictures)]

    def evaluate(self, pictures: NDArray[np.uint8], labels: NDArray[np.integer]) -> BaselineResult:
        """Score the baseline on pictures: accuracy, and loss = −mean log p(label | level).

        Args:
          pictures: uint8 (n, H, W, 3), validation pictures.
          labels: (n, H, W), in 0 … K − 1.

        Raises:
          UserError: shapes that differ, no pixels, a label outside the range.
        """
        _check(pictures, labels, self.probabilities.shape[1])
        prediction = self.predict(pictures)
        log_likelihood = np.log(self.probabilities)[grey_level(pictures), labels]
        return BaselineResult(
            float((prediction == labels).mean()), float(-log_likelihood.mean()), prediction
        )


def _check(pictures: NDArray[np.uint8], labels: NDArray[np.integer], colours: int) -> None:
    if pictures.ndim != 4 or pictures.shape[:3] != labels.shape:
        raise UserError(
            f"pictures {pictures.shape} and labels {labels.shape}: expected (n, H, W, 3) and "
            "(n, H, W)"
        )
    if not labels.size:
        raise UserError(f"labels {labels.shape}: no pixels; expected one picture or more")
    if labels.min() < 0 or labels.max() >= colours:
        raise UserError(
            f"labels from {labels.min()} to {labels.max()}: expected 0 to {colours - 1}"
        )
