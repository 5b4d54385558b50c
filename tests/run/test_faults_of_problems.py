"""Problems as people write them: each works, or is refused in a line that says what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.support.errors import UserError

X = np.arange(24.0).reshape(8, 3) / 10
T = np.arange(8.0)
KEY = jax.random.key(0)


def start(key, data):
    return jnp.zeros(3), ()


def whole(params, state, data, hparams):
    return jnp.mean(jnp.square(data.examples["x"] @ params - data.examples["t"]))


def residuals(params, batch):
    return batch.examples["x"] @ params - batch.examples["t"]


def plain(params, state, batch, hparams):
    return jnp.mean(residuals(params, batch) ** 2), state


def good(params, state, batch, hparams):
    return oj.masked_mean(residuals(params, batch) ** 2, batch.mask), state


def weighed(params, state, batch, hparams):
    values = residuals(params, batch) ** 2
    kept = jnp.ones(values.shape[0]) if batch.mask is None else batch.mask.astype(values.dtype)
    return jnp.sum(kept * values) / jnp.sum(kept), state


def with_statistics(params, state, batch, hparams):
    return good(params, state, batch, hparams)[0], {"mean": jnp.mean(batch.examples["t"])}


def with_noise(params, state, batch, hparams):
    noise = jax.random.normal(batch.key, batch.examples["t"].shape)
    return oj.masked_mean((residuals(params, batch) + noise) ** 2, batch.mask), state


def problem(loss, init=start, dtype=float):
    data = oj.Data({"x": jnp.asarray(X, dtype), "t": jnp.asarray(T, dtype)}, None)
    return oj.Problem(init, loss, whole, data)


@pytest.mark.parametrize(
    ("loss", "init", "counts_padding"),
    [
        (plain, start, True),
        (with_statistics, lambda key, data: (jnp.zeros(3), {"mean": jnp.zeros(())}), True),
        (good, start, False),
        (weighed, start, False),
        (with_noise, start, False),
    ],
)
@pytest.mark.parametrize("how", ["run", "jit", "hypergrad", "tune", "epochs", "masked"])
def test_a_loss_that_counts_padding_is_refused(loss, init, counts_padding, how):
    made = oj.make_run(problem(loss, init), optax.sgd, 4, max_batch_size=4, record_every=4)
    point = {"learning_rate": 0.01, "batch_size": 2}
    grid = {"learning_rate": [0.01], "batch_size": [2, 4]}
    calls = {
        "run": lambda: made(point, KEY),
        "jit": lambda: jax.jit(made)(point, KEY),
        "hypergrad": lambda: oj.hypergrad(made, wrt="learning_rate", mode="reverse")(point, KEY),
        "tune": lambda: oj.tune(made, "final_loss", point, steps=1, progress=lambda *_: None),
        "epochs": lambda: oj.make_run(
            problem(loss, init), optax.sgd, 4, max_batch_size=3, sampler="epochs"
        )({"learning_rate": 0.01}, KEY),
        "masked": lambda: oj.sweep(made, grid, batching="masked", progress=lambda *_: None),
    }
    if not counts_padding:
        calls[how]()
        return
    with pytest.raises(UserError, match=r"padding.*masked_mean"):
        calls[how]()


def test_a_sweep_of_such_a_loss_takes_a_program_for_each_batch_size():
    grid = {"learning_rate": [0.01], "batch_size": [2, 4]}
    found = [
        oj.sweep(
            oj.make_run(problem(loss), optax.sgd, 4, max_batch_size=4), grid, 2, batching=how,
            progress=lambda *_: None,
        ).final_loss.values
        for loss, how in ((plain, "auto"), (good, "static"))
    ]  # fmt: skip
    np.testing.assert_allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("singular", [lambda r: jnp.sqrt(r**2), lambda r: jnp.linalg.norm(r)])
@pytest.mark.parametrize("sampler", ["replacement", "epochs"])
def test_a_loss_singular_at_an_example_that_is_not_drawn_has_a_derivative(singular, sampler):
    """Masked runs diverge where runs of full batches do, and nowhere else."""

    def loss(params, state, batch, hparams):
        return oj.masked_mean(jax.vmap(singular)(residuals(params, batch)), batch.mask), state

    def run(slots):
        return oj.make_run(
            problem(loss), optax.sgd, 3, sampler=sampler, max_batch_size=slots, record_every=3
        )

    point = {"learning_rate": 0.01}  # the example t = 0 is singular at the start
    for size in (1, 2, 4):
        for seed in range(12):
            key = jax.random.key(seed)
            alone = run(size)(point, key)
            masked = run(8)({**point, "batch_size": size}, key)
            assert alone.status == masked.status
            if alone.status != oj.Status.DIVERGED:
                np.testing.assert_allclose(alone.params, masked.params, rtol=1e-12)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda key, data: jnp.zeros(3), "init gives a"),
        (lambda key, data: (jnp.zeros(3, complex), ()), "two arrays"),
        (lambda key, data: ({"w": jnp.zeros(3, int)}, ()), "w is int64: expected real floating"),
        (lambda key, data: ({}, ()), "no parameters"),
    ],
)
def test_a_start_that_cannot_be_trained_is_refused(init, message):
    with pytest.raises(UserError, match=message):
        oj.make_run(problem(good, init), optax.sgd, 2)({"learning_rate": 0.1}, KEY)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, s, b, h: jnp.mean(residuals(p, b) ** 2), r"a pair \(mean loss, model_state\)"),
        (lambda p, s, b, h: (residuals(p, b) ** 2, s), "masked_mean"),
    ],
)
def test_a_loss_of_another_form_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        oj.make_run(problem(loss), optax.sgd, 2)({"learning_rate": 0.1}, KEY)


def test_a_state_keeps_the_dtype_it_began_with():
    def init(key, data):
        return jnp.zeros(3, jnp.float32), {"mean": jnp.zeros((), jnp.float32)}

    def loss(params, state, batch, hparams):
        value = oj.masked_mean(residuals(params.astype(float), batch) ** 2, batch.mask)
        return value, {"mean": value}

    made = dataclasses.replace(problem(loss, init), objective=lambda p, s, d, h: s["mean"])
    ended = oj.make_run(made, optax.sgd, 2)({"learning_rate": 0.01}, KEY)
    assert ended.model_state["mean"].dtype == jnp.float32


@pytest.mark.parametrize("key", [3, np.int64(3), jax.random.PRNGKey(3)])
def test_a_seed_or_a_raw_key_is_the_key_of_a_run(key):
    run = oj.make_run(problem(good), optax.sgd, 3)
    expected = run({"learning_rate": 0.01, "batch_size": 2}, jax.random.key(3))
    found = run({"learning_rate": 0.01, "batch_size": 2}, key)
    assert np.array_equal(found.params, expected.params)


@pytest.mark.parametrize("key", ["a", 1.0, None, True, jnp.zeros(3)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(UserError, match="key"):
        oj.make_run(problem(good), optax.sgd, 3)({"learning_rate": 0.01}, key)


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_another_default_generator_changes_no_draw(generator):
    run = oj.make_run(problem(good), optax.sgd, 3)
    grid = {"learning_rate": [0.01], "batch_size": [2]}
    expected = run({"learning_rate": 0.01, "batch_size": 2}, jax.random.key(1))
    with jax.default_prng_impl(generator):
        found = oj.sweep(run, grid, 2, progress=lambda *_: None)
        assert np.isclose(found.final_loss[0, 0, 1], expected.final_loss, rtol=1e-12)
        alone = run({"learning_rate": 0.01, "batch_size": 2}, 1)
        assert np.array_equal(alone.params, expected.params)
        with pytest.raises(UserError, match="vmap"):
            run({"learning_rate": 0.01}, jax.random.key(1))


def spoiled(inner):
    """Return a factory whose optimiser leaves out a step with a gradient that is not finite."""
    return lambda learning_rate: optax.apply_if_finite(inner(learning_rate), 100)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("inner", [optax.sgd, optax.adam])
def test_a_skipped_step_is_no_divergence(inner, every):
    t = T.copy()
    t[2] = np.nan
    data = oj.Data({"x": jnp.asarray(X), "t": jnp.asarray(t)}, None)

    def clean(params, state, data, hparams):
        return jnp.nanmean(jnp.square(data.examples["x"] @ params - data.examples["t"]))

    spoilt = dataclasses.replace(problem(good), data=data, objective=clean)
    run = oj.make_run(spoilt, spoiled(inner), 32, record_every=every)
    point = {"learning_rate": 0.01, "batch_size": 1}
    ended = run(point, KEY)
    assert ended.status == oj.Status.COMPLETED
    assert ended.diverged_at == -1
    losses = np.asarray(ended.loss)
    if every == 1:  # a record of a step that was skipped has no loss
        assert 0 < np.isnan(losses).sum() < 32
    else:
        assert np.isfinite(losses).all()
    swept = oj.sweep(run, {"learning_rate": [0.01], "batch_size": [1]}, 1, progress=lambda *_: None)
    np.testing.assert_allclose(swept.loss.values.ravel(), losses, rtol=1e-10)
    np.testing.assert_allclose(swept.final_loss.values.ravel(), ended.final_loss, rtol=1e-10)
    plain_sgd = oj.make_run(spoilt, inner, 32, record_every=every)(point, KEY)
    assert plain_sgd.status == oj.Status.DIVERGED
    assert plain_sgd.diverged_at >= 0


def averaged(learning_rate, over):
    return optax.chain(optax.sgd(learning_rate), optax.scale(len(over)))


dropping = optax.piecewise_constant_schedule


def averaging(learning_rate):
    """Return SGD with a running mean of its iterates in the state."""
    inner = optax.sgd(learning_rate)

    def update(updates, state, params=None):
        updates, inside = inner.update(updates, state[0], params)
        return updates, (inside, 0.5 * state[1] + 0.5 * (params + updates))

    return optax.GradientTransformation(lambda params: (inner.init(params), params), update)


def test_a_run_is_judged_where_it_asks_to_be():
    run = oj.make_run(
        problem(good), averaging, 6, record_every=3, evaluate_at=lambda params, state: state[1]
    )
    state = run.init({"learning_rate": 0.01}, KEY)
    state, _ = run.advance(state, {"learning_rate": 0.01}, 6)
    ended = run({"learning_rate": 0.01}, KEY)
    there = whole(state.opt_state[1], (), run.problem.data, {})
    np.testing.assert_allclose(ended.final_loss, there, rtol=1e-12)
    swept = oj.sweep(
        run, {"learning_rate": [0.01]}, progress=lambda *_: None,
        final=lambda params, state, data: {"w": params},
    )  # fmt: skip
    np.testing.assert_allclose(swept.w.values.ravel(), state.opt_state[1], rtol=1e-12)
    slope = [
        oj.hypergrad(run, mode=mode)({"learning_rate": 0.01}, KEY).gradient["learning_rate"]
        for mode in ("forward", "reverse")
    ]
    ends = [run({"learning_rate": 0.01 + h}, KEY).final_loss for h in (1e-6, -1e-6)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5)


def test_a_schedule_free_optimiser_is_judged_at_its_average():
    free = optax.contrib.schedule_free_sgd
    run = oj.make_run(problem(good), free, 10)
    state = run.init({"learning_rate": 0.01}, KEY)
    state, _ = run.advance(state, {"learning_rate": 0.01}, 10)
    with jax.numpy_dtype_promotion("standard"):
        average = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    expected = whole(average, (), run.problem.data, {})
    ended = run({"learning_rate": 0.01}, KEY)
    np.testing.assert_allclose(ended.final_loss, expected, rtol=1e-12)
    assert not np.isclose(whole(state.params, (), run.problem.data, {}), expected)


WRAPPED = {
    "MultiSteps": lambda learning_rate: optax.MultiSteps(optax.adam(learning_rate), 2),
    "apply_if_finite": lambda learning_rate: optax.apply_if_finite(optax.adam(learning_rate), 9),
    "conditionally_transform": lambda learning_rate: optax.conditionally_transform(
        optax.adam(learning_rate), lambda step: step > 1
    ),
    "scan": lambda learning_rate: optax.chain(
        optax.stateless(
            lambda updates, params: jax.lax.scan(
                lambda g, _: (g / (jnp.sqrt(g**2) + 1e-3), None), updates, None, length=2
            )[0]
        ),
        optax.sgd(learning_rate),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_roots_in_branches_and_loops_have_a_derivative(name, mode):
    """The third coordinate of the data is zero, so its gradient is, too."""
    data = oj.Data({"x": jnp.asarray(X * [1, 1, 0]), "t": jnp.asarray(T)}, None)
    run = oj.make_run(dataclasses.replace(problem(good), data=data), WRAPPED[name], 6)
    found = oj.hypergrad(run, mode=mode)({"learning_rate": 0.01}, KEY)
    ends = [run({"learning_rate": 0.01 + h}, KEY).final_loss for h in (1e-6, -1e-6)]
    assert found.finite
    np.testing.assert_allclose(
        found.gradient["learning_rate"], (ends[0] - ends[1]) / 2e-6, rtol=1e-5
    )


def test_an_objective_without_a_slope_is_said():
    def steps(params, state, data, hparams):
        return {"accuracy": jnp.mean((residuals(params, data) > 0).astype(float))}

    run = oj.make_run(dataclasses.replace(problem(good), metrics=steps), optax.sgd, 3)
    with pytest.warns(UserWarning, match="every derivative of accuracy is exactly 0"):
        oj.hypergrad(run, "accuracy")({"learning_rate": 0.01}, KEY)
    with pytest.raises(UserError, match="every derivative of accuracy is exactly 0"):
        oj.tune(run, "accuracy", {"learning_rate": 0.01}, steps=3, progress=lambda *_: None)


def test_sharpness_aware_minimisation_gets_the_gradient_it_asks_for():
    def sam(learning_rate, rho=0.05):
        inner, adversary = optax.sgd(learning_rate), optax.sgd(rho)
        return optax.contrib.sam(inner, adversary, sync_period=2, opaque_mode=True)

    run = oj.make_run(problem(good), sam, 4)
    assert np.isfinite(run({"learning_rate": 0.01}, KEY).final_loss)
