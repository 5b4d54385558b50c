"""Every optimiser of optax that a name makes: alone, masked and static, or refused in a line."""

import inspect

import jax
import numpy as np
import pytest

import optjax as oj
from optjax.cli.named_problems import factories
from optjax.support.errors import UserError

RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(12, 3)), RNG.normal(size=12)
REFUSED = {
    "dpsgd": "hyperparameters lack",
    "schedule_free": "hyperparameters lack",
    "sophia": "the optimiser refuses: obj_fn must be provided",
}
FACTORIES = factories()
FEW = {"adam", "schedule_free_adamw"}


def hparams(factory):
    rate = inspect.signature(factory).parameters["learning_rate"]
    return {"learning_rate": 0.05} if rate.default is rate.empty else {}


@pytest.mark.filterwarnings("ignore:Specifying a key will be required")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(FACTORIES)]
)
def test_alone_masked_and_static_agree(name):
    factory = FACTORIES[name]
    own = hparams(factory)
    run = oj.make_run(oj.least_squares(X, T), factory, 6, max_batch_size=4, record_every=3)
    grid = {**{k: [v] for k, v in own.items()}, "batch_size": [2, 4]}
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]) as raised:
            run({**own, "batch_size": 2}, jax.random.key(0))
        assert "\n" not in str(raised.value)  # JAX may add a note of its traceback
        return
    alone = [
        [run({**own, "batch_size": b}, jax.random.key(s)).final_loss for s in range(2)]
        for b in grid["batch_size"]
    ]
    for batching in ("masked", "static"):
        found = oj.sweep(run, grid, 2, batching=batching, progress=lambda *_: None)
        both = found.final_loss.transpose(..., "batch_size", "seed").values.reshape(2, 2)
        np.testing.assert_allclose(both, alone, rtol=1e-9, err_msg=f"{name} {batching}")


def test_optax_has_so_many():
    assert len(FACTORIES) > 40
    assert set(REFUSED) <= set(FACTORIES)
