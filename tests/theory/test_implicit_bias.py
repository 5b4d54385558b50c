"""Solutions that a bias picks against other solvers and optimality; certificates by a table."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.svm import SVC

from optjax.run.geometries import entropy, hypentropy, power
from optjax.support.errors import UserError
from optjax.theory.implicit_bias import certificate, margin_certificate, norm_name
from optjax.theory.least_norms import (
    bregman_projection,
    equations,
    least_norm_solution,
    max_margin_direction,
)


def _draw(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=n)


@pytest.mark.parametrize("p", [1, 1.1, 4 / 3, 1.5, 2, 3, 10, math.inf])
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (10, 30)])
def test_no_other_solution_has_a_smaller_norm(p, shape):
    X, t = _draw(*shape)
    w = least_norm_solution(X, t, p)
    np.testing.assert_allclose(X @ w, t, atol=1e-9)
    least = np.linalg.norm(w, p)
    null = np.linalg.svd(X)[2][shape[0] :]
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            other = w + size * rng.normal(size=len(null)) @ null
            assert np.linalg.norm(other, p) >= least * (1 - 1e-12)
    if 1 < p < math.inf:  # the gradient of the norm has no part in the null space
        slope = np.sign(w) * (np.abs(w) / np.abs(w).max()) ** (p - 1)
        np.testing.assert_allclose(null @ slope, 0, atol=1e-9)


def test_scales_and_exact_zeros_do_no_harm():
    X, t = _draw(3, 8)
    for p in (1, 4 / 3, 2, 3, math.inf):
        once = least_norm_solution(X, t, p)
        for c in (1e-9, 1e9):
            np.testing.assert_allclose(least_norm_solution(X, c * t, p) / c, once, atol=1e-9)
            np.testing.assert_allclose(least_norm_solution(c * X, t, p) * c, once, atol=1e-9)
    assert not least_norm_solution(X, 0 * t, 3).any()
    same = np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 0.0]])
    np.testing.assert_allclose(same @ least_norm_solution(same, [1, 10], 4 / 3), [1, 10])


@pytest.mark.parametrize("potential", [hypentropy(0.1), hypentropy(10.0), power(1.5), power(3)])
def test_a_projection_is_a_solution_whose_mirror_image_moved_in_the_row_space(potential):
    X, t = _draw(3, 8)
    w0 = np.random.default_rng(2).normal(size=8)
    w = bregman_projection(X, t, w0, potential)
    np.testing.assert_allclose(X @ w, t, atol=1e-9)
    null = np.linalg.svd(X)[2][3:]
    gone = np.asarray(potential.mirror(jnp.asarray(w)) - potential.mirror(jnp.asarray(w0)))
    np.testing.assert_allclose(null @ gone, 0, atol=1e-8)


def test_hypentropy_lies_between_the_least_l1_and_l2_norms():
    X, t = _draw(4, 12)
    ends = [bregman_projection(X, t, np.zeros(12), hypentropy(b)) for b in (1e-8, 1.0, 1e4)]
    l1, l2 = (np.array([np.linalg.norm(w, p) for w in ends]) for p in (1, 2))
    assert l1[0] < l1[1] < l1[2]
    assert l2[0] > l2[1] > l2[2]
    np.testing.assert_allclose(ends[2], least_norm_solution(X, t), atol=1e-6)
    assert l1[0] < 1.05 * np.linalg.norm(least_norm_solution(X, t, 1), 1)


def test_the_entropys_projection_needs_a_positive_solution():
    np.testing.assert_allclose(
        bregman_projection([[1.0, 2.0]], [1.0], [1.0, 1.0], entropy), [0.5, 0.25]
    )
    with pytest.raises(UserError, match="no solution inside the domain of entropy"):
        bregman_projection([[1.0, 2.0]], [-1.0], [1.0, 1.0], entropy)
    with pytest.raises(UserError, match="w0 is outside of the domain of entropy"):
        bregman_projection([[1.0, 2.0]], [1.0], [0.0, 1.0], entropy)


@pytest.mark.parametrize("p", [1, 4 / 3, 3, math.inf])
def test_no_rank_and_full_rank(p):
    assert not least_norm_solution(np.zeros((2, 3)), [1.0, 2.0], p).any()
    np.testing.assert_allclose(least_norm_solution(np.eye(3), [1.0, 2.0, 3.0], p), [1, 2, 3])
    for X in (np.zeros((2, 3)), np.eye(3)):
        found = certificate(np.zeros(3), X, np.ones(len(X)), norms=[p], potentials=[hypentropy(1)])
        assert len(found.distances) == 2


def test_a_power_above_two_from_any_start():
    X, t = _draw(3, 8)
    w0 = np.eye(8)[0]
    w = bregman_projection(X, t, w0, power(3))
    null = np.linalg.svd(X)[2][3:]
    np.testing.assert_allclose(X @ w, t, atol=1e-9)
    np.testing.assert_allclose(null @ (w * np.abs(w) - w0), 0, atol=1e-8)


def _separable(n=20, d=4, seed=0):
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(n) % 2, 1.0, -1.0)
    return y[:, None] * np.r_[1.5, np.zeros(d - 1)] + rng.normal(size=(n, d)) * 0.5, y


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_no_direction_has_a_larger_margin(p):
    X, y = _separable()
    w, margin = max_margin_direction(X, y, p)
    assert np.isclose(np.linalg.norm(w, p), 1)
    rng = np.random.default_rng(1)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            other = w + size * rng.normal(size=len(w))
            assert (y * (X @ other)).min() / np.linalg.norm(other, p) <= margin * (1 + 1e-12)
    if p == 2:
        svm = SVC(kernel="linear", C=1e8, tol=1e-8).fit(X, y)
        # Its intercept is free: through a feature of ones it would not be.
        assert margin <= 1 / np.linalg.norm(svm.coef_) * (1 + 1e-6)
    for c in (1e-9, 1e9):
        scaled = max_margin_direction(c * X, y, p)
        np.testing.assert_allclose(scaled[0], w, atol=1e-9)
        np.testing.assert_allclose(scaled[1], c * margin, rtol=1e-9)


def test_labels_that_no_direction_separates_are_told():
    X, y = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), np.array([1.0, 1.0, -1.0])
    for p in (1, 2, math.inf):
        with pytest.raises(UserError, match="no direction through the origin"):
            max_margin_direction(X, y, p)
    found = margin_certificate([1.0, 0.0], X, y)
    assert found.angles == {}
    (line,) = found.failed
    assert line.startswith("no direction through the origin separates the labels")
    assert found.found == "the labels cannot be separated; 67 % are on the wrong side"


def test_a_margin_certificate_of_each_direction():
    X, y = _separable()
    for p in (1, 2, math.inf):
        found = margin_certificate(3 * max_margin_direction(X, y, p)[0], X, y)
        assert found.angles[norm_name(p)] < 1e-8
        assert np.isclose(found.margin_shares[norm_name(p)], 1)
        assert found.found.startswith(f"nearest to the largest {norm_name(p)} margin")
        assert all(share < 1 + 1e-9 for share in found.margin_shares.values())
    wrong = margin_certificate(-np.eye(4)[0], X, y)
    assert wrong.training_error > 0.9


X, T = np.array([[2.0, 1.0]]), np.array([2.0])
TABLE = [
    ([0.8, 0.4], {}, ("least ℓ2",), "the solution of least ℓ2 norm"),
    ([1.0, 0.0], {}, ("least ℓ1",), "the solution of least ℓ1 norm"),
    ([2 / 3, 2 / 3], {}, ("least ℓ∞",), "the solution of least ℓ∞ norm"),
    ([0.9, 0.2], {}, (), "none of those compared: 0.22 from the nearest (least ℓ1), 24 %"),
    ([0.8, 0.3], {}, (), "no solution yet: the relative residual is 0.05"),
    ([math.nan, 0.0], {}, (), "no solution: w is not finite"),
    ([0.4, 1.2], {"w0": [0.0, 1.0]}, ("nearest to the start",), "the solution nearest to the st"),
    ([0.8, 0.4], {"norms": [2, 4 / 3]}, ("least ℓ2",), "the solution of least ℓ2 norm"),
]


@pytest.mark.parametrize(("w", "more", "picked", "found"), TABLE)
def test_certificates(w, more, picked, found):
    got = certificate(w, X, T, **more)
    assert got.picked == picked
    assert got.found.startswith(found)
    assert got.failed == ()


def test_one_of_several_solutions_of_least_norm():
    same = np.array([[1.0, 1.0, 0.5]])
    assert certificate([0.3, 0.7, 0.0], same, [1.0]).found == (
        "a solution of least ℓ1 norm, one of several"
    )


RNG = np.random.default_rng(0)
TALL = RNG.normal(size=(6, 3))
CONDITIONS = {
    "rank": (np.array([[1.0, 1, 0], [2, 2, 0]]), np.array([1.0, 2.0]), "X has rank 1, less than"),
    "inconsistent": (np.array([[1.0, 1, 0], [2, 2, 0]]), np.array([1.0, 1.0]), "no w solves"),
    "tall": (TALL, TALL @ np.ones(3), "X has 6 rows and 3 columns (n > d)"),
    "one solution": (np.eye(3), np.ones(3), "there is one solution, and nothing to pick"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_failed_condition_is_named_and_the_rest_reported(name):
    A, t, words = CONDITIONS[name]
    w = np.linalg.lstsq(A, t, rcond=None)[0]
    found = certificate(w, A, t)
    assert any(words in line for line in found.failed)
    assert found.rank == np.linalg.matrix_rank(A)
    assert found.distances["least ℓ2"] < 1e-12
    assert found.off_row_space < 1e-12
    assert np.isclose(found.residual, np.linalg.norm(A @ w - t) / np.linalg.norm(t))
    assert "least ℓ2 norm" in found.found
    assert found.found.startswith("of the least-squares solutions") == (name == "inconsistent")


def test_equations_of_zero_have_residuals_too():
    found = certificate([1.0, 0.0], [[1.0, 1.0]], [0.0])
    assert found.residual == pytest.approx(1)
    assert found.found == "no solution yet: the relative residual is 1"


def test_a_residual_that_tells_nothing_picks_nothing():
    """With condition 1e6 a residual of 1e-5 may be ten lengths away."""
    X = np.array([[1.0, 0, 0], [0, 1e-6, 0]])
    found = certificate([1.0, 8.0, 0], X, [1.0, 1e-6], tolerance=1e-4)
    assert found.residual < 1e-4
    assert found.picked == ()


def test_a_projection_that_does_not_exist_is_a_failed_condition():
    found = certificate([-1.0, 0.0], [[1.0, 2.0]], [-1.0], w0=[1.0, 1.0], potentials=[entropy])
    assert any("no solution inside the domain of entropy" in line for line in found.failed)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: certificate([1.0], X, T), "w has 1 entries: expected 2"),
        (lambda: certificate([1.0, 1.0], X, T, w0=[1.0]), "w0 has 1 entries: expected 2"),
        (lambda: certificate([1.0, 1.0], X, T, norms=[0.5]), "norms are .0.5.: expected numbers"),
        (lambda: least_norm_solution(X, T, 0.5), "p is 0.5: expected at least 1"),
        (lambda: certificate([1.0, 1.0], X, [math.inf]), "t holds inf at \\(0,\\)"),
        (lambda: equations(X, [1.0, 2.0]), "t has shape \\(2,\\) and X \\(1, 2\\)"),
        (lambda: equations(np.zeros((0, 2)), []), "X has shape \\(0, 2\\)"),
        (lambda: max_margin_direction(X, [2.0]), "y holds the label 2: expected -1 and 1"),
        (lambda: max_margin_direction(X, [1.0], 3), "p is 3: expected 1, 2 or inf"),
        (lambda: margin_certificate([1.0], X, [1.0]), "w has 1 entries: expected 2"),
        (lambda: power(1), "p is 1: expected a finite number above 1"),
        (lambda: hypentropy(0.0), "beta is 0: expected a finite number above 0"),
    ],
)
def test_mistakes_are_told(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_no_float64_is_asked_of_the_user():
    jax.config.update("jax_enable_x64", False)
    try:
        found = certificate(least_norm_solution(X, T, 3), X, T, norms=[2, 3])
        assert found.distances["least ℓ3"] < 1e-12
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", True)
