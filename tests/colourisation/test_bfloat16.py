"""Networks that compute in bfloat16: float32 where it must be, and the same learning."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.colourisation.networks import MODELS, model
from optjax.colourisation.problem import colourisation_problem
from optjax.convnets.layers import BatchNorm, Conv, ConvTranspose

SEEDS, STEPS = 8, 16

pytestmark = pytest.mark.usefixtures("float32")


def _pictures():
    """Blocks of 4 x 4 pixels, coloured by how bright they are under the noise."""
    rng = np.random.default_rng(0)
    blocks = rng.normal(size=(16, 2, 2, 1)).repeat(4, axis=1).repeat(4, axis=2)
    x = blocks + 0.5 * rng.normal(size=blocks.shape)
    return x.astype(np.float32), np.digitize(blocks[..., 0], [-0.5, 0.5]).astype(np.int32)


def _losses(name, dtype):
    """The final losses over seeds."""
    net = model(name, filters=4, colours=3, dtype=dtype)
    run = oj.make_run(colourisation_problem(net, _pictures()), optax.adam, STEPS, max_batch_size=8)
    one = jax.vmap(lambda seed: run({"learning_rate": 0.02}, jax.random.key(seed)).final_loss)
    return np.asarray(jax.jit(one)(jnp.arange(SEEDS)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_it_learns_what_float32_learns(name):
    """Seed by seed it ends closer to float32 than one seed of float32 to another."""
    full, half = _losses(name, None), _losses(name, jnp.bfloat16)
    gap = half - full
    assert full.max() < 0.9 * np.log(3)  # it learns at all
    assert (gap != 0).all()  # and computes in bfloat16
    assert np.sqrt(np.mean(gap**2)) < 0.5 * full.std(ddof=1)
    # Rounding is no bias: three standard errors, and the rounding of one number.
    assert abs(gap.mean()) < 3 * gap.std(ddof=1) / SEEDS**0.5 + 2**-9 * full.mean()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_gradients_statistics_and_scores_are_float32(name):
    net = model(name, filters=2, colours=3, dtype=jnp.bfloat16)
    x, labels = _pictures()
    problem = colourisation_problem(net, (x, labels))
    params, state = jax.eval_shape(problem.init, jax.random.key(0), problem.data)
    examples = {"inputs": x, "targets": labels}
    batch = oj.Batch(examples, jnp.ones(16, bool), jax.random.key(0), problem.data.shared)
    found = jax.eval_shape(
        lambda p, s: jax.value_and_grad(problem.loss, has_aux=True)(p, s, batch, {}), params, state
    )
    chex.assert_type(jax.tree.leaves((params, state, found)), jnp.float32)


def test_each_layer_gives_its_dtype_and_batch_statistics_are_exact_sums():
    # 4096 values near 64: added up in bfloat16, whose steps are 0.5 there, the sum would stand
    # still at 256 times its terms.
    x = 64 + np.random.default_rng(0).normal(size=(16, 16, 16, 1)).astype(np.float32)
    for layer in (Conv(2), ConvTranspose(2)):
        y, variables = layer.init_with_output(jax.random.key(0), x.astype(jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        y, variables = layer.clone(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
        assert y.dtype == jnp.bfloat16
        chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    norm = BatchNorm(dtype=jnp.bfloat16)
    rounded = jnp.asarray(x, jnp.bfloat16)
    variables = norm.init(jax.random.key(0), rounded, True)
    y, new = norm.apply(variables, rounded, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(rounded, np.float64)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * exact.var(ddof=1), rtol=1e-4)
