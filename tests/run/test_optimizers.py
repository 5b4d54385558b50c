"""Optimisers: values equal to optax's to the bit, derivatives finite at a zero gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import RMSPROP, central_difference

import optjax as oj

TABLE = {
    "adam": (optax.adam, {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8}),
    "adamw": (optax.adamw, {"learning_rate": 0.1, "weight_decay": 0.01}),
    "rmsprop": (RMSPROP, {"learning_rate": 0.1, "decay": 0.9, "eps": 1e-6}),
    "adagrad": (optax.adagrad, {"learning_rate": 0.1, "initial_accumulator_value": 0.0}),
    "adabelief": (optax.adabelief, {"learning_rate": 0.1}),
    "momentum": (optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}),
}


def _steps(tx, gradients):
    w = jnp.array([1.0, -2.0, 0.5])
    state = tx.init(w)
    for g in gradients:
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
    return w


GRADIENTS = [jnp.array([0.0, 1.0, -3.0]), jnp.array([0.0, -0.5, 2.0]), jnp.array([0.0, 2.0, 0.1])]


@pytest.mark.parametrize("name", TABLE)
def test_values_are_optax_to_the_bit(name):
    factory, hparams = TABLE[name]
    with jax.numpy_dtype_promotion("standard"):
        plain = _steps(factory(**hparams), GRADIENTS)
    np.testing.assert_array_equal(_steps(oj.differentiable(factory(**hparams)), GRADIENTS), plain)


@pytest.mark.parametrize("name", TABLE)
def test_derivatives_are_finite_where_a_gradient_is_zero(name):
    """The first coordinate's gradient is exactly zero at every step."""
    factory, hparams = TABLE[name]
    for which in hparams:

        def end(value, which=which):
            tx = oj.differentiable(factory(**(hparams | {which: value})))
            return jnp.sum(_steps(tx, GRADIENTS) ** 2)

        slope = jax.grad(end)(hparams[which])
        assert np.isfinite(slope)
        if which in ("learning_rate", "b1", "b2", "decay", "momentum"):
            numeric = central_difference(end, hparams[which], 1e-6)
            np.testing.assert_allclose(slope, numeric, rtol=1e-6, atol=1e-9)


def test_optax_alone_gives_nan_there():
    """Show the need for `differentiable`: once this fails, optax has mended it and ours can go."""
    factory, hparams = TABLE["rmsprop"]

    def end(decay):
        return jnp.sum(_steps(factory(**(hparams | {"decay": decay})), GRADIENTS) ** 2)

    with jax.numpy_dtype_promotion("standard"):
        assert np.isnan(jax.grad(end)(0.9))


def test_weight_decay_is_the_penalty_of_lambda_over_two_eta():
    problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]], [2.0, 1.0, 0.0], [1.0, -1.0])
    key, eta, decay = jax.random.key(0), 0.07, 0.02
    a = oj.make_run(problem, oj.with_weight_decay(optax.sgd), 9, record_path=True)
    b = oj.make_run(problem, optax.sgd, 9, record_path=True)
    decayed = a({"learning_rate": eta, "weight_decay": decay, "batch_size": 2}, key)
    penalised = b({"learning_rate": eta, "l2": decay / (2 * eta), "batch_size": 2}, key)
    np.testing.assert_allclose(decayed.path, penalised.path, rtol=1e-12)
