"""The experiment on tuning, in small: it runs, and its verdicts follow the data."""

import jax
import pytest

from optjax.experiments import tuning

SMALL = tuning.Config(
    steps=30, pieces=3, outer_steps=15, seeds=2, grid=5, judges=4, net_steps=2, net_pieces=2,
    net_outer_steps=2, net_seeds=1, net_judges=2, filters=2,
)  # fmt: skip


@pytest.mark.slow
def test_tuning_runs_and_its_verdicts_follow_the_data():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        dataset = tuning.run(SMALL)
    assert set(tuning.figures(dataset)) == {"search", "schedules", "judged"}
    by_id = {claim.id: claim for claim in tuning.claims(dataset)}
    better = dataset.copy(deep=True)
    better["squares_judged"].loc[{"by": "gradient"}] = [1e-6, 2e-6, 1e-6, 3e-6]
    assert {c.id: c for c in tuning.claims(better)}[
        "tuning/schedule-beats-constant-rate"
    ].verdict == "holds"
    better["squares_judged"].loc[{"by": "gradient"}] = 1e6
    again = {claim.id: claim for claim in tuning.claims(better)}
    assert again["tuning/schedule-beats-constant-rate"].verdict == "refuted"
    assert set(by_id) == set(again)
