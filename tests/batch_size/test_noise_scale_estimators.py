"""The noise scale against NumPy, and its intervals against how often they hold the truth."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.batch_size.curvature_noise_scale import (
    curvature_noise_scale,
    full_curvature_noise_scale,
    max_rate,
    optimal_rate,
)
from optjax.batch_size.measured_noise_scale import per_example_noise_scale, two_batch_noise_scale
from optjax.batch_size.noise_scale import (
    Estimates,
    from_deviations,
    from_devices,
    noise_scale,
    running_scale,
    two_batch,
)
from optjax.batch_size.recorded_noise_scale import with_noise_scale
from optjax.support.errors import UserError

RNG = np.random.default_rng(0)
N, D = 24, 3
X = RNG.normal(size=(N, D)) * np.array([2.0, 1.0, 0.3])
TARGETS = X @ np.array([1.0, -2.0, 4.0]) + RNG.exponential(size=N)
W = np.array([0.9, -1.2, 2.0])
PROBLEM = oj.least_squares(X, TARGETS)
SINGLE = 2 * (X @ W - TARGETS)[:, None] * X  # the gradient of each example
G = SINGLE.mean(0)
SIGMA = np.cov(SINGLE.T, ddof=0)
HESSIAN = 2 * X.T @ X / N
SIMPLE = np.trace(SIGMA) / (G @ G)
CURVED = np.trace(HESSIAN @ SIGMA) / (G @ HESSIAN @ G)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))


def squared(out, target):
    return jnp.square(out - target).sum(-1)


def normed():
    return oj.flax_problem(Normed(), np.float32(X), np.float32(TARGETS[:, None]), squared)


def test_two_norms_give_both_parts():
    # The expectations themselves: |G|² = 3, tr Σ = 40.
    found = two_batch(3 + 40 / 5, 3 + 40 / 20, 5, 20)
    np.testing.assert_allclose((found.gradient_square, found.trace), (3, 40), rtol=1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def pairs_of(repeats, count, d, square, key):
    """`repeats` scales of `count` pairs b = 4, B = 32 with Σ = diag(1/i) and |G|² = square."""
    deviation = 1 / jnp.sqrt(jnp.arange(1.0, d + 1))
    shift = jnp.sqrt(square / d)

    def one(key):
        g = shift + jax.random.normal(key, (count, 8, d)) * deviation[None, None] / 2
        small = jnp.mean(jnp.sum(g**2, -1), -1)
        return noise_scale(two_batch(small, jnp.sum(jnp.mean(g, 1) ** 2, -1), 4, 32))

    return jax.vmap(one)(jax.random.split(key, repeats))


def held(found, truth):
    return float(jnp.mean((found.low <= truth) & (truth <= found.high)))


# 0.93 and 0.97 lie 2.9 standard errors of 1,000 repeats from 0.95.
@pytest.mark.parametrize("square", [0.0, 0.02, 1.0])
def test_of_1000_intervals_from_pairs_95_per_cent_hold_the_truth(square):
    found = pairs_of(1000, 64, 3, square, jax.random.key(3))
    truth = (1 + 1 / 2 + 1 / 3) / square if square else np.inf
    # Only the lower end can miss ∞, and it seldom does: at G = 0 the interval is conservative.
    assert 0.93 <= held(found, truth) <= (0.97 if square else 1)
    for part, exact in ((found.gradient_square, square), (found.trace, 11 / 6)):
        assert abs(part.mean() - exact) < 4 * part.std() / np.sqrt(1000)
    assert found.resolved.mean() > 0.99 if square == 1 else found.resolved.mean() < 0.8
    assert np.isinf(found.high[~found.resolved]).all()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def singles_of(repeats, count, d, square, key, skewed=False):
    """Scales from `count` gradients each, of Gaussian or exponential noise, Σ = diag(1/i)."""
    deviation = 1 / jnp.sqrt(jnp.arange(1.0, d + 1))

    def one(key):
        shape = (count, d)
        noise = jax.random.exponential(key, shape) - 1 if skewed else jax.random.normal(key, shape)
        g = jnp.sqrt(square / d) + noise * deviation[None]
        mean = g.mean(0)
        return from_deviations(
            mean @ mean, jnp.sum((g - mean[None]) ** 2, -1), (g - mean[None]) @ mean
        )

    return jax.vmap(one)(jax.random.split(key, repeats))


@pytest.mark.parametrize("square", [0.0, 0.1, 1.0])
def test_of_1000_intervals_from_single_gradients_95_per_cent_hold_the_truth(square):
    found = singles_of(1000, 64, 20, square, jax.random.key(5))
    truth = np.sum(1 / np.arange(1, 21)) / square if square else np.inf
    assert 0.93 <= held(found, truth) <= 0.97
    if square == 0:
        assert found.resolved.mean() < 0.08  # as often as the interval misses ∞


@pytest.mark.slow
@pytest.mark.parametrize("count", [32, 64, 256])
@pytest.mark.parametrize("d", [3, 100])
@pytest.mark.parametrize("square", [0.02, 0.2, 1.0])
def test_intervals_hold_the_truth_for_more_counts(count, d, square):
    truth = np.sum(1 / np.arange(1, d + 1)) / square
    assert 0.92 <= held(pairs_of(1000, count, d, square, jax.random.key(1)), truth) <= 0.98
    assert 0.92 <= held(singles_of(1000, count, d, square, jax.random.key(2)), truth) <= 0.985
    skewed = singles_of(1000, count, d, square, jax.random.key(2), True)
    assert 0.9 <= held(skewed, truth) <= 0.99  # measured: 0.917 to 0.976


def test_of_300_intervals_on_least_squares_95_per_cent_hold_the_truth():
    def one(key):
        return two_batch_noise_scale(PROBLEM, W, key, groups=8, pairs=40)

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 300))
    assert 0.91 <= held(found, SIMPLE) <= 0.985  # three standard errors of 300
    assert held(found._replace(low=found.low * 1.5, high=found.high * 1.5), SIMPLE) < 0.9
    for part, exact in ((found.gradient_square, G @ G), (found.trace, np.trace(SIGMA))):
        assert abs(part.mean() - exact) < 4 * part.std() / np.sqrt(300)


def test_the_mean_of_ratios_is_far_off_where_the_ratio_of_means_is_not():
    # Each pair resolves |G|² = 1 to ± 0.4. As it may come out as 0, a pair's ratio has no mean to
    # converge to: 100 means of 200 ratios are compared by their median.
    rng, d, trace, b, m = np.random.default_rng(4), 10, 49.5, 16, 8
    g = np.sqrt(1 / d) + rng.normal(size=(20_000, m, d)) * np.sqrt(trace / d / b)
    small = np.mean(np.sum(g**2, -1), -1)
    found = two_batch(small, np.sum(g.mean(1) ** 2, -1), b, m * b)
    scale = noise_scale(found)
    assert scale.low < trace < scale.high
    assert abs(scale.value - trace) < 0.7  # four standard errors
    singles = np.asarray(found.trace / found.gradient_square).reshape(100, 200).mean(1)
    assert 60 < np.median(singles) < 72


def test_single_gradients_are_those_of_numpy_in_any_chunks():
    for chunk in (None, 5):
        found = per_example_noise_scale(PROBLEM, W, chunk=chunk)
        trace = np.trace(np.cov(SINGLE.T))
        np.testing.assert_allclose(found.trace, trace, rtol=1e-12)
        np.testing.assert_allclose(found.gradient_square, G @ G - trace / N, rtol=1e-12)
        np.testing.assert_allclose(found.value, trace / (G @ G - trace / N), rtol=1e-12)
    exact = per_example_noise_scale(PROBLEM, W, exact=True)
    np.testing.assert_allclose(exact[:5], [SIMPLE] * 3 + [G @ G, np.trace(SIGMA)], rtol=1e-12)
    drawn = per_example_noise_scale(PROBLEM, W, jax.random.key(7), examples=400)
    assert drawn.low < SIMPLE < drawn.high


def test_a_penalty_moves_the_gradient_and_is_no_noise():
    found = per_example_noise_scale(PROBLEM, W, exact=True, hparams={"l2": 0.5})
    moved = G + 2 * 0.5 * W
    np.testing.assert_allclose(found.gradient_square, moved @ moved, rtol=1e-12)
    np.testing.assert_allclose(found.trace, np.trace(SIGMA), rtol=1e-12)


def test_at_the_minimum_nothing_is_resolved():
    best = np.linalg.lstsq(X, TARGETS)[0]
    for found in (
        two_batch_noise_scale(PROBLEM, best, jax.random.key(0), groups=8, pairs=40),
        per_example_noise_scale(PROBLEM, best),
    ):
        assert not found.resolved
        assert np.isinf(found.high)
        assert found.low > 1
    silent = oj.quadratic([1.0], [0.0], noise=[0.0])
    nothing = two_batch_noise_scale(silent, jnp.zeros(1), jax.random.key(0), pairs=2)
    assert not nothing.resolved
    assert (float(nothing.low), float(nothing.high)) == (0, np.inf)


def test_a_quadratic_has_the_noise_it_was_given():
    problem = oj.quadratic([4.0, 1.0, 0.5], W, noise=[1.0, 3.0, 0.2])
    square, trace = np.sum((np.array([4.0, 1, 0.5]) * W) ** 2), 1 + 9 + 0.04
    found = two_batch_noise_scale(problem, W, jax.random.key(3), batch_size=2)
    assert found.low < trace / square < found.high
    assert found.high < 2 * found.low


@pytest.mark.slow
def test_batches_of_a_network_with_batch_statistics_have_the_noise_of_that_batch():
    problem, b = normed(), 6
    params, state = problem.init(jax.random.key(1), problem.data)
    found = two_batch_noise_scale(
        problem, params, jax.random.key(2), batch_size=b, groups=4, pairs=32
    )

    def drawn(key):
        index = jax.random.randint(key, (b,), 0, N)
        batch = oj.Batch(jax.tree.map(lambda a: a[index], problem.data.examples), None, key, None)
        loss = lambda p: problem.loss(p, state, batch, {})[0]  # noqa: E731
        return jax.flatten_util.ravel_pytree(jax.grad(loss)(params))[0]

    g = np.asarray(jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(9), 1000)))
    truth = float(b * np.trace(np.cov(g.T)) / np.sum(g.mean(0) ** 2))
    assert found.low < truth < found.high
    assert found.high < 4 * found.low


def test_the_curvature_scale_is_that_of_the_dense_hessian():
    found = full_curvature_noise_scale(PROBLEM, W, jax.random.key(0), probes=64, chunk=7)
    np.testing.assert_allclose(found.gradient_curvature, G @ HESSIAN @ G, rtol=1e-12)
    np.testing.assert_allclose(found.gradient_square, G @ G, rtol=1e-12)
    assert found.low < CURVED < found.high
    assert found.high < 2.5 * found.low
    best_full = max_rate(found.gradient_square, found.gradient_curvature)
    rates = np.linspace(0, 2 * float(best_full), 20001)
    gain = rates * (G @ G) - rates**2 / 2 * (G @ HESSIAN @ G) * (1 + CURVED / 5)
    np.testing.assert_allclose(
        optimal_rate(best_full, CURVED, 5), rates[gain.argmax()], rtol=2e-3
    )  # the grid's own width


def test_of_200_sampled_curvature_scales_95_per_cent_hold_the_truth():
    def one(key):
        return curvature_noise_scale(PROBLEM, W, key, batch_size=2, groups=48)

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 200))
    assert 0.9 <= held(found, CURVED) <= 0.99  # three standard errors of 200
    for part, exact in (
        (found.gradient_curvature, G @ HESSIAN @ G),
        (found.trace, np.trace(HESSIAN @ SIGMA)),
        (found.gradient_square, G @ G),
    ):
        assert abs(part.mean() - exact) < 4 * part.std() / np.sqrt(200)


def test_devices_give_what_their_norms_do():
    g = {"a": jnp.asarray(RNG.normal(size=(4, 3))) + 1, "b": jnp.asarray(RNG.normal(size=(4, 2)))}
    both = np.concatenate([g["a"], g["b"]], axis=1)
    small, large = np.mean(np.sum(both**2, 1)), np.sum(both.mean(0) ** 2)
    expected = two_batch(small, large, 8, 32)
    found = jax.vmap(lambda own: from_devices(own, 8, "devices"), axis_name="devices")(g)
    for part, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, np.full(4, exact), rtol=1e-12)


def test_a_running_average_is_the_ratio_of_weighted_means():
    rows, decay = RNG.uniform(1, 5, (6, 2)), 0.7
    state = running_scale(float)
    for square, trace in rows:
        state = state.add(Estimates(jnp.asarray(square), jnp.asarray(trace)), decay)
    weights = decay ** np.arange(5, -1, -1)
    means = weights @ rows / weights.sum()
    np.testing.assert_allclose(state.means(), means, rtol=1e-12)
    np.testing.assert_allclose(state.value(), means[1] / means[0], rtol=1e-12)


def recording():
    return oj.make_run(with_noise_scale(PROBLEM), optax.sgd, 4, record_every=2, record_path=True)


def test_a_run_records_it():
    run = recording()
    assert run.plan == recording().plan
    hparams = {"learning_rate": 0.01, "batch_size": 3}
    alone = run(hparams, jax.random.key(0))
    exact = per_example_noise_scale(PROBLEM, alone.path[-1], exact=True)
    for name, value in zip(RECORDED, (exact.value, *exact[3:5]), strict=True):
        np.testing.assert_allclose(alone.metrics[name][-1], value, rtol=1e-12)
    # The metric changes no draw: the run is the one without it.
    plain = oj.make_run(PROBLEM, optax.sgd, 4, record_every=2)(hparams, jax.random.key(0))
    np.testing.assert_array_equal(plain.params, alone.params)


RECORDED = ("noise_scale", "noise_scale_gradient_square", "noise_scale_trace")


@pytest.mark.slow
def test_a_sweep_records_it():
    run = recording()
    alone = run({"learning_rate": 0.01, "batch_size": 3}, jax.random.key(1))
    swept = oj.sweep(run, {"learning_rate": [0.01, 0.02], "batch_size": [3]}, seeds=[0, 1])
    for name in RECORDED:
        found = swept[name].sel(learning_rate=0.01, batch_size=3, seed=1)
        np.testing.assert_allclose(found, alone.metrics[name], rtol=1e-9)


def test_blocks_are_unbiased_over_orders_of_the_data():
    found = []
    for seed in range(60):
        order = np.random.default_rng(seed).permutation(N)
        problem = with_noise_scale(oj.least_squares(X[order], TARGETS[order]), 4, groups=5)
        values = METRICS(problem.metrics, W, problem.data)
        found.append([values[f"noise_scale_{part}"] for part in ("gradient_square", "trace")])
    found = np.array(found)
    exact = np.array([G @ G, np.trace(SIGMA)])
    assert np.all(np.abs(found.mean(0) - exact) < 4 * found.std(0) / np.sqrt(60))
    whole = with_noise_scale(PROBLEM, 4)
    square = METRICS(whole.metrics, W, whole.data)["noise_scale_gradient_square"]
    np.testing.assert_allclose(square, G @ G, rtol=1e-12)


METRICS = jax.jit(lambda of, w, data: of(w, (), data, {}), static_argnums=0)


def test_float32_stays_so():
    problem = oj.least_squares(np.float32(X), np.float32(TARGETS))
    found = jax.eval_shape(lambda k: two_batch_noise_scale(problem, np.float32(W), k), KEY)
    assert {found.value.dtype, found.low.dtype, found.trace.dtype} == {jnp.dtype("float32")}
    exact = per_example_noise_scale(problem, np.float32(W), exact=True)
    np.testing.assert_allclose(exact.value, SIMPLE, rtol=1e-4)  # float32


KEY = jax.random.key(0)
QUADRATIC = oj.quadratic([1.0], [1.0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: two_batch(2.0, 1.0, 8, 8), "batch_size is 8 and large_batch_size 8"),
        (lambda: two_batch(2.0, 1.0, 1.5, 8), "batch_size is 1.5: expected a whole"),
        (lambda: two_batch(-2.0, 1.0, 1, 8), "small holds -2: expected at least 0"),
        (lambda: two_batch([2.0, np.nan], [1.0, 1.0], 1, 8), "small holds nan at"),
        (lambda: two_batch([2.0, 1.0], [1.0], 1, 8), r"small has shape \(2,\) and large \(1,\)"),
        (lambda: noise_scale(two_batch([2.0], [1.0], 1, 8)), "1 pair of estimates"),
        (lambda: two_batch_noise_scale(PROBLEM, W, KEY, pairs=1), "pairs is 1"),
        (lambda: two_batch_noise_scale(PROBLEM, W, KEY, groups=1), "groups is 1"),
        (lambda: two_batch_noise_scale(PROBLEM, W, KEY, confidence=95), "confidence is 95"),
        (lambda: two_batch_noise_scale(PROBLEM, W, KEY, confidence="x"), "confidence is 'x'"),
        (lambda: two_batch("a", 1.0, 1, 2), "small is 'a': expected real numbers"),
        (lambda: two_batch_noise_scale(PROBLEM, W[:2], KEY), "params have shapes"),
        (lambda: two_batch_noise_scale(None, W, KEY), "problem is None"),
        (lambda: per_example_noise_scale(PROBLEM, W, examples=5), "give a key"),
        (lambda: per_example_noise_scale(QUADRATIC, W[:1]), "quadratic has no examples"),
        (lambda: with_noise_scale(QUADRATIC), "quadratic has no examples"),
        (lambda: with_noise_scale(PROBLEM, 13), "2 groups of batch_size 13 are 26"),
        (lambda: with_noise_scale(normed()), "has batch statistics"),
        (lambda: curvature_noise_scale(PROBLEM, W, KEY, groups=2), "groups is 2"),
        (lambda: full_curvature_noise_scale(PROBLEM, W, KEY, probes=1), "probes is 1"),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(UserError, match=says):
        call()
