"""Operations and bytes of exported programs, counted from their text, against the account."""

import jax
import jax.numpy as jnp
import pytest
import stablehlo

from optjax.accounting.account import account
from optjax.colourisation.networks import MODELS, model
from optjax.colourisation.problem import pixelwise_cross_entropy
from optjax.convnets import choice
from optjax.convnets.device_forms import of_runs
from optjax.convnets.layers import _window

PLATFORMS = ("cuda", "rocm", "tpu")

pytestmark = pytest.mark.usefixtures("float32")


def programs(name, runs, size=16, batch=2, **widths):
    """Inference and a training step of so many runs, each with weights and pictures of its own."""
    net = model(name, **widths)
    x = jax.ShapeDtypeStruct((batch, size, size, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct(x.shape[:3], jnp.int32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def step(variables, x, labels):
        def loss(params):
            now = {**variables, "params": params}
            scores, new = net.apply(now, x, train=True, mutable=["batch_stats"])
            return jnp.mean(pixelwise_cross_entropy(scores, labels)), new

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    many = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((runs, *a.shape), a.dtype), (variables, x, labels)
    )
    return (
        (jax.jit(jax.vmap(net.apply)), many[:2]),
        (jax.jit(jax.vmap(step)), many),
    )


def counted(name, runs, platform, size=16, batch=2, **widths):
    """((found, the account's multiply-adds) of inference, the same of a training step)."""
    found = account(model(name, **widths), (size, size, 1))
    forward = runs * batch * found.multiply_adds
    # A step has two gradients of each layer, but for the first one's by the pictures.
    first = next(row.multiply_adds for row in found.rows if row.multiply_adds)
    expected = forward, 3 * forward - runs * batch * first
    contents = [
        stablehlo.read(jax.export.export(function, platforms=[platform])(*args))
        for function, args in programs(name, runs, size, batch, **widths)
    ]
    return tuple(zip(contents, expected, strict=True))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_runs_take_the_operations_of_the_account_and_no_more(name, platform):
    """Exactly, and so linear in the runs: no work of one run for another.

    Zeros are written for the TPU alone, whose convolutions do not multiply them.
    """
    for runs in (2, 8):
        for found, expected in counted(name, runs, platform, filters=4, colours=6):
            assert found.multiply_adds == expected
            assert found.as_written == expected or platform == "tpu"


def test_bytes_are_linear_in_the_runs():
    of = {runs: counted("unet", runs, "cuda", filters=4, colours=6) for runs in (2, 4, 8)}
    for i in range(2):
        for runs in (4, 8):
            assert of[runs][i][0].bytes == runs / 2 * of[2][i][0].bytes
            assert of[runs][i][0].largest == runs / 2 * of[2][i][0].largest


def test_patches_are_at_most_a_row_of_the_kernel():
    """The largest value of a step: three copies of the widest picture, where channels are many."""
    (_, (step, _)) = counted("conv-transpose", 2, "cuda", filters=32, colours=24)
    widest = 2 * 2 * 16 * 16 * 24 * 4  # R·B·H·W·C of float32
    assert step.largest <= 3 * widest


@pytest.mark.parametrize("way", choice.WAYS)
@pytest.mark.parametrize("name", ["conv", "conv_to_input", "conv_to_kernel"])
def test_the_counter_knows_groups_loops_and_inserted_zeros(name, way):
    """By hand: R·B·OH·OW·k²·C·F, and s² of it where zeros are written in between."""
    runs, b, c, f, k, s = 5, 2, 3, 4, 3, 2
    window = _window((8, 8), k, s)
    x, w = jnp.ones((runs, b, 8, 8, c)), jnp.ones((runs, k, k, c, f))
    y = jnp.ones((runs, b, 4, 4, f))
    args = {"conv": (x, w), "conv_to_input": (y, w), "conv_to_kernel": (x, y)}[name]
    exported = jax.export.export(jax.jit(of_runs(name, way, window)), platforms=["cuda"])(*args)
    found, by_hand = stablehlo.read(exported), runs * b * 4 * 4 * k * k * c * f
    zeros = name == "conv_to_input" and way != "product"
    assert found.multiply_adds == by_hand
    assert found.as_written == by_hand * (s * s if zeros else 1)
