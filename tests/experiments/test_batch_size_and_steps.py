"""The experiment on a small scale: its claims, figures and refusals; verdicts follow the data."""

from unittest import mock

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.batch_size_and_steps import claims
from optjax.experiments.batch_size_and_steps import run as experiment
from optjax.support.errors import UserError

SIZES = np.array([4, 16, 64, 256, 1024, 4096])


def made(B_crit=64.0, helped=8.0, spread=1.1):
    """A dataset as `run` gives, its steps by the law; preconditioned steps `helped` times fewer."""
    parts = []
    for problem in claims.PROBLEMS:
        for name, fewer in (("SGD", 1.0), ("preconditioned", np.linspace(1.5, helped, len(SIZES)))):
            steps = 100 * (1 + B_crit / SIZES) / fewer
            slope = -1 / (1 + SIZES / B_crit)
            part = xr.Dataset(
                {
                    "steps": ("batch_size", steps),
                    "slope": ("batch_size", slope),
                    "regime": ("batch_size", experiment.regime(slope)),
                },
                {"batch_size": SIZES, "bound": ["low", "high"]},
            )
            if problem != "quadratic":
                for key in ("steps", "slope"):
                    ends = np.stack([part[key].values / spread, part[key].values * spread], -1)
                    part[f"{key}_interval"] = ("batch_size", "bound"), np.sort(ends, -1)
                part["B_crit_interval"] = "bound", [B_crit / 1.5, B_crit * 1.5]
            part = part.assign(S_min=100.0, E_min=100.0 * B_crit, B_crit=B_crit)
            parts.append(experiment._named(problem, name, part))
    return xr.merge(parts)


def verdicts(dataset):
    return {claim.id.partition("/")[2]: claim.verdict for claim in experiment.claims(dataset)}


def test_verdicts_follow_the_data():
    assert verdicts(made()) == {
        "critical": "holds", "noise-regime": "holds", "curvature-regime": "holds"
    }  # fmt: skip
    # A knee beyond the batches: no flat part, and doubling still helps.
    assert verdicts(made(B_crit=1e5))["critical"] == "refuted"
    assert verdicts(made(B_crit=1e5))["curvature-regime"] == "refuted"
    # No noise at all: doubling buys nothing.
    assert verdicts(made(B_crit=0.1))["noise-regime"] == "refuted"
    # A preconditioner that does not help, or not for sure.
    assert verdicts(made(helped=0.9))["curvature-regime"] == "refuted"
    assert verdicts(made(helped=1.6, spread=2.0))["curvature-regime"] == "not run"


def test_the_figures_draw():
    drawn = experiment.figures(made())
    assert set(drawn) == {"steps", "remedies", "trade-off"}
    assert all(isinstance(figure, Figure) for figure in drawn.values())


def test_muon_sees_a_kernel_as_a_matrix():
    seen = experiment._matrices({"kernel": np.zeros((3, 3, 2, 4)), "bias": np.zeros(4)})
    assert seen["kernel"].reduction_axis == (0, 1, 2)
    assert seen["bias"] is None


@pytest.mark.slow
def test_small_quadratic_and_least_squares():
    config = experiment.Config(
        spectrum=50, exponents=(1, 3, 5, 8), rows=64, columns=4, batches=(1, 4, 16, 64), rates=4,
        seeds=2, steps=200, excess=0.3, risk=0.05,
    )  # fmt: skip
    with mock.patch.object(experiment, "_net", return_value=[]):
        found = experiment.run(config)
    assert np.isfinite(found.quadratic_SGD_steps).all()
    assert (found.quadratic_SGD_steps.diff("quadratic_batch_size") <= 0).all()
    sizes, factor, ends = claims.faster(found, "squares", "preconditioned")
    assert len(sizes) >= 3
    assert (ends[0] <= factor).all()
    assert (factor <= ends[1]).all()


@pytest.mark.slow
def test_the_whole_runs():
    config = experiment.Config(
        spectrum=50, exponents=(1, 3, 5, 8), rows=64, columns=4, batches=(1, 4, 16, 64), rates=4,
        seeds=2, steps=200, excess=0.3, risk=0.05, net_batches=(8, 16, 32), net_rates=2,
        net_seeds=2, net_examples=640, net_steps=30, net_loss=2.9, pictures=32, filters=2,
    )  # fmt: skip
    found = experiment.run(config)
    assert len(experiment.claims(found)) == 3
    assert len(experiment.figures(found)) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exponents": (1, 2)}, "expected at least three batch sizes"),
        ({"rows": 100}, "batches holds 512: expected 1 to rows = 100"),
    ],
)
def test_refusals_name_the_value(changes, says):
    with (
        mock.patch.object(experiment, "_quadratic", return_value=[]),
        pytest.raises(UserError, match=says),
    ):
        experiment.run(experiment.Config(**changes))
