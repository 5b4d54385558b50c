"""The gradient of a training run by its rate and weight decay: our modes, and PyTorch's ways."""

import functools
import gc
import math
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax.hypergradients import hypergrad
from optjax.run import batching
from optjax.run.flax_models import flax_problem
from optjax.run.optimizers import with_weight_decay
from optjax.run.trajectory import Run, make_run
from optjax.support.errors import UserError
from optjax.support.types import Array

from .measure import Entry, Side, seconds
from .peers import NO_TORCH, NoPeerError, alone

MODES = ("forward", "reverse", "segmented", "recursive", "auto")
# With a tenth of this decay the loss nears zero, and float32 no longer tells its slopes.
HPARAMS = {"learning_rate": 0.05, "weight_decay": 1e-3}
PEER_ROUNDS = 2


class HypergradientSizes(NamedTuple):
    """An MLP d-h-1 on n examples, batches of B, T steps."""

    inputs: int = 64
    hidden: int = 128
    n: int = 256
    batch_size: int = 32
    steps: tuple[int, ...] = (1600, 6400)
    longest: int = 100_000
    checked: int = 200  # steps after which every side must give the same numbers
    slow: int = 1600  # steps that PyTorch's forward mode is run for, and scaled

    def __str__(self) -> str:
        return f"MLP {self.inputs}-{self.hidden}-1, batch {self.batch_size}"


QUICK = HypergradientSizes(
    inputs=6, hidden=8, n=16, batch_size=4, steps=(40, 80), longest=160, checked=40
)


def entries(sizes: HypergradientSizes) -> list[Entry]:
    """Seconds and MiB of the gradient, for every number of steps."""
    what = f"gradient of the final loss by learning rate and weight decay, T = {{}} ({sizes})"
    found = []
    for steps in (*sizes.steps, sizes.longest):
        for name, unit, reference, prepare in (
            ("", "s", "bare run", _beside),
            ("-memory", "MiB", "forward", _memory),
        ):
            found.append(
                Entry(
                    f"hypergradient/{steps}{name}",
                    what.format(steps) + (", temporary memory" if name else ""),
                    unit,
                    reference,
                    functools.partial(prepare, sizes=sizes, steps=steps),
                )
            )
    return found


# ---------------------------------------------------------------------------------------- ours


class MLP(nn.Module):
    """One hidden layer."""

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.relu(nn.Dense(self.hidden, name="first")(x))
        return nn.Dense(1, name="last")(hidden)[..., 0]


def _squared(out: Array, target: Array) -> Array:
    return (out - target) ** 2


def data(sizes: HypergradientSizes) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal inputs (n, d) and a noisy function of one direction (n,), float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sizes.n, sizes.inputs))
    y = np.sin(x @ rng.normal(size=sizes.inputs) / math.sqrt(sizes.inputs))
    y += 0.3 * rng.normal(size=sizes.n)
    return x.astype(np.float32), y.astype(np.float32)


@functools.cache
def _run(sizes: HypergradientSizes, steps: int) -> Run:
    problem = flax_problem(MLP(sizes.hidden), *data(sizes), _squared, chunk=sizes.n)
    return make_run(
        problem,
        with_weight_decay(optax.sgd),
        steps,
        max_batch_size=sizes.batch_size,
        record_every=steps,
    )


class UnrolledProgram(NamedTuple):
    """A compiled gradient, or the run alone."""

    call: Callable[[], Any]
    mib: float  # of temporaries


def _compile(f: Callable[..., Any], run: Run) -> UnrolledProgram:
    hparams = {name: jnp.asarray(value, jnp.float32) for name, value in HPARAMS.items()}
    arguments = run.problem.data, hparams, jax.random.key(0)
    compiled = jax.jit(f).lower(*arguments).compile()
    stats = compiled.memory_analysis()
    mib = math.nan if stats is None else stats.temp_size_in_bytes / 2**20  # not every device says
    return UnrolledProgram(lambda: compiled(*arguments), mib)


@functools.cache
def _bare(sizes: HypergradientSizes, steps: int) -> UnrolledProgram:
    run = _run(sizes, steps)
    return _compile(lambda *at: run.pure(*at).final_loss, run)


@functools.cache
def _mode(sizes: HypergradientSizes, steps: int, mode: str) -> UnrolledProgram:
    run = _run(sizes, steps)
    gradient = hypergrad(run, "final_loss", tuple(HPARAMS), mode)
    return _compile(lambda *at: tuple(gradient.pure(*at)), run)


def _modes(
    entry: Entry, sizes: HypergradientSizes, steps: int
) -> Iterator[tuple[str, UnrolledProgram]]:
    """The modes that fit, each checked against the first."""
    expected = None
    for mode in MODES if steps < sizes.longest else ("forward", "segmented", "auto"):
        try:
            program = _mode(sizes, steps, mode)
        except UserError as error:
            entry.notes.append(f"{mode} is left out: {error}")
            continue
        found = _numbers(*program.call())
        expected = found if expected is None else expected
        # Modes that run a step twice round it otherwise, in float32, and T steps add to that.
        if not _agree(found, expected, 2e-2):
            raise AssertionError(f"mode {mode} gives {found} at T = {steps}, forward {expected}")
        yield mode, program


def _numbers(value: Any, gradient: dict[str, Any]) -> list[float]:
    return [float(value), *(float(gradient[name]) for name in HPARAMS)]


def _agree(found: list[float], expected: list[float], rtol: float) -> bool:
    return bool(np.allclose(found, expected, rtol=rtol, atol=0))


@functools.cache
def _reference(sizes: HypergradientSizes) -> list[float]:
    """Plain reverse mode of JAX through the run, of few steps: what every peer has to give."""
    run = _run(sizes, sizes.checked)
    value, gradient = jax.value_and_grad(
        lambda hparams: run(hparams, jax.random.key(0)).final_loss
    )({name: jnp.asarray(value) for name, value in HPARAMS.items()})
    return _numbers(value, gradient)


def times(entry: Entry, sizes: HypergradientSizes, steps: int) -> list[Side]:
    """The bare run and every mode that fits."""
    bare = _bare(sizes, steps)
    bare.call()
    rounds = None if steps < sizes.longest else PEER_ROUNDS
    sides = [Side("bare run", lambda: seconds(bare.call), rounds)]
    for mode, program in _modes(entry, sizes, steps):
        sides.append(Side(mode, lambda call=program.call: seconds(call), rounds))
    choice = hypergrad(_run(sizes, steps), "final_loss", tuple(HPARAMS)).explain(HPARAMS)
    entry.notes.append(f"T = {steps}, auto: {choice}")
    return sides


def _beside(entry: Entry, sizes: HypergradientSizes, steps: int) -> list[Side]:
    return [*times(entry, sizes, steps), *_torch_times(entry, sizes, steps)]


def _memory(entry: Entry, sizes: HypergradientSizes, steps: int) -> list[Side]:
    sides = [Side("bare run", lambda: _bare(sizes, steps).mib, 1)]
    for mode, program in _modes(entry, sizes, steps):
        sides.append(Side(mode, lambda mib=program.mib: mib, 1))
    return [*sides, *_torch_memory(entry, sizes, steps)]


# --------------------------------------------------------------------------------------- peers


_UNROLLED = (
    "PyTorch, unrolled graph",
    "PyTorch, unrolled graph, torch.compile",
    "torchopt",
    "higher",
)


@functools.cache
def _arrays(sizes: HypergradientSizes, steps: int) -> dict[str, np.ndarray]:
    """The run's data, first weights and batches, for those who do not draw their own."""
    run, key = _run(sizes, steps), jax.random.key(0)
    x, y = data(sizes)
    params: Any = run.init(HPARAMS, key).params
    layers = (params["first"], params["last"])
    weights = [layer[part] for layer in layers for part in ("kernel", "bias")]
    draws = jax.random.fold_in(key, 1)  # the run's own stream of draws

    def drawn(step: Array) -> Array | None:
        order = batching.no_order()
        slots = sizes.batch_size
        return batching.draw("replacement", draws, step, order, sizes.n, slots, None)[0]

    picks = jax.jit(jax.vmap(drawn))(jnp.arange(steps))
    found = {f"w{i}": np.asarray(w) for i, w in enumerate(weights)}
    hyper = np.asarray(list(HPARAMS.values()))
    return {"x": x, "y": y, "picks": np.asarray(picks), "hyper": hyper, **found}


@functools.cache
def _alone(sizes: HypergradientSizes, name: str, steps: int) -> dict[str, Any]:
    """What a peer finds in a process of its own, and the MiB by which that grew."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.npz"
        np.savez(file, **_arrays(sizes, steps))  # pyright: ignore[reportArgumentType]
        return alone(name, "torch_unrolled", name, str(file), str(steps))


@functools.cache
def _refused(sizes: HypergradientSizes, name: str) -> str | None:
    """Why a peer is not measured: it is not here, fails, or gives other numbers than JAX.

    First in a process of its own, since a peer may crash, then in this one.
    """
    if name in ("torchopt", "higher") and find_spec(name) is None:
        return f"{name} is not installed: pip install {name}"
    from . import torch_unrolled

    steps, expected = sizes.checked, _reference(sizes)
    try:
        alone = _alone(sizes, name, steps)
        work = torch_unrolled.TorchWork.of(_arrays(sizes, steps), steps)
        loss, slopes = torch_unrolled.derivatives(name, work)
    except NoPeerError as reason:
        return str(reason)
    for found in ([alone["loss"], *alone["slopes"]], [loss, *slopes]):
        if not _agree(found, expected, 1e-3):
            wrong, right = (", ".join(f"{v:.4g}" for v in values) for values in (found, expected))
            return f"{name} is left out: after {steps} steps it gives {wrong} and not {right}"
    return None


def _peers(entry: Entry, sizes: HypergradientSizes, steps: int) -> Iterator[str]:
    """Those that are here, run, give the right numbers and fit."""
    if find_spec("torch") is None:
        entry.notes.append(NO_TORCH)
        return
    if jax.default_backend() != "cpu":
        entry.notes.append("PyTorch's hypergradients are measured on a CPU only: left out")
        return
    from . import torch_unrolled

    names = list(torch_unrolled.WAYS)
    if steps >= sizes.longest:
        entry.notes.append(f"T = {steps}: unrolled graphs grow with T and are left out")
        names = [name for name in names if name not in _UNROLLED]
    for name in names:
        reason = _refused(sizes, name)
        if reason is None:
            yield name
        else:
            entry.notes.append(reason)


def _torch_times(entry: Entry, sizes: HypergradientSizes, steps: int) -> Iterator[Side]:
    for name in _peers(entry, sizes, steps):
        from . import torch_unrolled

        part = min(steps, sizes.slow) if name == "PyTorch, forward mode" else steps
        if part < steps:
            entry.notes.append(f"{name}: {part} of {steps} steps are run and their time is scaled")
        work = torch_unrolled.TorchWork.of(_arrays(sizes, part), part)

        def measure(name=name, work=work, factor=steps / part) -> float:
            taken = factor * seconds(lambda: torch_unrolled.derivatives(name, work))
            gc.collect()  # higher's graph refers to itself
            return taken

        fast = name.startswith("PyTorch") and name != "PyTorch, forward mode"
        yield Side(name, measure, None if fast and steps < sizes.longest else PEER_ROUNDS)


def _torch_memory(entry: Entry, sizes: HypergradientSizes, steps: int) -> Iterator[Side]:
    for name in _peers(entry, sizes, steps):
        if name == "PyTorch, forward mode" and steps > sizes.slow:
            continue  # as the compiled one: it keeps nothing of a step
        try:
            mib = _alone(sizes, name, steps)["mib"]
        except NoPeerError as reason:
            entry.notes.append(str(reason))
            continue
        if mib is None:
            entry.notes.append("the memory of PyTorch is read from Linux's /proc: left out")
            return
        yield Side(name, lambda mib=mib: mib, 1)
    entry.notes.append(
        "memory: of JAX the compiled temporaries, of PyTorch the growth of the resident "
        "memory of a process that has taken a few steps before"
    )
