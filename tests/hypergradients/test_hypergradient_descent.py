"""Hypergradient descent: the paper's recursions by hand, finite differences, dtypes, refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import RMSPROP, central_difference

import optjax as oj
from optjax.hypergradients.hypergradient_descent import hypergradient_descent as online
from optjax.run import core, optimizers

KEY = jax.random.key(0)
CURVATURE, W0 = np.array([1.0, 4.0, 0.3]), np.array([1.0, -0.5, 3.0])  # lopsided
STEPS = 12


def _gradient(w):
    return CURVATURE * w


def _loss(w):
    return 0.5 * np.sum(CURVATURE * w**2)


def _path(tx, steps=STEPS):
    """Parameters after each update and the hyperparameters that made it."""
    w, path, thetas = jnp.asarray(W0), [], []
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(steps):
        u, state = update(CURVATURE * w, state, w)
        w = w + u
        path.append(w)
        thetas.append({k: float(v) for k, v in getattr(state, "hyperparams", {}).items()})
    return np.array(path), thetas


def _final(factory, w0=W0, steps=4, **hparams):
    """The loss after a few updates, traceable."""
    tx = factory(**hparams)

    def one(carry, _):
        w, state = carry
        u, state = tx.update(CURVATURE * w, state, w)
        return (w + u, state), None

    w0 = jnp.asarray(w0)
    (w, _), _ = jax.lax.scan(one, (w0, tx.init(w0)), length=steps)
    return jnp.sum(CURVATURE * w**2) / 2


def _sgd_hd(eta, beta, steps=STEPS):
    w, last, path, rates = W0, np.zeros(3), [], []
    for _ in range(steps):
        g = _gradient(w)
        eta = eta + beta * (g @ last)
        w, last = w - eta * g, g
        path.append(w)
        rates.append(eta)
    return np.array(path), rates


def _adam_hd(alpha, beta, b1, b2, eps, steps=STEPS):
    """Algorithm 6."""
    w, m, v, slope, path, rates = W0, np.zeros(3), np.zeros(3), np.zeros(3), [], []
    for t in range(1, steps + 1):
        g = _gradient(w)
        alpha = alpha - beta * (g @ slope)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        slope = -(m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        w = w + alpha * slope
        path.append(w)
        rates.append(alpha)
    return np.array(path), rates


def _momentum_hd(eta, mu, beta, beta_mu, steps=STEPS):
    """Heavy ball, both adapted: u = −η(g + μ v), ∂u/∂η = −(g + μ v), ∂u/∂μ = −η v."""
    w, v, by_eta, by_mu, path, thetas = W0, np.zeros(3), np.zeros(3), np.zeros(3), [], []
    for _ in range(steps):
        g = _gradient(w)
        eta, mu = eta - beta * (g @ by_eta), mu - beta_mu * (g @ by_mu)
        by_mu, v = -eta * v, g + mu * v
        by_eta = -v
        w = w - eta * v
        path.append(w)
        thetas.append({"learning_rate": eta, "momentum": mu})
    return np.array(path), thetas


def _multiplicative(eta, beta, steps=STEPS):
    w, last, path, rates = W0, np.zeros(3), [], []
    for _ in range(steps):
        g = _gradient(w)
        lengths = np.linalg.norm(g) * np.linalg.norm(last)
        eta = eta * (1 + beta * (g @ last) / lengths) if lengths else eta
        w, last = w - eta * g, g
        path.append(w)
        rates.append(eta)
    return np.array(path), rates


def _agree(found, expected, name="learning_rate"):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose([t[name] for t in found[1]], expected[1], rtol=1e-12)


def test_gradient_descent_is_the_recursion_of_successive_gradients():
    found = _path(online(optax.sgd)(0.01, hyper_rate=1e-3))
    _agree(found, _sgd_hd(0.01, 1e-3))
    assert found[1][0]["learning_rate"] == 0.01  # nothing is known before the first update
    assert found[1][-1]["learning_rate"] > 0.04


def test_adam_is_algorithm_6():
    found = _path(online(optax.adam)(0.01, b1=0.8, b2=0.95, eps=1e-6, hyper_rate=1e-3))
    _agree(found, _adam_hd(0.01, 1e-3, 0.8, 0.95, 1e-6))


def test_momentum_and_rate_adapt_together_each_by_its_own_beta():
    factory = online(optax.sgd, wrt=("learning_rate", "momentum"))
    tx = factory(learning_rate=0.01, momentum=0.3, hyper_rate=1e-4, hyper_rate_momentum=1e-2)
    path, thetas = _momentum_hd(0.01, 0.3, 1e-4, 1e-2)
    found = _path(tx)
    for name in ("learning_rate", "momentum"):
        _agree(found, (path, [t[name] for t in thetas]), name)
    assert thetas[-1]["momentum"] > 0.305


def test_the_multiplicative_rule_is_its_own_recursion():
    found = _path(online(optax.sgd, rule="multiplicative")(0.01, hyper_rate=0.1))
    _agree(found, _multiplicative(0.01, 0.1))
    ratios = np.diff(np.log([t["learning_rate"] for t in found[1]]))
    assert np.all(np.abs(ratios) <= np.log(1.1) + 1e-12)  # a step is a share β at most


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
@pytest.mark.parametrize(
    "factory", [optax.sgd, optax.adam, RMSPROP], ids=["sgd", "adam", "rmsprop"]
)
def test_without_a_rate_of_its_own_it_is_the_inner_optimiser_to_the_bit(factory, rule):
    with jax.numpy_dtype_promotion("standard"):
        plain = _path(factory(0.03))[0]
    adapted = _path(online(factory, rule=rule)(0.03, hyper_rate=0.0))[0]
    np.testing.assert_array_equal(adapted, plain)


def test_a_run_is_batched_over_and_differentiated_by_both_rates():
    run = oj.make_run(oj.quadratic(CURVATURE, w0=W0), online(optax.adam), 9)

    def final(beta, rate):
        return run({"learning_rate": rate, "hyper_rate": beta}, KEY).final_loss

    points = np.array([[0, 0.02], [1e-3, 0.02], [1e-2, 0.02]])
    near = [[1e-3 + 1e-7, 0.02], [1e-3 - 1e-7, 0.02], [1e-3, 0.02 + 1e-6], [1e-3, 0.02 - 1e-6]]
    values = jax.jit(jax.vmap(final))(*np.concatenate([points, near]).T)
    alone, slopes = jax.jit(jax.value_and_grad(final, argnums=(0, 1)))(1e-3, 0.02)
    np.testing.assert_allclose(values[1], alone, rtol=1e-12)
    assert values[0] > values[1] > values[2]
    numeric = [(values[3] - values[4]) / 2e-7, (values[5] - values[6]) / 2e-6]
    np.testing.assert_allclose(slopes, numeric, rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "rule"),
    [
        (optax.adam, "multiplicative"),
        (optax.adagrad, "additive"),
        pytest.param(RMSPROP, "multiplicative", marks=pytest.mark.slow),
    ],
)
def test_derivatives_are_finite_where_a_gradient_is_zero(factory, rule):
    """The first coordinate's gradient is zero at every step; then all of them are."""

    def final(rate, beta, w0):
        return _final(online(factory, rule=rule), w0, learning_rate=rate, hyper_rate=beta)

    slopes, value = jax.jit(jax.grad(final, argnums=(0, 1))), jax.jit(final)
    assert np.all(np.isfinite(slopes(0.1, 1e-3, np.zeros(3))))
    w0 = np.array([0.0, 1.0, -2.0])
    numeric = [
        central_difference(lambda rate: value(rate, 1e-3, w0), 0.1, 1e-6),
        central_difference(lambda beta: value(0.1, beta, w0), 1e-3, 1e-6),
    ]
    np.testing.assert_allclose(slopes(0.1, 1e-3, w0), numeric, rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "name", "value"),
    [
        (functools.partial(optax.sgd, learning_rate=0.02), "momentum", 0.4),
        (
            oj.with_weight_decay(functools.partial(optax.adam, learning_rate=0.02)),
            "weight_decay",
            0,
        ),
        (functools.partial(RMSPROP, learning_rate=0.02), "decay", 0.9),
        (functools.partial(optax.adam, learning_rate=0.02), "b1", 0.9),
    ],
)
def test_a_hyperparameter_moves_down_the_finite_difference_of_the_last_step(factory, name, value):
    """θ₃ − θ₂ = −β dL(w₃)/dθ₂, with w₃ by one update of the plain optimiser from its state."""
    beta, tx = 1e-3, online(factory, wrt=name)(**{name: value}, hyper_rate=1e-3)
    w, state, states = jnp.asarray(W0), tx.init(jnp.asarray(W0)), []
    for _ in range(4):
        states.append((w, state))
        u, state = tx.update(_gradient(w), state, w)
        w = w + u
    (w, before), (_, now) = states[2], states[3]

    def loss_after(theta):
        plain = oj.differentiable(factory(**{name: theta}))
        return float(_loss(w + plain.update(_gradient(w), before.inner, w)[0]))

    theta = float(now.hyperparams[name])
    h = central_difference(loss_after, theta, 1e-5)
    moved = float(state.hyperparams[name]) - theta
    assert abs(h) > 1e-3
    np.testing.assert_allclose(moved, -beta * h, rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "rule", "rate", "beta"),
    [
        (optax.sgd, "additive", 0.2, 3e-3),
        (optax.sgd, "multiplicative", 0.2, 0.1),
        (optax.adam, "additive", 0.1, 1e-3),
        (optax.adam, "multiplicative", 0.1, 0.1),
    ],
)
def test_it_recovers_from_a_rate_a_hundred_times_too_small(factory, rule, rate, beta):
    """`rate` is a good one for 150 steps: it ends at 1e-8 or so."""
    with jax.numpy_dtype_promotion("standard"):
        good = _final(factory, steps=150, learning_rate=rate)
        slow = _final(factory, steps=150, learning_rate=rate / 100)
    ours = _final(online(factory, rule=rule), steps=150, learning_rate=rate / 100, hyper_rate=beta)
    assert good < 1e-7
    assert slow > 1
    assert ours < 1e-4


def test_one_program_serves_every_value():
    run = oj.make_run(oj.quadratic(CURVATURE, w0=W0), online(optax.adam), 3)
    before = core.run._cache_size()
    for rate, beta in [(0.1, 1e-3), (0.2, 0.0), (0.3, 1e-5)]:
        run({"learning_rate": rate, "hyper_rate": beta}, KEY)
    assert core.run._cache_size() == before + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factory", [optax.adam, optax.optimistic_gradient_descent])
def test_dtypes_of_parameters_and_state_are_kept(factory, dtype):
    tx = online(factory)(0.1, hyper_rate=1e-3)
    with jax.numpy_dtype_promotion("standard"):
        w = {"a": jnp.asarray(W0, dtype), "b": jnp.ones((), dtype)}
        state = tx.init(w)
        updates, new = jax.jit(tx.update)(w, state, w)
        after = optax.apply_updates(w, updates)
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (state, new, w, after)]
    assert kinds[0] == kinds[1]
    assert kinds[2] == kinds[3]
    assert new.hyperparams["learning_rate"].dtype == np.float32


def test_hyperparameters_stay_in_their_ranges():
    """A rate far too large meets 0 and comes back from it; a momentum stays below 1."""
    rates = [t["learning_rate"] for t in _path(online(optax.sgd)(0.5, hyper_rate=1.0))[1]]
    assert min(rates) == 0.0
    assert max(rates[rates.index(0.0) :]) > 0
    tx = online(optax.sgd, wrt="momentum")(0.01, momentum=0.9, hyper_rate=1e3)
    momenta = [t["momentum"] for t in _path(tx)[1]]
    assert 0.999999 < max(momenta) < 1
    assert min(momenta) >= 0


def test_a_weight_decay_that_starts_at_its_bound_is_differentiated_in_full():
    """Below 0 there is nothing: the derivative at 0 is the one from above, not half of it."""
    factory = online(oj.with_weight_decay(optax.sgd), wrt="weight_decay")

    @jax.jit
    def final(decay):
        return _final(factory, learning_rate=0.1, weight_decay=decay, hyper_rate=1e-3)

    one_sided = (final(1e-7) - final(0.0)) / 1e-7
    np.testing.assert_allclose(jax.grad(final)(0.0), one_sided, rtol=1e-5)


def test_optax_tools_read_the_hyperparameters():
    """As from `optax.inject_hyperparams`, inside a chain as well."""
    tx = optax.chain(optax.clip(1.0), online(optax.sgd)(0.1, hyper_rate=1e-3))
    state = tx.init(jnp.asarray(W0))
    assert optax.tree_utils.tree_get(state, "learning_rate") == 0.1
    names = {"learning_rate", "momentum", "nesterov", "accumulator_dtype"}
    assert optimizers.keywords(online(optax.sgd)) - names == {
        "hyper_rate",
        "hyper_rate_learning_rate",
    }
    assert optimizers.required(online(optax.sgd)) == {"learning_rate", "hyper_rate"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: online(optax.sgd, wrt="learning_rte"), "did you mean 'learning_rate'"),
        (lambda: online(optax.sgd, wrt=()), "wrt names no hyperparameter"),
        (lambda: online(optax.sgd(0.1)), "expected a factory"),
        (lambda: online(optax.sgd, rule="add"), "unknown rule 'add': known: 'additive'"),
        (lambda: online(online(optax.sgd)), "apply hypergradient_descent once"),
        (
            lambda: online(functools.partial(optax.sgd, momentum=0.9), wrt="momentum"),
            "momentum is bound by functools.partial",
        ),
        (lambda: online(functools.partial(optax.sgd, 0.1)), "learning_rate is bound by"),
        (lambda: online(optax.sgd, "momentum")(0.1, hyper_rate=0.1), "momentum is None: expected"),
        (lambda: online(optax.sgd)(lambda step: 0.1, hyper_rate=0.1), "not a flag or schedule"),
        (
            lambda: online(optax.sgd)(0.1, hyper_rate=None),
            "the hyper_rate of learning_rate is None",
        ),
        (lambda: online(optax.sgd)(np.ones(2), hyper_rate=0.1), "learning_rate has shape (2,)"),
        (lambda: online(optax.sgd)(-0.1, hyper_rate=0.1), "learning_rate is -0.1: expected 0 or"),
        (
            lambda: online(optax.sgd, "momentum")(0.1, momentum=1.0, hyper_rate=0.1),
            "momentum is 1: expected 0 to below 1",
        ),
        (
            lambda: online(optax.sgd, rule="multiplicative")(0.0, hyper_rate=0.1),
            "learning_rate is 0, where the multiplicative rule stays",
        ),
        (
            lambda: oj.make_run(oj.quadratic([1.0], [1.0]), online(optax.sgd), 3)(
                {"learning_rate": 0.1}, KEY
            ),
            "hyperparameters lack hyper_rate",
        ),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(oj.UserError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
