"""A sweep equals a loop of single runs, however it is cut, laid out, stopped and resumed."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.sweeps import layouts
from optjax.sweeps.programs import BatchLayout, Programs
from optjax.sweeps.swept_run import Inputs, RunSpec

N, D, T = 12, 6, 24
RATES, SIZES, SEEDS = [0.01, 0.05, 0.2], [1, 5, 12], 3
GRID = {"learning_rate": RATES, "batch_size": SIZES}
TOLERANCE = 1e-12  # float64; products of other shapes add in another order


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, D)) * np.geomspace(0.3, 1, D)  # lopsided: no two columns alike
    return oj.least_squares(X, rng.normal(size=N), rng.normal(size=D))


@pytest.fixture(scope="module")
def run(problem):
    return oj.make_run(problem, optax.rmsprop, T, record_every=2)


@pytest.fixture(scope="module")
def alone(run):
    """Every run by itself: the oracle."""
    shape = (len(RATES), len(SIZES), SEEDS)
    loss, final = np.empty((*shape, T // 2)), np.empty(shape)
    for i, j, s in np.ndindex(shape):
        one = run({"learning_rate": RATES[i], "batch_size": SIZES[j]}, jax.random.key(s))
        loss[i, j, s], final[i, j, s] = one.loss, one.final_loss
    return loss, final


def _same(found, alone, tolerance=TOLERANCE):
    np.testing.assert_allclose(found.loss.values, alone[0], rtol=tolerance)
    np.testing.assert_allclose(found.final_loss.values, alone[1], rtol=tolerance)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"batching": "static"},
        {"batching": "masked", "layout": "vmap"},
        {"layout": "map", "vmap_chunk": 4},
        {"layout": "loop", "batching": "masked"},
        {"vmap_chunk": 5, "chunk_steps": 6},
        {"chunk_steps": 2, "layout": "vmap"},
    ],
    ids=lambda how: ",".join(map(str, how.values())) or "auto",
)
def test_a_sweep_is_a_loop_of_runs(run, alone, how):
    found = oj.sweep(run, GRID, SEEDS, **how)
    assert found.loss.dims == ("learning_rate", "batch_size", "seed", "step")
    _same(found, alone)
    assert found.step.values.tolist() == list(range(2, T + 1, 2))
    assert (found.status == oj.Status.COMPLETED).all()
    assert (found.steps_done == T).all()


def test_batches_as_counts_are_the_same_batches(run, problem):
    """The draws to the bit: counts of what was drawn; the values to rounding."""
    from optjax.run import batching

    key, step = jax.random.key(7), jnp.int32(3)
    indices, mask, _ = batching.draw("replacement", key, step, batching.no_order(), N, 8, 5)
    counts = batching.counts(indices, mask, N, float)
    np.testing.assert_array_equal(counts, np.bincount(np.asarray(indices)[:5], minlength=N))

    example = (Inputs({"learning_rate": np.array(RATES)}, None), np.arange(3, dtype=np.int32))
    spec = RunSpec(run.plan, (), 4, True)
    ends = []
    for counted in (False, True):
        programs = Programs(
            spec, BatchLayout(3, 3, counted), jax.devices()[:1], problem.data, example
        )
        lanes = programs.start(*example)
        ends.append(programs.chunk(example[0], lanes, 0, 4, 2))
    np.testing.assert_allclose(ends[0][1]["loss"], ends[1][1]["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(ends[0][0].state.params, ends[1][0].state.params, rtol=TOLERANCE)


def test_float32_keeps_its_dtype_and_the_draws_of_a_run_are_its_own(problem):
    data = jax.tree.map(lambda a: np.asarray(a, np.float32), problem.data)
    small = oj.least_squares(data.examples["x"], data.examples["t"])
    run = oj.make_run(small, optax.sgd, 8)
    found = oj.sweep(run, {"learning_rate": [1e-30], "batch_size": [4, 9]}, [5, 2])
    assert found.loss.dtype == found.final_loss.dtype == np.float32
    # At a rate of nothing the loss tells which examples were drawn.
    one = run({"learning_rate": 1e-30, "batch_size": 4}, jax.random.key(2))
    mine = found.loss.isel(learning_rate=0).sel(batch_size=4, seed=2)
    np.testing.assert_allclose(mine, one.loss, rtol=1e-6)
    assert not np.allclose(mine, found.loss.isel(learning_rate=0).sel(batch_size=4, seed=5))


def test_the_epochs_of_a_sampler_are_those_of_the_run(problem):
    run = oj.make_run(problem, optax.adam, 12, sampler="epochs")
    found = oj.sweep(run, {"learning_rate": [0.1], "batch_size": [3, 5]}, 2, batching="masked")
    one = run({"learning_rate": 0.1, "batch_size": 5}, jax.random.key(1))
    np.testing.assert_allclose(
        found.loss.isel(learning_rate=0).sel(batch_size=5, seed=1), one.loss, rtol=TOLERANCE
    )


def test_steps_and_what_shapes_the_program_may_be_swept(problem):
    def make(optimizer, momentum_flag):
        factory = functools.partial(optimizer, nesterov=momentum_flag)
        return oj.make_run(problem, factory, 12, record_every=4)

    grid = {
        "optimizer": [optax.sgd, optax.adam],
        "momentum_flag": [False, True],
        "learning_rate": [0.01, 0.1],
        "steps": [4, 12],
    }
    found = oj.sweep(make, grid, 2)
    assert found.optimizer.values.tolist() == ["sgd", "adam"]
    assert found.loss.sel(steps=4).isel(step=slice(1, None)).isnull().all()
    for rule in (optax.sgd, optax.adam):
        one = make(rule, True)({"learning_rate": 0.1}, jax.random.key(1))
        mine = found.sel(optimizer=rule.__name__, momentum_flag="True", learning_rate=0.1, seed=1)
        np.testing.assert_allclose(mine.final_loss.sel(steps=12), one.final_loss, rtol=TOLERANCE)
        np.testing.assert_allclose(mine.loss.sel(steps=4)[0], one.loss[0], rtol=TOLERANCE)
    one = found.sel(optimizer="adam", momentum_flag="False", learning_rate=0.1, seed=0, steps=12)
    again = oj.replay(one)
    assert again.path.shape == (13, D)


def _many_problems():
    rng = np.random.default_rng(5)
    return [
        oj.least_squares(rng.normal(size=(N, D)), rng.normal(size=N), rng.normal(size=D))
        for _ in range(3)
    ]


@pytest.mark.parametrize(
    "how", [{}, {"vmap_chunk": 1}, {"layout": "map", "vmap_chunk": 2}], ids=str
)
def test_problems_of_one_shape_are_lanes_of_one_program(how):
    problems = _many_problems()

    def make(problem):
        return oj.make_run(problems[problem], optax.sgd, 12)

    grid = {"problem": [0, 1, 2], "learning_rate": [0.01, 0.1], "batch_size": [5, N]}
    found = oj.sweep(make, grid, 2, batching="masked", **how)
    notes = json.loads(found.attrs["groups"])
    assert [note["runs"] for note in notes] == [24]
    for p in range(3):
        one = make(p)({"learning_rate": 0.1, "batch_size": 5}, jax.random.key(1))
        mine = found.sel(problem=p, learning_rate=0.1, batch_size=5, seed=1)
        np.testing.assert_allclose(mine.loss, one.loss, rtol=TOLERANCE)
        np.testing.assert_allclose(mine.final_loss, one.final_loss, rtol=TOLERANCE)
    np.testing.assert_allclose(oj.replay(mine).final_loss, mine.final_loss, rtol=TOLERANCE)


def _weights(params, model_state, data):
    return {"w": params, "far": jnp.max(jnp.abs(params)), "above": params > 0}


def test_what_is_kept_of_a_run_is_of_its_end(noisy, tmp_path):
    grid = {"learning_rate": [0.02, 0.1, 80.0], "batch_size": [4]}
    how = {"stop": oj.Target(0.5), "final": _weights, "out": tmp_path / "a"}
    found = oj.sweep(noisy, grid, 2, chunk_steps=6, **how)
    assert found.w.dims == ("learning_rate", "batch_size", "seed", "w_0")
    assert found.above.dtype == bool
    one = found.sel(learning_rate=0.1, batch_size=4, seed=1)
    assert one.stopped_by == "target"
    np.testing.assert_allclose(oj.replay(one).params, one.w, rtol=1e-10)
    np.testing.assert_allclose(found.far, np.abs(found.w).max("w_0"))
    (tmp_path / "a" / "result.nc").unlink()
    np.testing.assert_allclose(oj.load_sweep(tmp_path / "a").w, found.w)
    with pytest.raises(oj.UserError, match="final was"):
        oj.sweep(noisy, grid, 2, stop=oj.Target(0.5), out=tmp_path / "a")


def test_zipped_and_drawn_points_lie_on_one_axis(run):
    zipped = oj.sweep(run, oj.zip_grid({"learning_rate": [0.01, 0.2], "batch_size": [1, 12]}), 2)
    assert zipped.loss.dims == ("point", "seed", "step")
    whole = oj.sweep(run, GRID, 2)
    np.testing.assert_allclose(
        zipped.final_loss[1], whole.final_loss.sel(learning_rate=0.2, batch_size=12), rtol=TOLERANCE
    )
    points = oj.sample(5, {"learning_rate": oj.loguniform(1e-3, 1e-1)})
    drawn = oj.sweep(run, points)
    assert ((drawn.learning_rate >= 1e-3) & (drawn.learning_rate <= 1e-1)).all()
    first = oj.sample(2, {"learning_rate": oj.loguniform(1e-3, 1e-1)})
    np.testing.assert_array_equal(first.columns["learning_rate"], drawn.learning_rate[:2])


def test_a_run_replayed_is_that_run(run):
    found = oj.sweep(run, GRID, SEEDS)
    chosen = found.sel(learning_rate=0.05, batch_size=5, seed=2)
    again = oj.replay(chosen, every=2)
    np.testing.assert_allclose(again.loss, chosen.loss, rtol=TOLERANCE)
    np.testing.assert_allclose(again.final_loss, chosen.final_loss, rtol=TOLERANCE)
    assert again.path.shape == (T // 2 + 1, D)
    with pytest.raises(oj.UserError, match="several runs are selected, along learning_rate"):
        oj.replay(found.sel(batch_size=5, seed=2))
    chosen.attrs["sweep"] = "unknown"
    with pytest.raises(oj.UserError, match="what was swept is not known"):
        oj.replay(chosen)


# ------------------------------------------------------------------------------- who leaves early


@pytest.fixture(scope="module")
def noisy(problem):
    return oj.make_run(problem, optax.sgd, 60, record_every=3)


@pytest.mark.parametrize("how", [{}, {"chunk_steps": 3, "vmap_chunk": 2}, {"layout": "loop"}])
def test_a_target_stops_a_run_at_its_record_whatever_the_chunks(noisy, how):
    grid = {"learning_rate": [0.02, 0.1, 0.3], "batch_size": [2, 12]}
    whole = oj.sweep(noisy, grid, 3)
    goal = float(whole.loss.isel(step=-1).median())
    found = oj.sweep(noisy, grid, 3, stop=oj.Target(goal), **how)
    reached = (whole.loss <= goal).values
    first = np.where(reached.any(-1), 3 * (reached.argmax(-1) + 1), -1)
    np.testing.assert_array_equal(found.stopped_at, first)
    assert (found.status.values[first > 0] == oj.Status.STOPPED).all()
    assert (found.stopped_by.values[first > 0] == "target").all()
    kept = np.arange(3, 61, 3) <= np.where(first < 0, 60, first)[..., None]
    np.testing.assert_allclose(found.loss.values[kept], whole.loss.values[kept], rtol=1e-10)
    assert np.isnan(found.loss.values[~kept]).all()
    # The final loss is that of the record at which the run stopped.
    at = tuple(np.argwhere(first > 0)[-1])
    one = found.isel(dict(zip(found.stopped_at.dims, at, strict=True)))
    assert one.final_loss.dims == ()
    np.testing.assert_allclose(oj.replay(one).final_loss, one.final_loss, rtol=1e-10)


def test_a_plateau_stops_and_survivors_are_as_they_were(noisy):
    grid = {"learning_rate": [1e-9, 0.05], "batch_size": [12]}
    whole = oj.sweep(noisy, grid, 2)
    found = oj.sweep(noisy, grid, 2, stop=[oj.Plateau(15, least=1e-2)], chunk_steps=6)
    stopped = found.isel(learning_rate=0, batch_size=0)
    assert (stopped.stopped_by == "plateau").all()
    assert (stopped.stopped_at < 60).all()
    alive = {"learning_rate": 1, "batch_size": 0}
    kept = found.loss.isel(alive).values
    np.testing.assert_allclose(
        kept[np.isfinite(kept)], whole.loss.isel(alive).values[np.isfinite(kept)], rtol=1e-10
    )


def test_the_diverged_leave_and_the_others_do_not_notice(noisy):
    grid = {"learning_rate": [0.02, 40.0, 0.1, 90.0], "batch_size": [4]}
    long = oj.make_run(noisy.problem, optax.sgd, 600, record_every=60)
    found = oj.sweep(long, grid, 2, vmap_chunk=2, chunk_steps=60)
    kept = oj.sweep(long, grid, 2, keep_diverged=True)
    lost = found.sel(learning_rate=[40.0, 90.0])
    assert (lost.status == oj.Status.DIVERGED).all()
    np.testing.assert_array_equal(found.diverged_at, kept.diverged_at)
    assert lost.final_loss.isnull().all()
    assert lost.loss.isel(step=-1).isnull().all()
    good = {"learning_rate": [0.02, 0.1]}
    np.testing.assert_allclose(found.loss.sel(good), kept.loss.sel(good), rtol=1e-10)
    assert float(found.steps_done.sum()) < float(kept.steps_done.sum())


@pytest.mark.parametrize("how", [{}, {"chunk_steps": 3, "vmap_chunk": 4}, {"batching": "static"}])
def test_successive_halving_keeps_the_best_of_all_buckets(noisy, how):
    grid = {"learning_rate": [0.005, 0.02, 0.1], "batch_size": [2, 12]}
    whole = oj.sweep(noisy, grid, 2)
    rule = oj.Halving(first=6, keep=0.5)
    found = oj.sweep(noisy, grid, 2, stop=rule, **how)
    runs, left = whole.loss.values.reshape(12, 20), np.arange(12)
    for step, keep in zip((6, 12, 24, 48), (6, 3, 2, 1), strict=True):
        order = np.argsort(runs[left, step // 3 - 1], kind="stable")
        out = np.sort(left[order[keep:]])
        np.testing.assert_array_equal(np.flatnonzero(found.stopped_at.values.ravel() == step), out)
        left = np.sort(left[order[:keep]])
    best = found.status.values.ravel() == oj.Status.COMPLETED
    np.testing.assert_array_equal(np.flatnonzero(best), left)
    assert set(found.stopped_by.values.ravel()) == {"", "halving"}
    np.testing.assert_allclose(
        found.final_loss.values.ravel()[left], whole.final_loss.values.ravel()[left], rtol=1e-10
    )


def test_few_survivors_move_into_fewer_blocks(noisy, monkeypatch):
    from optjax.sweeps.active_runs import ActiveRuns

    seen = []
    keep = ActiveRuns.keep

    def watched(self, *args):
        keep(self, *args)
        seen.append(len(self.batches))

    monkeypatch.setattr(ActiveRuns, "keep", watched)
    grid = {"learning_rate": [0.02] + [50.0 + i for i in range(11)], "batch_size": [4]}
    long = oj.make_run(noisy.problem, optax.sgd, 600, record_every=60)
    found = oj.sweep(long, grid, 2, vmap_chunk=4, chunk_steps=60)
    assert max(seen) <= 6
    assert 1 in seen
    alone = oj.sweep(long, {"learning_rate": [0.02], "batch_size": [4]}, 2)
    np.testing.assert_allclose(found.loss.isel(learning_rate=0), alone.loss[0], rtol=1e-10)


# ---------------------------------------------------------------------------------------- devices

_DEVICES = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
import numpy as np, optax, optjax as oj
from optjax.sweeps.swept_run import Inputs, RunSpec
from optjax.sweeps.programs import BatchLayout, Programs
rng = np.random.default_rng(0)
X = rng.normal(size=(12, 6))
run = oj.make_run(oj.least_squares(X, rng.normal(size=12)), optax.rmsprop, 24, record_every=2)
grid = {"learning_rate": [0.01, 0.05, 0.2], "batch_size": [1, 5, 12]}
found = {}
for count in (1, 2, 8):
    devices = jax.devices()[:count]
    kind = {"chunk_steps": 8} if count == 8 else {"layout": "map", "vmap_chunk": 2}
    data = oj.sweep(run, grid, 3, devices=devices, stop=oj.Target(1e-9), **kind)
    found[count] = data.loss.values.tolist()
def killed(text, fraction):
    if fraction > 0.4:
        raise ZeroDivisionError
kept = {"out": sys.argv[1], "chunk_steps": 8, "checkpoint_seconds": 0}
try:
    oj.sweep(run, grid, 3, devices=jax.devices(), progress=killed, **kept)
except ZeroDivisionError:
    pass
data = oj.sweep(run, grid, 3, devices=jax.devices()[:3], memory=3_000.0, **kept)
found["resumed"] = data.loss.values.tolist()
found["groups"] = data.attrs["groups"]
example = (Inputs({"learning_rate": np.full(16, 0.1)}, None), np.arange(16, dtype=np.int32))
spec, layout = RunSpec(run.plan, (), 4, True), BatchLayout(16, 2)
programs = Programs(spec, layout, jax.devices(), run.problem.data, example)
put = programs.put(example)
lanes = programs.start(*put)
programs.chunk(put[0], lanes, 0, 4, 2)
words = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
text = programs._compiled["chunk"].as_text()
found["collectives"] = [word for word in words if word in text]
found["partitioned"] = "num_partitions=8" in text
print(json.dumps(found))
"""


def test_one_two_and_eight_devices_give_one_result_without_collectives(tmp_path):
    words = [sys.executable, "-c", _DEVICES, str(tmp_path / "kept")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed: 0 of 27 runs have ended" in done.stderr  # on three devices for eight
    found = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(found["2"], found["1"], rtol=TOLERANCE)
    np.testing.assert_allclose(found["8"], found["1"], rtol=TOLERANCE)
    np.testing.assert_allclose(found["resumed"], found["1"], rtol=TOLERANCE)
    assert "the device's memory holds" in found["groups"]
    assert found["partitioned"]
    assert found["collectives"] == []


# ---------------------------------------------------------------------------------- choice of lanes


def test_a_trial_is_remembered(run, monkeypatch):
    monkeypatch.setattr(layouts, "_WORTH_MEASURING", 0.0)
    monkeypatch.setattr(layouts, "_TRIAL_SHARE", 1e9)
    monkeypatch.setattr(layouts, "_BEFORE", {})
    first = json.loads(oj.sweep(run, GRID, SEEDS, batching="masked").attrs["groups"])
    second = json.loads(oj.sweep(run, GRID, SEEDS, batching="masked").attrs["groups"])
    assert first[0]["why"] == "tried"
    assert len(first[0]["tried"]) > 1
    assert second[0]["why"] == "remembered"
    assert first[0]["layout"] == second[0]["layout"]
    layouts._BEFORE.clear()
    layouts.LAYOUTS.file.write_text("{not json")
    third = json.loads(oj.sweep(run, GRID, SEEDS, batching="masked").attrs["groups"])
    assert third[0]["why"] == "tried"


def test_a_sweep_that_does_not_fit_is_split_and_says_so(run, alone):
    found = oj.sweep(run, GRID, SEEDS, batching="masked", memory=3_000.0)
    notes = json.loads(found.attrs["groups"])
    assert any("split" in note for note in notes)
    _same(found, alone)


def test_a_second_sweep_compiles_nothing_it_has(run):
    from optjax.sweeps import programs

    oj.sweep(run, GRID, 2, batching="masked")
    known = set(programs._CACHE)
    oj.sweep(run, {**GRID, "learning_rate": [0.03, 0.04, 0.06]}, 2, batching="masked")
    assert set(programs._CACHE) == known


def test_batch_sizes_share_a_program_or_have_one_each(run):
    masked = json.loads(oj.sweep(run, GRID, 1, batching="masked").attrs["groups"])
    static = json.loads(oj.sweep(run, GRID, 1, batching="static").attrs["groups"])
    assert [note["slots"] for note in masked] == [12]
    assert [note["slots"] for note in static] == [12, 5, 1]
    assert masked[0]["waste"] == pytest.approx(0.5)
    assert all(note["waste"] == 0 for note in static)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("grid", "how", "message"),
    [
        ({"learning_rate": []}, {}, "the axis learning_rate is empty"),
        ({"learning_rate": [0.1, 0.1]}, {}, "learning_rate holds 0.1 twice"),
        ({"learning_rte": [0.1]}, {}, "unknown hyperparameter 'learning_rte': did you mean"),
        ({"learning_rate": [0.1], "batch_size": [13]}, {}, "batch_size is 13: expected 1 to 12"),
        ({"learning_rate": [np.nan]}, {}, "learning_rate holds nan"),
        ({"batch_size": [2]}, {}, "hyperparameters lack learning_rate"),
        ({"learning_rate": [0.1], "steps": [5]}, {}, "steps is 5: expected a positive multiple"),
        ({"learning_rate": [0.1]}, {"seeds": 0}, "seeds is 0"),
        ({"learning_rate": [0.1]}, {"seeds": [1, 1]}, "the seed 1 is given twice"),
        ({"learning_rate": [0.1]}, {"stop": oj.Target(1, "los")}, "unknown metric 'los'"),
        ({"learning_rate": [0.1]}, {"stop": 3}, "stop holds 3: expected rules"),
        ({"learning_rate": [0.1]}, {"layout": "vmapp"}, "unknown layout 'vmapp'"),
        ({"learning_rate": [0.1]}, {"batching": "mask"}, "unknown batching 'mask'"),
        ({"learning_rate": [0.1]}, {"vmap_chunk": 0}, "vmap_chunk is 0"),
        ({"learning_rate": [0.1]}, {"chunk_steps": 1}, "chunk_steps is 1: expected at least"),
        ({"learning_rate": oj.uniform(0, 1)}, {}, "learning_rate is a range: draw from it"),
        ([0.1], {}, "grid is a list: expected a dict of axes"),
    ],
)
def test_a_mistake_is_one_line(run, grid, how, message):
    with pytest.raises(oj.UserError, match=message) as caught:
        oj.sweep(run, grid, **how)
    assert "\n" not in str(caught.value)


def test_a_grid_too_large_says_how_large(problem):
    run = oj.make_run(problem, optax.sgd, 10**9, record_every=1)
    with pytest.raises(oj.UserError, match=r"take up to 8e\+03 GB and the memory has"):
        oj.sweep(run, {"learning_rate": np.linspace(0.1, 0.2, 1000).tolist()}, 1)
