"""The noise scale against the critical batch, small: what the verdicts rest on, and the figures."""

from unittest import mock

import jax
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.noise_scale import claims, families
from optjax.experiments.noise_scale import run as noise_scale
from optjax.support.errors import UserError
from optjax.theory.noisy_quadratic import noisy_quadratic

SMALL = noise_scale.Config(
    spectrum=20,
    rows=64,
    columns=3,
    noises=(0.5, 2.0),
    squares_batches=(1, 8, 64),
    squares_rates=4,
    squares_seeds=2,
    squares_steps=300,
    squares_target=0.02,
    pictures=16,
    filters=2,
    colours=3,
    net_batches=(2, 4, 8),
    net_rates=2,
    net_seeds=2,
    net_steps=24,
    net_every=2,
    net_span=(0.03, 0.3),
    net_targets=(0.95,),
    net_blocks=4,
    net_scale_seeds=2,
    repeats=1000,
    pairs=64,
)
SIZES = np.array([1.0, 10.0, 100.0])


def _float32(call):
    """As the command runs it."""
    jax.config.update("jax_enable_x64", False)
    try:
        return call()
    finally:
        jax.config.update("jax_enable_x64", True)


def _points(family, factors):
    """Made up: critical batches of 10, 20, …, and predictions that many times as large."""
    points = []
    for i, factor in enumerate(factors):
        critical = 10.0 * (i + 1)
        ends = critical * np.array([1, 0.8, 1.2])
        steps, scales = (
            50 * (1 + critical / SIZES),
            dict.fromkeys(families.SCALES, factor * ends),
        )
        name = f"{family} {i}"
        points.append(families.Measurement(name, family, SIZES, steps, ends, scales, 50.0))
    return points


def _seen(family, *names):
    axis = f"{family}_step"
    seen = {f"{family}_{name}": (axis, [20.0, 30.0, 60.0]) for name in names}
    ends = [[10.0, 30.0], [20.0, 50.0], [30.0, np.inf]]
    seen[f"{family}_{names[-1]}_interval"] = ((axis, "bound"), ends)
    coords = {axis: [1, 2, 3], "bound": families.BOUND}
    return xr.Dataset(seen, coords, {f"{family}_shown": f"{family} 0"})


@pytest.fixture(scope="module")
def dataset():
    """Quadratics and estimators are computed; the problems that are trained are made up."""
    exact = _points("squares", (1.1, 0.9))
    squares = mock.Mock(return_value=(exact, _seen("squares", "exact", "curved", "pairs")))
    net = mock.Mock(return_value=(_points("net", (0.7,)), _seen("net", "scale")))
    quadratics = mock.Mock(return_value=_points("quadratic", (1.0, 1.3, 1.2)))
    with mock.patch.multiple(families, squares=squares, net=net, quadratics=quadratics):
        return _float32(lambda: noise_scale.run(SMALL))


def _verdicts(dataset):
    return {claim.id: claim.verdict for claim in noise_scale.claims(dataset)}


def test_what_agrees_holds(dataset):
    assert _verdicts(dataset) == {
        "noise-scale/predicts-critical-batch": "holds",
        "noise-scale/ratio-of-means": "holds",
        "noise-scale/interval-coverage": "holds",
    }


@pytest.mark.parametrize(
    ("name", "change", "id_", "verdict"),
    [
        ("simple", lambda v: 4 * v, "predicts-critical-batch", "corrected"),
        ("simple", lambda v: 600 / v, "predicts-critical-batch", "refuted"),
        ("critical", lambda v: np.where(v == 20, np.inf, v), "predicts-critical-batch", "refuted"),
        ("of_means", lambda v: 1.1 * v, "ratio-of-means", "refuted"),
        ("of_ratios", lambda v: v / 1.3, "ratio-of-means", "refuted"),
        ("squares_held", lambda v: v - 0.05, "interval-coverage", "refuted"),
    ],
)
def test_what_does_not_agree_is_refuted(dataset, name, change, id_, verdict):
    worse = dataset.copy(deep=True)
    worse[name].values = change(worse[name].values)
    assert _verdicts(worse)[f"noise-scale/{id_}"] == verdict


def test_a_perfect_order_of_few_is_no_certain_one():
    r, (low, high) = claims._ranks(np.arange(1.0, 7), np.arange(1.0, 7) ** 2)
    assert (round(r, 9), round(high, 9)) == (1, 1)
    assert 0.3 < low < 0.8


def test_scales_of_the_quadratic_are_those_of_a_loop():
    h, c, s, rate = (np.array(v) for v in ([1.0, 0.2], [3.0, 1.0], [1.0, 4.0], 0.7))
    found = families._exact_scales(noisy_quadratic(h, c, s, batch_size=50), rate, 3)
    squares, curved = [], []
    for _ in range(3):
        s = (1 - rate * h) ** 2 * s + rate**2 * c / 50
        squares.append(h**2 @ s)
        curved.append(h**3 @ s)
    np.testing.assert_allclose(found["simple"][0], np.mean(4 / np.array(squares)), rtol=1e-12)
    np.testing.assert_allclose(found["averaged"][0], 4 / np.mean(squares), rtol=1e-12)
    np.testing.assert_allclose(found["curved"][0], np.mean(h @ c / np.array(curved)), rtol=1e-12)


def test_the_excess_of_least_squares_is_the_loss_above_the_least():
    problem, _ = families._squares_problem(SMALL, 1.0)
    data = problem.data
    w, zero = np.float32([0.3, -1.0, 2.0]), np.zeros(3, np.float32)
    losses = [float(problem.objective(v, (), data, {})) for v in (w, zero, data.shared["best"])]
    excess = problem.metrics(w, (), data, {})["excess"]
    expected = (losses[0] - losses[2]) / (losses[1] - losses[2])
    np.testing.assert_allclose(excess, expected, rtol=1e-4)  # float32


def test_figures_draw_from_what_was_saved(dataset, tmp_path):
    dataset.to_netcdf(tmp_path / "saved.nc", engine="h5netcdf")
    figures = noise_scale.figures(xr.load_dataset(tmp_path / "saved.nc", engine="h5netcdf"))
    assert set(figures) == {"critical", "along", "estimators"}
    for name, fig in figures.items():
        assert isinstance(fig, Figure)
        assert fig.caption
        fig.savefig(tmp_path / f"{name}.svg")


def test_refusals():
    with pytest.raises(UserError, match="noises or net_targets are empty"):
        noise_scale.run(noise_scale.Config(noises=()))


@pytest.mark.slow
def test_a_small_run_measures_every_problem():
    found = _float32(lambda: noise_scale.run(SMALL))
    assert found.family.values.tolist() == ["quadratic"] * 6 + ["squares"] * 2 + ["net"]
    assert np.isfinite(found.simple).all()
    exact = found.isel(point=found.family.values == "quadratic")
    assert np.all((exact.critical > 1) & (exact.critical < 1e6))
    _verdicts(found)
    assert len(noise_scale.figures(found)) == 3
