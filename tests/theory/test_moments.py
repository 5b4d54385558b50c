"""Momentum, Nesterov's and averaged weights: exact moments against other ways to get them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import central_difference

import optjax as oj
from optjax.support.errors import UserError
from optjax.theory.moments import final_risk, looked_at, risks, start, steps_at_once
from optjax.theory.noisy_quadratic import noisy_quadratic
from optjax.theory.quadratic_rates import best_constant_rate, best_schedule, greedy_rate

H = np.geomspace(2.0, 0.01, 7)
RNG = np.random.default_rng(1)
C, S0 = RNG.uniform(0.1, 3, 7), RNG.uniform(0.1, 5, 7)
WAYS = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "average": {"average": 0.95},
    "all": {"momentum": 0.7, "nesterov": True, "average": 0.9},
}


def responses(h, power, rates, momentum=0.0, nesterov=False, average=0.0):
    """X and e of one coordinate after each step: from x = 1 without noise, and to each ξ = 1."""

    def along(x, impulse):
        e, v, found = x, 0.0, []
        for t, rate in enumerate(rates):
            g = h ** (1 - power) * x + h**-power * (t == impulse)
            v = momentum * v + g
            x = x - rate * (momentum * v + g if nesterov else v)
            e = average * e + (1 - average) * x
            found.append(e)
        return np.array(found)

    return along(1.0, None), [along(0.0, j) for j in range(len(rates))]


def brute(power, rates, size, **way):
    """Risks by linearity: the squares of the answers to the start and to each step's noise."""
    total = np.zeros(len(rates))
    for h, c, s0 in zip(H, C, S0, strict=True):
        free, forced = responses(h, power, rates, **way)
        total += 0.5 * h * (free**2 * s0 + sum(f**2 for f in forced) * c / size)
    return np.concatenate([[0.5 * np.sum(H * S0)], total])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("power", [0, 0.5])
def test_risks_are_those_of_the_answers_to_every_impulse(way, power):
    rates = RNG.uniform(0.02, 0.3, 23)
    model = noisy_quadratic(H, C, S0, batch_size=3, power=power, **WAYS[way])
    np.testing.assert_allclose(risks(model, rates), brute(power, rates, 3, **WAYS[way]), rtol=1e-10)


def test_momentum_follows_the_rows_that_are_known():
    """x², v², xv with v the last step, x = αk; every coordinate apart, and T at once."""
    alpha, beta, size, steps = 0.4, 0.9, 3, 37
    moments = []
    for h, c, s0 in zip(H, C, S0, strict=True):
        x, noise = alpha * h, alpha**2 * c / size
        rows = np.array([
            [(1 - x) ** 2, beta**2, 2 * (1 - x) * beta],
            [x**2, beta**2, -2 * x * beta],
            [-(1 - x) * x, beta**2, (1 - 2 * x) * beta],
        ])  # fmt: skip
        m = np.array([s0, 0, 0])
        for _ in range(steps):
            m = rows @ m + noise
        moments.append(m)
    model = noisy_quadratic(H, C, S0, batch_size=size, momentum=beta)
    found = np.asarray(steps_at_once(model, start(model), alpha, steps))
    expected = np.array(moments).T
    np.testing.assert_allclose(found[0, 0], expected[0], rtol=1e-10)
    # Ours keeps optax's velocity, of which the last step is −α times.
    np.testing.assert_allclose(alpha**2 * found[1, 1], expected[1], rtol=1e-10)
    np.testing.assert_allclose(-alpha * found[0, 1], expected[2], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_many_steps_at_once_are_as_many_steps(way):
    model = noisy_quadratic(H, C, S0, batch_size=3, **WAYS[way])
    for steps in (0, 1, 29):
        found = risks(model, np.full(max(steps, 1), 0.2))
        np.testing.assert_allclose(final_risk(model, 0.2, steps), found[steps], rtol=1e-10)


@pytest.mark.parametrize("way", ["nesterov", "all"])
def test_ten_thousand_sampled_runs_have_these_risks(way):
    settings = dict(WAYS[way])
    average = settings.pop("average", 0.0)
    h, c, w0 = np.array([1.5, 0.3, 0.05]), np.array([4.0, 0.2, 1.0]), np.array([1.0, -3.0, 0.2])
    model = noisy_quadratic(h, c, w0**2, batch_size=4, **WAYS[way])
    rate, steps, count = 0.2, 20, 10_000
    factory = functools.partial(optax.sgd, **settings)
    run = oj.make_run(oj.quadratic(h, w0, noise=np.sqrt(c)), factory, steps, record_path=True)

    def weights(key):
        path = run({"learning_rate": rate, "batch_size": 4}, key).path

        def mixed(e, x):
            e = average * e + (1 - average) * x
            return e, e

        return jax.lax.scan(mixed, path[0], path[1:])[1]

    path = jax.jit(jax.vmap(weights))(jax.random.split(jax.random.key(2), count))
    losses = 0.5 * np.sum(h * np.asarray(path) ** 2, axis=-1)
    expected = np.asarray(risks(model, jnp.full(steps, rate)))[1:]
    z = (losses.mean(0) - expected) / (losses.std(0, ddof=1) / np.sqrt(count))
    # The first step from a fixed start is correlated with the rest: at most as 20 independent ones.
    assert np.abs(z).max() < 3.6


def test_risks_are_differentiable_by_the_optimiser():
    model = noisy_quadratic(H, C, S0, batch_size=3, **WAYS["all"])
    last = jax.jit(lambda m: final_risk(m, 0.2, 30))
    slopes = jax.jit(jax.grad(last))(model)
    for name in ("momentum", "nesterov", "average", "power", "batch_size"):
        value = float(getattr(model, name))

        def moved(x, name=name):
            return float(last(model._replace(**{name: jnp.asarray(x)})))

        expected = central_difference(moved, value, 1e-5)
        np.testing.assert_allclose(getattr(slopes, name), expected, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_best_rate_of_momentum_beats_a_fine_grid():
    model = noisy_quadratic(H, C, S0, batch_size=30, momentum=0.9)
    last = jax.jit(jax.vmap(lambda rate: final_risk(model, rate, 40)))
    best = best_constant_rate(model, 40)
    grid = jnp.geomspace(best / 50, best * 50, 2001)
    assert last(best[None])[0] <= jnp.nanmin(last(grid)) * (1 + 1e-12)


def test_at_critical_damping_nothing_is_lost():
    """M has one eigenvalue and one eigenvector: a diagonalisation would divide by zero."""
    beta, alpha = 0.81, (1 - 0.9) ** 2
    model = noisy_quadratic([1.0], [2.0], [3.0], momentum=beta)
    stepped = risks(model, np.full(200, alpha))[-1]
    np.testing.assert_allclose(final_risk(model, alpha, 200), stepped, rtol=1e-10)
    assert looked_at(model, start(model)).shape == (1,)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: noisy_quadratic([1.0], momentum=1.0), "momentum is 1: expected at least 0"),
        (lambda: noisy_quadratic([1.0], average=-0.1), "average is -0.1: expected at least 0"),
        (lambda: noisy_quadratic([1.0], nesterov=True), "nesterov is True and momentum is not"),
        (lambda: greedy_rate(noisy_quadratic([1.0], momentum=0.9), jnp.ones(1)), "momentum is giv"),
        (lambda: best_schedule(noisy_quadratic([1.0], average=0.9), 3), "average is given"),
        (lambda: final_risk(noisy_quadratic([1.0]), 0.1, -3), "steps is -3"),
        (lambda: final_risk(noisy_quadratic([1.0]), 0.1, 1.5), "steps is "),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(UserError, match=says):
        call()
