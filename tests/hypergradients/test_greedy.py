"""Greedy learning rates against closed forms, and against the losses of the rates beside them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.hypergradients.greedy import greedy_learning_rates
from optjax.support.errors import UserError
from optjax.theory import gradient_descent
from optjax.theory.noisy_quadratic import noisy_quadratic
from optjax.theory.quadratic_rates import greedy_schedule

KEY = jax.random.key(3)
T = 6  # of all that need no other: they share their compilations


@pytest.fixture(scope="module")
def squares():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6, 4)) * np.array([3.0, 1.0, 0.5, 0.2])
    return X, rng.normal(size=6), rng.normal(size=4)


@pytest.mark.parametrize(
    ("batch_size", "sampler"),
    [(None, "replacement"), *((b, s) for b in (1, 2, 6) for s in ("replacement", "epochs"))],
)
def test_the_first_rate_on_least_squares_is_the_closed_form(squares, batch_size, sampler):
    hparams = {} if batch_size is None else {"batch_size": batch_size}
    found = greedy_learning_rates(oj.least_squares(*squares), T, hparams, KEY, sampler=sampler)
    closed = gradient_descent.optimal_learning_rate(
        *squares, batch_size=batch_size, replacement=sampler == "replacement"
    )
    np.testing.assert_allclose(found.rates[0], closed, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_it_is_the_run_with_the_rates_that_it_chose(squares, batch_size):
    problem = oj.least_squares(*squares)
    hparams = {} if batch_size is None else {"batch_size": batch_size}
    found = greedy_learning_rates(problem, T, hparams, KEY)
    run = oj.make_run(problem, optax.sgd, T)
    again = run({**hparams, "learning_rate": oj.Piecewise(found.rates)}, KEY)
    np.testing.assert_allclose(again.params, found.params, rtol=1e-12)
    np.testing.assert_allclose(again.final_loss, found.losses[-1], rtol=1e-12)


@pytest.mark.parametrize("l2", [None, 0.1])
def test_every_rate_minimises_the_next_loss(squares, l2):
    X, t, w = squares
    hparams = {} if l2 is None else {"l2": l2}
    found = greedy_learning_rates(oj.least_squares(X, t, w), T, hparams, KEY)

    def loss(w):
        return np.mean((X @ w - t) ** 2) + (l2 or 0) * np.sum(w**2)

    for rate, before, after in zip(found.rates, found.losses, found.losses[1:], strict=False):
        g = 2 * X.T @ (X @ w - t) / len(t) + 2 * (l2 or 0) * w
        np.testing.assert_allclose(loss(w), before, rtol=1e-12)
        assert all(loss(w - rate * f * g) > after for f in (0.99, 1.01))
        w = w - rate * g
    np.testing.assert_allclose(w, found.params, rtol=1e-11)


def test_a_mini_batch_rate_minimises_the_mean_over_all_batches(squares):
    X, t, w = squares
    rate = greedy_learning_rates(oj.least_squares(X, t, w), T, {"batch_size": 2}, KEY).rates[0]

    def expected(rate):
        losses = []
        for drawn in itertools.product(range(6), repeat=2):
            x = X[list(drawn)]
            after = w - rate * 2 * x.T @ (x @ w - t[list(drawn)]) / 2
            losses.append(np.mean((X @ after - t) ** 2))
        return np.mean(losses)

    assert expected(rate) < min(expected(0.999 * rate), expected(1.001 * rate))


def test_a_noisy_quadratic_meets_its_model():
    h, c, w0 = np.array([2.0, 0.7, 0.1]), np.array([0.5, 2.0, 0.3]), np.array([1.0, -2.0, 4.0])
    problem = oj.quadratic(h, w0, noise=np.sqrt(c))
    model = noisy_quadratic(h, c, w0**2, batch_size=8)
    found = greedy_learning_rates(problem, 1, {"batch_size": 8}, KEY)
    np.testing.assert_allclose(found.rates, greedy_schedule(model, 1).rates, rtol=1e-12)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    H = turn @ np.diag(h) @ turn.T
    found = greedy_learning_rates(oj.quadratic(H, w0, noise=np.sqrt(c)), 1, {}, KEY)
    g = H @ w0
    np.testing.assert_allclose(found.rates[0], g @ g / (g @ H @ g + np.diag(H) @ c), rtol=1e-12)


def test_a_downward_curve_takes_the_bound_and_a_minimum_takes_nothing():
    saddle = oj.quadratic([1.0, -1.0], [0.1, 1.0])
    assert greedy_learning_rates(saddle, 1, {}, KEY, max_rate=0.3).rates.tolist() == [0.3]
    done = greedy_learning_rates(oj.quadratic([1.0], [0.0]), 2, {}, KEY)
    assert done.rates.tolist() == [0, 0]


def test_it_jits_and_vmaps_over_keys_and_batch_sizes(squares):
    problem = oj.least_squares(*(np.float32(a) for a in squares))

    def run(size, key):
        return greedy_learning_rates(problem, T, {"batch_size": size}, key)

    sizes, keys = jnp.array([1, 2, 6]), jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(run))(sizes, keys)
    in_float64 = oj.least_squares(*(np.float64(np.float32(a)) for a in squares))
    one = greedy_learning_rates(in_float64, T, {"batch_size": 2}, keys[1])
    np.testing.assert_allclose(many.rates[1], one.rates, rtol=1e-4)  # float32
    assert {a.dtype for a in many} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("hparams", "says"),
    [
        ({"learning_rate": 0.1}, "learning_rate: leave it out"),
        ({"momentum": 0.9}, "momentum: leave it out"),
        ({"batch_size": 7}, "batch_size is 7"),
        ({"batchsize": 2}, "did you mean 'batch_size'"),
    ],
)
def test_refusals(squares, hparams, says):
    with pytest.raises(UserError, match=says):
        greedy_learning_rates(oj.least_squares(*squares), 2, hparams, KEY)
