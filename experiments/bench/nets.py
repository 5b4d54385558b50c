"""The three networks: a training step, eight models at once, their memory; PyTorch beside them."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax

from optjax.accounting.account import account
from optjax.colourisation.networks import MODELS, model
from optjax.colourisation.problem import colourisation_problem
from optjax.convnets import device_forms, layers
from optjax.run.trajectory import Run, RunState, make_run
from optjax.support.console import silent
from optjax.sweeps import sweep

from . import device_limits
from .least_squares import first_call
from .measure import Entry, Side, seconds
from .peers import NO_TORCH, NoPeerError

RATE = 1e-3
_RSS_UNIT = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss in a MiB


class NetSizes(NamedTuple):
    """What is trained: batches of b pictures of s × s, NF filters, NC colours."""

    batch_size: int = 100
    side: int = 32
    filters: int = 32
    colours: int = 24
    steps: int = 20  # in one scan: a call of one step pays page faults for its temporaries
    slow_steps: int = 2  # of the side that takes seconds a step; XLA would inline a scan of one
    slow_rounds: int = 2
    models: int = 8  # in one sweep
    product: device_limits.LimitSizes = device_limits.CPU

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.side} × {self.side}, {self.filters} filters"


QUICK = NetSizes(
    batch_size=4,
    side=8,
    filters=2,
    colours=3,
    steps=2,
    slow_rounds=1,
    models=2,
    product=device_limits.QUICK,
)


def entries(sizes: NetSizes) -> list[Entry]:
    """A step of each network, many models of each, the memory they take, the time to compile."""
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
    models = [
        Entry(
            f"models/{name}",
            f"{sizes.models} models of {name} in one sweep, a step of one of them ({sizes})",
            "ms",
            "oj.sweep",
            lambda entry, name=name: _models(entry, name, sizes),
        )
        for name in MODELS
    ]
    memory = Entry(
        "models/memory",
        f"memory that a sweep of conv-transpose takes beside its start ({sizes})",
        "MiB",
        "one model",
        lambda _: [
            Side("one model", lambda: _memory(sizes, 1)),
            Side(f"{sizes.models} models", lambda: _memory(sizes, sizes.models)),
        ],
    )
    return [*steps, *models, memory, compiling]


def pictures(sizes: NetSizes, batches: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures (n, s, s, 1) and labels (n, s, s), batches of noise."""
    rng = np.random.default_rng(0)
    shape = (batches * sizes.batch_size, sizes.side, sizes.side)
    grey = rng.uniform(size=(*shape, 1)).astype(np.float32)
    return grey, rng.integers(0, sizes.colours, shape).astype(np.int32)


def _make(name: str, sizes: NetSizes, steps: int) -> tuple[Run, RunState]:
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


def _advance(name: str, sizes: NetSizes, steps: int | None = None) -> Callable[[], Any]:
    steps = steps or sizes.steps
    run, state = _make(name, sizes, steps)
    return lambda: run.advance(state, {"learning_rate": RATE}, steps)


def _step(entry: Entry, name: str, sizes: NetSizes) -> list[Side]:
    ours = _advance(name, sizes)
    jax.block_until_ready(ours())
    sides = [Side("optjax", lambda: 1000 / sizes.steps * seconds(ours)), _floor(name, sizes)]
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


def _floor(name: str, sizes: NetSizes) -> Side:
    """The step's arithmetic at the rate of a large product: its ratio is the part of the peak."""
    net = model(name, filters=sizes.filters, colours=sizes.colours)
    counts = account(net, (sizes.side, sizes.side, 1), batch=sizes.batch_size)
    peak = device_limits.product(sizes.product, "float32")
    work = float(counts.training_flops) / 1e12
    return Side("its arithmetic at the matrix peak", lambda: 1000 * work / peak.measure())


# ---------------------------------------------------------------------------- many models at once


def _swept(name: str, sizes: NetSizes, models: int) -> Callable[[], Any]:
    """A sweep of so many seeds, over two batches of pictures: each run scores them at its end."""
    net = model(name, filters=sizes.filters, colours=sizes.colours)
    run = make_run(
        colourisation_problem(net, pictures(sizes, batches=2)),
        optax.adam,
        steps=sizes.steps,
        sampler="epochs",
        max_batch_size=sizes.batch_size,
        record_every=sizes.steps,
    )
    return lambda: sweep(run, {"learning_rate": [RATE]}, models, progress=silent)


def _models(entry: Entry, name: str, sizes: NetSizes) -> list[Side]:
    ours = _swept(name, sizes, sizes.models)
    ours()
    each = 1000 / (sizes.steps * sizes.models)
    sides = [Side("oj.sweep", lambda: each * seconds(ours))]
    try:
        sides.append(_torch(name, sizes)._replace(name="PyTorch, one after another"))
    except NoPeerError as reason:
        entry.notes.append(str(reason))
    return sides


def _memory(sizes: NetSizes, models: int) -> float:
    """MiB that a process takes at most in a sweep, beyond what it held before."""
    program = (
        "import psutil, resource; from optjax.experiments.bench import nets\n"
        "from optjax.experiments.bench.device_limits import NetSizes\n"
        f"call = nets._swept('conv-transpose', nets.{sizes!r}, {models})\n"
        "start = psutil.Process().memory_info().rss / 2**20; call()\n"
        f"print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / {_RSS_UNIT} - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


# ----------------------------------------------------------------------- jax.lax convolutions


def _lax_convolutions():
    """Within it, the layers are traced with `jax.lax` convolutions and JAX's own derivatives."""
    return mock.patch.multiple(
        layers,
        conv=lambda x, w, window: device_forms.conv(x, w, window=window),
        conv_transpose=lambda y, w, window: device_forms.to_input(y, w, window=window),
    )


# -------------------------------------------------------------------------------------- PyTorch


def _torch(name: str, sizes: NetSizes) -> Side:
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
