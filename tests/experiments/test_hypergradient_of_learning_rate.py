"""Hypergradients of the learning rate with a small config: claims, what breaks them, figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from optjax.experiments import hypergradient_of_learning_rate as experiment
from optjax.support.errors import UserError


def _run(*steps):
    config = experiment.Config(problems=6, steps=steps, pairs=32, seeds=200, batch_steps=5)
    jax.config.update("jax_enable_x64", False)
    try:
        return experiment.run(config)
    finally:
        jax.config.update("jax_enable_x64", True)


# Compiled for ten seconds, and decided by `make reproduce` too.
@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.slow)])
def dataset():
    """Every T costs the compilation of every mode: test_modes.py has the modes at other T."""
    return _run(1)


def _verdicts(dataset):
    return [claim.verdict for claim in experiment.claims(dataset)]


def test_claims_hold(dataset):
    (modes,) = experiment.claims(dataset)
    assert modes.id == "hypergradient/modes-agree"
    assert modes.verdict == "holds"
    assert modes.measured["auto chose, for each T"]["1"] == "one_step"
    assert 0.4 < modes.measured["best rate in units of 2/λ_max, for each T"]["1"] < 1


@pytest.mark.slow
def test_the_best_rate_grows_with_the_steps():
    several = _run(1, 12)
    assert _verdicts(several) == ["holds"]
    measured = experiment.claims(several)[0].measured
    best = list(measured["best rate in units of 2/λ_max, for each T"].values())
    assert 0.4 < best[0] < best[1] < 1


@pytest.mark.parametrize("mode", ["forward", "one_step", "truncated", "difference"])
def test_a_wrong_slope_refutes(dataset, mode):
    wrong = dataset.copy(deep=True)
    wrong["slope"].loc[{"mode": mode, "steps": 1, "problem": 0, "share": 0.3}] *= 1 + 1e-5
    assert _verdicts(wrong) == ["refuted"]


def test_a_missing_slope_refutes(dataset):
    wrong = dataset.copy(deep=True)
    wrong["slope"].loc[{"mode": "reverse", "steps": 1, "problem": 0, "share": 0.3}] = np.nan
    assert _verdicts(wrong) == ["refuted"]


@pytest.mark.parametrize("what", ["es", "batches"])
def test_a_biased_estimate_corrects(dataset, what):
    wrong = dataset.copy(deep=True)
    wrong[what][0] *= 3
    assert _verdicts(wrong) == ["corrected"]


def test_the_expectation_is_that_of_every_batch_there_is():
    """Two examples and batches of two: after two steps there are sixteen equally likely runs."""
    rng = np.random.default_rng(3)
    X, t, w0, eta = rng.normal(size=(2, 1)), rng.normal(size=2), rng.normal(size=1), 0.3
    losses = []
    for draws in np.ndindex(2, 2, 2, 2):
        w = w0
        for pair in (draws[:2], draws[2:]):
            x, y = X[list(pair)], t[list(pair)]
            w = w - eta * x.T @ (x @ w - y)
        losses.append(np.mean((X @ w - t) ** 2))
    found = experiment._expected_loss(*map(jnp.asarray, (X, t, w0)), eta, 2, 2)
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-12)


def test_figures_draw_from_what_was_saved(dataset, tmp_path):
    dataset.to_netcdf(tmp_path / "saved.nc", engine="h5netcdf")
    figures = experiment.figures(dataset)
    evidence = {claim.evidence.split("/")[1] for claim in experiment.claims(dataset)}
    assert evidence < set(figures)
    for name, fig in figures.items():
        assert isinstance(fig, Figure)
        assert fig.caption
        fig.savefig(tmp_path / f"{name}.svg")


def test_refusals():
    for config in (experiment.Config(steps=()), experiment.Config(problems=1)):
        with pytest.raises(UserError, match="at least one number of steps"):
            experiment.run(config)
