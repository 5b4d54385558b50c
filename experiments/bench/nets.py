"""A training step of the three networks: ours, on `jax.lax` convolutions, and in PyTorch."""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optjax.colourisation.models import MODELS, model
from optjax.colourisation.problem import colourisation_problem
from optjax.convnets import layers
from optjax.convnets.window import Window
from optjax.trajectory import Run, RunState, make_run
from optjax.types import Array

from .least_squares import first_call
from .measure import Entry, Side, seconds
from .peers import NO_TORCH, NoPeerError

RATE = 1e-3


class Sizes(NamedTuple):
    """What is trained: batches of b pictures of s × s, NF filters, NC colours."""

    batch_size: int = 100
    side: int = 32
    filters: int = 32
    colours: int = 24
    steps: int = 20  # in one scan: a call of one step pays page faults for its temporaries
    slow_steps: int = 2  # of the side that takes seconds a step; XLA would inline a scan of one
    slow_rounds: int = 2

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.side} × {self.side}, {self.filters} filters"


QUICK = Sizes(batch_size=4, side=8, filters=2, colours=3, steps=2, slow_rounds=1)


def entries(sizes: Sizes) -> list[Entry]:
    """A step of each network, and the time to compile one."""
    steps = [
        Entry(
            f"step/{name}",
            f"a training step of {name} with Adam ({sizes})",
            "ms",
            "optjax",
            lambda entry, name=name: _step(entry, name, sizes),
        )
        for name in MODELS
    ]
    compiling = Entry(
        "compile/conv-transpose",
        f"trace and compile training steps of conv-transpose ({sizes})",
        "s",
        None,
        lambda _: [Side("optjax", lambda: first_call(lambda: _advance("conv-transpose", sizes)))],
    )
    return [*steps, compiling]


def pictures(sizes: Sizes, batches: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures (n, s, s, 1) and labels (n, s, s), batches of noise."""
    rng = np.random.default_rng(0)
    shape = (batches * sizes.batch_size, sizes.side, sizes.side)
    grey = rng.uniform(size=(*shape, 1)).astype(np.float32)
    return grey, rng.integers(0, sizes.colours, shape).astype(np.int32)


def _make(name: str, sizes: Sizes, steps: int) -> tuple[Run, RunState]:
    net = model(name, filters=sizes.filters, colours=sizes.colours)
    run = make_run(
        colourisation_problem(net, pictures(sizes)),
        optax.adam,
        steps=steps,
        sampler="epochs",
        max_batch_size=sizes.batch_size,
        record_every=steps,
    )
    return run, run.init({"learning_rate": RATE}, jax.random.key(0))


def _advance(name: str, sizes: Sizes, steps: int | None = None) -> Callable[[], Any]:
    steps = steps or sizes.steps
    run, state = _make(name, sizes, steps)
    return lambda: run.advance(state, {"learning_rate": RATE}, steps)


def _step(entry: Entry, name: str, sizes: Sizes) -> list[Side]:
    ours = _advance(name, sizes)
    jax.block_until_ready(ours())
    sides = [Side("optjax", lambda: 1000 / sizes.steps * seconds(ours))]
    try:
        sides.append(_torch(name, sizes))
    except NoPeerError as reason:
        entry.notes.append(str(reason))

    with _lax_convolutions():
        slow = _advance(name, sizes, sizes.slow_steps)
        jax.block_until_ready(slow())

    def measure() -> float:
        # Compiled above; the patch stays on in case JAX traces again.
        with _lax_convolutions():
            return 1000 / sizes.slow_steps * seconds(slow)

    return [*sides, Side("jax.lax convolutions", measure, sizes.slow_rounds)]


# ----------------------------------------------------------------------- jax.lax convolutions


def _lax_conv(x: Array, w: Array, window: Window) -> Array:
    return lax.conv_general_dilated(
        x, w, window.stride, window.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _lax_conv_transpose(y: Array, w: Array, window: Window) -> Array:
    edges = [
        (k - 1 - before, n + before - (o - 1) * s - 1)
        for n, k, s, (before, _), o in zip(*window, window.out, strict=True)
    ]
    return lax.conv_general_dilated(
        y,
        jnp.flip(w, (0, 1)).swapaxes(2, 3),
        (1, 1),
        edges,
        lhs_dilation=window.stride,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _lax_convolutions():
    """Within it, the layers are traced with `jax.lax` convolutions and JAX's own derivatives."""
    return mock.patch.multiple(layers, conv=_lax_conv, conv_transpose=_lax_conv_transpose)


# -------------------------------------------------------------------------------------- PyTorch


def _torch(name: str, sizes: Sizes) -> Side:
    try:
        from . import torch_nets
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NoPeerError(NO_TORCH) from None
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch_nets.has_gpu():
        raise NoPeerError("torch sees no GPU and jax does: install the torch build for it")
    net = torch_nets.NETS[name](sizes.filters, sizes.colours)
    params = _make(name, sizes, sizes.steps)[1].params
    own = sum(leaf.size for leaf in jax.tree.leaves(params))
    theirs = sum(weight.numel() for weight in net.parameters())
    if own != theirs:
        raise AssertionError(f"{name} has {own} parameters here and {theirs} in torch")
    train = torch_nets.trainer(
        net, *pictures(sizes), batch_size=sizes.batch_size, rate=RATE, gpu=on_gpu
    )
    train(sizes.steps)
    return Side("PyTorch", lambda: 1000 / sizes.steps * seconds(lambda: train(sizes.steps)))
