"""Optimisers that optax lacks: their steps by definition, and under every transformation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optjax.run.geometries import (
    entropy,
    hypentropy,
    mirror_descent,
    natural_gradient,
    power,
    shampoo,
    steepest_descent,
)
from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.support.errors import UserError

X = np.random.default_rng(0).normal(size=(3, 6))
T = np.random.default_rng(1).normal(size=3)


def step(tx, w, gradients):
    state = tx.init(w)
    for g in gradients:
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
    return w


@pytest.mark.parametrize("p", [1.0, 4 / 3, 2.0, 3.0, math.inf])
def test_no_other_direction_of_its_length_falls_faster(p):
    g = jnp.asarray(np.random.default_rng(0).normal(size=6))
    v = step(steepest_descent(1.0, p), jnp.zeros(6), [g])
    unit = step(steepest_descent(1.0, p, normalize=True), jnp.zeros(6), [g])
    q = {1.0: math.inf, math.inf: 1.0}.get(p) or p / (p - 1)
    assert np.isclose(np.linalg.norm(unit, p), 1)
    assert np.isclose(np.linalg.norm(v, p), np.linalg.norm(g, q))
    assert np.isclose(g @ unit, -np.linalg.norm(g, q))  # Hölder's inequality is attained
    rng = np.random.default_rng(1)
    for other in rng.normal(size=(50, 6)):
        assert (
            g @ v + np.linalg.norm(v, p) ** 2 / 2 <= g @ other + np.linalg.norm(other, p) ** 2 / 2
        )


def test_it_is_one_direction_of_all_parameters_and_zero_gradients_stand_still():
    tree = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([[-4.0]])}
    moved = step(steepest_descent(1.0, 1.0, normalize=True), tree, [tree])
    assert moved["a"].tolist() == [3.0, 1.0] and moved["b"].tolist() == [[-3.0]]  # noqa: PT018
    for p in (1.0, 1.5, math.inf):
        assert step(steepest_descent(1.0, p), jnp.ones(2), [jnp.zeros(2)]).tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match=r"p is 0\.5: expected at least 1, or inf"):
        steepest_descent(1.0, 0.5)


@pytest.mark.parametrize("potential", [entropy, hypentropy(0.5), power(3)])
def test_mirror_maps_and_their_inverses(potential):
    w = jnp.array([0.3, 2.0])
    np.testing.assert_allclose(potential.inverse(potential.mirror(w)), w, rtol=1e-12)


def test_momentum_in_the_dual_and_in_the_primal():
    w, g1, g2 = jnp.array([1.0]), jnp.array([1.0]), jnp.array([0.5])
    w1 = math.exp(-0.1)
    dual = step(mirror_descent(0.1, entropy, 0.9), w, [g1, g2])
    np.testing.assert_allclose(dual, w1 * math.exp(0.9 * -0.1 - 0.1 * 0.5))
    primal = step(mirror_descent(0.1, entropy, 0.9, primal=True), w, [g1, g2])
    np.testing.assert_allclose(primal, (w1 + 0.9 * (w1 - 1)) * math.exp(-0.05))


def test_natural_gradient_is_mirror_descent_of_small_steps():
    w, g = jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])
    for potential in (entropy, hypentropy(0.5), power(3)):
        gaps = [
            np.abs(step(natural_gradient(eta, potential), w, [g])
                   - step(mirror_descent(eta, potential), w, [g])).max()
            for eta in (1e-3, 1e-4)
        ]  # fmt: skip
        assert gaps[1] < 0.02 * gaps[0]


def test_shampoo_by_the_definition():
    rng = np.random.default_rng(0)
    G1, G2 = rng.normal(size=(2, 3, 2))
    L = G1 @ G1.T + G2 @ G2.T + 1e-12 * np.eye(3)
    R = G1.T @ G1 + G2.T @ G2 + 1e-12 * np.eye(2)

    def root(H):
        values, vectors = np.linalg.eigh(H)
        return (vectors * np.maximum(values, 1e-12) ** -0.25) @ vectors.T

    tx = shampoo(0.1)
    state = tx.init(jnp.zeros((3, 2)))
    _, state = tx.update(jnp.asarray(G1), state)
    found, _ = tx.update(jnp.asarray(G2), state)
    np.testing.assert_allclose(found, -0.1 * root(L) @ G2 @ root(R), rtol=1e-6)


FACTORIES = {
    "steepest": functools.partial(steepest_descent, p=1.5),
    "mirror": functools.partial(mirror_descent, potential=hypentropy(0.5), momentum=0.5),
    "natural": functools.partial(natural_gradient, potential=hypentropy(0.5)),
    "shampoo": shampoo,
}


@pytest.mark.parametrize("name", FACTORIES)
def test_they_are_compiled_vmapped_and_differentiated(name):
    run = make_run(least_squares(X, T, scale=0.5), FACTORIES[name], 5, sampler="full")
    key = jax.random.key(0)

    def end(rate):
        return run({"learning_rate": rate}, key).final_loss

    rates = jnp.array([0.05, 0.1])
    many, slopes = jax.jit(jax.vmap(jax.value_and_grad(end)))(rates)
    np.testing.assert_allclose(many, [end(rate) for rate in rates], rtol=1e-10)
    central = [(end(r + 1e-6) - end(r - 1e-6)) / 2e-6 for r in rates]
    np.testing.assert_allclose(slopes, central, rtol=1e-5)
