"""Scores of colours against those of scikit-learn and scikit-image, and by known cases."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    top_k_accuracy_score,
)

from optjax.experiments.recipes.metrics import (
    calibration,
    coloured,
    colourfulness,
    confusion,
    label_scores,
    psnr,
    ssim,
)

COLOURS = 7


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 8, 8, COLOURS))
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    labels = rng.integers(0, COLOURS - 1, (3, 8, 8))  # the last colour has no pixel
    return probabilities, labels


def test_scores_of_labels_are_those_of_scikit_learn(scored):
    probabilities, labels = scored
    flat, true = probabilities.reshape(-1, COLOURS), labels.ravel()
    best, every = flat.argmax(-1), np.arange(COLOURS)
    found = label_scores(probabilities, labels)
    seen = best[best < COLOURS - 1], true[best < COLOURS - 1]
    assert len(seen[0]) < len(best)  # a colour that no pixel has is given, too
    expected = {
        "accuracy": np.mean(best == true),
        "top_5": top_k_accuracy_score(true, flat, k=5, labels=every),
        "loss": log_loss(true, flat, labels=every),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(true, best)
    assert found["balanced_accuracy"] == pytest.approx(balanced, rel=1e-12)
    table = confusion_matrix(true, best, labels=every, normalize="true")
    np.testing.assert_allclose(confusion(true, best, COLOURS)[:-1], table[:-1])
    assert np.isnan(confusion(true, best, COLOURS)[-1]).all()


def test_one_that_knows_how_sure_it_is_has_no_calibration_error():
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.3, 1.0, 200_000)
    right = rng.uniform(size=sure.size) < sure
    found = calibration(sure, right)
    assert found.error < 0.01
    assert found.share.sum() == pytest.approx(1)
    assert np.isnan(found.accuracy[:4]).all()  # below 0.3 there is none
    assert calibration(sure, right & (rng.uniform(size=sure.size) < 0.5)).error > 0.2
    assert calibration(np.ones(3), np.ones(3)).error == 0  # the last range holds its end


@pytest.mark.parametrize("temperature", [0.01, 0.38, 1.0])
def test_colours_keep_the_grey_level_that_is_known(scored, temperature):
    palette = np.random.default_rng(2).uniform(0.4, 0.6, (COLOURS, 3))
    grey = np.full((3, 8, 8, 1), 0.5)
    found = coloured(scored[0], palette, grey, temperature)
    assert np.abs(found.mean(-1) / 256 - 0.5).max() < 1 / 256
    if temperature == 0.01:
        nearest = palette[scored[0].argmax(-1)]
        nearest = nearest + 0.5 - nearest.mean(-1, keepdims=True)
        assert np.mean(np.abs(found / 256 - nearest)) < 1e-2
    if temperature == 1.0:
        mean = scored[0] @ palette
        moved = mean + 0.5 - mean.mean(-1, keepdims=True)
        np.testing.assert_allclose(found / 256, moved, atol=0.51 / 256)


def test_scores_of_pictures():
    rng = np.random.default_rng(3)
    true = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    near = np.clip(true.astype(int) + rng.integers(-9, 10, true.shape), 0, 255).astype(np.uint8)
    assert psnr(true, near) == pytest.approx(peak_signal_noise_ratio(true, near), rel=1e-6)
    assert np.isfinite(psnr(true, true))
    assert ssim(true, true) == pytest.approx(1)
    assert ssim(true, near) < 1
    grey = np.repeat(true[..., :1], 3, axis=-1)
    assert colourfulness(grey) == 0 < colourfulness(near)
    # Half red, half green, by hand: rg = ±255, yb = 127.5; σ = 255, μ = 127.5.
    halves = np.zeros((1, 2, 2, 3), np.uint8)
    halves[:, 0, :, 0] = halves[:, 1, :, 1] = 255
    assert colourfulness(halves) == pytest.approx(255 + 0.3 * 127.5)
