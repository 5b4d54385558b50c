"""A sweep of a hypergradient equals a loop of single calls, whatever runs beside it."""

import functools
import json
import warnings

import jax
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.hypergradients import ES, NonFiniteHypergradient
from optjax.sweeps import programs

N, D, T = 12, 6, 24
TOLERANCE = 1e-12  # float64; products of other shapes add in another order
close = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, D)) * np.geomspace(0.3, 1, D)  # lopsided: no two columns alike
    return oj.least_squares(X, rng.normal(size=N), rng.normal(size=D))


@pytest.fixture(scope="module")
def run(problem):
    return oj.make_run(problem, optax.sgd, T)


@pytest.fixture(scope="module")
def slope(run):
    return oj.hypergrad(run, wrt=["learning_rate", "momentum"])


def key(seed):
    return jax.random.key(seed)


def _same(found, slope, hparams, seed):
    """A lane of a sweep is the single call."""
    one = slope(hparams, key(seed))
    close(found.value, one.value)
    close(found.gradient_learning_rate, one.gradient["learning_rate"])
    close(found.gradient_momentum, one.gradient["momentum"])


# Grids of these tests have four lanes a call and a batch of 12 among others: one program for all.
def test_a_product_is_a_loop_of_single_calls(slope):
    rates, sizes, seeds = [0.01, 0.2], [1, 5, 12], [4, 2]
    seen = []
    found = oj.sweep(
        slope,
        {"learning_rate": rates, "batch_size": sizes, "momentum": [0.5]},
        seeds,
        vmap_chunk=5,  # divides nothing here
        batching="masked",
        progress=lambda text, share: seen.append((text, share)),
    )
    assert found.value.dims == ("learning_rate", "batch_size", "momentum", "seed")
    assert list(found.seed) == seeds
    for i, j, k in np.ndindex(2, 3, 2):
        hparams = {"learning_rate": rates[i], "batch_size": sizes[j], "momentum": 0.5}
        mine = found.isel(learning_rate=i, batch_size=j, momentum=0, seed=k)
        _same(mine, slope, hparams, seeds[k])
    assert found.finite.all()
    assert [share for _, share in seen] == pytest.approx([1 / 3, 2 / 3, 1])
    assert "12 of 12 runs" in seen[-1][0]
    attrs = found.attrs
    said = (attrs["problem"], attrs["optimizer"], attrs["objective"], attrs["mode"])
    assert said == ("least squares", "sgd", "final_loss", "forward")
    assert attrs["why"].startswith("forward: by 2 numbers through 24 steps")
    assert {"commit", "versions", "seconds", "device", "devices"} <= attrs.keys()
    (note,) = json.loads(attrs["groups"])
    assert (note["layout"], note["calls"]) == ("vmap of 4 runs", 3)


def test_points_zipped_drawn_and_listed(slope):
    rows = {"learning_rate": [0.1, 0.2], "momentum": [0.0, 0.9], "batch_size": [3, 12]}
    for grid in (
        oj.zip_grid(rows),
        oj.points(dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)),
    ):
        found = oj.sweep(slope, grid, 2, batching="masked")
        assert found.sizes == {"point": 2, "seed": 2}
        _same(found.isel(point=1, seed=1), slope, {n: v[1] for n, v in rows.items()}, 1)
    ranges = {"learning_rate": oj.loguniform(0.01, 0.1), "momentum": [0.5]}
    drawn = oj.sample(4, {**ranges, "batch_size": [2, 12]})
    found = oj.sweep(slope, drawn, batching="masked")
    _same(found.isel(point=3, seed=0), slope, drawn.point(3), 0)


def test_a_batch_size_may_have_a_program_of_its_own(slope):
    grid = {"learning_rate": [0.1, 0.2], "momentum": [0.5], "batch_size": [2]}
    found = oj.sweep(slope, grid, 2)
    assert json.loads(found.attrs["groups"])[0]["group"] == "least squares, batch 2"
    mine = found.isel(learning_rate=1, momentum=0, batch_size=0, seed=1)
    _same(mine, slope, {"learning_rate": 0.2, "momentum": 0.5, "batch_size": 2}, 1)


def test_arrays_schedules_and_trees_have_axes_of_their_own():
    import flax.linen as nn

    rng = np.random.default_rng(0)
    net = nn.Dense(1, param_dtype=float)
    problem = oj.flax_problem(
        net, rng.normal(size=(N, 3)), rng.normal(size=N), lambda y, t: (y[:, 0] - t) ** 2
    )
    start = jax.tree.map(lambda w: rng.normal(size=w.shape), problem.init(key(0), problem.data)[0])
    short, long = oj.Piecewise([0.1, 0.05, 0.02]), oj.Piecewise([0.1, 0.1, 0.05, 0.02])
    weights = [np.ones(N), np.linspace(0.5, 1.5, N)]
    grid = {
        "learning_rate": [short, long],
        "example_weights": weights,
        "initial_params": [start],
        "l2": [0.01],
    }
    slope = oj.hypergrad(oj.make_run(problem, optax.sgd, T), mode="reverse")
    found = oj.sweep(slope, grid).isel(initial_params=0, l2=0, seed=0)
    for j in range(2):
        mine = found.isel(learning_rate=1, example_weights=j)
        hparams = {"example_weights": weights[j], "initial_params": start}
        one = slope({**hparams, "learning_rate": long, "l2": 0.01}, key(0)).gradient
        close(mine.gradient_l2, one["l2"])
        close(mine.gradient_learning_rate, one["learning_rate"].values)
        close(mine.gradient_example_weights, one["example_weights"])
        leaves = jax.tree_util.tree_leaves_with_path(one["initial_params"])
        assert len(leaves) == 2
        for path, leaf in leaves:
            name = "initial_params." + jax.tree_util.keystr(path, simple=True, separator=".")
            close(mine[f"gradient_{name}"], leaf)
            axes = [f"{name}_index"] if leaf.ndim == 1 else [f"{name}_index_0", f"{name}_index_1"]
            assert list(mine[f"gradient_{name}"].dims) == axes
    assert mine.gradient_example_weights.dims == ("example_weights_index",)
    empty = found.gradient_learning_rate.isel(learning_rate=0).isnull()
    assert empty.isel(learning_rate_index=3).all()
    assert not empty.isel(learning_rate_index=slice(3)).any()


def test_a_diverged_lane_is_marked_and_alone(slope):
    grid = {"learning_rate": [1e200, 0.2], "momentum": [0.5], "batch_size": [5, 12]}
    found = oj.sweep(slope, grid, batching="masked").isel(momentum=0, seed=0)
    hparams = {"learning_rate": 1e200, "momentum": 0.5, "batch_size": 5}
    with warnings.catch_warnings(action="ignore", category=NonFiniteHypergradient):
        bad = slope(hparams, key(0))
    lost, kept = found.isel(learning_rate=0), found.isel(learning_rate=1)
    assert lost.gradient_learning_rate.isnull().all()
    assert lost.gradient_momentum.isnull().all()
    assert not lost.finite.any()
    assert (lost.status == oj.Status.DIVERGED).all()
    assert lost.diverged_at[0] == bad.diverged_at >= 0
    assert kept.finite.all()
    assert (kept.diverged_at == -1).all()
    _same(kept.isel(batch_size=0), slope, {**hparams, "learning_rate": 0.2}, 0)


def test_mean_and_error_are_those_over_seeds(slope):
    grid = {"learning_rate": [0.1], "momentum": [0.5], "batch_size": [2, 12]}
    found = oj.sweep(slope, grid, 16, batching="masked", vmap_chunk=4)
    hparams = {"learning_rate": 0.1, "momentum": 0.5, "batch_size": 2}
    mine, whole = found.gradient_momentum.sel(batch_size=2), slope.over_seeds(hparams, 16)
    close(mine.mean(), whole.gradient["momentum"])
    close(mine.std(ddof=1) / 4, whole.gradient_error["momentum"])


def test_a_mode_adds_its_own_and_a_batch_size_may_be_perturbed(run):
    slope = oj.hypergrad(run, wrt=["learning_rate", "batch_size"], mode=ES(pairs=4))
    found = oj.sweep(slope, {"learning_rate": [0.1], "batch_size": [3, 6]}, vmap_chunk=1)
    one = slope({"learning_rate": 0.1, "batch_size": 6}, key(0))
    for name in ("learning_rate", "batch_size"):
        close(found[f"gradient_{name}"][0, 1, 0], one.gradient[name])
        close(found[f"standard_error_{name}"][0, 1, 0], one.aux["standard_error"][name])


def test_a_function_makes_data_sets_steps_and_modes_axes(problem):
    rng = np.random.default_rng(1)
    X, t = rng.normal(size=(N, D)), rng.normal(size=N)
    problems = [problem, oj.least_squares(X, t, np.ones(D))]

    def make(which, mode):
        return oj.hypergrad(oj.make_run(problems[which], optax.sgd, T), mode=mode)

    grid = {"which": [0, 1], "mode": ["forward", "reverse"], "steps": [6], "learning_rate": [0.1]}
    found = oj.sweep(make, grid, 2).squeeze()
    close(found.gradient_learning_rate[:, 0], found.gradient_learning_rate[:, 1])
    assert found.attrs["mode"] == "forward, reverse"
    assert [b["runs"] for b in json.loads(found.attrs["groups"])] == [4, 4]
    for i in range(2):
        one = oj.hypergrad(oj.make_run(problems[i], optax.sgd, 6))({"learning_rate": 0.1}, key(1))
        close(found.gradient_learning_rate[i, 1, 1], one.gradient["learning_rate"])


def test_memory_cuts_the_lanes_and_a_second_sweep_compiles_nothing(slope):
    grid = {"learning_rate": [0.1, 0.2], "momentum": [0.5], "batch_size": [2, 12]}
    first = oj.sweep(slope, grid, batching="masked")
    (group,) = json.loads(first.attrs["groups"])
    assert (group["layout"], group["calls"]) == ("vmap of 4 runs", 1)
    before = set(programs._CACHE)
    free = 4.5 * group["bytes of a run"]
    again = oj.sweep(
        slope, {**grid, "learning_rate": [0.3, 0.2]}, 3, batching="masked", memory=free
    )
    (group,) = json.loads(again.attrs["groups"])
    assert (group["layout"], group["calls"]) == ("vmap of 4 runs", 3)
    assert set(programs._CACHE) == before
    close(again.gradient_momentum[1, ..., :1], first.gradient_momentum[1])


@pytest.mark.parametrize("how", [{"layout": "loop"}, {"layout": "map", "vmap_chunk": 2}], ids=str)
def test_layouts_are_those_of_runs(slope, how):
    grid = {"learning_rate": [0.1, 0.2], "momentum": [0.5], "batch_size": [2, 12]}
    found = oj.sweep(slope, grid, batching="masked", **how)
    hparams = {"learning_rate": 0.2, "momentum": 0.5, "batch_size": 12}
    _same(found.isel(learning_rate=1, momentum=0, batch_size=1, seed=0), slope, hparams, 0)


def test_a_folder_keeps_resumes_and_extends(slope, tmp_path, monkeypatch):
    grid = {"learning_rate": [0.1, 0.2], "momentum": [0.5], "batch_size": [3, 12]}
    how = {"batching": "masked", "out": tmp_path / "s", "vmap_chunk": 2, "progress": print}
    whole = oj.sweep(slope, grid, 2, batching="masked", vmap_chunk=2, progress=print)
    calls = []

    def interrupted(text, share):
        calls.append(share)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oj.sweep(slope, grid, 2, **{**how, "progress": interrupted})
    part = oj.load_sweep(tmp_path / "s")
    assert 0 < int(part.value.notnull().sum()) < 8
    advanced = []
    chunk = programs.Programs.chunk
    monkeypatch.setattr(
        programs.Programs, "chunk", lambda self, *a: advanced.append(1) or chunk(self, *a)
    )
    found = oj.sweep(slope, grid, 2, **how)
    assert len(advanced) == 3  # the first call had ended; the second had not been judged
    for name in whole.data_vars:
        np.testing.assert_array_equal(found[name], whole[name])
    loaded = oj.load_sweep(tmp_path / "s")
    assert list(loaded.data_vars) == list(found.data_vars) == list(whole.data_vars)
    assert loaded.attrs.keys() == found.attrs.keys()
    assert loaded.attrs["mode"] == whole.attrs["mode"] == "forward"
    with pytest.raises(oj.UserError, match="holds a sweep of hypergradients, and this is a sweep"):
        oj.sweep(slope.run, grid, 2, out=tmp_path / "s")
    more = oj.sweep(slope, {**grid, "batch_size": [3, 12, 5]}, 2, **how)
    assert len(advanced) == 3 + 2
    np.testing.assert_array_equal(more.value.sel(batch_size=[3, 12]), whole.value)
    other = oj.hypergrad(slope.run, wrt=["learning_rate"])
    with pytest.raises(oj.UserError, match="holds another sweep of hypergradients: wrt was"):
        oj.sweep(other, grid, 2, **how)


@pytest.mark.parametrize(
    "given",
    [{"stop": oj.Target(0.1)}, {"final": print}, {"keep_diverged": True}, {"chunk_steps": 2}],
    ids=str,
)
def test_what_one_record_cannot_have_is_refused(slope, given):
    with pytest.raises(oj.UserError, match="a hypergradient is one record") as error:
        oj.sweep(slope, {"learning_rate": [0.1], "momentum": [0.5]}, **given)
    assert "\n" not in str(error.value)


def test_names_and_values_that_cannot_be(run, slope):
    with pytest.raises(oj.UserError, match="momentun"):
        oj.sweep(slope, {"learning_rate": [0.1], "momentun": [0.5]})
    with pytest.raises(oj.UserError, match="wrt names 'momentum', which hparams lack"):
        oj.sweep(slope, {"learning_rate": [0.1]})
    with pytest.raises(oj.UserError, match="runs and hypergradients"):
        oj.sweep(lambda a: slope if a else run, {"a": [0, 1], "learning_rate": [0.1]})
    axis = [0.1, oj.Piecewise([0.1, 0.2])]
    with pytest.raises(oj.UserError, match="shapes"):
        oj.sweep(slope, {"learning_rate": axis, "momentum": [0.5]})


def test_steps_are_an_axis_and_each_has_its_own_mode():
    """By least squares' closed form one step has a mode that no other number of steps has."""
    rng = np.random.default_rng(2)
    problem = oj.least_squares(rng.normal(size=(N, D)), rng.normal(size=N))
    slope = oj.hypergrad(oj.make_run(problem, optax.sgd, T, sampler="full"))
    for steps in ([1, 24], [24, 1]):
        found = oj.sweep(slope, {"steps": steps, "learning_rate": [0.05]})
        for i, count in enumerate(steps):
            run = oj.make_run(problem, optax.sgd, count, sampler="full")
            one = oj.hypergrad(run, mode="reverse")({"learning_rate": 0.05}, key(0))
            close(found.gradient_learning_rate[i, 0, 0], one.gradient["learning_rate"])
