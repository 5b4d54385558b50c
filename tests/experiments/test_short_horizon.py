"""Short-horizon bias with a small config: the claim, what it rests on, and the figures."""

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from optjax.errors import UserError
from optjax.experiments import short_horizon_bias


@pytest.fixture(scope="module")
def dataset():
    jax.config.update("jax_enable_x64", False)
    try:
        config = short_horizon_bias.Config(spectrum=60, batches=(16, 256), horizons=(20, 100))
        return short_horizon_bias.run(config)
    finally:
        jax.config.update("jax_enable_x64", True)


def test_greedy_is_worse_the_more_the_longer_the_horizon(dataset):
    (claim,) = short_horizon_bias.claims(dataset)
    assert (claim.id, claim.verdict) == ("short-horizon/greedy-is-worse", "holds")
    np.testing.assert_allclose(dataset.published_again, [0.0258, 0.443], rtol=1e-3)
    worse = dataset.copy(deep=True)
    worse["final_risk"][{"schedule": 2, "horizon": 1}] = 10.0
    assert short_horizon_bias.claims(worse)[0].verdict == "refuted"


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
