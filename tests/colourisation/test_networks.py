"""The networks: parameter counts, PyTorch's initialisation and statistics, masks, training."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax as oj
from optjax.colourisation.baseline import grey_level
from optjax.colourisation.networks import ResidualNet, model
from optjax.colourisation.palette import grey
from optjax.colourisation.problem import colourisation_problem
from optjax.convnets.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    max_pool,
    population_statistics,
    upsample,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("name", "count"),
    [("pool-upsample", 49_728), ("conv-transpose", 49_728), ("unet", 56_856)],
)
def test_parameters_are_the_sources(name, count):
    shapes = jax.eval_shape(model(name).init, KEY, jnp.zeros((1, 32, 32, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize("name", ["pool-upsample", "conv-transpose", "unet", "residual"])
@pytest.mark.parametrize("kernel", [3, 4, 5, 7])
def test_every_kernel_keeps_the_picture_size(name, kernel):
    net = model(name, filters=2, colours=3, kernel=kernel)
    out, _ = jax.eval_shape(net.init_with_output, KEY, jnp.zeros((2, 16, 24, 1)))
    assert out.shape == (2, 16, 24, 3)


def test_a_residual_net_adds_what_its_table_has_of_the_baselines_grey_level():
    sums = np.arange(766)  # of R, G and B
    pixels = np.stack([(sums + i) // 3 for i in range(3)], axis=-1).astype(np.uint8)
    pictures = np.zeros((1, 28, 28, 3), np.uint8)
    pictures.reshape(-1, 3)[: len(sums)] = pixels
    np.testing.assert_array_equal(pixels.sum(-1), sums)
    net, seen = ResidualNet(filters=2, colours=3), grey(pictures)
    variables = net.init(KEY, seen)
    table = np.arange(768.0, dtype=np.float32).reshape(256, 3)
    with_table = {**variables, "params": {**variables["params"], "table": jnp.asarray(table)}}
    added = net.apply(with_table, seen) - net.apply(variables, seen)
    np.testing.assert_allclose(added, table[grey_level(pictures)], atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "fan_in"), [(Conv(40, 3), 9 * 16), (ConvTranspose(40, 3), 9 * 40)]
)
def test_initialisation_is_pytorchs_uniform(layer, fan_in):
    params = layer.init(KEY, jnp.zeros((1, 4, 4, 16)))["params"]
    bound = fan_in**-0.5
    kernel = np.asarray(params["kernel"])
    assert np.abs(kernel).max() <= bound
    assert np.abs(params["bias"]).max() <= bound
    # The variance of U(±a) is a²/3; its sampling error is a²/3 · √(4/5N).
    error = bound**2 / 3 * np.sqrt(0.8 / kernel.size)
    assert abs(kernel.var() - bound**2 / 3) < 4 * error


def test_batch_statistics_are_pytorchs():
    """y, running mean and unbiased running variance by their formulas, in NumPy."""
    x = np.random.default_rng(0).normal(2, 3, size=(5, 4, 4, 2))
    layer = BatchNorm()
    variables = layer.init(KEY, jnp.asarray(x), True)
    y, new = layer.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-10, atol=1e-10)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var * 80 / 79, rtol=1e-12)


@pytest.mark.parametrize("name", [pytest.param("pool-upsample", marks=pytest.mark.slow), "unet"])
def test_a_masked_batch_has_the_loss_gradient_and_statistics_of_its_part(name):
    net = model(name, filters=2, colours=3)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(5, 8, 8, 1)))
    labels = jnp.asarray(rng.integers(0, 3, (5, 8, 8)), jnp.int32)
    problem = colourisation_problem(net, (x, labels))
    params, state = problem.init(KEY, problem.data)

    def at(count, mask):
        examples = {"inputs": x[:count], "targets": labels[:count]}
        batch = oj.Batch(examples, mask, KEY, problem.data.shared)
        value = lambda p: problem.loss(p, state, batch, {})  # noqa: E731
        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    whole, part = at(5, jnp.arange(5) < 3), at(3, None)
    chex.assert_trees_all_close(whole, part, rtol=1e-10, atol=1e-12)


def test_pool_and_upsample():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert max_pool(x)[0, :, :, 0].tolist() == [[5, 7], [13, 15]]
    assert upsample(x[:, :2, :2])[0, :, :, 0].tolist() == [
        [0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]]  # fmt: skip


@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_net_learns_pictures_whose_colour_is_their_grey_level(together):
    """Two flat colours told apart by brightness: every pixel must come out right."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 16), 64).reshape(16, 8, 8).astype(np.int32)
    grey = np.float32(0.2 + 0.6 * labels)[..., None]
    problem = colourisation_problem(
        model("conv-transpose", filters=4, colours=2), (grey, labels), (grey, labels)
    )
    run = oj.make_run(problem, optax.adam, 60, sampler="epochs", max_batch_size=8, record_every=20)
    keys = jax.random.split(KEY, 2)
    one = lambda key: run({"learning_rate": 0.02}, key)  # noqa: E731
    trajectory = jax.vmap(one)(keys) if together else one(keys[0])
    assert np.all(np.asarray(trajectory.metrics["validation_accuracy"])[..., -1] > 0.99)
    assert trajectory.loss.dtype == np.float32


def test_nnx_modules_go_in_by_a_factory():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(1, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.relu(self.norm(self.first(x))))

    x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        problem = oj.flax_problem(Net, x, x**2, lambda out, t: jnp.sum((out - t) ** 2, -1))
        run = oj.make_run(problem, optax.adam, 200)
        end = jax.vmap(lambda key: run({"learning_rate": 0.02}, key))(jax.random.split(KEY, 2))
    assert np.all(end.loss[:, -1] < 0.02)
    assert not np.allclose(*list(end.loss[:, 0]))


def test_a_linen_module_without_flags_goes_in_as_it_is():
    x = np.linspace(-1, 1, 8)[:, None]
    problem = oj.flax_problem(
        nn.Dense(1, param_dtype=jnp.float64), x, 2 * x, lambda out, t: jnp.sum((out - t) ** 2, -1)
    )
    run = oj.make_run(problem, optax.sgd, 200, sampler="full")
    assert run({"learning_rate": 0.3}, KEY).final_loss < 1e-10


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"name": "u-net"}, "unet"), ({"name": "unet", "kernel": 6}, "kernel is 6")],
)
def test_bad_nets_are_named(settings, message):
    with pytest.raises(oj.UserError, match=message):
        model(**settings)


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_with_batch_statistics_must_take_the_mask(masked):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))

    x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    problem = oj.flax_problem(Net(), x, x, lambda out, t: jnp.sum((out - t) ** 2, -1))
    run = oj.make_run(problem, optax.sgd, 2)
    hparams = {"learning_rate": 0.1} | ({"batch_size": 4} if masked else {})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if masked:
            with pytest.raises(oj.UserError, match="let its __call__ take `mask`"):
                run(hparams, KEY)
        else:
            assert np.isfinite(run(hparams, KEY).final_loss)


def test_a_loss_that_is_not_one_value_an_example_is_refused():
    x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    problem = oj.flax_problem(nn.Dense(1), x, x[:, 0], lambda out, t: (out - t[None]) ** 2)
    with pytest.raises(oj.UserError, match="one value an example"):
        oj.make_run(problem, optax.sgd, 2)({"learning_rate": 0.1}, KEY)


def test_equal_problems_share_a_program():
    x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    # One program traces it twice: for a batch, and for all data.
    squared = chex.assert_max_traces(lambda out, t: jnp.sum((out - t) ** 2, -1), n=2)
    for targets in (x, 2 * x):
        problem = oj.flax_problem(nn.Dense(1), x, targets, squared)
        oj.make_run(problem, optax.sgd, 2)({"learning_rate": 0.1}, KEY)


def test_seeds_together_and_one_by_one_learn_the_same():
    """An accelerator's sweep (all seeds in one program) equals the CPU's, seed after seed."""
    x = np.linspace(-1, 1, 12)[:, None]
    problem = oj.flax_problem(
        nn.Dense(1, param_dtype=jnp.float64), x, x**2, lambda out, t: jnp.sum((out - t) ** 2, -1)
    )
    run = oj.make_run(problem, optax.adam, 6, sampler="epochs", max_batch_size=4, record_every=3)
    together, alone = (
        oj.sweep(run, {"learning_rate": [0.01]}, 2, layout=layout) for layout in ("vmap", "loop")
    )
    np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-10)


def test_population_statistics_of_one_batch_give_that_batch_its_training_output():
    net = model("conv-transpose", filters=2, colours=3)
    x = jax.random.uniform(KEY, (6, 8, 8, 1))
    variables = net.init(KEY, x)
    expected, _ = net.apply(variables, x, train=True, mutable=["batch_stats"])
    stats = population_statistics(net, variables, x, batch=6)
    # Training divides by the batch's own variance, not by its unbiased estimate.
    pixels = {"BatchNorm_0": 16, "BatchNorm_1": 4, "BatchNorm_2": 16, "BatchNorm_3": 64}
    for name, each in pixels.items():
        stats[name]["var"] *= (6 * each - 1) / (6 * each)
    found = net.apply({"params": variables["params"], "batch_stats": stats}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    halves = population_statistics(net, variables, x, batch=3)["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(halves, stats["BatchNorm_0"]["mean"], rtol=1e-12)
