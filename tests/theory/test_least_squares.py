"""Closed forms against numpy, against loops, and every derivative against a finite difference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optjax.support.errors import UserError
from optjax.theory import gradient_descent, solutions

# Every shape costs compilations: one example, square, and many columns; the others are slow.
SHAPES = [(1, 7), (5, 5), (6, 20)]
SHAPES += [pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 2), (3, 4))]
TALL = [(9, 4), *SHAPES]


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    n, d = shape
    return rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=d)


def close(x, y, rtol=1e-12):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(np.asarray(y)).max())


def descend(X, t, w, eta, steps, k):
    for _ in range(steps):
        w = w - 2 * k * eta * X.T @ (X @ w - t)
    return w


@pytest.mark.parametrize("shape", SHAPES)
def test_projections_are_those_of_the_pseudo_inverse(shape):
    X, t, w0 = draw(shape)
    pinv = np.linalg.pinv(X)
    # n = d draws can be ill-conditioned: the two algorithms then differ by cond × rounding.
    rtol = 1e-14 * max(100, np.linalg.cond(X))
    close(solutions.minimum_norm_solution(X, t), np.linalg.lstsq(X, t, rcond=None)[0], rtol)
    close(solutions.minimum_norm_solution(X, t), pinv @ t, rtol)
    close(solutions.row_space_projection(X, w0), pinv @ X @ w0, rtol)
    np.testing.assert_allclose(
        solutions.off_row_space(X, w0), w0 - pinv @ X @ w0, atol=rtol * np.abs(w0).max()
    )
    nearest = solutions.nearest_solution(X, t, w0)
    close(nearest, w0 + pinv @ (t - X @ w0), rtol)
    close(X @ nearest, t, rtol)


def test_projection_takes_a_whole_path_and_is_idempotent():
    X, _, _ = draw((3, 8))
    path = np.random.default_rng(1).normal(size=(4, 5, 8))
    P = solutions.row_space_projection(X, path)
    close(P[2, 3], solutions.row_space_projection(X, path[2, 3]))
    close(solutions.row_space_projection(X, P), P)
    assert np.abs(solutions.off_row_space(X, P)).max() < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_one_step_is_one_step(shape, scale):
    X, t, w0 = draw(shape)
    k = 1 / shape[0] if scale is None else scale
    eta = 0.7 * float(gradient_descent.optimal_learning_rate(X, t, w0, scale))
    r = X @ descend(X, t, w0, eta, 1, k) - t
    close(gradient_descent.one_step_loss(X, t, w0, eta, scale), k * r @ r)
    by_jax = jax.grad(lambda e: gradient_descent.one_step_loss(X, t, w0, e, scale))(eta)
    close(gradient_descent.one_step_hypergradient(X, t, w0, eta, scale), by_jax)
    # L1 is a parabola in η, for which a central difference of any width is exact.
    h = 0.5 * eta
    plus, minus = (gradient_descent.one_step_loss(X, t, w0, eta + s * h, scale) for s in (1, -1))
    close(by_jax, (plus - minus) / (2 * h), 1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_optimal_learning_rate_is_the_vertex_of_the_parabola(shape, scale):
    X, t, w0 = draw(shape, seed=3)
    best = float(gradient_descent.optimal_learning_rate(X, t, w0, scale))
    etas = best * np.array([0.5, 1.0, 1.5])
    low, mid, high = (float(gradient_descent.one_step_loss(X, t, w0, e, scale)) for e in etas)
    assert mid < min(low, high)
    close(low, high, 1e-11)
    assert abs(gradient_descent.one_step_hypergradient(X, t, w0, best, scale)) < 1e-11 * abs(
        gradient_descent.one_step_hypergradient(X, t, w0, 0.0, scale)
    )


@pytest.mark.parametrize("shape", [(4, 6), (5, 3)])
@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_expected_loss_is_the_mean_over_all_mini_batches(shape, size, replacement, scale):
    X, t, w0 = draw(shape, seed=6)
    n = shape[0]
    k = 1 / n if scale is None else scale
    drawn = (
        itertools.product(range(n), repeat=size)
        if replacement
        else itertools.combinations(range(n), size)
    )
    batches = [list(batch) for batch in drawn]

    def mean(eta):
        ends = (
            w0 - eta * 2 * k * n / size * X[batch].T @ (X[batch] @ w0 - t[batch])
            for batch in batches
        )
        return np.mean([k * np.sum((X @ w - t) ** 2) for w in ends])

    options = {"batch_size": size, "replacement": replacement}
    best = gradient_descent.optimal_learning_rate(X, t, w0, scale, **options)
    for eta in (0.3 * best, 2 * best):
        close(
            gradient_descent.one_step_expected_loss(X, t, w0, eta, scale, **options),
            mean(eta),
            1e-11,
        )
    close(mean(0.5 * best), mean(1.5 * best), 1e-11)
    assert mean(best) < mean(1.01 * best)


@pytest.mark.parametrize("shape", [(9, 4), (3, 4)])
def test_a_mini_batch_of_all_without_replacement_is_the_full_batch(shape):
    X, t, w0 = draw(shape, seed=6)
    whole = gradient_descent.optimal_learning_rate(X, t, w0, batch_size=shape[0], replacement=False)
    close(whole, gradient_descent.optimal_learning_rate(X, t, w0))
    sizes = jnp.arange(1, 5)
    rates = jax.vmap(lambda b: gradient_descent.optimal_learning_rate(X, t, w0, batch_size=b))(
        sizes
    )
    close(rates[1], gradient_descent.optimal_learning_rate(X, t, w0, batch_size=2))


@pytest.mark.parametrize("shape", TALL)
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("overshoot", [0.4, 1.8])
def test_the_svd_basis_gives_the_loop(shape, steps, overshoot):
    X, t, w0 = draw(shape, seed=4)
    k = 1 / shape[0]
    # overshoot > 1 makes 1 − 2kησ² negative for the largest σ: an odd power must keep its sign.
    eta = overshoot / (2 * k * np.linalg.norm(X, 2) ** 2)
    w = descend(X, t, w0, eta, steps, k)
    close(gradient_descent.gradient_descent_iterate(X, t, w0, eta, steps), w, 1e-11)
    r = X @ w - t
    np.testing.assert_allclose(
        gradient_descent.gradient_descent_loss(X, t, w0, eta, steps),
        k * r @ r,
        rtol=1e-10,
        atol=1e-14,
    )
    if steps:
        slope = gradient_descent.gradient_descent_hypergradient(X, t, w0, eta, steps)
        loss = lambda e: gradient_descent.gradient_descent_loss(X, t, w0, e, steps)  # noqa: E731
        close(slope, jax.grad(loss)(eta), 1e-10)
        h = 1e-5 * eta
        difference = (loss(eta + h) - loss(eta - h)) / (2 * h)
        np.testing.assert_allclose(slope, difference, rtol=2e-6, atol=1e-8 * loss(eta) / eta)


def test_jit_vmap_and_a_traced_number_of_steps():
    X, t, w0 = draw((3, 6))
    jitted = jax.jit(gradient_descent.gradient_descent_loss)
    close(
        jitted(X, t, w0, 0.1, jnp.int32(5)),
        gradient_descent.gradient_descent_loss(X, t, w0, 0.1, 5),
    )
    many = jax.vmap(lambda e: gradient_descent.one_step_loss(X, t, w0, e))(jnp.linspace(0, 1, 4))
    close(many[2], gradient_descent.one_step_loss(X, t, w0, 2 / 3))
    close(jax.jit(solutions.nearest_solution)(X, t, w0), solutions.nearest_solution(X, t, w0))
    assert solutions.minimum_norm_solution(X.astype(np.float32), t.astype(np.float32)).dtype == (
        jnp.float32
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda X, t, w: solutions.minimum_norm_solution(np.vstack([X, X[:1]]), np.ones(4)),
            "rank 3 but n = 4",
        ),
        (lambda X, t, w: solutions.minimum_norm_solution(X.T, t), r"\(6, 3\)"),
        (lambda X, t, w: solutions.minimum_norm_solution(X, t[:2]), r"t has shape \(2,\)"),
        (lambda X, t, w: solutions.minimum_norm_solution(X * np.nan, t), "X holds nan at"),
        (lambda X, t, w: solutions.minimum_norm_solution(X, t * np.inf), "t holds inf at"),
        (lambda X, t, w: solutions.minimum_norm_solution(X[0], t), "expected two axes"),
        (lambda X, t, w: solutions.row_space_projection(X, w[:5]), r"w has shape \(5,\)"),
        (lambda X, t, w: solutions.nearest_solution(X, t, w[:5]), r"w0 has shape \(5,\)"),
        (lambda X, t, w: gradient_descent.one_step_loss(X, t, w[:5], 0.1), r"w0 has shape \(5,\)"),
        (
            lambda X, t, w: gradient_descent.optimal_learning_rate(X, 0 * t, 0 * w),
            "gradient at w0 is zero",
        ),
        (
            lambda X, t, w: gradient_descent.optimal_learning_rate(X, t, w, batch_size=0),
            "batch_size is 0",
        ),
        (
            lambda X, t, w: gradient_descent.one_step_expected_loss(
                X, t, w, 0.1, batch_size=4, replacement=False
            ),
            "batch_size is 4: expected at least 1 and at most n = 3",
        ),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(UserError, match=says):
        call(*draw((3, 6)))
