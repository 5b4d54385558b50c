"""A run that overflows, underflows, starts at NaN or at a singular point disturbs no other run."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj

RUNS, SEEDS = 5, 2
POISONS = {
    "overflow": {"learning_rate": 1e200},
    "underflow": {"learning_rate": 5e-324},
    "NaN at the start": {"initial_params": np.full(3, np.nan)},
    "infinity at the start": {"initial_params": np.full(3, np.inf)},
    "singular step": {"initial_params": np.zeros(3)},  # the norm's gradient there is 0/0
}
HOW = {
    "vmap": {"layout": "vmap"},
    "map": {"layout": "map", "vmap_chunk": 3},
    "loop": {"layout": "loop"},
    "static": {"batching": "static", "layout": "vmap"},
    "masked": {"batching": "masked", "layout": "map", "vmap_chunk": 2},
    "kept": {"layout": "vmap", "keep_diverged": True},
    "rules": {"layout": "vmap", "stop": [oj.Target(0.05), oj.Plateau(20)]},
    "chunks": {"layout": "map", "vmap_chunk": 2, "chunk_steps": 4},
}


def _off(w, examples):
    return (examples["x"] @ w - examples["t"]) ** 2


def _norm(w):
    return 1e-3 * jnp.sqrt(jnp.sum(w**2))


def _loss(w, state, batch, hparams):
    return oj.masked_mean(_off(w, batch.examples), batch.mask) + _norm(w), state


def _whole(w, state, data, hparams):
    return jnp.mean(_off(w, data.examples)) + _norm(w)


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    examples = {"x": jnp.asarray(rng.normal(size=(12, 3))), "t": jnp.asarray(rng.normal(size=12))}
    problem = oj.Problem(
        lambda key, data: (jnp.ones(3), ()), _loss, _whole, oj.Data(examples, None)
    )
    return oj.make_run(problem, optax.adam, 40, max_batch_size=8, record_every=2)


def _grid(sizes, at=None, poison=()):
    columns = {
        "learning_rate": list(np.geomspace(0.003, 0.1, RUNS)),
        "initial_params": [np.full(3, 0.5 + i) for i in range(RUNS)],
        "batch_size": sizes,
    }
    for name, value in dict(poison).items():
        columns[name][at] = value
    return oj.zip_grid(columns)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_poisoned_run_disturbs_no_other(how, run):
    sizes = [8] * RUNS if how not in ("static", "masked") else [8, 3, 8, 3, 8]
    healthy = oj.sweep(run, _grid(sizes), SEEDS, **HOW[how])
    assert np.isfinite(healthy.final_loss).all()
    for name, poison in POISONS.items():
        for at in range(RUNS):
            found = oj.sweep(run, _grid(sizes, at, poison), SEEDS, **HOW[how])
            others = np.arange(RUNS) != at
            for kept in ("loss", "final_loss", "status", "diverged_at", "stopped_at"):
                ours, theirs = found[kept].values[others], healthy[kept].values[others]
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{name} at {at}: {kept}")
            diverged = found.status.values[at] == oj.Status.DIVERGED
            assert diverged.all() == (name != "underflow"), (name, at)
