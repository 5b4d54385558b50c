"""Fits find known laws and are no worse than SciPy's; intervals cover; outliers are seen."""

import itertools

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from optjax import scaling
from optjax.scaling import Hoffmann, KaplanND, KaplanNS, Power
from optjax.scaling.bootstrap import counts
from optjax.scaling.forms import FORMS
from optjax.scaling.minimise import _tile, lanes_of, memory
from optjax.support.errors import UserError
from optjax.support.machine import threads

RNG = np.random.default_rng(0)
TRUE = Hoffmann(1.5, 300.0, 900.0, 0.31, 0.36)  # lopsided on purpose
N = np.tile(np.geomspace(3e7, 1e10, 8), 5)
D = np.repeat(np.geomspace(5e8, 2e11, 5), 8) * N**0.1 / 7
S = np.repeat(np.geomspace(1e3, 3e5, 5), 8)
EXACT = 1.5 + 300 * N**-0.31 + 900 * D**-0.36
NOISY = scaling.runs(EXACT * np.exp(0.004 * RNG.standard_t(3, 40)), N, D)


@pytest.fixture(scope="module")
def noisy():
    found = scaling.fit(NOISY)
    return found, scaling.bootstrap(found, 300, jax.random.key(1))


def by_hand(theta, w, points=NOISY):
    """The objective, written another way: θ = (log A, log B, log E, α, β)."""
    a, b, e, alpha, beta = theta
    terms = [a - alpha * np.log(points.N), b - beta * np.log(points.D), np.full(len(w), e)]
    r = scipy.special.logsumexp(terms, axis=0) - np.log(points.loss)
    return float(w @ scipy.special.huber(1e-3, r))


def parameters(law, i=()):
    E, A, B, alpha, beta = (np.asarray(x)[i] for x in law)
    return np.array([np.log(A), np.log(B), np.log(E), alpha, beta])


@pytest.mark.parametrize(
    ("name", "law", "sizes"),
    [
        ("hoffmann", TRUE, {"N": N, "D": D}),
        ("power-n", Power(8.8e13, 0.076), {"N": N}),
        pytest.param(
            *("power-d-floor", Power(4e9, 0.4, 1.2), {"D": D}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("kaplan-nd", KaplanND(6.4e13, 1.8e13, 0.076, 0.103), {"N": N, "D": D}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("kaplan-ns", KaplanNS(6.5e13, 2.1e3, 0.077, 0.76), {"N": N, "S": S}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["hoffmann", "power-n", "power-d-floor", "kaplan-nd", "kaplan-ns"],
)
def test_exact_points_give_their_law_back(name, law, sizes):
    points = scaling.runs(FORMS[name].loss(law, *sizes.values()), **sizes)
    found = scaling.fit(points, name)
    assert found.objective < 1e-16
    for got, true in zip(found.law, law, strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-5)
    again = FORMS[name].to_law(FORMS[name].from_law(found.law, found.means), found.means)
    np.testing.assert_allclose(again, found.law, rtol=1e-9)


@pytest.mark.parametrize("name", ["hoffmann", "kaplan-nd"])
def test_the_derivatives_of_the_objective_are_those_of_differences(name):
    form, rng = FORMS[name], np.random.default_rng(3)
    z, y, w = rng.normal(size=(2, 9)), rng.normal(size=9), rng.integers(0, 3, 9) + 0.5
    theta, delta = np.array([0.2, -0.3, 0.5, 0.7, 0.4])[: form.parameters], 0.6

    parts = jax.jit(lambda theta: form.parts(theta, z, y, w, delta))

    def value(theta):
        r = np.asarray(form.log_loss(theta, z)) - y
        return w @ scipy.special.huber(delta, r)

    found = parts(theta)
    np.testing.assert_allclose(found.value, value(theta), rtol=1e-12)
    np.testing.assert_allclose(
        found.gradient, scipy.optimize.approx_fprime(theta, value, 1e-7), atol=1e-5
    )
    for i, unit in enumerate(np.eye(len(theta))):
        above, below = parts(theta + 1e-6 * unit), parts(theta - 1e-6 * unit)
        slope = (above.gradient - below.gradient) / 2e-6
        np.testing.assert_allclose(found.hessian[i], slope, atol=1e-7)
    # The majoriser is that of least squares with weights min(1, δ/|r|).
    r = np.asarray(form.log_loss(theta, z)) - y
    jacobian = np.asarray(jax.jacfwd(form.log_loss)(theta, z))
    scaled = w * np.minimum(1, delta / np.abs(r))
    np.testing.assert_allclose(found.majoriser, jacobian.T @ np.diag(scaled) @ jacobian, rtol=1e-10)


def test_a_fit_is_no_worse_than_scipys_from_a_grid(noisy):
    found, _ = noisy
    ones = np.ones(40)
    np.testing.assert_allclose(by_hand(parameters(found.law), ones), found.objective, rtol=1e-9)
    np.testing.assert_allclose(scaling.objective(NOISY, found.law), found.objective, rtol=1e-9)
    starts = itertools.product((5, 8), (5, 10), (0.0, 0.5), (0.2, 0.5), (0.2, 0.5))
    ends = [
        scipy.optimize.minimize(
            lambda t: 1e3 * by_hand(t, ones), start, method="L-BFGS-B",
            options={"maxiter": 300}, bounds=[(-30, 60)] * 3 + [(0, 3)] * 2,
        ).fun / 1e3
        for start in itertools.islice(starts, 0, None, 4)
    ]  # fmt: skip
    assert found.objective <= min(ends) * (1 + 1e-9)
    assert found.converged
    assert found.agreeing > 0.3
    np.testing.assert_allclose(found.residuals, np.log(NOISY.loss) - np.log(
        found.law.E + found.law.A * N**-found.law.alpha + found.law.B * D**-found.law.beta
    ), atol=1e-9)  # fmt: skip


def test_refits_are_no_worse_than_scipys_from_the_same_start(noisy):
    found, refits = noisy
    assert refits.failed == 0
    w = counts(jax.random.key(1), 0, 12, 40)
    worse = 0
    for i, row in enumerate(w.astype(float)):
        np.testing.assert_allclose(
            by_hand(parameters(refits.law, i), row), refits.objective[i], rtol=1e-7
        )
        end = scipy.optimize.minimize(
            *(lambda t, row=row: 1e3 * by_hand(t, row), parameters(found.law)),
            method="Nelder-Mead", options={"maxfev": 4000, "fatol": 1e-12},
        )  # fmt: skip
        worse += refits.objective[i] > end.fun / 1e3 * (1 + 1e-6)
    assert worse == 0


def test_resamples_are_multinomial_and_prefixes_of_more():
    few, many = counts(jax.random.key(4), 0, 5, 7), counts(jax.random.key(4), 0, 700, 7)
    np.testing.assert_array_equal(few, many[:5])
    np.testing.assert_array_equal(counts(jax.random.key(4), 3, 2, 7), many[3:5])
    assert (many.sum(axis=1) == 7).all()
    # Each count is Binomial(7, 1/7): mean 1, variance 6/7; within 4 standard errors.
    assert np.abs(many.mean(axis=0) - 1).max() < 4 * np.sqrt(6 / 7 / 700)
    assert abs(many.var() - 6 / 7) < 4 * 1.5 / np.sqrt(700 * 7)


def test_intervals_hold_the_truth_and_the_derived_exponents(noisy):
    found, refits = noisy
    made = scaling.intervals(refits)
    for name, true in TRUE._asdict().items():
        assert made[name].low < true < made[name].high
        assert made[name].value == getattr(found.law, name)
        assert made[name].error > 0
    a = refits.law.beta / (refits.law.alpha + refits.law.beta)
    np.testing.assert_allclose([made["a"].low, made["a"].high], np.percentile(a, [2.5, 97.5]))
    np.testing.assert_allclose(made["a"].error, a.std(ddof=1))
    np.testing.assert_allclose(made["a"].value + made["b"].value, 1)
    at = scaling.predictions(refits, [1e9], [2e10])
    E, A, B, alpha, beta = refits.law
    np.testing.assert_allclose(at[:, 0], E + A * 1e9**-alpha + B * 2e10**-beta, rtol=1e-12)


@pytest.mark.slow
def test_standard_errors_are_those_of_new_samples():
    """Power law, no floor: the bootstrap's error beside the spread of 300 fits to new noise."""
    x = np.geomspace(1e6, 1e9, 30)
    z = np.log(x) - np.log(x).mean()
    rng = np.random.default_rng(2)
    log_loss = 0.1 * (np.log(1e13) - np.log(x)) + 0.02 * rng.normal(size=(300, 30))
    slopes = []
    for row in log_loss:
        # Nearly least absolute deviations: by linear programming, independent of our fit.
        end = scipy.optimize.linprog(
            np.r_[0, 0, np.ones(60)],
            A_eq=np.c_[np.ones(30), -z, np.eye(30), -np.eye(30)], b_eq=row,
            bounds=[(None, None)] * 2 + [(0, None)] * 60,
        )  # fmt: skip
        slopes.append(end.x[1])
    errors = [
        scaling.intervals(scaling.bootstrap(scaling.fit(scaling.runs(np.exp(row), x), "power-n"),
                                            200))["exponent"].error
        for row in log_loss[:12]
    ]  # fmt: skip
    # 12 of them vary by some 20 % each; 300 fits give the spread to 4 %.
    assert 0.75 < np.mean(errors) / np.std(slopes) < 1.35


def test_outliers_move_the_fit_and_dropping_them_does_not():
    spoilt = NOISY._replace(loss=NOISY.loss.copy())
    low = np.argsort(NOISY.loss)[[2, 5]]
    spoilt.loss[low] = NOISY.loss.max() * np.array([1.3, 1.5])
    without = scaling.outliers(spoilt, "hoffmann", 3)
    # Without both it is as good a minimum of the clean runs as can be found from there.
    w = (~np.isin(np.arange(40), low)).astype(float)
    theta = parameters(without.law, 2)
    np.testing.assert_allclose(by_hand(theta, w, spoilt), without.objective[2], rtol=1e-8)
    end = scipy.optimize.minimize(
        lambda t: 1e3 * by_hand(t, w, spoilt), parameters(scaling.fit(NOISY).law),
        method="Nelder-Mead", options={"maxfev": 4000, "fatol": 1e-12},
    )  # fmt: skip
    assert without.objective[2] <= end.fun / 1e3 * (1 + 1e-6)
    np.testing.assert_allclose(without.objective[0], scaling.fit(spoilt).objective, rtol=1e-9)
    assert without.objective[0] > 2 * without.objective[2]
    assert (np.diff(without.objective) <= 0).all()


@pytest.mark.slow
def test_the_fits_without_outliers_are_as_good_as_fits_of_their_own():
    """Few runs, of which many are dropped: starts ranked on all of them miss minima."""
    rng = np.random.default_rng(4)
    n, d = 10 ** rng.uniform(7, 10, 20), 10 ** rng.uniform(8, 11, 20)
    loss = (1.5 + 300 * n**-0.31 + 900 * d**-0.36) * np.exp(0.01 * rng.standard_t(3, 20))
    points = scaling.runs(loss, n, d)
    without = scaling.outliers(points, "hoffmann", 13)
    assert (np.diff(without.objective) <= 0).all()
    for k in (6, 10, 13):
        alone = scaling.fit(scaling.drop_highest(points, k)).objective
        assert without.objective[k] <= alone * 1.005


def test_leaving_one_run_out_is_the_fit_without_it(noisy):
    found, _ = noisy
    without = scaling.leave_one_out(found)
    i = int(np.argmax(np.abs(without.law.beta - found.law.beta)))
    w = (np.arange(40) != i).astype(float)
    theta = parameters(without.law, i)
    np.testing.assert_allclose(by_hand(theta, w), without.objective[i], rtol=1e-8)
    assert without.objective[i] <= by_hand(parameters(found.law), w)
    assert without.converged.all()


@pytest.mark.slow
def test_larger_runs_are_foretold_with_intervals_that_cover():
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(20):
        points = scaling.runs(EXACT * np.exp(0.01 * rng.normal(size=40)), N, D)
        foretold = scaling.extrapolate(points, share=0.6, resamples=150)
        assert len(foretold.predicted) == 16
        assert foretold.fit.runs.C.max() <= foretold.held_out.C.min()
        assert (foretold.low < foretold.high).all()
        off = np.log(foretold.held_out.loss / foretold.predicted)
        np.testing.assert_allclose(foretold.error, np.sqrt(np.mean(off**2)))
        np.testing.assert_allclose(foretold.bias, np.mean(off))
        covered.append(foretold.covered)
    # Errors of one data set's law are shared, so 96 points are worth far fewer; residuals of a fit
    # are somewhat too small.
    assert 0.75 <= np.mean(covered) <= 1


def test_fits_are_in_float64_in_a_float32_process(noisy):
    found, _ = noisy
    jax.config.update("jax_enable_x64", False)
    try:
        again = scaling.fit(NOISY)
        drawn = counts(jax.random.key(1), 0, 3, 40)
    finally:
        jax.config.update("jax_enable_x64", True)
    assert again.objective == pytest.approx(found.objective, rel=1e-12)
    np.testing.assert_array_equal(drawn, counts(jax.random.key(1), 0, 3, 40))


@pytest.mark.slow
def test_memory_is_foretold():
    form, n = FORMS["hoffmann"], 240
    lanes, queue = lanes_of(n), 16 * lanes_of(n)
    shapes = ((2, n), (n,), (queue, n), (queue, 5))
    arrays = [jax.ShapeDtypeStruct(shape, np.float64) for shape in shapes]
    count = jax.ShapeDtypeStruct((), np.int32)
    made = _tile.lower(form, lanes, *arrays, count, 1e-3).compile().memory_analysis()
    used = made.temp_size_in_bytes + made.argument_size_in_bytes
    tiles = threads()
    assert used <= memory(form, n) / tiles <= 4 * used
    assert memory(form, 10**6) / tiles < 1e9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scaling.fit(NOISY.take(slice(5))), "5 runs: the law 'hoffmann' has 5 param"),
        (lambda: scaling.fit(NOISY, "hofman"), "unknown law 'hofman'; did you mean 'hoffmann'"),
        (lambda: scaling.fit(NOISY, "kaplan-ns"), "needs numbers of steps S"),
        (lambda: scaling.fit(NOISY._replace(N=N * 0 + 1e9)), "all are equal"),
        (lambda: scaling.fit(NOISY._replace(D=20 * N)), "N and D follow each other exactly"),
        (lambda: scaling.fit(NOISY._replace(loss=N * 0 + 2)), "all losses are equal"),
        (lambda: scaling.fit(NOISY, delta=0), "delta is 0"),
        (lambda: scaling.drop_highest(NOISY, 40), "drop_highest is 40 of 40 runs"),
        (lambda: scaling.runs([1.0, -2.0], [1.0, 2.0]), r"loss\[1\] is -2"),
        (lambda: scaling.runs([1.0, np.nan], [1.0, 2.0]), r"loss holds nan at \(1,\)"),
        (lambda: scaling.runs([1.0, 2.0], [1.0]), "N has shape"),
        (lambda: scaling.runs(["a"]), r"loss is \['a'\]: expected real numbers"),
        (lambda: scaling.extrapolate(NOISY, share=1.5), "share is 1.5"),
        (lambda: scaling.extrapolate(NOISY, by="S"), "by is 'S'"),
    ],
)
def test_a_mistake_is_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_bootstrap_of_fewer_than_two_is_a_mistake(noisy):
    with pytest.raises(UserError, match="resamples is 1"):
        scaling.bootstrap(noisy[0], 1)


@pytest.mark.needs_data
def test_hoffmanns_points_give_the_known_fit(data_folder):
    file = data_folder / "chinchilla_points.csv"
    if not file.is_file():
        pytest.skip("OPTJAX_DATA has no chinchilla_points.csv")
    every, where = scaling.read_runs(file)
    assert where == {"N": "Model Size", "C": "Training FLOP", "loss": "loss"}
    points = scaling.drop_highest(every, 5)
    assert len(points.loss) == 240
    found = scaling.fit(points)
    known = Hoffmann(1.8172, 477.8, 2143, 0.3473, 0.3672)
    for got, true in zip(found.law, known, strict=True):
        assert float(f"{got:.{5 if true == known.E else 4}g}") == true
    assert f"{found.objective:.6g}" == "0.00101827"
    assert f"{scaling.objective(points, scaling.HOFFMANN_2022):.3g}" == "0.00412"
    refits = scaling.bootstrap(found, 4000)
    assert refits.failed == 0
    made = scaling.intervals(refits)
    # Published standard errors: 0.03, 124.58, 1293.23, 0.02, 0.02, of 4,000 other resamples.
    for name, error in {"E": 0.03, "A": 124.58, "alpha": 0.015, "beta": 0.02}.items():
        assert made[name].error == pytest.approx(error, rel=0.25)
    assert made["a"].low < 0.5 < made["a"].high
    without = scaling.outliers(every, "hoffmann", 5)
    assert round(without.law.beta[0], 3) == 0.453
    np.testing.assert_allclose(without.law.beta[5], found.law.beta, rtol=1e-6)
