"""Contract 1: a run of a sweep is the run alone, under every setting of JAX that users choose."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import itertools, json, os
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np, optax, optjax as oj
rng = np.random.default_rng(0)
X, t = rng.normal(size=(12, 6)), rng.normal(size=12)
rates, sizes, worst = [0.01, 0.05], [1, 5, 12], {}
for double, generator, strict, nans in itertools.product(
    (True, False), ("threefry2x32", "rbg"), (True, False), (True, False)
):
    if strict == nans and generator == "rbg":
        continue  # pairs of settings, not all
    promotion, rank = ("strict", "raise") if strict else ("standard", "allow")
    with (
        jax.enable_x64(double), jax.default_prng_impl(generator), jax.debug_nans(nans),
        jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion(rank),
    ):
        kind = np.float64 if double else np.float32
        problem = oj.least_squares(X.astype(kind), t.astype(kind))
        run = oj.make_run(problem, optax.rmsprop, 12, record_every=3)
        key = lambda s: jax.random.key(s, impl="threefry2x32")
        alone = np.array([[[run({"learning_rate": r, "batch_size": b}, key(s)).loss
                            for s in range(3)] for b in sizes] for r in rates])
        for count in (1, 2, 8):
            found = oj.sweep(
                run, {"learning_rate": rates, "batch_size": sizes}, 3,
                devices=jax.devices()[:count], progress=lambda *_: None,
            )
            assert found.loss.dtype == kind
            name = f"x64 {double}, {generator}, strict {strict}, nans {nans}, devices {count}"
            worst[name] = float(np.max(np.abs(found.loss.values / alone - 1)))
print(json.dumps(worst))
"""


@pytest.mark.slow
def test_a_run_of_a_sweep_is_the_run_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == 36
    for name, off in worst.items():
        assert off < (1e-12 if "x64 True" in name else 1e-5), (name, off)
