"""Programs exported for platforms that are not here: what they hold, and what they must not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stablehlo
from jax.sharding import AbstractMesh, AxisType

import optjax as oj
from optjax.colourisation.networks import MODELS, model
from optjax.colourisation.problem import colourisation_problem
from optjax.convnets.layers import Conv, ConvTranspose
from optjax.hypergradients import ES, PES, Truncated
from optjax.sweeps.programs import BatchLayout, Programs
from optjax.sweeps.swept_run import Inputs, RunSpec

PLATFORMS = ("cuda", "rocm", "tpu")
RUNS, DEVICES = 8, 4

pytestmark = pytest.mark.usefixtures("float32")


def _check(function, *args, convolves=True):
    """Export for each platform, and refuse what an accelerator lacks or should not do."""
    for platform in PLATFORMS:
        exported = jax.export.export(function, platforms=[platform])(*args)
        found = stablehlo.read(exported)
        assert not [dtype for dtype in found.dtypes if "f64" in dtype or "c128" in dtype]
        assert found.custom_calls == set()
        assert found.collectives == []
        assert not any("callback" in name for name in found.operations)
        assert bool(found.multiply_adds) == convolves


def _problem(net, size=8, pictures=4):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(pictures, size, size, 1)).astype(np.float32)
    return colourisation_problem(net, (x, rng.integers(0, 3, x.shape[:3]).astype(np.int32)))


@pytest.fixture(scope="module")
def run():
    with jax.enable_x64(False):
        problem = _problem(model("unet", filters=2, colours=3))
        return oj.make_run(problem, optax.adam, 4, max_batch_size=2)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "unet" else pytest.mark.slow) for n in MODELS],
)
def test_a_training_run(name):
    run = oj.make_run(_problem(model(name, filters=2, colours=3)), optax.adam, 4, max_batch_size=2)

    def alone(data, rate, seed):
        return run.pure(data, {"learning_rate": rate}, jax.random.key(seed)).final_loss

    _check(jax.jit(alone), run.problem.data, jnp.float32(1e-3), jnp.int32(0))


@pytest.mark.parametrize(
    ("devices", "vmap_chunk"),
    [
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(DEVICES, 1, marks=pytest.mark.slow),
        (DEVICES, 2),
    ],
)
def test_the_three_programs_of_a_sweep(run, devices, vmap_chunk):
    rates = np.full(RUNS, 1e-3, np.float32)
    example = Inputs({"learning_rate": rates}, None), np.arange(RUNS, dtype=np.int32)
    programs = Programs(
        RunSpec(run.plan, (oj.Target(0.5, "loss"),), 4, True),
        BatchLayout(RUNS, vmap_chunk),
        jax.devices()[:1],
        run.problem.data,
        example,
    )
    inputs, seeds, states = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), programs._shapes()
    )
    if devices > 1:
        programs.mesh = AbstractMesh((devices,), ("run",), axis_types=(AxisType.Auto,))
    data = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), programs.data)
    step = np.int32(1)
    for program, args in (
        (programs._start, (inputs, seeds)),
        (programs._chunk, (inputs, states, step, step, step)),
        (programs._finish, (inputs, states, step)),
    ):
        convolves = program != programs._start
        _check(programs._jitted(program, len(args)), data, *args, convolves=convolves)


class Small(nn.Module):
    """A convolution and a transposed one, without batch statistics."""

    @nn.compact
    def __call__(self, x):
        return ConvTranspose(3)(nn.tanh(Conv(2, stride=2)(x)))


@pytest.mark.parametrize(
    "mode",
    [
        "forward",
        "reverse",
        "segmented",
        "recursive",
        "one_step",
        pytest.param("implicit", marks=pytest.mark.slow),
        pytest.param(Truncated(2), marks=pytest.mark.slow),
        ES(pairs=2, at_once=2),
        PES(2, pairs=2),
    ],
    ids=lambda mode: mode if isinstance(mode, str) else mode.name,
)
def test_hypergradients(mode):
    steps = 1 if mode == "one_step" else 4
    run = oj.make_run(_problem(Small(), size=4), optax.sgd, steps, sampler="full")
    fn = oj.hypergrad(run, wrt="l2", mode=mode)

    def gradient(data, l2, seed):
        found = fn.pure(data, {"learning_rate": 0.1, "l2": l2}, jax.random.key(seed))
        return found.value, found.gradient

    _check(jax.jit(gradient), run.problem.data, jnp.float32(1e-3), jnp.int32(0))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_inference(name, dtype):
    net = model(name, dtype=dtype)
    x = jnp.zeros((2, 8, 8, 1))
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    _check(jax.jit(net.apply), variables, x)


def test_one_export_for_several_platforms_runs_on_the_one_that_is_here():
    net = model("unet", filters=2, colours=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 1)), jnp.float32)
    variables = net.init(jax.random.key(0), x)
    exported = jax.export.export(jax.jit(net.apply), platforms=["cpu", "cuda", "tpu"])(variables, x)
    # The same convolutions in the same process: rounding apart, which fusions change.
    np.testing.assert_allclose(
        exported.call(variables, x), net.apply(variables, x), rtol=1e-4, atol=1e-5
    )
