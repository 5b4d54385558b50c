"""Steps to a target: against stepping, against the published table, and the best rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import central_difference

from optjax.support.errors import UserError
from optjax.theory.moments import risks
from optjax.theory.noisy_quadratic import noisy_quadratic
from optjax.theory.quadratic_steps import fewest_steps, steps_to
from optjax.theory.quadratic_table import quadratic_steps

H = 1 / np.arange(1, 31.0)
SIZES = (4, 64, 1024, 16384, 2**20)
TABLE = {
    0.0: (1_515_845, 95_989, 10_371, 7_214, 7_039),
    0.5: (347_979, 21_855, 1_371, 107, 84),
}  # of the whole spectrum 1/i, i ≤ 10⁴, over the rates below
GRID = np.logspace(-5, 0.5, 100)


def stepped(model, target, rate, most=4000):
    """The first step at or below the target, one step after the other."""
    below = np.flatnonzero(np.asarray(risks(model, np.full(most, rate))) <= target)
    return float(below[0]) if below.size else np.inf


def test_the_exact_table_to_the_step():
    h = 1 / np.arange(1, 10_001.0)
    found = quadratic_steps(h, target=0.01, batch_sizes=SIZES, rates=GRID, powers=list(TABLE))
    assert found.min(-1).tolist() == [list(row) for row in TABLE.values()]


@pytest.mark.slow
def test_optimised_rates_need_fewer_steps_than_the_best_of_the_grid():
    h = 1 / np.arange(1, 10_001.0)

    @jax.jit
    def compared(size, power):
        model = noisy_quadratic(h, batch_size=size, power=power)
        grid = jax.lax.map(lambda rate: steps_to(model, 0.01, rate).crossing, jnp.asarray(GRID))
        return fewest_steps(model, 0.01), grid.min()

    for power, row in TABLE.items():
        for size, best_of_grid in zip(SIZES, row, strict=True):
            best, crossing = compared(float(size), power)
            assert best.steps <= best_of_grid
            assert best.crossing < crossing
            # A step is the least that a count can fall by: there the grid had found it.
            assert best.steps < best_of_grid or crossing - best.crossing < 1
            assert abs(best.gradient) < 2e-3


WAYS = [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True, "average": 0.9}]
COUNT = jax.jit(steps_to)
RATES = (0.01, 0.3, 1.9)


@pytest.mark.parametrize("way", WAYS)
def test_counts_are_those_of_stepping(way):
    for size in (2, 50, 1e6):
        model = noisy_quadratic(H, batch_size=size, power=0.3, **way)
        for rate in RATES:
            assert COUNT(model, 0.05, rate).steps == stepped(model, 0.05, rate), (size, rate)


def test_a_dip_of_sgd_is_not_missed():
    """The sharp coordinate falls and the flat one rises: the risk is below for some steps only."""
    model = noisy_quadratic([1.0, 0.02], [1e-4, 1.0], [4.0, 0.001], batch_size=1)
    along = np.asarray(risks(model, np.full(400, 0.05)))
    target = along.min() * 1.0001
    below = np.flatnonzero(along <= target)
    assert len(below) < 3
    assert below[0] > 16
    assert COUNT(model, target, 0.05).steps == float(below[0])
    assert COUNT(model, along.min() * 0.9999, 0.05).steps == np.inf
    for goal, count in ((target, float(below[0])), (along.min() * 0.9999, np.inf)):
        found = quadratic_steps(
            model.h, model.c, model.s0, target=goal, batch_sizes=[1], rates=[0.05]
        )
        assert found.item() == count


def test_a_table_is_its_single_counts():
    rng = np.random.default_rng(3)
    h, c, s0 = rng.uniform(0.01, 2, 9), rng.uniform(0, 2, 9), rng.uniform(0, 3, 9)
    axes = {"batch_sizes": [1, 30.0, 1e5], "rates": [0.01, 0.2, 0.7, 0.999, 1.5], "powers": [0, 1]}
    found = quadratic_steps(h, c, s0, target=0.1, **axes)
    for i, power in enumerate(axes["powers"]):
        for j, size in enumerate(axes["batch_sizes"]):
            model = noisy_quadratic(h, c, s0, batch_size=size, power=power)
            one = [float(COUNT(model, 0.1, rate).steps) for rate in axes["rates"]]
            assert found[i, j].tolist() == one
    assert np.isfinite(found).any()
    assert np.isinf(found).any()


def test_the_crossing_is_differentiable():
    def crossing(size, rate, power):
        model = noisy_quadratic(H, batch_size=size, power=power, momentum=0.5)
        return steps_to(model, 0.05, rate).crossing

    at = (60.0, 0.11, 0.2)
    slopes = jax.jit(jax.grad(crossing, argnums=(0, 1, 2)))(*at)
    crossing = jax.jit(crossing)
    for i, slope in enumerate(slopes):
        moved = [central_difference(lambda x, i=i: crossing(*at[:i], x, *at[i + 1 :]), at[i], 1e-6)]
        np.testing.assert_allclose(slope, moved[0], rtol=1e-5)


FEWEST = jax.jit(fewest_steps)


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"momentum": 0.9}])
def test_no_rate_of_a_fine_grid_needs_fewer_steps(way):
    counts = jax.jit(jax.vmap(lambda m, r: steps_to(m, 0.02, r), (None, 0)))
    for size in (3, 1e4):
        model = noisy_quadratic(H, batch_size=size, **way)
        best = FEWEST(model, 0.02)
        grid = np.geomspace(best.rate / 30, best.rate * 8, 801)
        assert best.steps <= counts(model, grid).steps.min()
        np.testing.assert_allclose(best.steps, COUNT(model, 0.02, best.rate).steps)


@pytest.mark.slow
def test_the_best_rate_is_differentiable_by_the_model():
    def rate(size):
        return fewest_steps(noisy_quadratic(H, batch_size=size), 0.02).rate

    slope = central_difference(jax.jit(rate), 30.0, 1e-3)
    np.testing.assert_allclose(jax.grad(rate)(30.0), slope, rtol=1e-4)


def test_what_never_arrives_is_infinite():
    far = noisy_quadratic(H, batch_size=1)
    assert FEWEST(far, 1e-9).steps == np.inf
    assert COUNT(far, 0.1, 50.0).steps == np.inf
    assert COUNT(far, 100.0, 0.1).steps == 0
    # In float32 one more than the largest number of steps is that number.
    single = noisy_quadratic(np.float32([1.0, 0.1]), batch_size=4)
    assert fewest_steps(single, 1e-12).steps == np.inf
    assert steps_to(noisy_quadratic([1.0], [0.0]), 0.01, 0.01, max_steps=50).steps == np.inf


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: steps_to(noisy_quadratic(H), 0.0, 0.1), "target holds 0: expected above 0"),
        (lambda: steps_to(noisy_quadratic(H), 0.1, -1), "rate holds -1"),
        (lambda: steps_to(noisy_quadratic(H), 0.1, 0.1, max_steps=0), "max_steps is 0"),
        (lambda: fewest_steps(noisy_quadratic(H), 0.1, max_steps=2**31), "expected at most 2"),
        (lambda: fewest_steps(noisy_quadratic(H), [0.1]), r"target has shape \(1,\)"),
        (
            lambda: quadratic_steps(H, target=0.1, batch_sizes=[0], rates=[0.1]),
            "batch_sizes holds 0",
        ),
        (lambda: quadratic_steps(H, target=0.1, batch_sizes=[1], rates=0.1), "rates has shape"),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(UserError, match=says):
        call()
