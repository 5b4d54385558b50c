"""Tuning by gradient: it descends, stays in range, comes back from divergence, resumes."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.support import fingerprint
from optjax.sweeps import programs
from optjax.theory import gradient_descent
from optjax.tuning import TuningInterrupted, checks, descent
from optjax.tuning.space import make_space, named_leaves

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


def _interrupt(text, fraction):
    raise KeyboardInterrupt


def test_it_finds_the_best_rate_of_one_step():
    """In closed form, η* = (n/2)‖Xᵀa‖²/‖XXᵀa‖²."""
    X, t = _data()
    found = oj.tune(_run(1), "final_loss", {"learning_rate": 0.01}, optax.adam(0.3), steps=150)
    best = gradient_descent.optimal_learning_rate(X, t, np.zeros(4))
    np.testing.assert_allclose(found.hparams["learning_rate"], best, rtol=1e-4)
    at_best = gradient_descent.one_step_loss(X, t, np.zeros(4), best)
    np.testing.assert_allclose(found.value, at_best, rtol=1e-8)
    assert dict(found.path.sizes) == {"restart": 1, "outer_step": 150}


def test_a_score_that_is_to_be_high_is_its_negative_made_low():
    tune = functools.partial(
        oj.tune, _run(), hparams={"learning_rate": 0.02}, steps=30, restarts=2, progress=_quiet
    )
    goal = float(tune("final_loss").value) * 1.2
    low = tune("final_loss", stop=oj.Target(goal))
    high = tune(lambda run: -run.final_loss, better="high", stop=oj.Target(-goal))
    assert 1 < low.path.sizes["outer_step"] < 30
    assert (high.value, high.hparams) == (-low.value, low.hparams)
    np.testing.assert_array_equal(high.path.value, -low.path.value)
    high.figure()
    with pytest.raises(oj.UserError, match="target has better='high', the tuning 'low'"):
        tune("final_loss", stop=oj.Target(goal, better="high"))
    found = oj.sweep(_run(), high.hparams, 2, progress=_quiet)  # what was found, as it comes
    assert dict(found.sizes) == {"seed": 2, "step": 12}
    with pytest.raises(oj.UserError, match="better is 'max': expected 'low' or 'high'"):
        tune("final_loss", better="max")


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
    """To the restart's own last finite point, or to the best point of all where it has none."""
    run = _run(2000)
    found = oj.tune(run, "final_loss", {"learning_rate": 0.3}, steps=12, restarts=6, spread=3.0,
                    seed=1, progress=_quiet)  # fmt: skip
    finite = found.path.finite.values
    assert not finite[:, 0].all()
    assert finite[:, -1].all()
    r = int(np.argmin(finite[:, 0]))
    u = np.log(found.path.learning_rate.values)
    best = int(np.nanargmin(found.path.value.values[:, 0]))
    np.testing.assert_allclose(u[r, 1], (u[r, 0] + u[best, 0]) / 2, rtol=1e-10)
    far = oj.tune(_run(150), "final_loss", {"learning_rate": 0.05}, optax.sgd(1e3), steps=3,
                  progress=_quiet)  # fmt: skip
    u, finite = np.log(far.path.learning_rate.values[0]), far.path.finite.values[0]
    assert finite.tolist() == [True, False, False]
    np.testing.assert_allclose(u[2], (u[0] + u[1]) / 2, rtol=1e-10)


def _cliff(trajectory):
    """A gradient whose square overflows, far from the solution."""
    loss = trajectory.final_loss
    return jnp.where(loss > 1e2, 1e200, 1.0) * loss


@pytest.mark.parametrize("of", ["final_loss", _cliff])
def test_a_start_that_is_not_finite_comes_down(of):
    steps, rate = (200, 1e3) if of == "final_loss" else (12, 10.0)
    found = oj.tune(_run(steps), of, {"learning_rate": rate}, steps=14, progress=_quiet)
    finite = found.path.finite.values[0]
    first = int(np.argmax(finite))
    assert first > 1
    assert finite[first:].all()
    rates = found.path.learning_rate.values[0]
    np.testing.assert_allclose(rates[: first + 1], rate * np.exp(-np.arange(first + 1.0)))
    assert bool(found.path.diverged[0, 0]) == (of == "final_loss")
    # Adam starts afresh: its first step is a tenth, but for its ε.
    np.testing.assert_allclose(abs(np.log(rates[first + 1] / rates[first])), 0.1, rtol=0.02)


def test_no_start_that_is_finite(tmp_path):
    hparams = {"learning_rate": 1e9, "momentum": 0.5}
    diverging = functools.partial(
        oj.tune, _run(200), "final_loss", hparams, wrt="momentum", steps=99
    )

    with pytest.raises(TuningInterrupted) as raised:
        diverging(progress=_interrupt)
    tuning = raised.value.tuning
    assert math.isnan(tuning.value)
    assert tuning.hparams == hparams
    assert tuning.figure().axes
    with pytest.raises(oj.UserError, match="every point of 10 outer steps diverged"):
        diverging(progress=_quiet)
    with pytest.raises(oj.UserError, match="have the runs converged; take more steps"):
        oj.tune(_run(), "final_loss", {"learning_rate": 1e-3, "l2": 0.1}, wrt="l2", steps=2,
                mode="implicit", progress=_quiet)  # fmt: skip


def test_no_step_leaves_the_range():
    hparams = {"learning_rate": 0.05, "momentum": 0.4}
    found = oj.tune(_run(), "final_loss", hparams, optax.sgd(1e6), steps=4, progress=_quiet)
    momentum = found.path.momentum.values
    assert ((momentum > 0) & (momentum < 1)).all()
    space = make_space({"momentum": np.array(0.5)}, {})
    for u in (-1e6, 1e6):
        at = space.inside({"momentum": jnp.asarray(u, jnp.float32)})["momentum"]
        assert at.dtype == jnp.float32
        assert 0 < float(at) < 1


def test_a_second_tuning_compiles_nothing():
    hparams = {"learning_rate": 0.05, "momentum": 0.4}
    oj.tune(_run(), "final_loss", hparams, steps=3, progress=_quiet)
    before = set(programs._CACHE)
    hparams = {"learning_rate": 0.02, "momentum": 0.3}
    oj.tune(_run(), "final_loss", hparams, steps=3, seeds=np.int64(1), seed=2, progress=_quiet)
    assert set(programs._CACHE) == before


def test_schedules_and_trees_come_back_as_they_are():
    hparams = {
        "learning_rate": oj.Piecewise(np.full(3, 0.05)),
        "l2": 1e-3,
        "initial_params": np.array([1.0, -2.0, 0.5, 0.0]),
        "example_weights": np.linspace(0.5, 1.5, 12),
    }
    found = oj.tune(_run(), "mean_loss", hparams, steps=4, progress=_quiet)
    assert isinstance(found.hparams["learning_rate"], oj.Piecewise)
    assert found.hparams["learning_rate"].values.shape == (3,)
    again = _run()(found.hparams, KEY)
    np.testing.assert_allclose(np.mean(again.loss), found.value, rtol=1e-8)
    assert found.path["learning_rate"].dims == ("restart", "outer_step", "learning_rate_index")
    axes = found.figure().axes
    assert len(axes) >= 5
    assert axes[0].get_legend() is not None


def test_fresh_seeds_are_new_at_every_step(monkeypatch):
    monkeypatch.setattr(descent, "at_once", lambda *given: 1)  # the seeds one after another
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
        oj.tune, _run(), "final_loss", hparams, restarts=2, progress=_quiet, out=tmp_path / "t"
    )
    whole = oj.tune(_run(), "final_loss", hparams, restarts=2, steps=9, progress=_quiet)

    with pytest.raises(TuningInterrupted) as raised:
        tune(steps=9, progress=_interrupt)
    assert 0 < raised.value.tuning.path.sizes["outer_step"] < 9
    on = tune(steps=9)
    np.testing.assert_allclose(on.path.learning_rate, whole.path.learning_rate, rtol=1e-12)
    np.testing.assert_allclose(on.value, whole.value, rtol=1e-12)
    assert tune(steps=9).path.sizes["outer_step"] == 9  # nothing left to do
    with pytest.raises(oj.UserError, match="another tuning: spread was"):
        tune(steps=9, spread=2.0)
    assert tune(steps=11).path.sizes["outer_step"] == 11
    assert tune(steps=3).path.sizes["outer_step"] == 11
    assert tune(steps=3, spread=2.0, overwrite=True).path.sizes["outer_step"] == 3


def test_another_tuning_is_refused_in_a_short_line(tmp_path):
    X, t = _data()
    hparams = {"learning_rate": 0.02, "initial_params": np.zeros(4)}
    tune = functools.partial(oj.tune, steps=1, progress=_quiet, out=tmp_path / "t")
    tune(_run(), "final_loss", hparams)
    other = oj.make_run(oj.least_squares(X, 2 * t), optax.sgd, 12, sampler="full")
    batches = _run(12, max_batch_size=3)
    inner = oj.make_run(oj.least_squares(X, t), optax.adam, 12, sampler="full")
    for run, of, outer, moved, match in [
        (other, "final_loss", None, 0.0, "data was"),
        (batches, "final_loss", None, 0.0, "sampler was 'full' and is 'replacement'"),
        (inner, "final_loss", None, 0.0, "optimizer was"),
        (_run(), "mean_loss", None, 0.0, "objective was 'final_loss"),
        (_run(), "final_loss", optax.adam(0.2), 0.0, "outer was"),
        (_run(), "final_loss", None, 1.0, r"start of initial_params was '"),
    ]:
        there = {**hparams, "initial_params": np.full(4, moved)}
        with pytest.raises(oj.UserError, match=f"another tuning: {match}") as raised:
            tune(run, of, there, outer)
        assert len(str(raised.value)) < 400 + len(str(tmp_path))
        assert "\n" not in str(raised.value)


def test_the_code_of_a_function_tells_it_from_another():
    """Two functions of one file and one name; line numbers do not count."""
    first, second, third = (_made(c) for c in "xyx")
    named = fingerprint.of
    assert named(first) == named(third) != named(second)
    assert named(functools.partial(first, 1)) != named(functools.partial(second, 1))


def _made(name):
    if name == "x":
        return lambda x: x + 1
    return lambda x: x - 1


def test_out_is_written_on_the_way_and_found_unwritable_at_once(tmp_path):
    tune = functools.partial(oj.tune, _run(), "final_loss", {"learning_rate": 0.05}, steps=4)

    def run_out(text, fraction):
        raise MemoryError

    with pytest.raises(MemoryError):
        tune(progress=run_out, out=tmp_path / "t")
    assert np.isfinite(oj.load_sweep(tmp_path / "t").value).any()
    assert oj.load_sweep(tmp_path / "t").value.dims == ("restart", "outer_step")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thing").write_text("")
    for out, why in (("file", "cannot write to the folder"), ("folder", "'thing' and no sweep")):
        with pytest.raises(oj.UserError, match=why) as raised:
            tune(progress=_interrupt, out=tmp_path / out)
        assert "\n" not in str(raised.value)


def test_it_stops_by_a_rule():
    tune = functools.partial(oj.tune, _run(), "final_loss", {"learning_rate": 0.02}, steps=60)
    whole = tune(progress=_quiet)
    target = float(whole.path.value[0, 20])
    found = tune(stop=oj.Target(target), progress=_quiet)
    assert found.path.sizes["outer_step"] == 21
    np.testing.assert_array_equal(found.path.value, whole.path.value[:, :21])
    with pytest.raises(oj.UserError, match="unknown metric 'loss'"):
        tune(stop=oj.Target(target, "loss"), progress=_quiet)
    with pytest.raises(oj.UserError, match="Halving compares runs"):
        tune(stop=oj.Halving(4), progress=_quiet)


def test_a_state_with_a_key_and_a_small_float_is_kept(tmp_path):
    outer = optax.chain(
        optax.add_noise(0.01, 0.5, key=jax.random.key(3)), optax.sgd(0.1, 0.9, False, jnp.bfloat16)
    )
    tune = functools.partial(oj.tune, _run(), "final_loss", {"learning_rate": 0.05}, outer)
    whole = tune(steps=4, progress=_quiet)
    tune(steps=2, progress=_quiet, out=tmp_path / "t")
    on = tune(steps=4, progress=_quiet, out=tmp_path / "t")
    np.testing.assert_allclose(on.path.learning_rate, whole.path.learning_rate, rtol=1e-12)


def test_a_hyperparameter_must_not_overwrite_a_column():
    for name in ("value", "diverged", "outer_step"):
        theta = {name: jnp.asarray(0.1)}
        with pytest.raises(oj.UserError, match=f"is named '{name}', which the path has already"):
            checks.columns(theta)
    theta = {"rate": jnp.ones(2), "rate_index": jnp.asarray(0.1)}
    with pytest.raises(oj.UserError, match="'rate_index'"):
        checks.columns(theta)


def test_leaves_have_names_of_their_own():
    Params = collections.namedtuple("Params", ["kernel", "bias"])
    theta = {"initial_params": Params(1.0, 2.0), "rate": oj.Piecewise(np.ones(2)), "a/b": 3.0}
    assert list(named_leaves(theta)) == [
        "a.b", "initial_params.kernel", "initial_params.bias", "rate"
    ]  # fmt: skip
    with pytest.raises(oj.UserError, match=r"two hyperparameters are named 'a.b'"):
        named_leaves({"a": {"b": 1.0}, "a.b": 2.0})


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
        ({"steps": 2.5}, "steps is 2.5: expected a whole number"),
        ({"steps": "3"}, "steps is '3'"),
        ({"restarts": 2.5}, "restarts is 2.5"),
        ({"spread": "a"}, "spread is 'a'"),
        ({"spread": math.nan}, "spread is nan"),
        ({"seeds": ["a"]}, "expected how many"),
        ({"seeds": [0.5]}, "whole numbers"),
        ({"seed": -1}, "seed is -1"),
        ({"wrt": ()}, r"wrt is \(\): expected a name"),
        ({"progress": 3}, "progress is 3: expected a function"),
        ({"constraints": 3}, "constraints is 3"),
        ({"out": 3}, "out is 3"),
        ({"outer": optax.adam}, "outer is the function adam: expected an optimiser"),
        ({"outer": "adam"}, "outer is 'adam'"),
        ({"outer": optax.lbfgs()}, "from a gradient and a point alone .*'value'"),
    ],
)
def test_bad_input_is_one_line(options, match):
    hparams = options.pop("hparams", {"learning_rate": 0.1})
    run = _run(40, max_batch_size=4)
    with pytest.raises(oj.UserError, match=match) as raised:
        oj.tune(run, "final_loss", hparams, **{"steps": 2, "progress": _quiet, **options})
    assert "\n" not in str(raised.value)
