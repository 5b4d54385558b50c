"""Palettes against brute force, and the palettes that are refused."""

import numpy as np
import pytest

from optjax.colourisation.palette import grey, kmeans_palette, load_palette, nearest_colour
from optjax.support.errors import UserError


def random_pictures(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def brute_force(pictures, palette):
    difference = pictures[..., None, :] / 256 - palette
    return (difference**2).sum(axis=-1).argmin(axis=-1)


# 17,000 pixels pass the edge of a chunk.
@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (3, 8, 12, 3), (17, 40, 25, 3)])
@pytest.mark.parametrize("colours", [1, 2, 24, 300])
def test_labels_are_the_brute_force_ones(shape, colours):
    pictures = random_pictures(shape)
    palette = np.random.default_rng(1).random((colours, 3))
    labels = nearest_colour(pictures, palette)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, brute_force(pictures, palette))


def test_equal_colours_give_the_lowest_label():
    palette = np.array([[0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [0.1, 0.1, 0.1]])
    assert (nearest_colour(np.zeros((1, 4, 4, 3), np.uint8), palette) == 1).all()


def test_a_palette_colour_is_its_own_label():
    palette = np.unique(random_pictures((40, 3)), axis=0) / 256
    pictures = (palette * 256).astype(np.uint8)[None, None]
    np.testing.assert_array_equal(nearest_colour(pictures, palette)[0, 0], np.arange(len(palette)))


def test_grey_is_the_mean_over_256():
    pictures = random_pictures((2, 8, 8, 3))
    result = grey(pictures)
    assert result.dtype == np.float32
    assert result.shape == (2, 8, 8, 1)
    # float32 rounds the one division: half a unit in the last place of numbers below 1.
    expected = (pictures / 256).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(result, expected, rtol=0, atol=6e-8)
    assert grey(np.full((1, 4, 4, 3), 255, np.uint8)).max() == np.float32(255 / 256)


def test_kmeans_finds_separated_colours_and_repeats():
    rng = np.random.default_rng(0)
    true = np.array([[20, 20, 20], [200, 30, 30], [40, 90, 220], [240, 240, 240]])
    pictures = (true[rng.integers(0, 4, (4, 16, 16))] + rng.integers(-3, 4, (4, 16, 16, 3))).astype(
        np.uint8
    )
    palette = kmeans_palette(pictures, colours=4, seed=0)
    assert palette.dtype == np.float64
    np.testing.assert_allclose(palette[[0, 1, 2, 3]] * 256, true, atol=0.6)
    np.testing.assert_array_equal(palette, kmeans_palette(pictures, colours=4, seed=0))


def test_kmeans_from_a_sample():
    palette = kmeans_palette(random_pictures((8, 32, 32, 3)), colours=24, sample=500)
    assert palette.shape == (24, 3)
    assert palette.min() >= 0
    assert palette.max() <= 1


def test_kmeans_refusals():
    with pytest.raises(UserError, match="1 distinct colours"):
        kmeans_palette(np.zeros((1, 4, 4, 3), np.uint8), colours=2)
    with pytest.raises(UserError, match="expected 1 or more"):
        kmeans_palette(np.zeros((1, 4, 4, 3), np.uint8), colours=0)


def test_load_palette_round_trip(tmp_path):
    palette = np.random.default_rng(0).random((24, 3))
    np.save(tmp_path / "p.npy", palette)
    np.testing.assert_array_equal(load_palette(tmp_path / "p.npy", colours=24), palette)
    np.save(tmp_path / "q.npy", np.asfortranarray(palette.astype(np.float32)))
    loaded = load_palette(tmp_path / "q.npy")
    assert loaded.dtype == np.float64
    np.testing.assert_array_equal(loaded, palette.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((3, 24)), r"shape \(3, 24\), expected \(K, 3\)"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((70_000, 3)), r"shape \(70000, 3\)"),
        (np.zeros((2, 3), np.uint8), "dtype uint8"),
        (np.zeros((2, 3), complex), "dtype complex128"),
        (np.array([[None] * 3]), "object array"),
        (np.array([[0, np.nan, 0]]), "NaN"),
        (np.array([[0, np.inf, 0]]), "infinity"),
        (np.array([[0, 255.0, 0]]), "divide by 256"),
        (np.array([[0, -0.1, 0]]), "values from -0.1"),
    ],
)
def test_load_palette_refuses(tmp_path, array, match):
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(UserError, match=match) as caught:
        load_palette(tmp_path / "p.npy")
    assert "\n" not in str(caught.value)


def test_load_palette_of_another_length(tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((5, 3)))
    with pytest.raises(UserError, match=r"shape \(5, 3\), expected \(24, 3\)"):
        load_palette(tmp_path / "p.npy", colours=24)


def test_load_palette_unreadable(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_palette(tmp_path / "absent.npy")
    with pytest.raises(UserError, match="cannot be read"):
        load_palette(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_palette("nul\0byte")
    (tmp_path / "p.npy").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"not a readable \.npy"):
        load_palette(tmp_path / "p.npy")
    np.save(tmp_path / "q.npy", np.zeros((24, 3)))
    (tmp_path / "q.npy").write_bytes((tmp_path / "q.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_palette(tmp_path / "q.npy")


@pytest.mark.needs_data
def test_the_published_palette(data_folder):
    palette = load_palette(data_folder / "horses_palette24.npy", colours=24)
    with np.load(data_folder / "cifar10_horses.npz", allow_pickle=False) as horses:
        pictures = horses["test"][:50]
    np.testing.assert_array_equal(nearest_colour(pictures, palette), brute_force(pictures, palette))
