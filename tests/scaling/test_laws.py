"""The published laws and allocations against NumPy written another way, and against a search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from oracles import central_difference

from optjax import scaling
from optjax.scaling import (
    BESIROGLU_2024,
    HOFFMANN_2022,
    KAPLAN_BATCH,
    KAPLAN_D,
    KAPLAN_FRONTIER,
    KAPLAN_N,
    KAPLAN_ND,
    KAPLAN_NS,
    PF_DAY,
)
from optjax.support.errors import UserError

N, D, S = 3e8, 7e9, 4e4
# (function, law, sizes, the same by hand with the constants of the papers)
LAWS = [
    (
        *(scaling.hoffmann_loss, HOFFMANN_2022, (N, D)),
        1.69 + 406.4 / np.exp(0.34 * np.log(N)) + 410.7 / np.exp(0.28 * np.log(D)),
    ),
    (
        *(scaling.hoffmann_loss, BESIROGLU_2024, (N, D)),
        1.8172 + 482.01 / np.exp(0.3478 * np.log(N)) + 2085.43 / np.exp(0.3658 * np.log(D)),
    ),
    (scaling.power_loss, KAPLAN_N, (N,), np.exp(0.076 * (np.log(8.8e13) - np.log(N)))),
    (scaling.power_loss, KAPLAN_D, (D,), np.exp(0.095 * (np.log(5.4e13) - np.log(D)))),
    (
        *(scaling.kaplan_nd_loss, KAPLAN_ND, (N, D)),
        np.exp(
            0.103 * np.log(np.exp(0.076 / 0.103 * np.log(6.4e13 / N)) + np.exp(np.log(1.8e13 / D)))
        ),
    ),
    (
        *(scaling.kaplan_ns_loss, KAPLAN_NS, (N, S)),
        np.exp(0.077 * np.log(6.5e13 / N)) + np.exp(0.76 * np.log(2.1e3 / S)),
    ),
    (scaling.critical_batch, KAPLAN_BATCH, (3.0,), 2e8 / 3.0 ** (1 / 0.21)),
]


@pytest.mark.parametrize(
    ("function", "law", "sizes", "by_hand"),
    LAWS,
    ids=[f"{f.__name__}-{i}" for i, (f, *_) in enumerate(LAWS)],
)
def test_laws_are_the_printed_ones_and_their_slopes_those_of_differences(
    function, law, sizes, by_hand
):
    np.testing.assert_allclose(function(law, *sizes), by_hand, rtol=1e-12)
    slopes = jax.grad(lambda law: function(law, *sizes))(type(law)(*map(float, law)))
    for name, value in law._asdict().items():
        if value == 0:
            continue
        expected = central_difference(
            lambda x, name=name: float(function(law._replace(**{name: x}), *sizes)),
            value,
            1e-4 * value,
        )
        np.testing.assert_allclose(getattr(slopes, name), expected, rtol=1e-5)
    many = jax.vmap(lambda x: function(law, *(x * size for size in sizes)))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(many[0], by_hand, rtol=1e-12)


def test_steps_and_batches_trade_off_as_kaplan_says():
    loss = 2.7
    B_crit = float(scaling.critical_batch(KAPLAN_BATCH, loss))
    S_min = scaling.least_steps(1e5, B_crit / 3, B_crit)
    np.testing.assert_allclose(S_min, 1e5 / 4)
    # (S/S_min − 1)(E/E_min − 1) = 1 with E = BS and E_min = B_crit S_min
    np.testing.assert_allclose((1e5 / S_min - 1) * (1e5 / 3 / S_min - 1), 1, rtol=1e-12)
    np.testing.assert_allclose(scaling.training_flops(N, 1e6, 1e3), 6 * N * 1e9)


@pytest.mark.parametrize("law", [HOFFMANN_2022, BESIROGLU_2024])
def test_hoffmanns_allocation_is_the_best_of_a_search(law):
    C = 3e22
    best = scaling.allocate_hoffmann(law, C)
    np.testing.assert_allclose(6 * best.N * best.D, C, rtol=1e-12)
    found = scipy.optimize.minimize_scalar(
        lambda log_n: float(law.E + law.A * np.exp(-law.alpha * log_n)
        + law.B * (C / 6 / np.exp(log_n)) ** -law.beta),
        bounds=(15, 30), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    np.testing.assert_allclose(np.log(best.N), found.x, atol=1e-6)
    np.testing.assert_allclose(best.loss, found.fun, rtol=1e-12)
    grown = jax.jit(jax.vmap(lambda c: scaling.allocate_hoffmann(law, c).N))(
        C * jnp.array([1.0, 10.0])
    )
    power = scaling.hoffmann_exponents(law).N
    np.testing.assert_allclose(np.log10(grown[1] / grown[0]), power, rtol=1e-12)


@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_kaplans_allocation_is_the_best_of_a_search(ratio):
    """The loss that N reaches is implicit: B_crit depends on it. A search knows no closed form."""
    C = 5e20

    def loss_of(log_n):
        n = np.exp(log_n)
        floor = (6.5e13 / n) ** 0.077

        def gap(loss):
            B_crit = 2e8 / loss ** (1 / 0.21)
            S = C / (6 * n * ratio * B_crit)
            return floor + (2.1e3 / (S / (1 + 1 / ratio))) ** 0.76 - loss

        return scipy.optimize.brentq(gap, floor, 100, xtol=1e-14)

    found = scipy.optimize.minimize_scalar(
        loss_of, bounds=(18, 26), method="bounded", options={"xatol": 1e-9}
    )
    best = scaling.allocate_kaplan(C, ratio=ratio)
    np.testing.assert_allclose(np.log(best.N), found.x, atol=1e-4)
    np.testing.assert_allclose(best.loss, found.fun, rtol=1e-9)
    np.testing.assert_allclose(6 * best.N * best.batch * best.steps, C, rtol=1e-12)
    np.testing.assert_allclose(best.D, best.batch * best.steps, rtol=1e-12)
    np.testing.assert_allclose(
        best.loss, scaling.kaplan_ns_loss(KAPLAN_NS, best.N, best.least_steps), rtol=1e-12
    )
    B_crit = scaling.critical_batch(KAPLAN_BATCH, best.loss)
    np.testing.assert_allclose(
        best.least_steps, scaling.least_steps(best.steps, best.batch, B_crit), rtol=1e-12
    )


def test_kaplans_exponents_are_those_of_its_allocations():
    powers = scaling.kaplan_exponents()
    small, large = scaling.allocate_kaplan(1e20), scaling.allocate_kaplan(1e23)
    for name, power in (("N", powers.N), ("batch", powers.B), ("steps", powers.S), ("D", powers.D)):
        ratio = getattr(large, name) / getattr(small, name)
        np.testing.assert_allclose(np.log10(ratio) / 3, power, rtol=1e-10)
    np.testing.assert_allclose(powers.N + powers.B + powers.S, 1)
    np.testing.assert_allclose(np.log10(large.loss / small.loss) / 3, -powers.L, rtol=1e-10)
    assert round(powers.N, 2) == 0.68
    printed = scaling.allocate_frontier(2 * PF_DAY * 100)
    np.testing.assert_allclose(printed.N, 1.3e9 * 100**0.73, rtol=1e-12)
    np.testing.assert_allclose(printed.batch, 2.0e6 * 100**0.24, rtol=1e-12)
    np.testing.assert_allclose(printed.least_steps, 5.4e3 * 100**0.03, rtol=1e-12)


def test_the_papers_contradictions_are_found_by_computing(monkeypatch):
    checks = {check.what: check for check in scaling.contradictions()}
    wrong = {what for what, check in checks.items() if check.contradicts}
    assert wrong == {
        "Kaplan: N ∝ C^p",
        "Kaplan: S ∝ C^p",
        "Hoffmann, approach 1 (training curves): N ∝ C^a",
        "Hoffmann, approach 2 (equal FLOPs): N ∝ C^a",
    }
    for check in checks.values():
        assert check.low < check.computed < check.high
    # Had Kaplan printed what follows, nothing would be said.
    from optjax.scaling import allocate

    honest = KAPLAN_FRONTIER._replace(p_N=0.68, p_S=0.07)
    monkeypatch.setattr(allocate, "KAPLAN_FRONTIER", honest)
    assert not any(c.contradicts for c in scaling.contradictions() if c.what.startswith("Kaplan"))


@pytest.mark.parametrize("flops", [0.0, -1e20, np.nan, np.inf])
def test_a_budget_that_is_none_is_one_line(flops):
    for allocate in (
        lambda c: scaling.allocate_hoffmann(HOFFMANN_2022, c),
        scaling.allocate_kaplan,
        scaling.allocate_frontier,
    ):
        with pytest.raises(UserError, match="expected a finite number above 0"):
            allocate(flops)


def test_whole_numbers_are_as_good_as_floats():
    """An int32 has too few bits for tokens and operations."""
    np.testing.assert_allclose(scaling.training_flops(10**9, 10**6, 10**4), 6e19, rtol=1e-6)
    found = scaling.hoffmann_loss(HOFFMANN_2022, 70 * 10**9, 14 * 10**11)
    np.testing.assert_allclose(found, scaling.hoffmann_loss(HOFFMANN_2022, 70e9, 1.4e12))
    best = scaling.allocate_hoffmann(BESIROGLU_2024, 10**21)
    np.testing.assert_allclose(best.N, scaling.allocate_hoffmann(BESIROGLU_2024, 1e21).N)


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf"), "x"])
def test_a_ratio_that_is_none_is_one_line(ratio):
    for call in (scaling.allocate_kaplan, scaling.allocate_frontier):
        with pytest.raises(UserError, match=r"ratio is .*: expected a finite number above 0"):
            call(1e21, ratio=ratio)
