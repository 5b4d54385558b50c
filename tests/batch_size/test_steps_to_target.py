"""Steps to a target: synthetic ones of the law, the exact table, and one real sweep."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import xarray as xr

import optjax as oj
from optjax.batch_size.critical_batch_size import critical_batch_size
from optjax.batch_size.regimes import Regime, fitted_slope, local_slope, regime
from optjax.batch_size.steps_law import data_parallel, fit_critical_batch, goodness, law
from optjax.batch_size.steps_to_target import steps_table, steps_to_target
from optjax.batch_size.tuned_rates import least, tuned_rates
from optjax.run.core import Status
from optjax.support.errors import UserError

SIZES = 2.0 ** np.arange(0, 12, 1.5)
RATES = np.geomspace(1e-3, 3, 11)
S_MIN, B_CRIT = 100.0, 50.0
TRUE = S_MIN * (1 + B_CRIT / SIZES)
BEST = 0.1 * SIZES / (SIZES + B_CRIT) ** 0.8


def synthetic(rng, seeds, width=1.5):
    """Log-normal steps about the law; a seed's luck is partly common to all of its runs."""
    bowl = (np.log(RATES) - np.log(BEST)[:, None]) ** 2 / (2 * width**2)
    luck = 0.2 * rng.normal(size=(*bowl.shape, seeds)) + 0.1 * rng.normal(size=seeds)
    return TRUE[:, None, None] * np.exp(bowl[..., None] + luck)


def test_the_fit_is_that_of_another_search():
    rng = np.random.default_rng(0)
    steps = TRUE * np.exp(0.3 * rng.normal(size=(20, len(SIZES))))
    weights = rng.uniform(0.1, 3, len(SIZES))  # lopsided
    found = fit_critical_batch(SIZES, steps, weights)
    for i, y in enumerate(np.log(steps)):
        other = scipy.optimize.least_squares(
            lambda p, y=y: np.sqrt(weights) * (y - p[0] - np.log1p(np.exp(p[1]) / SIZES)),
            [np.log(S_MIN), np.log(B_CRIT)], xtol=1e-14, ftol=1e-14, gtol=1e-14,
        )  # fmt: skip
        np.testing.assert_allclose([found.S_min[i], found.B_crit[i]], np.exp(other.x), rtol=1e-6)
    np.testing.assert_allclose(found.E_min, found.S_min * found.B_crit, rtol=1e-12)


def test_the_fit_of_exact_steps_is_the_law_and_its_limits_are_said():
    found = fit_critical_batch(SIZES, TRUE)
    np.testing.assert_allclose(found, [S_MIN, S_MIN * B_CRIT, B_CRIT], rtol=1e-9)
    np.testing.assert_allclose(law(SIZES, found), TRUE, rtol=1e-12)
    S, E = law(SIZES, found), law(SIZES, found) * SIZES
    np.testing.assert_allclose((S / found.S_min - 1) * (E / found.E_min - 1), 1, rtol=1e-8)
    noisy = fit_critical_batch([1, 2, 4], [4000.0, 2000.0, 1000.0])
    assert (noisy.S_min, noisy.B_crit) == (0, np.inf)
    np.testing.assert_allclose(noisy.E_min, 4000, rtol=1e-3)
    flat = fit_critical_batch([1, 2, 4], [7.0, 7.0, 7.0])
    assert (flat.E_min, flat.B_crit) == (0, 0)
    np.testing.assert_allclose(flat.S_min, 7, rtol=1e-3)
    missing = np.where(np.arange(len(SIZES)) == 2, np.inf, TRUE)
    np.testing.assert_allclose(fit_critical_batch(SIZES, missing).B_crit, B_CRIT, rtol=1e-9)


def coverage(seeds, width, statistic, repeats=200):
    """The share of repeats whose intervals hold S_min, E_min, B_crit, and of those of the steps."""
    rng, hits, steps = np.random.default_rng(1), [], []
    truth = [S_MIN, S_MIN * B_CRIT, B_CRIT]
    for _ in range(repeats):
        found = critical_batch_size(
            steps_table(SIZES, RATES, synthetic(rng, seeds, width)),
            statistic=statistic,
            resamples=200,
        )
        ends = np.stack([found[f"{n}_interval"].values for n in ("S_min", "E_min", "B_crit")])
        hits.append((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
        ends = found.steps_interval.values
        steps.append(np.mean((ends[:, 0] <= TRUE) & (ends[:, 1] >= TRUE)))
    return np.mean(hits, 0), np.mean(steps)


@pytest.mark.parametrize(
    ("seeds", "width", "statistic"),
    [
        (5, 1.5, "median"),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in ((3, 1.5, "mean"), (8, 6.0, "median"), (8, 1.5, "mean"), (20, 6.0, "median"))
        ),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, width, statistic):
    # Width 6: rates that differ by little, where picking the best flatters most.
    laws, steps = coverage(seeds, width, statistic)
    assert np.all((laws >= 0.9) & (laws <= 1)), laws
    assert 0.9 <= steps <= 0.995, steps
    assert laws.mean() < 1


def test_picking_a_rate_flatters_and_the_other_seeds_say_by_how_much():
    rng = np.random.default_rng(2)
    bias, optimism = [], []
    for _ in range(100):
        table = steps_table(SIZES, RATES, synthetic(rng, 6, width=30.0))  # all rates alike
        found = tuned_rates(table, statistic="mean", resamples=0)
        bias.append(np.log(found.steps / TRUE).mean())
        optimism.append(np.log(found.optimism).mean())
    assert np.mean(bias) < -0.05
    # In the middle of the repeats the two cancel, within their standard error and the bowl's rise.
    rest = np.array(bias) + optimism
    assert abs(rest.mean()) < 3 * rest.std() / 10 + 0.02


def test_the_tuned_rate_is_the_vertex_and_stays_on_the_grid_at_a_cliff():
    x = np.log([0.1, 0.15, 0.4, 0.5])  # uneven
    at, value = least(x, 0.2 * (x - np.log(0.2)) ** 2 + 3)
    np.testing.assert_allclose([np.exp(at), value], [0.2, 3.0])
    at, value = least(x, np.array([3.2, 3.0, 2.9, np.inf]))
    np.testing.assert_allclose([np.exp(at), value], [0.4, 2.9])
    at, value = least(x, np.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose([np.exp(at), value], [0.1, 1.0])
    assert np.isnan(least(x, np.full(4, np.inf))[0])


def test_rates_are_those_of_fewest_steps_with_intervals_and_ends_are_said():
    steps = synthetic(np.random.default_rng(3), 8)
    found = critical_batch_size(steps_table(SIZES, RATES, steps))
    assert np.all(np.abs(np.log(found.rate / BEST)) < 0.8)  # of the next rate on the grid
    assert np.mean((found.rate_interval[:, 0] <= BEST) & (found.rate_interval[:, 1] >= BEST)) > 0.8
    assert not found.rate_end.any()
    cut = critical_batch_size(steps_table(SIZES, RATES[:6], steps[:, :6]))
    assert cut.rate_end.values[-1] == 1
    assert "the rate grid is too small" in cut.notes
    order = np.random.default_rng(0).permutation(len(SIZES))
    mixed = critical_batch_size(steps_table(SIZES[order], RATES[::-1], steps[order][:, ::-1]))
    xr.testing.assert_identical(mixed.drop_attrs(), found.drop_attrs())


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_censored_runs_never_make_a_sweep_look_better(statistic):
    steps = synthetic(np.random.default_rng(4), 9)
    whole = tuned_rates(steps_table(SIZES, RATES, steps), statistic=statistic, resamples=0)
    for budget in (5000, 3000, 1500, 600):
        lost = steps > budget
        table = steps_table(SIZES, RATES, np.minimum(steps, budget), lost)
        cut = tuned_rates(table, statistic=statistic, resamples=0)
        assert np.all(cut.steps >= whole.steps * (1 - 2**-3))  # the vertex' share at most
        known = np.isfinite(cut.steps)
        assert np.all(cut.share[known] >= 0.8)
        assert known[-1]
        # Where all is known that matters, nothing has changed.
        clear = (steps < budget).all((1, 2))
        np.testing.assert_array_equal(cut.steps[clear], whole.steps[clear])
    assert not known[0]
    # With one rate there is no vertex: no size gets better at all.
    one = steps[:, 5:6]
    full = tuned_rates(steps_table(SIZES, [1.0], one), statistic=statistic, resamples=0)
    cut = tuned_rates(
        steps_table(SIZES, [1.0], np.minimum(one, 900), one > 900), statistic=statistic, resamples=0
    )
    assert np.all(cut.steps >= full.steps)


def test_a_rate_at_which_runs_diverge_is_eligible_only_if_asked():
    steps = np.full((3, 2, 4), 10.0)
    steps[:, 1] = [5.0, 5.0, 5.0, np.inf]
    table = steps_table([1, 2, 4], [0.1, 0.2], steps)
    assert tuned_rates(table, resamples=0).steps.tolist() == pytest.approx([10, 10, 10])
    assert tuned_rates(table, resamples=0, may_fail=0.25).steps.tolist() == pytest.approx([5, 5, 5])


def test_a_batch_that_mostly_fails_has_no_upper_end_and_one_that_all_fail_is_left_out():
    steps = synthetic(np.random.default_rng(5), 8)
    lost = np.zeros(steps.shape, bool)
    lost[0] = True
    lost[1, :, 0] = True  # one of eight: some resamples draw it too often
    found = critical_batch_size(steps_table(SIZES, RATES, steps, lost))
    assert np.isinf(found.steps[0])
    assert found.regime[0] == Regime.UNKNOWN
    assert np.isfinite(found.steps[1])
    assert np.isinf(found.steps_interval[1, 1])
    assert 0 < found.steps_interval[1, 0] < found.steps[1]
    assert "batch 1: too few runs reach" in found.notes
    assert np.isfinite(found.B_crit_interval).all()


def test_regimes_are_those_of_the_analytic_slope():
    sizes = np.geomspace(1, 1e6, 61)
    steps = law(sizes, fit_critical_batch(SIZES, TRUE))
    slope = -1 / (1 + sizes / B_CRIT)
    np.testing.assert_allclose(fitted_slope(sizes, B_CRIT), slope, rtol=1e-12)
    np.testing.assert_allclose(local_slope(sizes, steps)[1:-1], slope[1:-1], atol=5e-3)
    named = regime(slope)
    assert np.all((named == Regime.NOISE) == (sizes < B_CRIT / 3))
    assert np.all((named == Regime.CURVATURE) == (sizes > 3 * B_CRIT))
    assert fitted_slope([1, 10], np.inf).tolist() == [-1, -1]
    assert fitted_slope([1, 10], 0.0).tolist() == [0, 0]


def test_the_exact_table_of_the_noisy_quadratic():
    sizes, steps = [4, 64, 1024, 16384, 2**20], [1_515_845, 95_989, 10_371, 7_214, 7_039]
    fit = fit_critical_batch(sizes, steps)
    assert 6500 < fit.S_min < 7039
    assert 64 < fit.B_crit < 16384
    good = goodness(sizes, steps, fit)
    assert good.r2 > 0.998
    assert (good.worst < 1.2, good.worst_size) == (True, 1024)  # the law's knee is rounder
    expected = [Regime.NOISE, Regime.NOISE, Regime.TRANSITION, Regime.CURVATURE, Regime.CURVATURE]
    assert regime(local_slope(sizes, steps)).tolist() == expected
    assert regime(fitted_slope(sizes, fit.B_crit)).tolist() == expected
    parallel = data_parallel(sizes, steps, 1)
    np.testing.assert_allclose(parallel.speedup[2], 95_989 / 10_371)
    np.testing.assert_allclose(parallel.efficiency[2], 95_989 / 10_371 / 16)


def test_the_law_is_rejected_where_it_does_not_hold_and_only_there():
    rng = np.random.default_rng(6)
    luck = np.exp(0.03 * rng.normal(size=(len(SIZES), 1, 12)))
    holds = critical_batch_size(steps_table(SIZES, [1.0], TRUE[:, None, None] * luck))
    other = (S_MIN * (1 + (B_CRIT / SIZES) ** 0.5))[:, None, None] * luck
    fails = critical_batch_size(steps_table(SIZES, [1.0], other))
    assert holds.p_value > 0.05
    assert "does not hold" not in holds.notes
    assert fails.p_value < 0.01
    assert "the law does not hold" in fails.notes


@pytest.mark.parametrize(
    ("part", "says"), [(slice(3), "above the largest"), (slice(5, 8), "below")]
)
def test_a_critical_batch_outside_the_measured_ones_is_said_to_be_extrapolated(part, says):
    luck = np.exp(0.01 * np.random.default_rng(7).normal(size=(3, 1, 6)))
    table = steps_table(SIZES[part], [1.0], TRUE[part, None, None] * luck)
    found = critical_batch_size(table)
    assert not found.resolved
    assert says in found.notes


def sweep_of(rows, **other):
    """A Dataset such as `sweep` returns, (B = 3, R = 1, S = 1) with the rows' losses (3, 4)."""
    shape, dims = (3, 1, 1), ("batch_size", "learning_rate", "seed")
    fields = {"status": Status.COMPLETED, "steps_done": 40, **other}
    return xr.Dataset(
        {"loss": ((*dims, "step"), np.reshape(rows, (*shape, 4)).astype(np.float32))}
        | {name: (dims, np.broadcast_to(value, shape)) for name, value in fields.items()},
        {"batch_size": [1, 2, 4], "learning_rate": [0.1], "seed": [0], "step": [10, 20, 30, 40]},
    )


NAN = np.nan
ROWS = [[8, 4, 1, 1], [8, 6, 5, NAN], [8, NAN, NAN, NAN]]


def test_steps_are_read_off_the_records_and_ends_are_censored():
    status = np.array([Status.COMPLETED, Status.STOPPED, Status.DIVERGED]).reshape(3, 1, 1)
    dataset = sweep_of(ROWS, status=status, steps_done=np.array([40, 30, 20]).reshape(3, 1, 1))
    found = steps_to_target(dataset, 2.0)
    assert found.censored.ravel().tolist() == [False, True, True]
    np.testing.assert_allclose(found.steps.ravel(), [25, 30, np.inf])  # log 4, log 2, log 1
    assert steps_to_target(dataset, 2.0, interpolate=False).steps[0] == 30
    assert steps_to_target(dataset, 4.0).steps[0] == 20
    assert steps_to_target(dataset, 2.6, window=2).steps[0] == pytest.approx(
        15 + 10 * np.log(6 / 2.6) / np.log(6 / 2.5)
    )
    high = dataset.assign(score=-dataset.loss)
    np.testing.assert_allclose(  # not positive: a straight line
        steps_to_target(high, -2.0, "score", "high").steps.ravel(), [20 + 20 / 3, 30, np.inf]
    )
    turned = dataset.transpose("step", "seed", "learning_rate", "batch_size")
    np.testing.assert_array_equal(steps_to_target(turned, 2.0).steps, found.steps)


@pytest.mark.slow
def test_a_real_sweep_over_least_squares_from_end_to_end(tmp_path):
    rng = np.random.default_rng(8)
    X = rng.normal(size=(128, 4)) * [1.5, 1, 0.7, 0.5]
    t = X @ [1.0, -2, 3, 1] + 0.5 * rng.normal(size=128)
    X1, t1 = jnp.asarray(X), jnp.asarray(t)

    def whole(w, state, data, hparams):
        return {"all": jnp.mean((X1 @ w - t1) ** 2)}

    problem = dataclasses.replace(oj.least_squares(X, t), metrics=whole)
    best = float(np.mean((t - X @ np.linalg.lstsq(X, t)[0]) ** 2))
    run = oj.make_run(problem, optax.sgd, 1000, record_every=2)
    grid = {"learning_rate": np.geomspace(0.003, 0.4, 8), "batch_size": [1, 4, 16, 64]}
    dataset = oj.sweep(run, grid, 6, batching="masked")
    found = critical_batch_size(dataset, best + 0.05, metric="all", resamples=300)
    steps = found.steps.values
    assert steps[0] > 2 * steps[1] > 2.4 * steps[2]
    assert abs(np.log(steps[3] / steps[2])) < 0.2  # curvature: 48 more examples a step buy nothing
    assert np.all(np.diff(steps * [1, 4, 16, 64]) > 0)
    assert found.regime[-1] == Regime.CURVATURE
    assert 1 < found.B_crit < 16
    i, j = 2, int(np.argmin(np.abs(np.log(grid["learning_rate"] / float(found.rate[2])))))
    runs = dataset["all"].isel(batch_size=i, learning_rate=j).values <= best + 0.05
    plain = [2 * (np.flatnonzero(row)[0] + 1) if row.any() else np.inf for row in runs]
    assert np.median(plain) == pytest.approx(steps[i], rel=0.2)
    found.to_netcdf(tmp_path / "found.nc", engine="h5netcdf")
    xr.testing.assert_allclose(xr.load_dataset(tmp_path / "found.nc", engine="h5netcdf"), found)


THREE = steps_table([1, 2, 4], [0.1], np.full((3, 1, 2), 9.0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: steps_to_target(sweep_of(ROWS), 0.5), "best loss is 1, of batch 1 at rate 0.1"),
        (lambda: steps_to_target(sweep_of(ROWS), 8.0), r"first record \(step 10\) of batch 1"),
        (lambda: steps_to_target(sweep_of(ROWS), NAN), "target is nan: expected a finite"),
        (lambda: steps_to_target(sweep_of(ROWS), "low"), "target is 'low'"),
        (lambda: steps_to_target(sweep_of(ROWS), 2.0, better="less"), "better is 'less'"),
        (lambda: steps_to_target(sweep_of(ROWS), 2.0, "los"), "unknown metric 'los': did you mean"),
        (lambda: steps_to_target(sweep_of(ROWS), 2.0, window=5), "window is 5: expected at most"),
        (lambda: steps_to_target(sweep_of(ROWS), 2.0, window=0), "window is 0"),
        (
            lambda: steps_to_target(sweep_of(ROWS).isel(batch_size=0), 2.0),
            "dataset lacks the axis batch_size",
        ),
        (
            lambda: steps_to_target(sweep_of(ROWS).isel(learning_rate=0, batch_size=0), 2.0),
            "lacks the axis batch_size and learning_rate",
        ),
        (
            lambda: steps_to_target(sweep_of(ROWS).expand_dims(momentum=[0.9]), 2.0),
            "dataset also has the axis momentum",
        ),
        (lambda: critical_batch_size(sweep_of(ROWS), 2.0), "has 1 seed: expected at least 2"),
        (lambda: critical_batch_size(sweep_of(ROWS)), "target is None"),
        (
            lambda: critical_batch_size(steps_table([1, 2], [0.1], np.ones((2, 1, 3)))),
            "has 2 batch sizes: expected at least 3",
        ),
        (
            lambda: critical_batch_size(THREE._replace(censored=np.ones((3, 1, 2), bool))),
            r"only 0 batch sizes .*\(not 1, 2, 4\)",
        ),
        (lambda: critical_batch_size(THREE, level=95), "level is 95"),
        (lambda: critical_batch_size(THREE, level="a"), "level is 'a'"),
        (lambda: critical_batch_size(THREE, seed=-1), "seed is -1"),
        (lambda: critical_batch_size(None, 1.0), "dataset is a NoneType"),
        (lambda: steps_table([1, 2], [0.1], "abc"), "steps are 'abc'"),
        (lambda: critical_batch_size(THREE, resamples=0), "resamples is 0"),
        (lambda: critical_batch_size(THREE, noise_below=-0.1), "noise_below is -0.1"),
        (lambda: tuned_rates(THREE, may_fail=0.5), "may_fail is 0.5"),
        (lambda: tuned_rates(THREE, statistic="mode"), "statistic is 'mode'"),
        (lambda: steps_table([1, 1], [0.1], np.ones((2, 1, 2))), "expected each once"),
        (lambda: steps_table([1, 2], [0.0], np.ones((2, 1, 2))), "numbers above 0"),
        (lambda: steps_table(["a"], [0.1], np.ones((1, 1, 2))), "expected numbers"),
        (lambda: steps_table([1, 2], [0.1], np.ones((1, 2, 2))), "steps has shape"),
        (lambda: steps_table([1], [0.1], [[[NAN]]]), "steps holds nan"),
        (lambda: steps_table([1], [0.1], [[[1.0]]], [True]), "censored has shape"),
        (lambda: fit_critical_batch([1, 2], [3.0, 2.0]), "at least three batch sizes"),
        (lambda: fit_critical_batch([1, 2, 2], [3.0, 2.0, 1]), "each once"),
        (lambda: fit_critical_batch([1, 2, 3], [3.0, 2.0]), "expected one for each of 3"),
        (lambda: fit_critical_batch([1, 2, 3], [3.0, 2, -1]), "steps holds -1"),
        (lambda: fit_critical_batch([1, 2, 3], [3.0, 2, 1], [1, 1, -1]), "at least 0"),
        (lambda: data_parallel([1, 2], [3.0, 2.0], 2), "reference is 2"),
        (lambda: local_slope([1], [3.0]), "at least two batch sizes"),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(UserError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)
