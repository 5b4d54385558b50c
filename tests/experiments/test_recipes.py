"""The studies of recipes: every recipe trains, scores are kept, the verdict follows from them."""

from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from jax.flatten_util import ravel_pytree

from optjax.colourisation.colouriser import variables_of
from optjax.colourisation.pictures import demo_pictures, load_pictures
from optjax.colourisation.task import make_task
from optjax.experiments.recipes import run as recipes
from optjax.experiments.recipes.studies import OPTIMISERS, OURS, STUDIES, UNET
from optjax.support.errors import UserError

SMALL = {"steps": 2, "batch_size": 4, "shrink": 16, "colours": 6, "size": 8}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures whose colour follows from their grey level alone."""
    light = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1))
    images = np.concatenate([light, light, 255 - light // 2], axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "some.npz"
    np.savez(path, train=images[:20], test=images[20:])
    return str(path)


@pytest.fixture(scope="module")
def dataset(pictures):
    few = {"unet": UNET, "ours": replace(OURS, optimiser="schedule-free Adam", rebalance=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "skips", few | {"unet": replace(UNET, batch_size=50, share=2)})
        patch.setattr(recipes, "_probe", lambda net: lambda *given: 0.5)
        return recipes.run(recipes.Config(data=pictures, seeds=2, study="skips", **SMALL))


@pytest.mark.parametrize("study", STUDIES)
def test_every_recipe_is_a_network_and_a_way_to_train_it(study):
    for recipe in STUDIES[study].values():
        net = recipe.network(12, shrink=8)
        picture = jax.ShapeDtypeStruct((2, 16, 16, 1), np.float32)
        scores = jax.eval_shape(lambda v, x, net=net: net.apply(v, x), variables_of(net), picture)
        assert scores.shape == (2, 16, 16, 12)
        assert recipe.optimiser in OPTIMISERS
        assert not recipe.counted or "table" in variables_of(net)["params"]


def test_the_ablation_goes_from_the_sources_network_to_ours():
    names = list(STUDIES["ablation"])
    assert STUDIES["ablation"][names[0]] == UNET
    assert OURS in STUDIES["ablation"].values()
    assert len(names) >= 8


def test_scores_of_every_seed_are_kept(dataset):
    assert dataset.sizes["seed"] == 2
    for name in ("accuracy", "top_5", "balanced_accuracy", "loss", "ssim", "calibration_error"):
        assert dataset[name].dims == ("recipe", "seed")
        assert np.all(np.isfinite(dataset[name])), name
    assert dataset["psnr"].dims == ("recipe", "seed", "temperature")
    assert dataset["curve_step"].sel(recipe="unet")[-1] == 4  # twice the steps, of two pictures
    assert dataset["curve_step"].sel(recipe="ours")[-1] == 2
    # The table knows these pictures; the other network has seen 8 of them.
    assert np.all(dataset["accuracy"].sel(recipe="ours") > dataset["accuracy"].sel(recipe="unet"))


@pytest.mark.parametrize("sound", [[True, False], [False, True], [False, False]])
def test_a_run_that_diverged_is_missing_and_the_others_are_judged(pictures, sound):
    task = make_task(load_pictures(pictures, size=8), 6)
    net = OURS.network(6, shrink=16)
    weights = ravel_pytree(net.init(jax.random.key(0), task.train[0][:1]))[0]
    runs = xr.Dataset(
        {
            "weights": (("seed", "i"), [weights if good else np.nan * weights for good in sound]),
            "validation_loss": (("seed", "step"), np.zeros((2, 1))),
        },
        {"step": [1]},
        {"seconds": 1.0},
    )
    if not any(sound):
        with pytest.raises(UserError, match="every run of a recipe diverged"):
            recipes._judged(net, runs, task, probe=False)
        return
    found = recipes._judged(net, runs, task, probe=False)
    for name in ("accuracy", "psnr", "confusion"):
        assert np.isfinite(found[name].values).any((*range(1, found[name].ndim),)).tolist() == sound
    assert np.isfinite(found["entropy"]).all()


def test_the_probe_looks_at_the_last_features_at_full_size(pictures):
    task = make_task(load_pictures(pictures, size=8), 6)
    missed = []
    for skips in ((), ("stage", "input")):
        net = replace(UNET, options={"skips": skips}).network(6, shrink=4)
        variables = net.init(jax.random.key(0), task.train[0][:1])
        missed.append(float(recipes._probe(net)(variables, task.train[0], task.validation[0])))
    assert 0 < missed[1] < missed[0] < 1.5


@pytest.mark.parametrize(
    ("steps", "share", "expected"),
    [(7, 1, 7), (250, 1, 250), (250, 100 / 128, 195), (1250, 100 / 128, 980)],
)
def test_a_run_has_several_records_whatever_its_steps(monkeypatch, steps, share, expected):
    made = []
    monkeypatch.setattr(recipes, "make_run", lambda p, o, steps, **how: made.append((steps, how)))
    monkeypatch.setattr(
        recipes, "sweep", lambda *given, **how: xr.Dataset({}, {"learning_rate": [1]})
    )
    task = make_task(demo_pictures(("coffee",), 16), 6)
    net = UNET.network(6, shrink=16)
    recipes._trained(UNET, net, task, round(share * steps), range(1), lambda *said: None)
    ((made_steps, how),) = made
    assert made_steps == expected
    assert made_steps % how["record_every"] == 0
    assert steps < 80 or made_steps // how["record_every"] >= min(5, steps // 80)


def test_every_figure_is_drawn(dataset):
    for study in ("comparison", "ablation"):
        many = dataset.isel(recipe=[0, 1, 0, 1, 0] if study == "ablation" else [0, 1])
        many = many.assign_coords(recipe=[f"r{i}" for i in range(many.sizes["recipe"])])
        for fig in recipes.figures(many).values():
            fig.canvas.draw()
            plt.close(fig)


@pytest.mark.parametrize(
    ("accuracy", "loss", "verdict"),
    [
        ([0.70, 0.71], [0.80, 0.81], "holds"),
        ([0.70, 0.71], [0.80, 0.99], "corrected"),  # the interval of the loss holds the table's
        ([0.50, 0.51], [0.99, 0.98], "refuted"),
        ([0.62, 0.63], [0.99, 0.98], "refuted"),  # the accuracy decides nothing
        ([0.60, 0.70], [0.80, 0.99], "not run"),  # neither does
        ([0.70, np.nan], [0.80, np.nan], "not run"),
    ],
)
def test_the_verdict_follows_from_both_scores(dataset, accuracy, loss, verdict):
    told = dataset.assign(baseline_accuracy=0.62, baseline_loss=0.92)
    for name, values in (("accuracy", accuracy), ("loss", loss)):
        told[name] = (("recipe", "seed"), [values, values])
    (claim,) = recipes.claims(told)
    assert claim.verdict == verdict
    assert recipes.claims(told.sel(recipe=["unet"])) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"study": "ablations"}, "did you mean 'ablation'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"colours": 3}, "colours is 3"),
        ({"batch_size": 30}, "20 training pictures: study 'ours' needs 30 or more"),
    ],
)
def test_refusals(pictures, wrong, words):
    with pytest.raises(UserError, match=words):
        recipes.run(recipes.Config(data=pictures, **SMALL | wrong))
