"""The main paths as users run them: float32, implicit promotion, XLA's default flags."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import json, sys
import jax, numpy as np, optax, optjax as oj

rng = np.random.default_rng(0)
X = rng.normal(size=(48, 8)).astype(np.float32)
problem = oj.least_squares(X, X @ rng.normal(size=8).astype(np.float32))
run = oj.make_run(problem, optax.adam, 60, record_every=5)
key, found = jax.random.key(3), {}

def kept(tree):
    return [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(tree)]

point = {"learning_rate": 0.05, "batch_size": 8}
one = jax.jit(run)(point, key)
found["dtypes"] = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(one)})
found["run"], found["run again"] = kept(one), kept(jax.jit(run)(point, key))
found["single"] = float(one.final_loss)

grid = {"learning_rate": [0.01, 0.05, 0.2], "batch_size": [1, 8, 48]}
turned = {name: values[::-1] for name, values in grid.items()}
sweeps = [oj.sweep(run, g, [3, 5]) for g in (grid, grid, turned)]
sorted_ = [s.sortby(["learning_rate", "batch_size"]) for s in sweeps]
found["sweeps"] = [s.final_loss.values.ravel().tolist() for s in sorted_]
found["swept"] = float(sweeps[0].final_loss.sel(learning_rate=0.05, batch_size=8, seed=3))

def loss(t):
    return t.final_loss

def last(t):
    return t.loss[-1]

def both(t):
    return 2 * t.final_loss - 0.5 * t.loss[-1]

def slope(objective, mode="auto"):
    fn = oj.hypergrad(run, objective, "learning_rate", mode)
    return float(fn(point, key).gradient["learning_rate"])

found["objectives"] = [slope(f) for f in (loss, last, both)]
modes = ("forward", "reverse", "segmented", "recursive")
found["modes"] = [slope("final_loss", mode) for mode in modes]
swept = oj.sweep(oj.hypergrad(run, wrt="learning_rate"), grid, [3])
chosen = swept.gradient_learning_rate.sel(learning_rate=0.05, batch_size=8, seed=3)
found["slope of the sweep"] = float(chosen)
tuned = oj.tune(run, "final_loss", {"learning_rate": 0.01}, steps=15, progress=lambda *_: None)
found["tuned"] = [float(tuned.path.value[0, 0]), tuned.value]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    env = clean | {"OPTJAX_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_nothing_is_widened(found):
    assert set(found["dtypes"]) <= {"float32", "int32"}


def test_a_repeated_run_and_a_repeated_sweep_have_the_same_bits(found):
    assert found["run"] == found["run again"]
    assert found["sweeps"][0] == found["sweeps"][1]


def test_the_order_of_a_grid_changes_rounding_alone(found):
    # 60 steps of Adam on sums of up to 48 float32 products, added in another order.
    np.testing.assert_allclose(found["sweeps"][2], found["sweeps"][0], rtol=1e-3)
    np.testing.assert_allclose(found["swept"], found["single"], rtol=1e-3)


def test_a_hypergradient_is_linear_in_its_objective(found):
    first, second, both = found["objectives"]
    np.testing.assert_allclose(both, 2 * first - 0.5 * second, rtol=1e-3)


def test_modes_and_a_sweep_agree(found):
    # Each recomputes its steps in another program: float32 through 60 steps.
    np.testing.assert_allclose(found["modes"], found["modes"][0], rtol=2e-3)
    np.testing.assert_allclose(found["slope of the sweep"], found["modes"][0], rtol=2e-3)


def test_tuning_descends(found):
    start, end = found["tuned"]
    assert end < start / 2
