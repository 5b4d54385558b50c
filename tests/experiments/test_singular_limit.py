"""The derivative of the solution down to λ = 0, with a small config: the claim, what breaks it."""

import jax
import numpy as np
import pytest

from optjax.experiments import singular_limit as experiment
from optjax.support.errors import UserError


@pytest.fixture(scope="module")
def dataset():
    jax.config.update("jax_enable_x64", False)
    try:
        return experiment.run(experiment.Config(problems=6, penalties=(1e-8, 1e-3)))
    finally:
        jax.config.update("jax_enable_x64", True)


def test_the_claim_holds_and_its_figure_draws(dataset):
    (claim,) = experiment.claims(dataset)
    assert (claim.id, claim.verdict) == ("hypergradient/singular-limit", "holds")
    assert claim.evidence == "singular_limit/limit"
    assert experiment.figures(dataset)["limit"].caption


@pytest.mark.parametrize("what", ["limit_implicit", "limit_through"])
def test_a_wrong_limit_refutes(dataset, what):
    for value in (1.001, np.nan):
        wrong = dataset.copy(deep=True)
        wrong[what][0, 0] *= value
        assert experiment.claims(wrong)[0].verdict == "refuted"


def test_refusals():
    with pytest.raises(UserError, match="two penalties"):
        experiment.run(experiment.Config(penalties=(1.0,)))
