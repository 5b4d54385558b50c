"""The 2 × 2 of ways down and up: what the probe sees, and which verdict follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from optjax.experiments import pooling as experiment
from optjax.support.errors import UserError

TINY = experiment.Config(seeds=2, steps=2, filters=2, colours=3, batch_size=4)


def _made(pooling, hidden, seeds=20):
    """Make a dataset in which pooling adds to the loss and hides from the probe."""
    rng = np.random.default_rng(0)
    shape = (2, 2, seeds)
    added = np.array([1.0, 0.0])[:, None, None]
    tables = {
        name: (("down", "up", "seed"), 1 + added * pooling + 0.01 * rng.normal(size=shape))
        for name in ("loss_population", "loss_running", "accuracy_population", "accuracy_running")
    }
    missed = 0.1 + added[..., None] * hidden + 0.001 * rng.normal(size=(*shape, 2))
    return xr.Dataset(
        {
            **tables,
            "missed": (("down", "up", "seed", "stage"), missed),
            "diverged": (("down", "up", "seed"), np.zeros(shape, bool)),
            "baseline_loss": 0.9,
        },
        {
            "down": list(experiment.DOWN),
            "up": list(experiment.UP),
            "seed": range(seeds),
            "stage": [1, 2],
        },
        {"demo": 1, "data": "demo", "note": "made", "parameters": 10, "steps": 2},
    )


@pytest.mark.parametrize(
    ("pooling", "hidden", "expected"),
    [
        (0.1, 0.02, "holds"),
        (0.0, 0.02, "corrected"),
        (-0.1, 0.02, "corrected"),
        (0.1, 0.0, "refuted"),
        (0.0, -0.02, "refuted"),
    ],
)
def test_the_verdict_follows_from_both(pooling, hidden, expected):
    dataset = _made(pooling, hidden)
    (claim,) = experiment.claims(dataset)
    assert (claim.id, claim.verdict) == ("colourisation/why-pooling-discards", expected)
    low, high = claim.interval["loss added by max-pooling (nats)"]
    assert low < pooling < high
    assert all(figure.caption for figure in experiment.figures(dataset).values())


def test_a_probe_finds_what_is_there_and_no_more():
    x = jax.random.normal(jax.random.key(0), (200, 8, 8, 1))
    blocks = x.reshape(200, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(200, 4, 4, 4)
    # A sum of four equal, independent values tells a quarter of the variance of each.
    for features, missed in ((blocks, 0.0), (blocks.sum(-1, keepdims=True), 0.75)):
        found = experiment.missed_by_a_probe(features[:100], x[:100], features[100:], x[100:])
        np.testing.assert_allclose(found, missed, atol=0.02)
    noise = jax.random.normal(jax.random.key(1), blocks.shape)
    assert experiment.missed_by_a_probe(noise[:100], x[:100], noise[100:], x[100:]) > 0.98


def test_features_are_those_behind_the_down_samplings():
    net = experiment.EncoderDecoder(2, 3)
    grey = jnp.zeros((1, 16, 16, 1))
    stages = experiment._stages(net, net.init(jax.random.key(0), grey), grey)
    assert [stage.shape for stage in stages] == [(1, 8, 8, 2), (1, 4, 4, 4)]


def test_a_cell_is_trained_scored_and_probed(monkeypatch, float32):
    monkeypatch.setattr(experiment, "DOWN", ("stride",))
    monkeypatch.setattr(experiment, "UP", ("transpose",))
    found = experiment.run(TINY)
    assert dict(found.sizes) == {"down": 1, "up": 1, "seed": 2, "stage": 2}
    assert np.isfinite(found.loss_population).all()
    assert (found.missed > 0).all()
    assert found.attrs["note"].startswith("demo: ")


@pytest.mark.slow
def test_the_whole_from_small_pictures(float32):
    (claim,) = experiment.claims(experiment.run(TINY))
    assert claim.n_runs == 8
    assert len(claim.interval) == 5


@pytest.mark.parametrize(
    ("field", "value"), [("seeds", 1), ("steps", 0), ("learning_rate", 0.0), ("batch_size", 0)]
)
def test_bad_input_is_one_line(field, value):
    with pytest.raises(UserError, match=f"{field} is {value}: expected"):
        experiment.run(experiment.Config(**{field: value}))
