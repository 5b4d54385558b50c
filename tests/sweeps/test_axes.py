"""Axes of schedules, arrays and objects: each value by what is in it, in memory and on disk."""

import functools

import jax
import numpy as np
import optax
import pytest

import optjax as oj

N, D, T = 12, 5, 20
close = functools.partial(np.testing.assert_allclose, rtol=1e-12)  # float64, other sums' order


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    return oj.least_squares(rng.normal(size=(N, D)), rng.normal(size=N))


SCHEDULES = [
    oj.Piecewise([0.1, 0.01]),
    oj.Piecewise([0.1, 0.01], linear=True),
    optax.cosine_decay_schedule(0.1, T),
    optax.linear_schedule(0.1, 0.0, T),
]


@pytest.mark.parametrize("every", [1, 5])
def test_schedules_are_spread_over_the_steps_of_their_run(problem, every):
    run = oj.make_run(problem, optax.sgd, T, record_every=every)
    found = oj.sweep(run, {"learning_rate": SCHEDULES, "steps": [10, T]}, [3], chunk_steps=5)
    for i, schedule in enumerate(SCHEDULES):
        for j, steps in enumerate((10, T)):
            alone = oj.make_run(problem, optax.sgd, steps, record_every=every)
            one = alone({"learning_rate": schedule}, jax.random.key(3))
            close(found.final_loss[i, j, 0], one.final_loss)
            close(found.loss[i, j, 0, : steps // every], one.loss)


@pytest.mark.parametrize(
    "grid",
    [
        {"learning_rate": [SCHEDULES[0], SCHEDULES[1]]},
        {"learning_rate": [0.1], "initial_params": [np.zeros(D), np.ones(D)]},
    ],
    ids=["schedules", "arrays"],
)
def test_values_of_float64_enter_runs_of_float32_without_a_warning(grid):
    with jax.enable_x64(False):
        problem = oj.least_squares(np.eye(N, D, dtype=np.float32), np.ones(N, np.float32))
        found = oj.sweep(oj.make_run(problem, optax.sgd, T), grid)
    assert found.final_loss.dtype == np.float32


def test_a_stopped_run_with_a_schedule_is_replayed(problem):
    run = oj.make_run(problem, optax.sgd, T)
    whole = run({"learning_rate": SCHEDULES[0]}, jax.random.key(0))
    stop = oj.Target(float(np.sort(whole.loss)[3]))
    found = oj.sweep(run, {"learning_rate": SCHEDULES[:2]}, stop=stop)
    one = found.isel(learning_rate=0, seed=0)
    last = int(one.steps_done)
    assert 0 < last < T
    again = oj.replay(one)
    close(again.loss, whole.loss[:last])


def test_arrays_on_disk_are_known_by_their_content(problem, tmp_path):
    run = oj.make_run(problem, optax.sgd, T)
    first, second = np.zeros(D), np.linspace(-1, 1, D)
    sweep = functools.partial(oj.sweep, run, out=tmp_path / "s")
    grid = {"initial_params": [first, second], "learning_rate": [0.05]}
    both = sweep(grid)
    turned = sweep({**grid, "initial_params": [second, first]})
    close(turned.final_loss[::-1, 0, 0], both.final_loss[:, 0, 0])
    with pytest.raises(oj.UserError, match="are not in this grid"):
        sweep({**grid, "initial_params": [second, second + 1]})


def test_replay_takes_the_array_of_its_own_sweep(problem, tmp_path):
    run = oj.make_run(problem, optax.sgd, T)
    found = [
        oj.sweep(run, {"initial_params": [w], "learning_rate": [0.05]}, out=tmp_path / name)
        for name, w in (("a", np.zeros(D)), ("b", np.ones(D)))
    ]
    for dataset in found:
        one = dataset.isel(initial_params=0, learning_rate=0, seed=0)
        close(oj.replay(one).final_loss, one.final_loss)


def test_long_arrays_given_to_a_function_are_told_apart():
    rng = np.random.default_rng(0)
    X, t = rng.normal(size=(2000, 2)), rng.normal(size=2000)
    other = t.copy()
    other[1000] += 100  # numpy prints the two alike

    def make(target):
        return oj.make_run(oj.least_squares(X, target), optax.sgd, 4, sampler="full")

    found = oj.sweep(make, {"target": [t, other], "learning_rate": [0.1]})
    for i, target in enumerate((t, other)):
        one = make(target)({"learning_rate": 0.1}, jax.random.key(0))
        close(found.final_loss[i, 0, 0], one.final_loss)
        close(oj.replay(found.isel(target=i, learning_rate=0, seed=0)).final_loss, one.final_loss)


def test_numbers_and_schedules_share_an_axis(problem):
    run = oj.make_run(problem, optax.sgd, T)
    found = oj.sweep(run, {"learning_rate": [0.1, SCHEDULES[0]]})
    for i, rate in enumerate((0.1, SCHEDULES[0])):
        one = run({"learning_rate": rate}, jax.random.key(0))
        close(found.final_loss[i, 0], one.final_loss)
        close(oj.replay(found.isel(learning_rate=i, seed=0)).final_loss, one.final_loss)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"progress": True}, "progress is True"),
        ({"about": {"x": np.float32(1)}}, "about is"),
        ({"final": lambda w, s, d: {"a/b": w}}, "no slash"),
        ({"final": lambda w, s, d: {1: w}}, "dict of arrays"),
    ],
    ids=["progress", "about", "slash", "key"],
)
def test_a_mistake_leaves_no_folder(problem, tmp_path, how, said):
    run = oj.make_run(problem, optax.sgd, T)
    with pytest.raises(oj.UserError, match=said) as error:
        oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "s", **how)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


def test_a_damaged_folder_is_overwritten(problem, tmp_path):
    run = oj.make_run(problem, optax.sgd, T)
    oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "s")
    (tmp_path / "s" / "sweep.json").write_text("{")
    (tmp_path / "s" / "records.log").write_bytes(b"")
    with pytest.raises(oj.UserError, match="start over"):
        oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "s")
    oj.sweep(run, {"learning_rate": [0.1]}, out=tmp_path / "s", overwrite=True)
