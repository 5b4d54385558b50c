"""Sweeps at the edges: half precision, odd metrics, names, damaged folders, other generators."""

import contextlib
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import optjax as oj
from optjax.run.problems import Data, Problem
from optjax.sweeps.store import Store


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    return oj.least_squares(rng.normal(size=(6, 4)), rng.normal(size=6))


class Killed(BaseException):
    pass


def _killed(text, fraction):
    if fraction > 0.3:
        raise Killed


def _constant(dtype):
    """A loss that is 3 whatever happens, in a dtype."""

    def init(key, data):
        return jnp.zeros(2, dtype), jnp.zeros(1, dtype)

    def loss(w, state, batch, hparams):
        return jnp.asarray(3, dtype) + 0 * jnp.sum(w), state

    def objective(w, state, data, hparams):
        return jnp.asarray(3, dtype) + 0 * jnp.sum(w)

    return Problem(init, loss, objective, Data((), {}), name="constant")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_is_averaged_saved_and_resumed(name, tmp_path):
    factory = functools.partial(optax.sgd, momentum=0.9)
    run = oj.make_run(_constant(jnp.dtype(name)), factory, 2000, record_every=1000)
    how = {"chunk_steps": 1000, "checkpoint_seconds": 0, "out": tmp_path / "a"}
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it for such parameters
        with pytest.raises(Killed):
            oj.sweep(run, {"learning_rate": [0.1]}, progress=_killed, **how)
        found = oj.sweep(run, {"learning_rate": [0.1]}, **how)
    np.testing.assert_array_equal(found.loss, np.full((1, 1, 2), 3.0))
    assert found.final_loss.item() == 3.0
    xr.testing.assert_equal(oj.load_sweep(tmp_path / "a").loss, found.loss)


def test_whole_number_metrics_are_blanked_and_compared_as_numbers(problem):
    def metrics(w, state, data, hparams):
        return {"three": jnp.int32(3)}

    counted = dataclasses.replace(problem, metrics=metrics)
    run = oj.make_run(counted, optax.sgd, 40, record_every=4)
    never = oj.Target(3.5, "three", better="high")
    found = oj.sweep(run, {"learning_rate": [0.01, 1e30]}, stop=never)
    assert (found.stopped_at == -1).all()
    assert found.three.isel(learning_rate=0).values.tolist() == [[3.0] * 10]
    assert found.three.isel(learning_rate=1, step=-1).isnull().all()


def test_a_rule_does_not_stop_what_has_diverged(problem):
    run = oj.make_run(problem, optax.sgd, 200, sampler="full")
    for chunk in (1, 200):
        found = oj.sweep(
            run, {"learning_rate": [1e30]}, stop=oj.Plateau(60), chunk_steps=chunk, final=_weights
        )
        assert found.stopped_at.item() == -1
        assert found.status.item() == oj.Status.DIVERGED
        assert found.w.isnull().all()


def _weights(w, state, data):
    return {"w": w}


def test_functions_of_one_name_are_told_apart_or_refused(problem):
    make = lambda optimizer: oj.make_run(problem, optimizer, 8)  # noqa: E731
    partials = [functools.partial(optax.sgd, momentum=m) for m in (0.9, 0.1)]
    found = oj.sweep(make, {"optimizer": partials, "learning_rate": [0.01]})
    assert found.optimizer.values.tolist() == ["sgd(momentum=0.9)", "sgd(momentum=0.1)"]
    second = found.isel(optimizer=1, learning_rate=0, seed=0)
    alone = oj.make_run(problem, partials[1], 8)({"learning_rate": 0.01}, jax.random.key(0))
    np.testing.assert_allclose(oj.replay(second).final_loss, alone.final_loss, rtol=1e-12)
    lambdas = [
        lambda learning_rate: optax.sgd(learning_rate),
        lambda learning_rate: optax.adam(0.1),
    ]
    found = oj.sweep(make, {"optimizer": lambdas, "learning_rate": [0.01]})
    assert found.optimizer.values.tolist() == ["0", "1"]
    alone = oj.make_run(problem, lambdas[1], 8)({"learning_rate": 0.01}, jax.random.key(0))
    np.testing.assert_allclose(found.final_loss[1, 0, 0], alone.final_loss, rtol=1e-12)
    with pytest.raises(oj.UserError, match="twice: expected each value once"):
        oj.sweep(make, {"optimizer": [lambdas[0]] * 2, "learning_rate": [0.01]})


def test_a_closure_that_changed_is_another_sweep(problem, tmp_path):
    def factory_of(scale):
        def factory(learning_rate):
            return optax.sgd(scale * learning_rate)

        return factory

    for scale in (1.0, 2.0):
        run = oj.make_run(problem, factory_of(scale), 8)
        if scale == 1.0:
            oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "a")
            continue
        with pytest.raises(oj.UserError, match="optimizer was"):
            oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "a")


@pytest.mark.slow
def test_a_script_may_ask_for_more_seeds_and_not_change_its_functions(tmp_path):
    script = tmp_path / "mine.py"

    def go(seeds, scale=1):
        script.write_text(
            "import optax, optjax as oj\n"
            f"def factory(learning_rate): return optax.sgd({scale} * learning_rate)\n"
            "run = oj.make_run(oj.least_squares([[2.0, 1.0]], [2.0]), factory, 4)\n"
            f"found = oj.sweep(run, {{'learning_rate': [0.1]}}, {seeds}, out='out')\n"
            "print(found.sizes['seed'])\n"
        )
        return subprocess.run(
            [sys.executable, "mine.py"], capture_output=True, text=True, cwd=tmp_path
        )

    assert go(2).stdout == "2\n"
    assert go(3).stdout == "3\n"
    assert "optimizer was" in go(3, scale=2).stderr


def test_numbers_are_the_same_whole_or_real(problem, tmp_path):
    run = oj.make_run(problem, optax.sgd, 4)
    oj.sweep(run, {"learning_rate": [1]}, out=tmp_path / "a")
    found = oj.sweep(run, {"learning_rate": np.array([0.5, 1.0])}, out=tmp_path / "a")
    assert found.sizes["learning_rate"] == 2


def test_a_users_own_files_are_left_alone(problem, tmp_path):
    run, folder = oj.make_run(problem, optax.sgd, 4), tmp_path / "a"
    folder.mkdir()
    (folder / ".env").write_text("mine")
    with pytest.raises(oj.UserError, match=r"holds '.env' and no sweep"):
        oj.sweep(run, {"learning_rate": [0.1]}, out=folder)
    (folder / ".env").unlink()
    oj.sweep(run, {"learning_rate": [0.1]}, out=folder)
    (folder / "figures").mkdir()
    (folder / "notes.txt").write_text("mine")
    oj.sweep(run, {"learning_rate": [0.2]}, out=folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_state_whose_records_were_lost_starts_over(problem, tmp_path):
    run = oj.make_run(problem, optax.sgd, 40)
    how = {"chunk_steps": 4, "checkpoint_seconds": 0}
    whole = oj.sweep(run, {"learning_rate": [0.01, 0.1]}, 2)
    with pytest.raises(Killed):
        oj.sweep(
            run, {"learning_rate": [0.01, 0.1]}, 2, out=tmp_path / "a", progress=_killed, **how
        )
    log = tmp_path / "a" / "records.log"
    log.write_bytes(log.read_bytes()[:30])
    found = oj.sweep(run, {"learning_rate": [0.01, 0.1]}, 2, out=tmp_path / "a", **how)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "sweep"},
        {"kind": "sweep", "identity": [], "axes": {}, "columns": {}, "seeds": [0]},
    ],
)
def test_a_spec_that_makes_no_sense_is_one_line(problem, tmp_path, spec):
    run = oj.make_run(problem, optax.sgd, 4)
    oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "a")
    with contextlib.closing(Store(tmp_path / "a")) as store:
        store._write_spec(spec)
    for call in (
        lambda: oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "a"),
        lambda: oj.load_sweep(tmp_path / "a"),
    ):
        with pytest.raises(oj.UserError, match=r"is damaged \(") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["rbg", "threefry2x32"])
def test_keys_of_any_generator_may_live_in_a_models_state(problem, kind):
    def init(key, data):
        return data.shared["w0"], jax.random.key(1, impl=kind)

    def loss(w, state, batch, hparams):
        return problem.loss(w, (), batch, hparams)[0], jax.random.split(state)[0]

    def objective(w, state, data, hparams):
        return problem.objective(w, (), data, hparams)

    keyed = dataclasses.replace(problem, init=init, loss=loss, objective=objective)
    run = oj.make_run(keyed, optax.sgd, 6)
    found = oj.sweep(run, {"learning_rate": [0.1]}, 2, stop=oj.Target(1e-9), chunk_steps=2)
    plain = oj.sweep(oj.make_run(problem, optax.sgd, 6), {"learning_rate": [0.1]}, 2)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-12)


def test_survivors_fit_a_smaller_block_whatever_the_tile(problem, monkeypatch):
    from optjax.sweeps.active_runs import ActiveRuns

    smaller = ActiveRuns._smaller
    monkeypatch.setattr(ActiveRuns, "_smaller", lambda self, left, ahead: smaller(self, left, 1e9))
    run = oj.make_run(problem, optax.sgd, 400, record_every=20)
    rates = [0.01 + 0.001 * i for i in range(6)] + [1e3 + i for i in range(14)]
    found = oj.sweep(run, {"learning_rate": rates}, layout="map", chunk_steps=20)
    alone = oj.sweep(run, {"learning_rate": rates[:6]})
    np.testing.assert_allclose(found.loss[:6], alone.loss, rtol=1e-10)


def test_a_swept_run_is_not_kept_alive(problem):
    run = oj.make_run(problem, optax.sgd, 4)
    found = oj.sweep(run, {"learning_rate": [0.1]})
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None
    with pytest.raises(oj.UserError, match="not known"):
        oj.replay(found)


def test_a_memory_limit_holds_for_what_was_chosen_before(problem):
    run = oj.make_run(problem, optax.sgd, 4)
    grid = {"learning_rate": np.linspace(0.01, 0.1, 64)}
    free = json.loads(oj.sweep(run, grid).attrs["groups"])[-1]["layout"]
    tight = json.loads(oj.sweep(run, grid, memory=6_000.0).attrs["groups"])[-1]["layout"]
    assert free == "vmap of 64 runs"
    assert tight != free


def test_the_empty_grid_is_one_point(problem):
    run = oj.make_run(problem, functools.partial(optax.sgd, learning_rate=0.1), 4)
    assert oj.sweep(run, {}, 3).final_loss.dims == ("seed",)


def _probe(name, value):
    return lambda *_: {name: value}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"chunk_seconds": float("inf")}, "chunk_seconds is inf"),
        ({"memory": "4GB"}, "memory is '4GB'"),
        ({"memory": 0}, "memory is 0"),
        ({"vmap_chunk": "4"}, "vmap_chunk is '4'"),
        ({"final": _probe("learning_rate", 1.0)}, "an axis is named 'learning_rate'"),
        ({"final": lambda *_: {"v": jnp.ones(10**12)}}, "take up to 8e"),
        ({"devices": []}, r"devices is \[\]"),
        ({"devices": 2}, "devices is 2: expected a list"),
        ({"stop": oj.Target}, "expected rules"),
        ({"seeds": 2**40}, "seeds is"),
        ({"final": 3}, "final is 3"),
        ({"final": _probe("loss", 1.0)}, "final is named 'loss'"),
        ({"final": lambda *_: 3}, "something else than a dict"),
    ],
)
def test_other_mistakes_are_one_line(problem, how, message):
    run = oj.make_run(problem, optax.sgd, 4)
    with pytest.raises(oj.UserError, match=message):
        oj.sweep(run, {"learning_rate": [0.1]}, **how)


def test_names_that_clash_and_rules_that_cannot_be(problem):
    vector = dataclasses.replace(problem, metrics=_probe("v", np.ones(2)))
    taken = dataclasses.replace(problem, metrics=_probe("status", np.float64(1)))
    for other, message in ((vector, r"v has shape \(2,\)"), (taken, "named 'status'")):
        with pytest.raises(oj.UserError, match=message):
            oj.sweep(oj.make_run(other, optax.sgd, 4), {"learning_rate": [0.1]})

    def make_it(width):
        return oj.make_run(problem, optax.sgd, 4)

    with pytest.raises(oj.UserError, match="make_it needs width"):
        oj.sweep(make_it, {"learning_rate": [0.1]})
    for rule, message in (
        (lambda: oj.Target(1.0, better="lowest"), "better is 'lowest'"),
        (lambda: oj.Target("low"), "target is 'low'"),
        (lambda: oj.Plateau(2.5), "patience is 2.5"),
        (lambda: oj.Halving(10, keep=2), "keep is 2"),
        (lambda: oj.Halving(10, keep="half"), "keep is 'half'"),
        (lambda: oj.sample("many", {"a": oj.uniform(0, 1)}), "count is 'many'"),
        (lambda: oj.sample(3, [0.1]), r"ranges is \[0.1\]"),
        (lambda: oj.sample(9, {"a": [1, 2]}), "count is 9, and .* gave 2 different points"),
        (lambda: oj.uniform("a", 1), "range from a to 1"),
        (lambda: oj.loguniform("a", 1), "range from a to 1"),
        (lambda: oj.points(3), "points is 3: expected a list of dicts"),
        (lambda: oj.load_sweep(3), "the folder is 3"),
    ):
        with pytest.raises(oj.UserError, match=message):
            rule()
