"""The colourisation experiment from pictures on disk to claims, on networks a test can afford."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from optjax.experiments import colourisation
from optjax.experiments.colourisation import Config
from optjax.support.errors import UserError

SMALL = {"nets": ("conv-transpose",), "filters": 2, "colours": 2, "epochs": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures whose colour follows from their grey level: red where dark, blue where light."""
    rng = np.random.default_rng(0)
    light = rng.integers(0, 2, (30, 2, 2, 1)).repeat(4, 1).repeat(4, 2)
    images = np.where(light == 1, [120, 160, 250], [90, 20, 10]).astype(np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "two.npz"
    np.savez(path, train=images[:20], test=images[20:])
    return str(path)


@pytest.fixture(scope="module")
def dataset(pictures):
    return colourisation.run(Config(data=pictures, seeds=2, **SMALL))


def test_every_epoch_of_every_seed_is_recorded(dataset):
    assert dict(dataset["validation_loss"].sizes) == {"net": 1, "seed": 2, "epoch": 2}
    for name in ("train_loss", "validation_loss", "validation_accuracy", "seconds_an_epoch"):
        assert np.all(np.isfinite(dataset[name]))
    for name in ("population_loss", "population_accuracy"):
        assert dataset[name].dims == ("net", "seed")
        assert np.all(np.isfinite(dataset[name]))
    assert np.all(dataset["diverged_at"] == -1)
    assert dataset.attrs["protocol"] == 0
    assert float(dataset["baseline_accuracy"]) == 1.0  # grey decides the colour here
    first, second = dataset["train_loss"].isel(net=0, epoch=-1).values
    assert first != second


def test_a_seed_is_the_same_run_whatever_it_runs_beside(dataset, pictures):
    alone = colourisation.run(Config(data=pictures, seeds=1, seed=1, **SMALL))
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        # float32, and lanes of other numbers: products add in another order.
        np.testing.assert_allclose(alone[name].sel(seed=1), dataset[name].sel(seed=1), rtol=1e-4)


def test_other_pictures_leave_the_sources_figures_undecided(dataset):
    claims = {claim.id: claim for claim in colourisation.claims(dataset)}
    claim = claims["colourisation/conv-transpose"]
    assert claim.verdict == "not run"
    assert "CIFAR-10's horses" in claim.measured["data"]
    assert claim.n_runs == 2


@pytest.mark.parametrize(
    ("accuracy", "loss", "seeds", "verdict"),
    [
        (0.554, 1.147, 5, "holds"),
        (0.545, 1.147, 5, "holds"),  # single runs scatter by two points
        (0.520, 1.147, 5, "corrected"),
        (0.554, 1.2, 5, "corrected"),
        (0.554, 1.147, 4, "not run"),  # too few to say how they scatter
    ],
)
def test_the_sources_pictures_and_protocol_decide(dataset, accuracy, loss, seeds, verdict):
    means = [mean for _, mean in colourisation.HORSES.values()]
    told = dataset.isel(seed=[0] * seeds).assign_coords(seed=range(seeds))
    told["mean_colour"] = dataset["mean_colour"].copy(data=means)
    told["pictures"] = dataset["pictures"].copy(data=[5000, 1000])
    spread = np.linspace(-0.01, 0.01, seeds)[None, :, None]
    told["validation_accuracy"] = 0 * told["validation_accuracy"] + accuracy + spread
    told["validation_loss"] = 0 * told["validation_loss"] + loss + spread
    told.attrs["protocol"] = 1
    (claim,) = colourisation.claims(told)
    assert claim.verdict == verdict
    assert colourisation.claims(told.assign_attrs(protocol=0))[0].verdict == "not run"


def test_the_default_number_of_epochs_is_the_protocols(pictures):
    given = {name: value for name, value in SMALL.items() if name != "epochs"}
    dataset = colourisation.run(Config(data=pictures, seeds=1, **given))
    assert dataset.sizes["epoch"] == colourisation.PROTOCOL["epochs"]


def test_figures_are_drawn(dataset):
    found = colourisation.figures(dataset)
    assert set(found) == {"curves", "pictures"}
    for fig in found.values():
        fig.canvas.draw()
        plt.close(fig)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch_size": 21}, "expected 1 to 20"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"nets": ("unett",)}, "did you mean 'unet'"),
    ],
)
def test_refusals(pictures, wrong, words):
    with pytest.raises(UserError, match=words):
        colourisation.run(Config(data=pictures, **SMALL | wrong))
