"""The experiments on implicit bias with small configs: claims, verdicts, figures, refusals."""

import jax
import numpy as np
import pytest
import xarray as xr

from optjax.experiments import gunasekar, max_margin, sgd_moments, wilson
from optjax.experiments.which_solution import run as which_solution
from optjax.experiments.which_solution.data_sets import wilson_margins
from optjax.support.errors import UserError
from optjax.theory.least_norms import least_norm_solution

SMALL = {
    "sgd_moments": (sgd_moments, {"rows": 4, "columns": 6, "steps": (1, 3), "seeds": 1000}),
    "wilson": (wilson, {"plus": (3,), "minus": (2,), "tested": 10, "steps": 3000}),
    "gunasekar": (gunasekar, {"problems": 3, "rates": 6, "steps": 2500}),
    "max_margin": (max_margin, {"sets": 3, "steps": 50_000}),
    "which_solution": (which_solution, {
        "optimizers": ("sgd", "momentum", "nesterov", "shampoo", "steepest_l1"),
        "steps": 2000, "seeds": 2,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def datasets():
    """In float64, whatever the process is set to."""
    done = {}

    def get(name):
        if name not in done:
            module, fields = SMALL[name]
            jax.config.update("jax_enable_x64", False)
            try:
                done[name] = module.run(module.Config(**fields))
                assert not jax.config.jax_enable_x64
            finally:
                jax.config.update("jax_enable_x64", True)
        return done[name].copy(deep=True)

    return get


@pytest.mark.parametrize("name", SMALL)
def test_claims_hold_and_figures_draw(name, datasets, presented):
    assert set(presented(SMALL[name][0], name, datasets(name)).values()) == {"holds"}


def _set(variable, value, **where):
    def change(dataset: xr.Dataset) -> None:
        dataset[variable].loc[where] = value

    return change


CHANGES = [
    ("sgd_moments", _set("z", 6.0, sampler="epochs"), {"min-norm/minibatch-moments"}),
    ("wilson", _set("cosine", 0.99, optimizer="adam"), {"implicit-bias/wilson"}),
    ("wilson", _set("test_error", 0.1, optimizer="sgd"), {"implicit-bias/wilson"}),
    ("wilson", _set("minus", -0.5, optimizer="sgd"), {"implicit-bias/wilson"}),
    ("wilson", _set("residual", 1e-3, optimizer="lion"), {"implicit-bias/wilson"}),
    ("wilson", _set("plus", np.nan, optimizer="sgd"), {"implicit-bias/wilson"}),
    ("wilson", _set("cosine", np.nan, optimizer="adam"), {"implicit-bias/wilson"}),
    ("sgd_moments", _set("z", np.nan, sampler="epochs"), {"min-norm/minibatch-moments"}),
    ("gunasekar", _set("mirror", np.nan), {"implicit-bias/mirror-descent"}),
    ("gunasekar", _set("distance", np.nan, sampler="full"), {"implicit-bias/mirror-descent"}),
    ("gunasekar", _set("distance", 1e-3, sampler="full"), {"implicit-bias/mirror-descent"}),
    ("gunasekar", _set("dual", 1.0), {"implicit-bias/mirror-descent"}),
    ("gunasekar", _set("primal", 0.5), {"implicit-bias/step-size"}),
    ("gunasekar", _set("steepest", np.nan), {"implicit-bias/step-size"}),
    ("max_margin", _set("share ℓ1", 1.0, optimizer="sign descent"), {"implicit-bias/max-margin"}),
    ("max_margin", _set("angle", 0.1), {"implicit-bias/max-margin"}),
    ("which_solution", _set("distance", 0.1, optimizer="sgd"), {"implicit-bias/row-space"}),
    ("which_solution", _set("distance", 0.0, optimizer="steepest_l1"),
     {"implicit-bias/row-space"}),
    ("which_solution", _set("residual", 1.0, optimizer="sgd", data="even spectrum"),
     {"implicit-bias/row-space", "implicit-bias/prediction"}),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(CHANGES)))
def test_verdicts_follow_the_measurements(i, datasets):
    name, change, refuted = CHANGES[i]
    dataset = datasets(name)
    change(dataset)
    found = SMALL[name][0].claims(dataset)
    assert {claim.id for claim in found if claim.verdict == "refuted"} == refuted


def test_a_claim_on_optimizers_that_were_left_out_is_not_run(datasets):
    dataset = datasets("which_solution").sel(optimizer=["shampoo", "steepest_l1"])
    found = which_solution.claims(dataset)
    assert {claim.verdict for claim in found} == {"not run"}
    assert all("leave --optimizers out" in claim.needs for claim in found)


@pytest.mark.parametrize(
    ("module", "fields", "words"),
    [
        (wilson, {"plus": (2, 3), "minus": (1,)}, "expected pairs"),
        (wilson, {"plus": (2,), "minus": (2,)}, "expected pairs"),
        (max_margin, {"steps": 10}, "expected at least 1,000"),
        (max_margin, {"rows": 4000, "sets": 2}, "none is separable"),
    ],
)
def test_sizes_that_cannot_be_are_told(module, fields, words):
    with pytest.raises(UserError, match=words):
        module.run(module.Config(**fields))


def test_an_optimizer_that_is_not_known_is_told():
    with pytest.raises(UserError, match="unknown optimizer 'adma'; did you mean 'adam'"):
        which_solution.run(which_solution.Config(optimizers=("adma",)))


@pytest.mark.parametrize(("plus", "minus"), [(2, 1), (6, 4), (5, 5), (9, 2)])
def test_the_margins_of_wilsons_data_are_those_of_the_minimum_norm(plus, minus):
    data = wilson.wilson(plus, minus, 4)
    w = least_norm_solution(data.X, data.t)
    np.testing.assert_allclose((data.X_test @ w)[:2], wilson_margins(plus, minus), atol=1e-12)
