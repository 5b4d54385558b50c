"""Grids as people write them, and the best point of a sweep."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import optjax as oj
from optjax.support.errors import UserError

QUIET = {"progress": lambda *_: None}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3))
PROBLEM = oj.least_squares(X, X @ RNG.normal(size=3) + RNG.normal(size=12))


def make(optimizer):
    return oj.make_run(PROBLEM, optimizer, 20, record_every=10)


@pytest.mark.parametrize("fixed", [0.5, np.float64(0.5), 1])
def test_a_single_number_is_held_fixed_and_has_no_axis(fixed):
    run = make(functools.partial(optax.sgd))
    fixed_grid = {"learning_rate": [0.01, 0.02], "momentum": fixed * 0.5}
    found = oj.sweep(run, fixed_grid, 2, **QUIET)
    assert found.final_loss.dims == ("learning_rate", "seed")
    assert float(found.momentum) == fixed * 0.5
    full = oj.sweep(run, fixed_grid | {"momentum": [fixed * 0.5]}, 2, **QUIET)
    assert np.array_equal(found.final_loss, full.final_loss.isel(momentum=0))
    again = oj.replay(found.isel(learning_rate=1, seed=1))
    np.testing.assert_allclose(again.final_loss, found.final_loss[1, 1], rtol=1e-12)
    zipped = oj.zip_grid({"learning_rate": [0.01, 0.02], "momentum": fixed * 0.5})
    assert np.array_equal(oj.sweep(run, zipped, 2, **QUIET).final_loss, found.final_loss)
    one = oj.sweep(run, {"learning_rate": 0.01, "momentum": fixed * 0.5}, 2, **QUIET)
    assert np.array_equal(one.final_loss, found.final_loss[0])


ROWS = [
    {"optimizer": optax.sgd, "learning_rate": 0.01, "momentum": 0.9},
    {"optimizer": optax.sgd, "learning_rate": 0.02},
    {"optimizer": optax.adam, "learning_rate": 0.05, "b1": 0.8},
]


def test_a_point_may_lack_what_others_have(tmp_path):
    found = oj.sweep(make, oj.points(ROWS), 2, out=tmp_path / "rows", **QUIET)
    for i, row in enumerate(ROWS):
        given = {name: value for name, value in row.items() if name != "optimizer"}
        alone = make(row["optimizer"])(given, jax.random.key(1))
        np.testing.assert_allclose(found.final_loss[i, 1], alone.final_loss, rtol=1e-12)
        again = oj.replay(found.isel(point=i, seed=1))
        np.testing.assert_allclose(again.final_loss, alone.final_loss, rtol=1e-12)
    assert np.isnan(found.momentum.values).tolist() == [False, True, True]
    kept = oj.load_sweep(tmp_path / "rows")
    xr.testing.assert_equal(kept.drop_vars("optimizer"), found.drop_vars("optimizer"))
    assert (
        oj.best(found).point.keys()
        == ROWS[int(found.final_loss.mean("seed").argmin("point"))].keys()
    )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, param_dtype=jnp.float64)(x)


def accuracy(out, label):
    return {"accuracy": (out.argmax(-1) == label).astype(float)}


@pytest.mark.parametrize(
    ("metric", "mode"), [("validation_loss", "min"), ("validation_accuracy", "max")]
)
def test_the_best_point_has_a_model_that_predicts(metric, mode):
    y = (X[:, 0] > 0).astype(np.int64)
    cross = optax.softmax_cross_entropy_with_integer_labels
    problem = oj.flax_problem(Net(), X, y, cross, validation=(X, y), score=accuracy)
    run = oj.make_run(problem, optax.sgd, 20, max_batch_size=4, record_every=10)
    found = oj.sweep(run, {"learning_rate": [1e-3, 0.5], "batch_size": [2, 4]}, 2, **QUIET)
    best = oj.best(found, metric, mode)
    means = found[metric].isel(step=-1).mean("seed")
    assert best.value == float(means.min() if mode == "min" else means.max())
    assert best.value == float(means.sel(best.point))
    own = best.predict(X)
    assert np.allclose(own, Net().apply({"params": best.params}, X))
    with pytest.raises(UserError, match="unknown metric"):
        oj.best(found, "accuracy")
    with pytest.raises(UserError, match="unknown mode"):
        oj.best(found, metric, "highest")


def test_points_that_diverged_are_never_best():
    run = make(optax.sgd)
    found = oj.sweep(run, {"learning_rate": [1e-3, 1e20]}, 2, **QUIET)
    assert oj.best(found).point == {"learning_rate": 1e-3}
    with pytest.raises(UserError, match="no point has a finite final_loss"):
        oj.best(found.isel(learning_rate=[1]))
    with pytest.raises(UserError, match="your model to params"):
        oj.best(found).predict(X)
