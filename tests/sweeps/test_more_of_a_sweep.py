"""More of a sweep: longer runs, records under way, equal examples, seeds that change nothing."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.support.errors import UserError
from optjax.sweeps import programs
from optjax.sweeps.store import Store

RNG = np.random.default_rng(0)
PROBLEM = oj.least_squares(RNG.normal(size=(32, 4)), RNG.normal(size=32))
GRID = {"learning_rate": [0.01, 0.1], "batch_size": [4, 8]}


def quiet(*_):
    pass


def swept(steps, **given):
    run = oj.make_run(PROBLEM, optax.adam, steps, record_every=10)
    return oj.sweep(run, GRID, seeds=2, progress=quiet, **given)


def test_a_finished_sweep_takes_only_the_steps_that_are_missing(tmp_path, capsys):
    first = swept(20, out=tmp_path / "s", keep_states=True)
    run = oj.make_run(PROBLEM, optax.adam, 50, record_every=10)
    longer = oj.sweep(run, GRID, seeds=2, out=tmp_path / "s", keep_states=True)
    said = capsys.readouterr().err
    assert "sweep: resumed: 0 of 8 runs have ended, the others have records up to step 20" in said
    assert first.sizes["step"] == 2
    assert longer.steps_done.values.min() == 50
    alone = swept(50)
    for name in ("loss", "final_loss"):
        np.testing.assert_allclose(longer[name], alone[name], rtol=1e-12)
    store = Store(tmp_path / "s")
    begun = [int(facts["first"]) for facts, _ in store.frames() if facts["kind"] == "records"]
    store.close()
    assert begun.count(0) == 1  # no run was begun again
    assert max(begun) >= 2
    with pytest.raises(UserError, match="ask for at least as many"):
        swept(20, out=tmp_path / "s", keep_states=True)


def test_runs_that_diverged_do_not_go_on(tmp_path):
    def swept(steps, **given):
        run = oj.make_run(PROBLEM, optax.adam, steps, record_every=10)
        grid = {"learning_rate": [0.01, 1e200], "batch_size": [4, 8]}
        return oj.sweep(run, grid, seeds=2, progress=quiet, **given)

    for steps in (20, 50):
        found = swept(steps, out=tmp_path / "s", keep_states=True)
    alone = swept(50)
    assert (alone.status == oj.Status.DIVERGED).any()
    for name in ("loss", "final_loss", "status", "diverged_at", "steps_done"):
        np.testing.assert_array_equal(found[name], alone[name], err_msg=name)
    with pytest.raises(UserError, match="a diverged run has ended"):
        swept(60, out=tmp_path / "s", keep_states=True, keep_diverged=True)


def test_an_extension_under_way_is_read_as_such(tmp_path):
    """Its runs are RUNNING, not COMPLETED as when they were shorter."""
    swept(20, out=tmp_path / "s", keep_states=True)
    run = oj.make_run(PROBLEM, optax.adam, 50, record_every=10)

    def killed(text, fraction):
        raise RuntimeError("killed")

    given = {"out": tmp_path / "s", "keep_states": True, "chunk_steps": 10}
    with pytest.raises(RuntimeError, match="killed"):
        oj.sweep(run, GRID, seeds=2, progress=killed, **given)
    assert oj.Status.RUNNING in oj.load_sweep(tmp_path / "s").status.values
    with pytest.raises(UserError, match=r"any \(keep_states\)"):
        oj.sweep(run, GRID, seeds=2, out=tmp_path / "s", progress=quiet)


def test_states_outlast_other_runs_of_the_sweep(tmp_path):
    """Two seeds, then a third, then more steps: none of the three is begun again."""
    for steps, seeds in ((20, 2), (20, 3), (50, 3)):
        run = oj.make_run(PROBLEM, optax.adam, steps, record_every=10)
        given = {"out": tmp_path / "s", "keep_states": True, "progress": quiet}
        found = oj.sweep(run, {"learning_rate": [0.01], "batch_size": [4]}, seeds, **given)
    assert found.steps_done.values.min() == 50
    store = Store(tmp_path / "s")
    first = [
        len(arrays["run id"]) for facts, arrays in store.frames()
        if facts["kind"] == "records" and int(facts["first"]) == 0
    ]  # fmt: skip
    store.close()
    assert sum(first) == 3


def test_programs_of_one_text_that_read_other_arguments_are_not_mistaken():
    known = {**PROBLEM.data.shared, "a": jnp.array(1.0), "b": jnp.array(3.0)}
    data = oj.Data(PROBLEM.data.examples, known)

    def problem(name):
        def objective(params, state, data, hparams):
            return data.shared[name] * jnp.sum(params)

        return dataclasses.replace(PROBLEM, data=data, objective=objective)

    found = [
        oj.sweep(oj.make_run(problem(n), optax.sgd, 2), {"learning_rate": [0.1]}, progress=quiet)
        for n in ("a", "b")
    ]
    np.testing.assert_allclose(found[1].final_loss, 3 * found[0].final_loss)


def test_batch_sizes_of_one_layout_start_and_finish_by_the_same_programs():
    programs.forget()
    swept(10, batching="static", layout="vmap")
    compiled = {id(found[0]) for found in programs._CACHE.values()}
    assert len(compiled) == 4  # a start, a finish, and a chunk for each batch size


def test_callbacks_of_one_text_are_not_mistaken():
    def problem(factor):
        def objective(params, state, data, hparams):
            shape = jax.ShapeDtypeStruct((), params.dtype)
            return jax.pure_callback(lambda w: factor * w.sum(), shape, params)

        return dataclasses.replace(PROBLEM, objective=objective)

    found = [
        oj.sweep(oj.make_run(problem(f), optax.sgd, 2), {"learning_rate": [0.1]}, progress=quiet)
        for f in (1.0, 3.0)
    ]
    np.testing.assert_allclose(found[1].final_loss, 3 * found[0].final_loss)


def moving(peak, steps):
    return optax.sgd(optax.cosine_decay_schedule(peak, steps))


@pytest.mark.parametrize(
    ("run", "grid", "given", "expected"),
    [
        (oj.make_run(PROBLEM, optax.sgd, 4), {"learning_rate": [0.1]}, {}, "needs out"),
        (oj.make_run(PROBLEM, optax.sgd, 4), {"learning_rate": [0.1], "steps": [2, 4]},
         {"out": "s"}, "steps, an axis"),
        (oj.make_run(PROBLEM, optax.sgd, 4), {"learning_rate": [oj.Piecewise([0.1, 0.2])]},
         {"out": "s"}, "learning_rate depends on the run's number of steps"),
        (oj.make_run(PROBLEM, moving, 4), {"peak": [0.1]}, {"out": "s"}, "the optimiser depends"),
        (oj.make_run(PROBLEM, optax.sgd, 4), {"learning_rate": [0.1]},
         {"out": "s", "stop": oj.Halving(2)}, "leave out one"),
        (oj.make_run(PROBLEM, optax.sgd, 4), {"learning_rate": [0.1]},
         {"out": "s", "keep_diverged": True}, "leave out one"),
    ],
)  # fmt: skip
def test_runs_that_depend_on_their_length_keep_no_states(
    run, grid, given, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        oj.sweep(run, grid, keep_states=True, progress=quiet, **given)


def test_a_factory_that_asks_for_steps_is_given_the_runs():
    run = oj.make_run(PROBLEM, moving, 20)
    same = oj.make_run(PROBLEM, optax.sgd, 20)
    schedule = optax.cosine_decay_schedule(0.1, 20)
    one, other = run({"peak": 0.1}, 0), same({"learning_rate": schedule}, 0)
    np.testing.assert_allclose(one.final_loss, other.final_loss, rtol=1e-12)
    found = oj.sweep(run, {"peak": [0.1], "steps": [10, 20]}, progress=quiet)
    short = oj.make_run(PROBLEM, moving, 10)({"peak": 0.1}, 0).final_loss
    np.testing.assert_allclose(found.final_loss.values.ravel(), [short, one.final_loss], rtol=1e-12)
    with pytest.raises(UserError, match="unknown hyperparameter 'steps'"):
        run({"peak": 0.1, "steps": 3}, 0)


def test_records_are_told_as_they_come(tmp_path):
    file, written = tmp_path / "records.jsonl", {}

    class Writer:
        def __init__(self, name):
            self.rows = written.setdefault(name, [])

        def add_scalar(self, tag, value, step):
            self.rows.append((tag, value, step))

    tells = oj.json_lines(file), oj.scalars(Writer)
    found = swept(50, on_records=lambda records: [tell(records) for tell in tells])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == found.loss.size
    for row in rows:
        at = {name: row[name] for name in ("learning_rate", "batch_size", "seed", "step")}
        assert row["loss"] == float(found.loss.sel(at))
    assert len(written) == found.final_loss.size
    assert written["learning_rate=0.1 batch_size=4 seed=1"] == [
        ("loss", float(found.loss.sel(learning_rate=0.1, batch_size=4, seed=1, step=s)), s)
        for s in found.step.values
    ]


def test_records_at_equal_examples():
    found = swept(50)
    even = oj.by_examples(found)
    assert even.examples.values.tolist() == [80, 160]
    for size in (4, 8):
        one = found.loss.sel(batch_size=size, step=even.examples.values // size)
        np.testing.assert_array_equal(even.loss.sel(batch_size=size).values, one.values)
    with pytest.raises(UserError, match="record more often"):
        oj.by_examples(swept(10))


@pytest.mark.parametrize(
    ("optimizer", "given", "warns"),
    [
        (optax.sgd, {}, True),
        (optax.sgd, {"batch_size": [4]}, False),
        (functools.partial(optax.noisy_sgd, key=0), {}, True),
    ],
)
def test_seeds_that_change_nothing_are_said(optimizer, given, warns, capsys):
    run = oj.make_run(PROBLEM, optimizer, 5)
    grid = {"learning_rate": [0.01, 0.1], **given}
    found = oj.sweep(run, grid, seeds=2)
    told = "all 2 seeds gave the same final losses" in capsys.readouterr().err
    assert told == warns == ("note" in found.attrs)
