"""The run: closed forms, batching by masks, chunks, derivatives, statuses, refusals."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import RMSPROP, central_difference, rmsprop_outside

import optjax as oj
from optjax.run import problems
from optjax.theory import gradient_descent

N, D = 6, 9


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, D)) * np.geomspace(0.3, 2, D)  # lopsided: no two columns alike
    return X, rng.normal(size=N), rng.normal(size=D)


@pytest.fixture(scope="module")
def problem(data):
    return oj.least_squares(*data)


KEY = jax.random.key(3)


@pytest.fixture
def traced_once(monkeypatch):
    """Refuse a second trace of the loss of least squares."""
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(problems.squares_loss, n=1)
    monkeypatch.setattr(problems, "squares_loss", counted)


@pytest.mark.parametrize("steps", [1, 7])
def test_gradient_descent_equals_its_closed_form(data, problem, steps):
    X, t, w0 = data
    run = oj.make_run(problem, optax.sgd, steps, sampler="full")
    trajectory = run({"learning_rate": 0.05}, KEY)
    exact = gradient_descent.gradient_descent_loss(X, t, w0, 0.05, steps)
    np.testing.assert_allclose(trajectory.final_loss, exact, rtol=1e-12)


def test_rmsprop_is_the_sources(data):
    X, t, w0 = data
    run = oj.make_run(oj.least_squares(X, t, w0), RMSPROP, 5, sampler="full", record_path=True)
    hparams = {"learning_rate": 0.1, "decay": 0.9, "eps": 0.01}
    expected = rmsprop_outside(lambda w: 2 / N * X.T @ (X @ w - t), w0, 0.1, 0.9, 0.01, 5)
    np.testing.assert_allclose(run(hparams, KEY).path[1:], expected, rtol=1e-12)


@pytest.mark.parametrize("sampler", ["replacement", "epochs"])
def test_a_masked_batch_is_a_batch_of_that_size(problem, sampler):
    """B of B slots gives the run of B = b, to rounding; the draws are the same."""
    hparams = {"learning_rate": 0.02}
    wide = oj.make_run(problem, optax.sgd, 12, sampler=sampler)
    for b in (1, 4, N):
        narrow = oj.make_run(problem, optax.sgd, 12, sampler=sampler, max_batch_size=b)
        masked = wide(hparams | {"batch_size": b}, KEY)
        plain = narrow(hparams | {"batch_size": b}, KEY)
        np.testing.assert_allclose(masked.loss, plain.loss, rtol=1e-12)
        np.testing.assert_allclose(masked.params, plain.params, rtol=1e-12)


def test_an_epoch_sees_each_example_once(problem):
    from optjax.run.batching import draw, initial_order

    @jax.jit
    def epochs(key, step, order, size):
        return draw("epochs", key, step, order, N, N, size)

    for size in (1, 4, 5, N):
        order, seen = initial_order("epochs", KEY, N), []
        batches = -(-N // size)
        for step in range(2 * batches):
            indices, mask, order = draw(
                "epochs", KEY, jnp.int32(step), order, N, N, jnp.int32(size)
            )
            seen.append(np.asarray(indices)[np.asarray(mask)])
        for epoch in (seen[:batches], seen[batches:]):
            assert sorted(np.concatenate(epoch)) == list(range(N))
        assert not np.array_equal(np.concatenate(seen[:batches]), np.concatenate(seen[batches:]))


def test_shuffled_once_every_epoch_is_the_first(problem):
    """Two epochs in batches of 4 of 6 examples."""
    run = oj.make_run(problem, optax.sgd, 4, sampler="shuffle_once", max_batch_size=4)
    first = oj.make_run(problem, optax.sgd, 4, sampler="epochs", max_batch_size=4)
    hparams = {"learning_rate": 1e-30}  # the loss alone tells which examples were drawn
    once, fresh = run(hparams, KEY).loss, first(hparams, KEY).loss
    np.testing.assert_array_equal(once[:2], once[2:])
    np.testing.assert_allclose(once[:2], fresh[:2], rtol=1e-12)
    assert not np.allclose(fresh[:2], fresh[2:])


def test_a_draw_is_the_prefix_of_a_larger_draw():
    from optjax.run.batching import draw, no_order

    small, _, _ = draw("replacement", KEY, jnp.int32(5), no_order(), 1000, 7, None)
    large, _, _ = draw("replacement", KEY, jnp.int32(5), no_order(), 1000, 64, None)
    np.testing.assert_array_equal(small, large[:7])


@pytest.mark.parametrize("optimizer", [optax.adam, pytest.param(RMSPROP, marks=pytest.mark.slow)])
def test_vmapped_runs_equal_looped_runs(problem, optimizer):
    run = oj.make_run(problem, optimizer, 10, sampler="epochs")
    rates, sizes = jnp.array([0.01, 0.03, 0.1]), jnp.array([1, 3, 6])
    keys = jax.random.split(KEY, 3)
    together = jax.vmap(lambda r, b, k: run({"learning_rate": r, "batch_size": b}, k))(
        rates, sizes, keys
    )
    for i in range(3):
        alone = run({"learning_rate": rates[i], "batch_size": sizes[i]}, keys[i])
        np.testing.assert_allclose(together.loss[i], alone.loss, rtol=1e-12)
        np.testing.assert_allclose(together.params[i], alone.params, rtol=1e-12)


def test_chunks_equal_the_whole(problem):
    run = oj.make_run(problem, optax.adam, 12, sampler="epochs", record_every=2, record_path=True)
    hparams = {"learning_rate": 0.05, "batch_size": 4}
    whole = run(hparams, KEY)
    start, chunks = run.init(hparams, KEY), list(run.chunks(hparams, KEY, 4))
    state, parts = chunks[-1][0], [records for _, records in chunks]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    resumed = run.finish(start, state, joined, hparams)
    chex.assert_trees_all_close(whole, resumed, rtol=1e-12)
    np.testing.assert_array_equal(whole.step, [2, 4, 6, 8, 10, 12])
    assert whole.path.shape == (7, D)


@pytest.mark.parametrize("name", ["learning_rate", "l2", "momentum"])
def test_grad_and_jvp_equal_central_differences(problem, name):
    run = oj.make_run(problem, optax.sgd, 8)
    base = {"learning_rate": 0.05, "l2": 0.02, "momentum": 0.5, "batch_size": 3}

    def final(value):
        return run(base | {name: value}, KEY).final_loss

    numeric = central_difference(final, base[name], 1e-6)
    np.testing.assert_allclose(jax.grad(final)(base[name]), numeric, rtol=1e-7)
    np.testing.assert_allclose(jax.jvp(final, (base[name],), (1.0,))[1], numeric, rtol=1e-7)


def test_l2_is_the_gradient_of_its_penalty(data, problem):
    X, t, w0 = data
    run = oj.make_run(problem, optax.sgd, 1, sampler="full")
    w1 = run({"learning_rate": 0.1, "l2": 0.3}, KEY).params
    np.testing.assert_allclose(
        w1, w0 - 0.1 * (2 / N * X.T @ (X @ w0 - t) + 2 * 0.3 * w0), rtol=1e-13
    )


def test_one_compilation_serves_every_value(data, traced_once):
    run = oj.make_run(oj.least_squares(*data), optax.adam, 3)
    for rate, size in [(0.1, 2), (0.2, 3), (0.3, 6)]:
        run({"learning_rate": rate, "batch_size": size}, KEY)


def test_one_program_serves_every_data_set_of_a_shape(data, traced_once):
    X, t, _ = data
    for scale in (1.0, 2.0):
        oj.make_run(oj.least_squares(scale * X, t), optax.sgd, 4)({"learning_rate": 0.01}, KEY)


def test_a_problem_of_traced_data_is_the_problem_of_their_values(data):
    X, t, w0 = data

    def loss(X, t, w0):
        run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 4)
        return run({"learning_rate": 0.01, "batch_size": 2}, KEY).final_loss

    scales = np.array([1.0, 2.0])
    many = jax.vmap(lambda scale: loss(scale * X, t, w0))(scales)
    np.testing.assert_allclose(many, [loss(scale * X, t, w0) for scale in scales], rtol=1e-12)
    with pytest.raises(oj.UserError, match=r"X has shape .* and t"):
        jax.jit(loss)(X, t[:-1], w0)
    whole = jax.jit(lambda x: oj.least_squares(x, [1.0]).data.examples["x"])(np.ones((1, 2), int))
    assert whole.dtype == np.float64


def test_data_are_arguments_of_the_program_not_constants():
    X = np.random.default_rng(1).normal(size=(64, 32))
    run = oj.make_run(oj.least_squares(X, X[:, 0]), optax.sgd, 2)
    from optjax.run import core

    text = core.run.lower(run.plan, run.problem.data, {"learning_rate": 0.1}, KEY).as_text()
    assert "tensor<64x32xf64>" in text
    assert not re.search(r"constant dense<\"0x[0-9A-F]{1000,}", text)


def test_divergence_is_data_and_leaves_the_neighbours_alone(problem):
    run = oj.make_run(problem, optax.sgd, 400, record_every=100)
    rates = jnp.array([0.01, 50.0])
    both = jax.vmap(lambda r: run({"learning_rate": r}, KEY))(rates)
    assert both.status.tolist() == [oj.Status.COMPLETED, oj.Status.DIVERGED]
    assert both.diverged_at[0] == -1
    assert 0 < int(both.diverged_at[1]) < 400
    np.testing.assert_allclose(both.params[0], run({"learning_rate": 0.01}, KEY).params, rtol=1e-12)


def test_convergence_is_a_status(problem):
    run = oj.make_run(problem, optax.sgd, 3000, sampler="full", tolerance=1e-3, record_every=3000)
    assert run({"learning_rate": 0.05}, KEY).status == oj.Status.CONVERGED
    assert run({"learning_rate": 1e-5}, KEY).status == oj.Status.COMPLETED


def test_a_traced_batch_size_out_of_range_diverges_at_zero(problem):
    run = oj.make_run(problem, optax.sgd, 3)
    sizes = jnp.array([0, 3, N + 1])
    out = jax.jit(jax.vmap(lambda b: run({"learning_rate": 0.01, "batch_size": b}, KEY)))(sizes)
    assert out.diverged_at.tolist() == [0, -1, 0]


def test_float32_stays_float32_under_x64(data):
    X, t, _ = (np.float32(a) for a in data)
    trajectory = oj.make_run(oj.least_squares(X, t), optax.adam, 3)({"learning_rate": 0.1}, KEY)
    assert {leaf.dtype for leaf in (trajectory.params, trajectory.loss)} == {np.dtype("float32")}


def test_quadratic_noise_shrinks_with_the_batch():
    """w₁ − w₀ has standard deviation η·noise/√b in each coordinate; gated by its own error."""
    problem = oj.quadratic([1.0, 3.0], w0=[0.0, 0.0], noise=[1.0, 2.0])
    run = oj.make_run(problem, optax.sgd, 1)
    keys = jax.random.split(KEY, 4000)
    for b in (1, 16):
        steps = jax.vmap(lambda k, b=b: run({"learning_rate": 1.0, "batch_size": b}, k).params)(
            keys
        )
        expected = np.array([1.0, 2.0]) / np.sqrt(b)
        error = expected / np.sqrt(2 * len(keys))  # of a sample standard deviation
        assert np.all(np.abs(np.std(steps, axis=0) - expected) < 4 * error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10, "record_every": 3}, "record_every is 3"),
        ({"steps": 10, "sampler": "epoch"}, "did you mean 'epochs'"),
        ({"steps": 10, "max_batch_size": 7}, "max_batch_size is 7"),
    ],
)
def test_bad_settings_are_named(problem, settings, message):
    with pytest.raises(oj.UserError, match=message):
        oj.make_run(problem, optax.sgd, **settings)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"learning_rte": 0.1}, "did you mean 'learning_rate'"),
        ({"learning_rate": 0.1, "batch_size": 0}, "batch_size is 0: expected 1 to 6"),
        ({"learning_rate": 0.1, "batch_size": 7}, "batch_size is 7"),
        ({"learning_rate": 0.1, "nesterov": True}, "functools.partial"),
    ],
)
def test_bad_hyperparameters_are_named(problem, hparams, message):
    with pytest.raises(oj.UserError, match=re.escape(message)):
        oj.make_run(problem, optax.sgd, 3)(hparams, KEY)


def test_flags_go_in_by_partial(problem):
    run = oj.make_run(problem, functools.partial(optax.sgd, nesterov=True), 3)
    assert np.isfinite(run({"learning_rate": 0.01, "momentum": 0.9}, KEY).final_loss)


@pytest.mark.parametrize(
    ("X", "t", "message"),
    [
        (np.ones((3, 2)), np.ones(4), r"X has shape \(3, 2\) and t \(4,\)"),
        (np.array([[1.0, np.nan]]), np.ones(1), r"X holds nan at \(0, 1\)"),
        (np.ones((1, 2)), np.array([np.inf]), r"t holds inf at \(0,\)"),
        (np.ones(3), np.ones(3), "X has shape"),
    ],
)
def test_bad_data_are_named(X, t, message):
    with pytest.raises(oj.UserError, match=message):
        oj.least_squares(X, t)


def test_a_line_search_sees_the_penalty(data):
    """L-BFGS with l2 ends at the ridge solution, (XᵀX/n + λ̃I)w = Xᵀt/n."""
    X, t, _ = data
    run = oj.make_run(oj.least_squares(X, t), optax.lbfgs, 60, sampler="full", record_every=60)
    ridge = np.linalg.solve(X.T @ X / N + 0.5 * np.eye(D), X.T @ t / N)
    np.testing.assert_allclose(run({"l2": 0.5}, KEY).params, ridge, rtol=1e-6, atol=1e-9)


def test_the_pure_form_takes_the_data_as_arguments():
    """A user's jit of `run.pure` compiles no data into the program; HLO holds no such constant."""
    X = np.random.default_rng(1).normal(size=(48, 32))
    run = oj.make_run(oj.least_squares(X, X[:, 0]), optax.sgd, 2)
    compiled = jax.jit(run.pure).lower(run.problem.data, {"learning_rate": 0.1}, KEY).compile()
    assert not re.search(r"f64\[48,32\]\S* constant", compiled.as_text())


def test_number_types_share_a_program(data, traced_once):
    run = oj.make_run(oj.least_squares(*data), optax.sgd, 3)
    for rate in (0.1, 1, 0.2, np.float32(0.3), np.int64(1)):
        run({"learning_rate": rate}, KEY)


def test_a_slot_count_without_a_size_is_drawn(problem):
    """max_batch_size = n with replacement is a draw of n, not the full batch."""
    drawn = oj.make_run(problem, optax.sgd, 5, max_batch_size=N)({"learning_rate": 0.02}, KEY)
    sized = oj.make_run(problem, optax.sgd, 5)({"learning_rate": 0.02, "batch_size": N}, KEY)
    full = oj.make_run(problem, optax.sgd, 5)({"learning_rate": 0.02}, KEY)
    np.testing.assert_allclose(drawn.params, sized.params, rtol=1e-12)
    assert not np.allclose(drawn.params, full.params)


def test_low_precision_parameters_keep_their_dtype():
    import flax.linen as nn

    x = jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16)[:, None]
    with jax.numpy_dtype_promotion("standard"):
        model = nn.Dense(1, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        problem = oj.flax_problem(model, x, x, lambda out, t: jnp.sum((out - t) ** 2, -1))
        end = oj.make_run(problem, optax.adam, 5)({"learning_rate": 0.01, "b1": 0.9}, KEY)
    assert end.params["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: oj.make_run(p, optax.sgd, 3)({}, KEY), "lack learning_rate"),
        (lambda p: oj.make_run(p, optax.sgd(0.1), 3), "expected a factory"),
        (lambda p: oj.make_run(p, optax.sgd, 2.5), "steps is 2.5"),
        (
            lambda p: oj.make_run(p, optax.sgd, 3)(
                {"learning_rate": 0.1, "batch_size": np.nan}, KEY
            ),
            "batch_size is nan",
        ),
        (
            lambda p: oj.make_run(p, optax.sgd, 3)({"learning_rate": 0.1, "l2": [1, 2]}, KEY),
            r"l2 has shape \(2,\)",
        ),
        (
            lambda p: oj.make_run(p, optax.sgd, 3)(
                {"learning_rate": 0.1, "momentum": 0.9, "nesterov": 1}, KEY
            ),
            "functools.partial",
        ),
        (lambda p: oj.make_run(lambda w: w, optax.sgd, 3), "expected a Problem"),
        (lambda p: oj.make_run(p, optax.sgd, 3, sampler="full", max_batch_size=2), "leave it out"),
    ],
)
def test_other_mistakes_are_one_line(problem, call, message):
    with pytest.raises(oj.UserError, match=message) as caught:
        call(problem)
    assert "\n" not in str(caught.value)
