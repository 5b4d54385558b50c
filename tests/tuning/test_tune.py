"""Tuning by gradient: it descends, stays in range, comes back from divergence, resumes."""

import functools
import math

import jax
import numpy as np
import optax
import pytest

import optjax as oj
from optjax import linear
from optjax.tuning import TuningInterrupted
from optjax.tuning.space import make_space

KEY = jax.random.key(0)


@functools.cache
def _data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(12, 4)) * np.geomspace(1, 0.3, 4)
    return X, X @ rng.normal(size=4) + 0.3 * rng.normal(size=12)


@functools.cache
def _run(steps=12, **options):
    options = options or {"sampler": "full"}
    return oj.make_run(oj.least_squares(*_data()), optax.sgd, steps, **options)


def _quiet(text, fraction):
    pass


def test_it_finds_the_best_rate_of_one_step():
    """In closed form, η* = (n/2)‖Xᵀa‖²/‖XXᵀa‖²."""
    X, t = _data()
    found = oj.tune(_run(1), "final_loss", {"learning_rate": 0.01}, optax.adam(0.3), steps=150)
    best = linear.optimal_learning_rate(X, t, np.zeros(4))
    np.testing.assert_allclose(found.hparams["learning_rate"], best, rtol=1e-4)
    at_best = linear.one_step_loss(X, t, np.zeros(4), best)
    np.testing.assert_allclose(found.value, at_best, rtol=1e-8)
    assert dict(found.path.sizes) == {"restart": 1, "outer_step": 150}


def test_the_first_step_is_the_outer_optimisers_in_the_logarithm():
    hparams = {"learning_rate": 0.05, "momentum": 0.4}
    found = oj.tune(_run(), "final_loss", hparams, optax.sgd(0.01), steps=2, progress=_quiet)
    _, slope = oj.hypergrad(_run())(hparams, KEY)
    u = math.log(0.05) - 0.01 * float(slope["learning_rate"]) * 0.05
    np.testing.assert_allclose(found.path.learning_rate[0, 1], math.exp(u), rtol=1e-10)
    u = math.log(0.4 / 0.6) - 0.01 * float(slope["momentum"]) * 0.4 * 0.6
    np.testing.assert_allclose(found.path.momentum[0, 1], 1 / (1 + math.exp(-u)), rtol=1e-10)


def test_restarts_and_seeds_are_runs_of_their_own():
    """The value of a point is the mean over seeds of that point's runs; the first is the start."""
    run = _run(8, max_batch_size=3)
    found = oj.tune(run, "final_loss", {"learning_rate": 0.05, "batch_size": 2}, steps=3,
                    seeds=[4, 9], restarts=3, progress=_quiet)  # fmt: skip
    assert found.path.learning_rate[0, 0] == pytest.approx(0.05, rel=1e-12)
    for r in range(3):
        rate = float(found.path.learning_rate[r, 1])
        ends = [
            run({"learning_rate": rate, "batch_size": 2}, jax.random.key(s)).final_loss
            for s in (4, 9)
        ]
        np.testing.assert_allclose(found.path.value[r, 1], np.mean(ends), rtol=1e-10)
        np.testing.assert_allclose(
            found.path.value_error[r, 1], np.std(ends, ddof=1) / np.sqrt(2), rtol=1e-8
        )
    assert found.hparams["batch_size"] == 2
    best = found.path.value.where(found.path.finite).min()
    assert found.value == pytest.approx(float(best), rel=1e-12)


def test_a_diverging_point_goes_back_halfway():
    """Restarts far above the largest rate that converges; the given start is below it."""
    run = _run(2000)
    found = oj.tune(run, "final_loss", {"learning_rate": 0.3}, steps=12, restarts=6, spread=3.0,
                    seed=1, progress=_quiet)  # fmt: skip
    finite = found.path.finite.values
    assert not finite[:, 0].all()
    assert finite[:, -1].all()
    r = int(np.argmin(finite[:, 0]))
    u = np.log(found.path.learning_rate.values[r, :2])
    np.testing.assert_allclose(u[1], (u[0] + math.log(0.3)) / 2, rtol=1e-10)


def test_schedules_and_trees_come_back_as_they_are():
    hparams = {
        "learning_rate": oj.Schedule(np.full(3, 0.05)),
        "l2": 1e-3,
        "initial_params": np.array([1.0, -2.0, 0.5, 0.0]),
        "example_weights": np.linspace(0.5, 1.5, 12),
    }
    found = oj.tune(_run(), "mean_loss", hparams, steps=4, progress=_quiet)
    assert isinstance(found.hparams["learning_rate"], oj.Schedule)
    assert found.hparams["learning_rate"].values.shape == (3,)
    again = _run()(found.hparams, KEY)
    np.testing.assert_allclose(np.mean(again.loss), found.value, rtol=1e-8)
    assert found.path["learning_rate"].dims == ("restart", "outer_step", "learning_rate_index")
    assert len(found.figure().axes) >= 5


def test_fresh_seeds_are_new_at_every_step():
    run = _run(8, max_batch_size=2)
    found = oj.tune(run, "final_loss", {"learning_rate": 0.05}, optax.sgd(0.0), steps=3, seeds=2,
                    fresh_seeds=True, progress=_quiet)  # fmt: skip
    for k in range(3):
        seeds = (2 * k, 2 * k + 1)
        ends = [run({"learning_rate": 0.05}, jax.random.key(s)).final_loss for s in seeds]
        np.testing.assert_allclose(found.path.value[0, k], np.mean(ends), rtol=1e-10)
    assert found.value == pytest.approx(float(found.path.value[0, -1]))


def test_a_tuning_goes_on_where_it_was(tmp_path):
    hparams = {"learning_rate": 0.02, "momentum": 0.5}
    tune = functools.partial(
        oj.tune, _run(), "final_loss", hparams, restarts=2, progress=_quiet, out=tmp_path / "t.nc"
    )
    whole = oj.tune(_run(), "final_loss", hparams, restarts=2, steps=9, progress=_quiet)

    def stop(text, fraction):
        if "step 4" in text:
            raise KeyboardInterrupt

    with pytest.raises(TuningInterrupted) as raised:
        tune(steps=9, progress=stop)
    assert raised.value.tuning.path.sizes["outer_step"] == 4
    on = tune(steps=9)
    np.testing.assert_allclose(on.path.learning_rate, whole.path.learning_rate, rtol=1e-12)
    np.testing.assert_allclose(on.value, whole.value, rtol=1e-12)
    assert tune(steps=9).path.sizes["outer_step"] == 9  # nothing left to do
    with pytest.raises(oj.UserError, match="another tuning: spread was"):
        tune(steps=9, spread=2.0)
    (tmp_path / "other.nc").write_text("no netCDF")
    with pytest.raises(oj.UserError, match="holds no tuning"):
        tune(steps=9, out=tmp_path / "other.nc")


@pytest.mark.parametrize(
    ("span", "value"),
    [(None, -3.0), ((0, math.inf), 1e-4), ((-1, 2), 1.9), ((-math.inf, 0.5), -2.0), ((3, 5), 3.1)],
)
def test_a_range_and_the_reals(span, value):
    theta = {"learning_rate": np.array(value)}
    space = make_space(theta, {"learning_rate": span})
    u = space.outside(theta)
    np.testing.assert_allclose(space.inside(u)["learning_rate"], value, rtol=1e-12)
    slope = space.pulled_back(u, {"learning_rate": np.array(2.0)})["learning_rate"]
    h = 1e-6
    inside = lambda s: space.inside({"learning_rate": u["learning_rate"] + s})["learning_rate"]  # noqa: E731
    slope_there = (inside(h) - inside(-h)) / (2 * h)
    np.testing.assert_allclose(slope, 2 * slope_there, rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hparams": {"learning_rate": 0.1, "momentum": 0.0}}, "momentum starts at 0"),
        ({"constraints": {"rate": (0, 1)}}, "constraints name 'rate'"),
        ({"constraints": {"learning_rate": (1, 0)}}, "expected low < high"),
        ({"constraints": {"learning_rate": 3}}, r"expected \(low, high\)"),
        ({"steps": 0}, "at least 1"),
        ({"restarts": 0}, "at least 1"),
        ({"spread": -1.0}, "0 or more"),
        ({"seeds": []}, "at least one"),
        ({"wrt": "batch_size", "hparams": {"learning_rate": 0.1, "batch_size": 2}}, "mode='es'"),
        ({"hparams": {"learning_rate": 1e9}}, "every point"),
    ],
)
def test_bad_input_is_one_line(options, match):
    hparams = options.pop("hparams", {"learning_rate": 0.1})
    run = _run(40, max_batch_size=4)
    with pytest.raises(oj.UserError, match=match) as raised:
        oj.tune(run, "final_loss", hparams, **{"steps": 2, "progress": _quiet, **options})
    assert "\n" not in str(raised.value)
