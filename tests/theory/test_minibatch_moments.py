"""Exact moments of mini-batch SGD against sums over every draw, and against what `run` draws."""

import itertools

import jax
import numpy as np
import optax
import pytest

from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.support.errors import UserError
from optjax.theory.gradient_descent import gradient_descent_iterate
from optjax.theory.minibatch_moments import minibatch_moments

N, D = 4, 3


def _data(n=N, d=D):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=d)


def _sequences(sampler, n, b, steps):
    """Every equally likely sequence of batches."""
    if sampler == "replacement":
        return itertools.product(itertools.product(range(n), repeat=b), repeat=steps)
    if sampler == "subsets":
        return itertools.product(itertools.combinations(range(n), b), repeat=steps)
    batches = -(-n // b)
    epochs = itertools.product(itertools.permutations(range(n)), repeat=-(-steps // batches))
    return (
        [order[i : i + b] for order in orders for i in range(0, n, b)][:steps] for orders in epochs
    )


@pytest.mark.parametrize(
    ("sampler", "b", "steps"),
    [("replacement", 1, 3), ("replacement", 2, 2), ("subsets", 2, 3), ("epochs", 2, 3),
     ("epochs", 1, 6), ("epochs", 3, 3)],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
def test_moments_are_the_means_over_every_draw(sampler, b, steps, shape):
    X, t, w0 = _data(*shape)
    eta, found = 0.1, []
    for batches in _sequences(sampler, len(X), b, steps):
        w = w0
        for batch in batches:
            S = list(batch)
            w = w - 2 * eta / len(S) * X[S].T @ (X[S] @ w - t[S])
        found.append(w)
    exact = minibatch_moments(X, t, w0, eta, steps, b, sampler)
    off = np.array(found) - np.asarray(exact.end)
    np.testing.assert_allclose(exact.mean, np.mean(found, axis=0), rtol=1e-12)
    np.testing.assert_allclose(exact.second, off.T @ off / len(off), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(X.T @ (X @ exact.end - t), 0, atol=1e-12)


def test_all_examples_at_each_step_are_gradient_descent():
    X, t, w0 = _data(3, 5)
    exact = gradient_descent_iterate(X, t, w0, 0.1, 7)
    for sampler, b in (("full", 1), ("subsets", 3), ("epochs", 3)):
        found = minibatch_moments(X, t, w0, 0.1, 7, b, sampler)
        np.testing.assert_allclose(found.mean, exact, rtol=1e-12)
        spread = found.second - np.outer(found.mean - found.end, found.mean - found.end)
        np.testing.assert_allclose(spread, 0, atol=1e-14)


@pytest.mark.parametrize("sampler", ["replacement", "epochs"])
def test_runs_have_these_moments(sampler):
    X, t, w0 = _data(4, 6)
    run = make_run(
        least_squares(X, t, w0), optax.sgd, 6, sampler=sampler, max_batch_size=1, record_every=6
    )
    keys = jax.random.split(jax.random.key(1), 4000)
    w = jax.jit(jax.vmap(lambda key: run({"learning_rate": 0.1}, key).params))(keys)
    exact = minibatch_moments(X, t, w0, 0.1, 6, 1, sampler)
    off = np.asarray(w) - np.asarray(exact.end)
    squares = np.sum(off**2, axis=1)
    for values, expected in ((off, exact.mean - exact.end), (squares, np.trace(exact.second))):
        error = values.std(axis=0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(axis=0) - expected) < 4.5 * error)
        assert np.all(error < 0.1 * np.sqrt(np.trace(exact.second)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 5}, "batch_size is 5: expected at most n = 4"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": -1}, "steps"),
        ({"sampler": "bootstrap"}, "sampler is 'bootstrap': expected replacement"),
        ({"w0": [1.0]}, "w0 has shape"),
        ({"t": [np.nan] * 4}, "t holds nan"),
    ],
)
def test_mistakes_are_told(change, words):
    X, t, w0 = _data()
    given = {"X": X, "t": t, "w0": w0, "eta": 0.1, "steps": 2, "batch_size": 2} | change
    with pytest.raises(UserError, match=words):
        minibatch_moments(**given)


def test_too_many_sets_are_told_before_they_are_made():
    with pytest.raises(UserError, match="sets to sum over: expected at most 200,000"):
        minibatch_moments(np.eye(40), np.ones(40), np.zeros(40), 0.1, 1, 5, "epochs")


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_the_iteration(nesterov):
    X, t, w0 = _data(3, 5)
    for beta, steps in ((0.0, 3), (0.9, 0), (0.9, 1), (0.5, 14)):
        w, v = w0, np.zeros(5)
        for _ in range(steps):
            g = 2 / 3 * X.T @ (X @ w - t)
            v = beta * v + g
            w = w - 0.05 * (beta * v + g if nesterov else v)
        found = gradient_descent_iterate(X, t, w0, 0.05, steps, momentum=beta, nesterov=nesterov)
        np.testing.assert_allclose(found, w, rtol=1e-12)
    slope = jax.grad(
        lambda beta: gradient_descent_iterate(X, t, w0, 0.05, 14, momentum=beta).sum()
    )(0.5)
    up, down = (
        gradient_descent_iterate(X, t, w0, 0.05, 14, momentum=0.5 + h).sum() for h in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)
