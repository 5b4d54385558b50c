"""The noisy quadratic model against NumPy, against sampled runs, and each rate against others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from oracles import central_difference

import optjax as oj
from optjax.support.errors import UserError
from optjax.theory.moments import final_risk, looked_at, risks, start, steps_at_once
from optjax.theory.noisy_quadratic import noisy_quadratic, risk, step
from optjax.theory.quadratic_rates import (
    best_constant_rate,
    best_schedule,
    greedy_rate,
    greedy_schedule,
)

RNG = np.random.default_rng(0)
H = np.geomspace(2.0, 0.01, 7)
C, S0 = RNG.uniform(0.1, 3, 7), RNG.uniform(0.1, 5, 7)
RATES = np.array([0.9, 0.05, 1.2, 0.4, 0.3, 0.2, 0.01])
T = 17  # of the searches that need no other: not a square, and they share their compilations
LOG_RISK = jax.jit(jax.value_and_grad(lambda rates, model: jnp.log(risks(model, rates)[-1])))


@functools.partial(jax.jit, static_argnums=2)
def last_risk(model, rate, steps):
    return final_risk(model, rate, steps)


def brute(h, c, s, size, power, rates):
    """The recursion, a coordinate and a step at a time; the risks and the last moments."""
    s, found = list(s), [0.5 * sum(h * s)]
    for rate in rates:
        for i in range(len(h)):
            factor = 1 - rate * h[i] / h[i] ** power
            s[i] = factor * factor * s[i] + (rate / h[i] ** power) ** 2 * c[i] / size
        found.append(0.5 * sum(h * s))
    return np.array(found), np.array(s)


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_moments_are_those_of_the_brute_force_recursion(power):
    model = noisy_quadratic(H, C, S0, batch_size=3, power=power)
    found, last = brute(H, C, S0, 3, power, RATES)
    np.testing.assert_allclose(risks(model, RATES), found, rtol=1e-12)
    s = model.s0
    for rate in RATES:
        s = step(model, s, rate)
    np.testing.assert_allclose(s, last, rtol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 100, 1000])
@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])  # ρ of the first: near 1, 0 and 1
def test_many_steps_at_once_are_as_many_steps(steps, rate):
    model = noisy_quadratic(H, C, S0, batch_size=3)
    last = brute(H, C, S0, 3, 0, [rate] * steps)[1]
    found = steps_at_once(model, start(model), rate, steps)
    np.testing.assert_allclose(looked_at(model, found), last, rtol=1e-10)
    traced = jax.jit(steps_at_once)(model, start(model), rate, steps)
    np.testing.assert_allclose(looked_at(model, traced), last, rtol=1e-10)


def test_the_derivative_of_many_steps_does_not_see_powers_that_are_not_needed():
    # ρ = 9: 9³² is within float32, 9⁶⁴ is not.
    model = noisy_quadratic(np.float32([1.0]), batch_size=np.float32(4))

    def last(rate):
        return final_risk(model, rate, 33)

    slope = jax.jit(jax.grad(last))(jnp.float32(4.0))
    assert np.isfinite(slope)
    assert slope > 0


def test_sampled_runs_of_sgd_have_these_risks():
    h, c, w0 = np.array([1.5, 0.3, 0.05]), np.array([4.0, 0.2, 1.0]), np.array([1.0, -3.0, 0.2])
    model = noisy_quadratic(h, c, w0**2, batch_size=4)
    rate, steps, count = 0.6, 25, 4000
    run = oj.make_run(oj.quadratic(h, w0, noise=np.sqrt(c)), optax.sgd, steps, record_path=True)
    hparams = {"learning_rate": rate, "batch_size": 4}
    path = jax.jit(jax.vmap(lambda key: run(hparams, key).path))(
        jax.random.split(jax.random.key(1), count)
    )
    losses = 0.5 * np.sum(h * np.asarray(path) ** 2, axis=-1)[:, 1:]
    expected = np.asarray(risks(model, jnp.full(steps, rate)))[1:]
    z = (losses.mean(0) - expected) / (losses.std(0, ddof=1) / np.sqrt(count))
    # The steps are correlated: their largest |z| is at most that of 25 independent ones.
    assert np.abs(z).max() < 3.7


@pytest.mark.parametrize("power", [0, 0.5])
def test_the_hypergradient_by_every_rate_is_the_central_difference(power):
    model = noisy_quadratic(H, C, S0, batch_size=3, power=power)
    found = jax.grad(lambda rates: risks(model, rates)[-1])(jnp.asarray(RATES))

    def last(rates):
        return brute(H, C, S0, 3, power, rates)[0][-1]

    for i, unit in enumerate(np.eye(len(RATES))):
        slope = central_difference(lambda x, u=unit: last(RATES + x * u), 0.0, 1e-5)
        np.testing.assert_allclose(found[i], slope, rtol=1e-7, atol=1e-9)


def test_the_risk_is_differentiable_by_the_model():
    model = noisy_quadratic(H, C, S0, batch_size=3, power=0.3)
    found = jax.grad(lambda m: risks(m, RATES)[-1])(model)
    for name in ("batch_size", "power"):
        value = float(getattr(model, name))

        def last(x, name=name):
            return float(risks(model._replace(**{name: jnp.asarray(x)}), RATES)[-1])

        np.testing.assert_allclose(
            getattr(found, name), central_difference(last, value, 1e-5), rtol=1e-7
        )


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_the_greedy_rate_minimises_the_next_risk(power):
    model = noisy_quadratic(H, C, S0, batch_size=3, power=power)
    best = greedy_rate(model, model.s0)
    after = jax.grad(lambda rate: risk(model, step(model, model.s0, rate)))
    assert abs(after(best)) < 1e-13 * abs(after(0.0))
    schedule = greedy_schedule(model, 5)
    np.testing.assert_allclose(schedule.rates[0], best, rtol=1e-14)
    np.testing.assert_allclose(schedule.risks, risks(model, schedule.rates), rtol=1e-13)


def test_without_a_preconditioner_the_greedy_rate_is_the_published_one():
    model = noisy_quadratic(H, C, S0, batch_size=3)
    published = np.sum(H**2 * S0) / np.sum(H**3 * S0 + H * C / 3)
    np.testing.assert_allclose(greedy_rate(model, model.s0), published, rtol=1e-14)
    at_rest = noisy_quadratic(H, 0 * C, 0 * S0)
    assert greedy_rate(at_rest, at_rest.s0) == 0


@pytest.mark.parametrize(
    ("steps", "size"),
    [
        (3000, 1e6),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, 1), (1, 1e6), (3000, 1))),
    ],
)
def test_the_best_constant_rate_beats_a_fine_grid(size, steps):
    model = noisy_quadratic(H, C, S0, batch_size=size)

    def last(rate):
        return last_risk(model, rate, steps)

    best = best_constant_rate(model, steps)
    grid = jnp.geomspace(best / 100, best * 100, 4001)
    assert last(best) <= jnp.nanmin(jax.vmap(last)(grid)) * (1 + 1e-14)
    assert abs(best * jax.grad(lambda r: jnp.log(last(r)))(best)) < 1e-9
    if steps == 1:
        np.testing.assert_allclose(best, greedy_rate(model, model.s0), rtol=1e-9)


def test_the_best_constant_rate_is_differentiable_by_the_model():
    def best(size):
        return best_constant_rate(noisy_quadratic(H, C, S0, batch_size=size), T)

    slope = central_difference(best, 3.0, 1e-3)
    np.testing.assert_allclose(jax.grad(best)(3.0), slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "steps"),
    [(1, T), (30, T), (1e4, T), *(pytest.param(b, 60, marks=pytest.mark.slow) for b in (30, 1e4))],
)
def test_the_best_schedule_is_stationary_and_no_worse_than_the_others(size, steps):
    model = noisy_quadratic(H, C, S0, batch_size=size)
    best = best_schedule(model, steps)
    bound = 2 / H.max()
    assert best.gradient < 1e-9
    assert best.rates.max() <= bound
    constant = risks(model, jnp.full(steps, best_constant_rate(model, steps)))[-1]
    for other in (constant, greedy_schedule(model, steps, bound).risks[-1]):
        assert best.risks[-1] <= other * (1 + 1e-14)
    for _ in range(20):
        near = best.rates * np.exp(0.03 * RNG.normal(size=steps))
        assert best.risks[-1] <= risks(model, jnp.minimum(near, bound))[-1]
    # A search of another kind, from where nothing is known, finds nothing better.
    other = scipy.optimize.minimize(
        LOG_RISK, np.full(steps, bound / 2), (model,), jac=True, method="L-BFGS-B",
        bounds=[(0, bound)] * steps, options={"ftol": 1e-15, "gtol": 1e-10},
    )  # fmt: skip
    assert np.log(best.risks[-1]) <= other.fun + 1e-12


@pytest.mark.slow
def test_the_best_risk_is_differentiable_by_the_model_also_through_the_bound():
    def last(h0):
        return best_schedule(noisy_quadratic(jnp.asarray(H).at[0].set(h0), C, S0), T).risks[-1]

    held = best_schedule(noisy_quadratic(H, C, S0, batch_size=1e3), T)
    assert (held.rates == held.rates.max()).sum() > 1
    np.testing.assert_allclose(jax.grad(last)(2.0), central_difference(last, 2.0, 1e-4), rtol=1e-5)


def test_a_sweep_over_models_is_one_vmap_and_float32_stays_so():
    def final(size, power):
        model = noisy_quadratic(np.float32(H), batch_size=size, power=power)
        return best_schedule(model, 10)

    sizes, powers = jnp.array([1, 8, 64]), jnp.array([0.0, 0.5, 1.0], jnp.float32)
    best = jax.vmap(final)(sizes, powers)
    # The schedule's search has this one within: its dtype needs no second compilation.
    constant = jax.eval_shape(lambda m: best_constant_rate(m, 10), noisy_quadratic(np.float32(H)))
    assert {x.dtype for x in (best.rates, best.risks, best.gradient, constant)} == {
        jnp.dtype(jnp.float32)
    }
    exact = risks(noisy_quadratic(H, batch_size=8, power=0.5), np.float64(best.rates[1]))
    np.testing.assert_allclose(best.risks[1], exact, rtol=1e-5)  # float32
    assert best.gradient.max() < 1e-4  # float32


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: noisy_quadratic([1.0, 0.0]), "h holds 0: expected above 0"),
        (lambda: noisy_quadratic([1.0], [-1.0]), "c holds -1: expected at least 0"),
        (lambda: noisy_quadratic([1.0], [1.0, 1.0]), r"c has shape \(2,\) and h \(1,\)"),
        (lambda: noisy_quadratic([1.0, np.nan]), "h holds nan at"),
        (lambda: noisy_quadratic([[1.0]]), r"h has shape \(1, 1\)"),
        (lambda: noisy_quadratic([1.0], batch_size=0), "batch_size holds 0"),
        (lambda: risks(noisy_quadratic([1.0]), 0.1), r"rates has shape \(\)"),
        (lambda: best_schedule(noisy_quadratic([1.0]), 0), "steps is 0"),
        (lambda: greedy_schedule(noisy_quadratic([1.0]), 1.5), "steps is 1.5"),
        (lambda: best_schedule(noisy_quadratic([1.0]), 3, max_rate=-1), "max_rate holds -1"),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(UserError, match=says):
        call()
