"""Closed form = forward = reverse = segmented = recursive = central differences, in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import RMSPROP, central_difference

import optjax as oj
from optjax.hypergradients import Forward, Recursive
from optjax.run.problems import Data, Problem
from optjax.theory import gradient_descent

KEY = jax.random.key(5)
EXACT = ("forward", "reverse", "segmented", "recursive")


def _data(n, d, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * np.geomspace(0.3, 2, d)
    return X, rng.normal(size=n), rng.normal(size=d)


def _climb(n, d, steps, seed):
    X, t, w0 = _data(n, d, seed)
    rate = np.random.default_rng(seed).uniform(0.05, 0.95) * n / np.linalg.norm(X, 2) ** 2
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, steps, sampler="full")
    value = gradient_descent.gradient_descent_loss(X, t, w0, rate, steps)
    slope = gradient_descent.gradient_descent_hypergradient(X, t, w0, rate, steps)
    modes = ["forward", "reverse", "segmented", Recursive(3)]
    for mode in [*modes, "one_step"] if steps == 1 else modes:
        found, gradient = oj.hypergrad(run, mode=mode)({"learning_rate": rate}, KEY)
        # A loss of 1e-14 from residuals of 1e-7 has lost half of its digits to their rounding.
        np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(gradient["learning_rate"], slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("n", "d", "steps", "seed"), [(5, 8, 1, 0), (6, 4, 23, 1)])
def test_closed_form_is_every_modes(n, d, steps, seed):
    _climb(n, d, steps, seed)


@pytest.mark.slow
# A single residual may vanish to the last bit.
@pytest.mark.filterwarnings("ignore::optjax.hypergradients.hypergradient.FlatObjective")
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 7), d=st.integers(1, 9), steps=st.integers(1, 40), seed=st.integers(0, 10**6)
)
def test_closed_form_is_every_modes_whatever_the_shape(n, d, steps, seed):
    _climb(n, d, steps, seed)


NUMBERS = {
    "learning_rate": 0.05, "momentum": 0.6, "weight_decay": 0.02, "b1": 0.8, "b2": 0.95, "b3": 0.9,
    "eps": 1e-3, "eps_root": 1e-3, "decay": 0.9, "rho": 0.9, "initial_accumulator_value": 0.1,
    "initial_scale": 0.05, "decay_rate": 0.8, "clipping_threshold": 1.0, "weight_decay_rate": 0.01,
    "min_norm": 1e-3, "trust_coefficient": 0.1, "eta": 0.01, "gamma": 0.55,
    "alpha": 0.9, "beta": 0.8, "max_learning_rate": 1.0, "scaling": 0.5, "f_min": 0.01,
    "threshold": 5.0, "eta_minus": 0.5, "eta_plus": 1.2, "min_step_size": 1e-4,
    "max_step_size": 50.0, "adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 1e-3,
    "adam_weight_decay": 0.01, "estim_lr0": 1e-3, "estim_lr_coef": 1.0, "init_estim_sq_dist": 0.1,
    "scale": 0.5, "lower_bound": 0.01, "weight_lr_power": 1.0,
}  # fmt: skip
"""What an optimiser is given for every keyword of that name that it has."""

FLAGS = set(
    "nesterov mu_dtype mask weight_decay_mask min_dim_size_to_factor multiply_by_parameter_scale "
    "dtype_momentum factored trust_ratio_mask key seed variant eps_in_sqrt centered "
    "bias_correction bias_correction_mu bias_correction_nu accumulator_dtype "
    "ns_coeffs ns_steps adaptive preconditioning adam_learning_rate consistent_rms "
    "muon_weight_dimension_numbers betas safeguard_warmup use_clipping clip_value_fn init_step "
    "rank update_proj_gap base_optimizer weight_dimension_numbers adapt_lower_bound warmup_steps "
    "state_dtype beta3".split()
)
"""Keywords that shape the program, or are whole numbers or pairs: they cannot be traced."""

EXCLUDED = {
    "lbfgs": "its line search is a while loop: forward mode alone (a test below)",
    "dpsgd": "needs a gradient for each example",
    "sophia": "needs the loss as a function, for its Hessian's diagonal",
    "schedule_free": "takes a transformation, not numbers; schedule_free_sgd and _adamw are here",
    "scale_by_madgrad": "a part of madgrad",
    "optimistic_adam": "deprecated by optax for optimistic_adam_v2, which is here",
    "adafactor/decay_offset": "a number of steps",
    "adafactor/momentum": "accumulates in float32, whose rounding a difference sees",
}
"""What the table leaves out, and why."""


def _optimizers():
    found = {}
    for module in (optax, optax.contrib):
        for name in dir(module):
            factory = getattr(module, name)
            if not inspect.isfunction(factory) or name in EXCLUDED:
                continue
            names = set(inspect.signature(factory).parameters)
            rated = names & {"learning_rate", "max_learning_rate"}
            if rated and (module is optax.contrib or "alias" in factory.__module__):
                found[name] = factory
    noisy = functools.partial(optax.noisy_sgd, key=jax.random.key(0))
    return found | {"our rmsprop": RMSPROP, "noisy_sgd": noisy}


OPTIMIZERS = _optimizers()


def _numbers(name, factory):
    """The keywords of an optimiser that are numbers, with their values here."""
    keywords = set(inspect.signature(factory).parameters) - FLAGS
    keywords = {k for k in keywords if f"{name}/{k}" not in EXCLUDED}
    unknown = keywords - set(NUMBERS)
    assert not unknown, f"{name} has {unknown}: give them a value, or say why they have none"
    return {k: NUMBERS[k] for k in sorted(keywords)}


def _problem():
    """The second column is zero: so is that coordinate's gradient, exactly, at every step."""
    X, t, w0 = _data(5, 4, 0)
    X[:, 1] = 0
    return oj.least_squares(X, t, w0)


def _check(name, modes):
    factory = OPTIMIZERS[name]
    hparams = _numbers(name, factory)
    run = oj.make_run(_problem(), factory, 8, sampler="full")
    value, first = oj.hypergrad(run, mode=modes[0])(hparams, KEY)
    for mode in modes[1:]:
        _, other = oj.hypergrad(run, mode=mode)(hparams, KEY)
        for k in hparams:
            np.testing.assert_allclose(other[k], first[k], rtol=1e-10, atol=1e-10 * float(value),
                                       err_msg=k)  # fmt: skip
    for k in hparams:
        assert np.isfinite(first[k]), k

        def final(v, k=k):
            return float(run({**hparams, k: v}, KEY).final_loss)

        step = 1e-5 * hparams[k]
        numeric = central_difference(final, hparams[k], step)
        noise = 8 * np.finfo(float).eps * float(value) / step  # the values' rounding
        np.testing.assert_allclose(first[k], numeric, rtol=1e-6, atol=noise, err_msg=k)
    return first


NO_SLOPE = {"radam": {"threshold"}, "muon": {"beta", "weight_decay"}}
"""A threshold switches; Muon's own numbers act on matrices, of which the problem has none."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimiser_by_every_number_in_every_mode(name):
    _check(name, EXACT)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_some_optimisers_by_every_number(name):
    slopes = _check(name, ("forward", "reverse"))
    assert {k for k, slope in slopes.items() if abs(slope) < 1e-12} == NO_SLOPE.get(name, set())


def test_the_table_has_optax():
    """A new optimiser of optax enters by itself; these must be in it."""
    assert {"adam", "adamw", "adafactor", "lion", "sgd", "yogi", "optimistic_adam_v2"} <= set(
        OPTIMIZERS
    )
    assert len(OPTIMIZERS) > 40


@pytest.mark.slow
def test_a_line_search_goes_forward_and_says_so():
    run = oj.make_run(_problem(), optax.lbfgs, 2, sampler="full")
    _, gradient = oj.hypergrad(run, wrt="l2")({"l2": 0.1}, KEY)
    numeric = central_difference(lambda v: run({"l2": v}, KEY).final_loss, 0.1, 1e-5)
    np.testing.assert_allclose(gradient["l2"], numeric, rtol=1e-6)
    many = oj.hypergrad(run, wrt="example_weights").explain({"example_weights": np.ones(5)})
    assert many.mode.name == "forward"
    with pytest.raises(oj.UserError, match="forward"):
        oj.hypergrad(run, mode="reverse")({"l2": 0.1}, KEY)


def test_every_kind_of_hyperparameter_in_every_mode():
    """Schedules, data weights, initial parameters, a penalty a parameter, with mini-batches."""
    X, t, w0 = _data(6, 5, 3)
    run = oj.make_run(oj.least_squares(X, t), oj.with_weight_decay(optax.sgd), 12, sampler="epochs")
    rng = np.random.default_rng(1)
    hparams = {
        "learning_rate": oj.Piecewise(np.array([0.05, 0.04, 0.02, 0.01])),
        "weight_decay": oj.Piecewise(np.array([0.01, 0.02, 0.005]), linear=True),
        "momentum": 0.4,
        "l2": rng.uniform(0.01, 0.2, size=5),
        "example_weights": rng.uniform(0, 2, size=6) * np.array([1, 0, 1, 1, -1, 1]),
        "initial_params": w0,
        "batch_size": 4,
    }
    found = [oj.hypergrad(run, mode=mode)(hparams, KEY).gradient for mode in EXACT]
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
    tile = oj.hypergrad(run, mode=Forward(at_once=5))(hparams, KEY).gradient
    for a, b in zip(jax.tree.leaves(tile), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)

    def final(name, index):
        def at(v):
            value = hparams[name]
            if isinstance(value, oj.Piecewise):
                values = np.array(value.values)
                values[index] = v
                value = oj.Piecewise(values, value.linear)
            elif np.ndim(value):
                value = np.array(value)
                value[index] = v
            else:
                value = v
            return float(run({**hparams, name: value}, KEY).final_loss)

        return at

    for name, slope in found[0].items():
        slope = slope.values if isinstance(slope, oj.Piecewise) else slope
        value = hparams[name].values if isinstance(hparams[name], oj.Piecewise) else hparams[name]
        for index in np.ndindex(np.shape(value)):
            middle = float(np.asarray(value)[index])
            numeric = central_difference(final(name, index), middle, 1e-5)
            np.testing.assert_allclose(np.asarray(slope)[index], numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", [*EXACT, Forward(singly=0)])
def test_a_metric_sees_a_schedule_as_the_last_step_did(mode):
    def loss(w, state, batch, hparams):
        return jnp.sum((w - hparams["theta"]) ** 2), state

    problem = Problem(
        lambda key, data: (data.shared, ()), loss, lambda w, state, data, hparams: jnp.sum(w**2),
        Data((), jnp.array([0.3, -2.0])), hparams=frozenset({"theta"}),
        metrics=lambda w, state, data, hparams: {"m": jnp.sum(w**2) * hparams["theta"]},
    )  # fmt: skip
    run = oj.make_run(problem, optax.sgd, 6, record_every=3)
    theta = np.array([0.7, 0.3])
    hparams = {"learning_rate": 0.2, "theta": oj.Piecewise(theta)}

    def of(trajectory):
        return jnp.sum(trajectory.metrics["m"])

    w, total = np.array([0.3, -2.0]), 0.0
    for value in theta:
        for _ in range(3):
            w = w - 0.2 * 2 * (w - value)
        total += np.sum(w**2) * value
    found, slope = oj.hypergrad(run, objective=of, wrt="theta", mode=mode)(hparams, KEY)
    np.testing.assert_allclose(found, total, rtol=1e-12)
    _, forward = oj.hypergrad(run, objective=of, wrt="theta", mode="reverse")(hparams, KEY)
    np.testing.assert_allclose(slope["theta"].values, forward["theta"].values, rtol=1e-10)


def test_a_function_that_is_called_as_a_number_is_not_that_number():
    X, t, w0 = _data(4, 3, 1)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 1, sampler="full")

    def final_loss(trajectory):
        return jnp.log(trajectory.final_loss)

    auto = oj.hypergrad(run, objective=final_loss)({"learning_rate": 0.1}, KEY)
    reverse = oj.hypergrad(run, objective=final_loss, mode="reverse")({"learning_rate": 0.1}, KEY)
    np.testing.assert_allclose(auto.gradient["learning_rate"], reverse.gradient["learning_rate"])
    for rate in (oj.Piecewise([0.1]), np.full(3, 0.1)):  # the closed form is for one number
        _, slope = oj.hypergrad(run)({"learning_rate": rate}, KEY)
        exact = gradient_descent.one_step_hypergradient(X, t, w0, 0.1)
        total = sum(np.sum(leaf) for leaf in jax.tree.leaves(slope))
        np.testing.assert_allclose(total, exact, rtol=1e-10)


def test_a_schedule_is_the_steps_it_names():
    X, t, w0 = _data(4, 3, 2)
    rates = np.array([0.1, 0.02, 0.05])
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 6, sampler="full", record_path=True)
    path = run({"learning_rate": oj.Piecewise(rates)}, KEY).path
    w = w0
    for step in range(6):
        w = w - rates[step // 2] * 2 / 4 * X.T @ (X @ w - t)
        np.testing.assert_allclose(path[step + 1], w, rtol=1e-12)
    state = run.init({"learning_rate": oj.Piecewise(rates)}, KEY)
    for _ in range(3):  # in chunks, a schedule goes on where it was
        state, _ = run.advance(state, {"learning_rate": oj.Piecewise(rates)}, 2)
    np.testing.assert_allclose(state.params, path[-1], rtol=1e-12)


def test_data_weights_are_repetitions():
    """Whole weights ω under full batches are ω copies of an example, and a rate Σω/n of it."""
    X, t, w0 = _data(4, 3, 4)
    weights = np.array([2, 0, 1, 3])
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 7, sampler="full")
    weighted = run({"learning_rate": 0.05, "example_weights": weights}, KEY).params
    copies = np.repeat(np.arange(4), weights)
    repeated = oj.make_run(oj.least_squares(X[copies], t[copies], w0), optax.sgd, 7, sampler="full")
    plain = repeated({"learning_rate": 0.05 * weights.sum() / 4}, KEY).params
    np.testing.assert_allclose(weighted, plain, rtol=1e-12)


@pytest.mark.parametrize("mode", EXACT)
def test_any_function_of_the_trajectory(mode):
    X, t, w0 = _data(5, 3, 6)
    run = oj.make_run(
        oj.least_squares(X, t, w0), optax.adam, 12, max_batch_size=2, record_every=3,
        record_path=True,
    )  # fmt: skip

    def of(trajectory):
        return jnp.sum(trajectory.loss[1:] ** 2) + jnp.sum(trajectory.path[2] * trajectory.params)

    hparams = {"learning_rate": 0.1}
    _, gradient = oj.hypergrad(run, objective=of, mode=mode)(hparams, KEY)
    numeric = central_difference(lambda v: of(run({"learning_rate": v}, KEY)), 0.1, 1e-6)
    np.testing.assert_allclose(gradient["learning_rate"], numeric, rtol=1e-6)
    mean = oj.hypergrad(run, objective="mean_loss", mode=mode)(hparams, KEY)
    np.testing.assert_allclose(mean.value, jnp.mean(run(hparams, KEY).loss), rtol=1e-12)
