"""The grey-level baseline against a case done by hand, and against a slow count."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from optjax.colourisation.baseline import GreyLevelBaseline, grey_level
from optjax.colourisation.palette import load_palette, nearest_colour
from optjax.colourisation.pictures import load_pictures
from optjax.support.errors import UserError


def greys(levels):
    return np.repeat(np.array(levels, np.uint8)[None, None, :, None], 3, axis=-1)


def test_by_hand():
    # Level 10: labels 0, 0, 1. Level 20: label 2. K = 3, smoothing 1.
    baseline = GreyLevelBaseline.fit(greys([10, 10, 10, 20]), np.array([[[0, 0, 1, 2]]]), colours=3)
    np.testing.assert_allclose(baseline.probabilities[10], [3 / 6, 2 / 6, 1 / 6])
    np.testing.assert_allclose(baseline.probabilities[20], [1 / 4, 1 / 4, 2 / 4])
    # 12 is nearer to 10, 250 to 20; 15 is as near to both and takes the darker.
    result = baseline.evaluate(greys([10, 12, 250, 15]), np.array([[[0, 1, 2, 0]]]))
    assert result.prediction.tolist() == [[[0, 0, 2, 0]]]
    assert result.accuracy == 0.75
    assert result.loss == pytest.approx(-np.log([1 / 2, 1 / 3, 1 / 2, 1 / 2]).mean(), rel=1e-14)


def test_against_a_slow_count():
    rng = np.random.default_rng(0)
    train, held_out = (rng.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8) for _ in range(2))
    labels = [p[..., 0] // 64 for p in (train, held_out)]
    result = GreyLevelBaseline.fit(train, labels[0], 4, smoothing=0.5).evaluate(held_out, labels[1])
    counts = defaultdict(Counter)
    for pixel, label in zip(train.reshape(-1, 3).tolist(), labels[0].ravel().tolist(), strict=True):
        counts[sum(pixel) // 3][label] += 1
    right, loss = 0, 0.0
    pixels = held_out.reshape(-1, 3).tolist()
    for pixel, label in zip(pixels, labels[1].ravel().tolist(), strict=True):
        level = min(counts, key=lambda seen: (abs(seen - sum(pixel) // 3), seen))
        row = [counts[level][k] + 0.5 for k in range(4)]
        right += row.index(max(row)) == label
        loss -= np.log(row[label] / sum(row))
    assert result.accuracy == pytest.approx(right / len(pixels), rel=1e-12)
    assert result.loss == pytest.approx(loss / len(pixels), rel=1e-12)


def test_distributions_are_proper():
    baseline = GreyLevelBaseline.fit(greys([7]), np.array([[[1]]]), colours=5)
    assert baseline.probabilities.shape == (256, 5)
    np.testing.assert_allclose(baseline.probabilities.sum(axis=1), 1)
    assert baseline.probabilities.min() > 0


def test_grey_level_does_not_overflow():
    assert grey_level(np.full((1, 4, 4, 3), 255, np.uint8)).max() == 255


@pytest.mark.parametrize(
    ("labels", "colours", "smoothing", "match"),
    [
        (np.zeros((1, 1, 3), int), 2, 1.0, r"labels \(1, 1, 3\)"),
        (np.array([[[0, 2]]]), 2, 1.0, "labels from 0 to 2: expected 0 to 1"),
        (np.array([[[-1, 0]]]), 2, 1.0, "labels from -1"),
        (np.array([[[0, 1]]]), 2, 0.0, "smoothing 0.0"),
        (np.array([[[0, 1]]]), 2, float("nan"), "smoothing nan"),
    ],
)
def test_refusals(labels, colours, smoothing, match):
    with pytest.raises(UserError, match=match):
        GreyLevelBaseline.fit(greys([1, 2]), labels, colours, smoothing)


def test_refuses_no_pixels():
    empty = np.zeros((0, 4, 4, 3), np.uint8)
    with pytest.raises(UserError, match="no pixels"):
        GreyLevelBaseline.fit(empty, np.zeros((0, 4, 4), int), 2)


@pytest.mark.needs_data
def test_horses(data_folder):
    # Measured once with another count (a k-d tree and a dictionary), on the published palette.
    horses = load_pictures(str(data_folder / "cifar10_horses.npz"))
    palette = load_palette(data_folder / "horses_palette24.npy", colours=24)
    train, held_out = (nearest_colour(p, palette) for p in (horses.train, horses.validation))
    result = GreyLevelBaseline.fit(horses.train, train, 24).evaluate(horses.validation, held_out)
    assert result.accuracy == pytest.approx(0.6215, abs=5e-4)
    assert result.loss == pytest.approx(0.9152, abs=5e-4)
