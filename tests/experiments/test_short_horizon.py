"""Short-horizon bias with a small config: the claim, what it rests on, and the figures."""

import jax
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments import short_horizon_bias
from optjax.support.errors import UserError


def _run(*horizons):
    jax.config.update("jax_enable_x64", False)
    try:
        config = short_horizon_bias.Config(spectrum=60, batches=(16, 256), horizons=horizons)
        return short_horizon_bias.run(config)
    finally:
        jax.config.update("jax_enable_x64", True)


# Compiled for ten seconds, and decided by `make reproduce` too.
@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.slow)])
def dataset():
    return _run(100)


def test_greedy_is_worse(dataset):
    (claim,) = short_horizon_bias.claims(dataset)
    assert (claim.id, claim.verdict) == ("short-horizon/greedy-is-worse", "holds")
    np.testing.assert_allclose(dataset.published_again, [0.0258, 0.443], rtol=1e-3)
    worse = dataset.copy(deep=True)
    worse["final_risk"][{"schedule": 2}] = 10.0
    assert short_horizon_bias.claims(worse)[0].verdict == "refuted"


@pytest.mark.parametrize(("share", "verdict"), [(0.99, "holds"), (1.0, "refuted")])
def test_the_factor_has_to_grow_with_the_horizon(dataset, share, verdict):
    longer = dataset.assign_coords(horizon=[200]).copy(deep=True)
    longer["final_risk"].loc[{"schedule": "best"}] *= share
    both = xr.concat([dataset, longer], "horizon", data_vars="minimal")
    assert short_horizon_bias.claims(both)[0].verdict == verdict


@pytest.mark.slow
def test_it_does_the_more_the_longer_the_horizon():
    (claim,) = short_horizon_bias.claims(_run(20, 100))
    assert claim.verdict == "holds"


def test_figures_draw_from_what_was_saved(dataset, tmp_path):
    dataset.to_netcdf(tmp_path / "saved.nc", engine="h5netcdf")
    figures = short_horizon_bias.figures(dataset)
    assert set(figures) == {"schedules", "factor"}
    for name, fig in figures.items():
        assert isinstance(fig, Figure)
        assert fig.caption
        fig.savefig(tmp_path / f"{name}.svg")


def test_refusals():
    with pytest.raises(UserError, match="horizons are empty"):
        short_horizon_bias.run(short_horizon_bias.Config(horizons=()))
