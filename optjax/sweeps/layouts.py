"""How many runs at once, and how: guessed from sizes, tried where it pays, and remembered."""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optjax.support import files
from optjax.support.cache import Remembered
from optjax.sweeps.groups import Group
from optjax.sweeps.programs import BatchLayout, Programs
from optjax.sweeps.swept_run import Inputs, RunSpec, likes

Arrangement = Literal["auto", "vmap", "map", "loop"]
ARRANGEMENTS = ("auto", "vmap", "map", "loop")

_CACHE_BYTES = 2 << 20
"""The state of a vmap chunk's runs on the CPU: caches hold it and the temporaries."""

_COUNTED = 8
"""Examples a slot up to which one product over all of them beats a gather of a batch a run."""

_HEAVY = 2e6
"""Operations of a step from which one run keeps all cores busy."""

_WORTH_MEASURING = 1e11
"""Operations of all steps below which no layout is measured: the sweep takes seconds."""

_HASTE = (2e12, 5e11)
"""Operations of all steps below which compiling with less effort saves more than it costs."""

_TRIAL_SHARE = 0.1
"""Of the predicted time of a group, what trying other layouts may take."""


@dataclasses.dataclass
class Chosen:
    """The programs of a group in the layout that it will run in."""

    programs: Programs
    rate: float | None  # seconds a step of a run, where measured
    why: str  # "given", "remembered", "as before", "guessed" or "tried"
    tried: dict[str, float]  # layout → seconds a step of a run


class Kept(NamedTuple):
    """What makes a program round as it did: runs that go on do so in the same one."""

    layout: BatchLayout
    haste: int


@dataclasses.dataclass(frozen=True)
class Request:
    """What is known before a layout is chosen."""

    group: Group
    spec: RunSpec
    runs: int
    steps: float  # of all runs together
    every: int  # steps from record to record
    devices: list[Any]
    memory: float  # bytes of a device that the programs may take
    how: Arrangement
    vmap_chunk: int | None
    before: "Kept | None"  # of runs that go on
    weighted: bool
    example: Callable[[int], tuple[Any, Any]]  # runs of a batch → (Inputs, seeds)

    def programs(self, layout: BatchLayout, haste: int = 0) -> Programs:
        example = self.example(layout.batch)
        return Programs(self.spec, layout, self.devices, self.group.data, example, haste)


def choose(request: Request) -> Chosen:
    """Choose the layout to run in; compile it and, where it pays, measure it."""
    if request.before is not None:
        return _fitting(request, request.programs(*request.before), "as before")
    if request.how != "auto" or request.vmap_chunk is not None:
        programs = request.programs(_given(request))
        programs.haste = _haste(request, programs.operations())
        return _fitting(request, programs, "given")
    memory = _Memory(request)
    # Processes may remember different things, and must run the same programs.
    known = memory.layout() if jax.process_count() == 1 else None
    if known is not None:
        return _fitting(request, request.programs(known), "remembered")
    before = _BEFORE.get(memory.key)
    if before is not None and request.steps <= 4 * before.steps and request.runs >= before.runs:
        programs = request.programs(*before.kept)
        return dataclasses.replace(_fitting(request, programs, "as before"), rate=before.rate)
    chosen = _chosen(request, memory)
    programs = chosen.programs
    _BEFORE[memory.key] = _Before(
        Kept(programs.layout, programs.haste), chosen.rate, request.steps, request.runs
    )
    return chosen


def _chosen(request: Request, memory: "_Memory") -> Chosen:
    programs, flops = _guess(request)
    programs.haste = _haste(request, flops)
    chosen = _fitting(request, programs)
    if flops * request.steps < _WORTH_MEASURING or jax.process_count() > 1:
        return chosen
    rate = measure(chosen.programs, request)
    if rate is None:
        return chosen
    layout = chosen.programs.layout
    chosen = dataclasses.replace(chosen, rate=rate, tried={_name(layout): rate})
    compiling = chosen.programs.compiling
    budget = _TRIAL_SHARE * rate * request.steps
    if budget < compiling:
        return chosen
    deadline = time.perf_counter() + budget
    for other in _others(request, layout):
        if time.perf_counter() + compiling > deadline:
            break
        programs = request.programs(other)
        found = measure(programs, request)
        if found is None or (programs.memory() or 0) > request.memory:
            continue
        chosen.tried[_name(other)] = found
        if found < (chosen.rate or math.inf):
            chosen = dataclasses.replace(chosen, programs=programs, rate=found)
    chosen = dataclasses.replace(chosen, why="tried")
    memory.keep(chosen.programs.layout)
    return chosen


def _haste(request: Request, flops: float) -> int:
    """Return how hastily to compile, 0 to 2, given the operations of a step."""
    turns = getattr(request.group.computation, "turns", 1)
    return sum(flops * turns * request.steps < most for most in _HASTE)


def describe(layout: BatchLayout, devices: int) -> str:
    """Describe a layout in words.

    >>> describe(BatchLayout(64, 16, True), 2)
    'lax.map over 2 vmap chunks of 16 runs on each of 2 devices, batches as counts'
    """
    each = layout.batch // devices
    chunks = each // layout.vmap_chunk
    if chunks > 1:
        text = f"lax.map over {chunks} vmap chunks of {layout.vmap_chunk} runs"
    elif layout.vmap_chunk > 1:
        text = f"vmap of {layout.vmap_chunk} runs"
    else:
        text = "one run at a time"
    text += f" on each of {devices} devices" if devices > 1 else ""
    return text + (", batches as counts" if layout.counts else "")


def measure(programs: Programs, request: Request) -> float | None:
    """Measure the seconds a step of a run, by the difference of two short chunks.

    None where the steps are too quick to be told apart from the rest.
    """
    inputs, seeds = programs.put(request.example(programs.layout.batch))
    runs = programs.start(inputs, seeds)

    def seconds(steps: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(programs.chunk(inputs, runs, 0, 1, steps))
        return time.perf_counter() - begin

    seconds(1)
    short, steps = seconds(1), 4
    while (taken := seconds(steps) - short) < 0.05 and steps < 4096:
        steps *= 4
    runs_steps = programs.layout.batch * (steps - 1)
    return taken / runs_steps if taken > 0 else None


# -------------------------------------------------------------------------------------- candidates


def _given(request: Request) -> BatchLayout:
    devices = len(request.devices)
    each = -(-request.runs // devices)
    if request.how == "loop":
        return BatchLayout(devices, 1)
    if request.how == "map":
        vmap_chunk = min(request.vmap_chunk or max(1, each // 4), each)
        return BatchLayout(devices * vmap_chunk * -(-each // vmap_chunk), vmap_chunk)
    vmap_chunk = min(request.vmap_chunk or each, each)
    return BatchLayout(devices * vmap_chunk, vmap_chunk)


def _guess(request: Request) -> tuple[Programs, float]:
    """Guess: on the CPU vmap chunks that fit the cache, one run where a step is heavy; else all.

    Beside the programs the operations of a step.
    """
    devices = len(request.devices)
    each = -(-request.runs // devices)
    on_cpu = request.devices[0].platform == "cpu"
    counts = _countable(request) and request.group.plan.n <= _COUNTED * request.group.plan.slots
    vmap_chunk = each
    if on_cpu:
        state = run_bytes(request.spec, request.group, request.example(1))
        # One product for all runs of a vmap chunk wants many of them.
        vmap_chunk = min(each, _power((2 if counts else 1) * _CACHE_BYTES / max(1, state)))
    programs = request.programs(
        BatchLayout(devices * vmap_chunk, vmap_chunk, counts and vmap_chunk > 1)
    )
    flops = programs.operations()
    if on_cpu and flops >= _HEAVY and vmap_chunk > 1:
        programs = request.programs(BatchLayout(devices, 1))
    return programs, flops


def run_bytes(spec: RunSpec, group: Group, example: Any) -> int:
    """Return the bytes of the state of one run.

    Args:
      example: inputs and seeds of a batch.
    """
    state = likes(spec, group.data, *example)[1]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _fitting(request: Request, programs: Programs, why: str = "guessed") -> Chosen:
    """Compile the programs, with as few runs in a vmap chunk as the device's memory asks for."""
    while True:
        layout = programs.layout
        try:
            programs.prepare()
            needed = programs.memory() or 0
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or layout.vmap_chunk == 1:
                raise
            needed = 2 * request.memory
        if needed <= request.memory or layout.vmap_chunk == 1:
            return Chosen(programs, None, why, {})
        vmap_chunk = _power(max(1.0, layout.vmap_chunk * request.memory / needed))
        smaller = BatchLayout(len(request.devices) * vmap_chunk, vmap_chunk, layout.counts)
        programs = request.programs(smaller, programs.haste)


def _others(request: Request, first: BatchLayout) -> list[BatchLayout]:
    """List other layouts that are worth a trial."""
    devices = len(request.devices)
    each = -(-request.runs // devices)
    vmap_chunk, found = first.vmap_chunk, []

    def add(vmap_chunk: int, counts: bool, chunks: int = 1) -> None:
        vmap_chunk = max(1, min(vmap_chunk, each))
        layout = BatchLayout(devices * vmap_chunk * chunks, vmap_chunk, counts)
        if layout != first and layout not in found:
            found.append(layout)

    if _countable(request):
        add(vmap_chunk if first.counts else 2 * vmap_chunk, not first.counts)
    if request.devices[0].platform == "cpu":
        for other in (
            (vmap_chunk // 2, vmap_chunk // 4, 4 * vmap_chunk, 1) if vmap_chunk > 1 else (4, 16)
        ):
            add(other, first.counts and other > 1)
    elif vmap_chunk > 1:
        add(vmap_chunk // 4, first.counts)
    if vmap_chunk < each:
        add(vmap_chunk, first.counts, min(4, -(-each // vmap_chunk)))
    return found


def _countable(request: Request) -> bool:
    """Whether batches can be taken as counts: all examples, and how often each was drawn."""
    group, plan = request.group, request.group.plan
    shared = group.which is None and group.computation is plan
    return request.weighted and shared and plan.n > 0 and plan.sampler != "full" and not plan.whole


def _power(x: float) -> int:
    """Return the largest power of two within x, at least 1."""
    return 1 << max(0, int(math.log2(max(1.0, x))))


def _name(layout: BatchLayout) -> str:
    return (
        f"batch {layout.batch}, vmap chunk {layout.vmap_chunk}{', counts' if layout.counts else ''}"
    )


# ---------------------------------------------------------------------------------------- memory


class _Before(NamedTuple):
    """What was chosen in this process, and for how much work."""

    kept: Kept
    rate: float | None
    steps: float
    runs: int


_BEFORE: dict[str, _Before] = {}

LAYOUTS = Remembered("layouts.json")


class _Memory:
    """The layout found by trial, on this machine, for runs of one kind."""

    def __init__(self, request: Request) -> None:
        group = request.group
        shapes = [
            (np.shape(leaf), str(jnp.result_type(leaf)))
            for leaf in jax.tree.leaves((group.data, group.hparams_at(np.zeros(1, int))))
        ]
        facts = [
            files.plainly(request.spec.computation),
            [files.plainly(rule) for rule in request.spec.rules],
            shapes,
            _countable(request),
            jax.config.read("jax_enable_x64"),
            [request.devices[0].device_kind, len(request.devices), os.cpu_count()],
            [jax.__version__, int(math.log2(request.runs))],
        ]
        self.key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]
        self.runs, self.devices = request.runs, len(request.devices)

    def layout(self) -> BatchLayout | None:
        entry: Any = LAYOUTS.entries().get(self.key)
        try:
            vmap_chunk, chunks, counts = int(entry[0]), int(entry[1]), bool(entry[2])
        except (TypeError, ValueError, IndexError, KeyError):
            return None
        each = -(-self.runs // self.devices)
        if not (1 <= vmap_chunk <= 2 * each and 1 <= chunks <= each):
            return None
        vmap_chunk = min(vmap_chunk, each)
        return BatchLayout(self.devices * vmap_chunk * chunks, vmap_chunk, counts)

    def keep(self, layout: BatchLayout) -> None:
        chunks = layout.batch // self.devices // layout.vmap_chunk
        LAYOUTS.keep(self.key, [layout.vmap_chunk, chunks, layout.counts])


def example(inputs: Inputs, seeds: np.ndarray) -> Callable[[int], Any]:
    """Repeat the first runs of a group to fill a batch."""

    def batch(size: int) -> tuple[Any, Any]:
        at = np.arange(size) % len(seeds)
        return jax.tree.map(lambda a: a[at], inputs), seeds[at]

    return batch
