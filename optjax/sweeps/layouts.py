"""How many lanes at once, and how: guessed from sizes, tried where it pays, and remembered."""

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
import psutil

from optjax.support import files
from optjax.support.cache import Remembered
from optjax.support.errors import UserError, nearest
from optjax.sweeps.buckets import Bucket
from optjax.sweeps.lane import Inputs, Spec, likes
from optjax.sweeps.program import Layout, Programs

Lanes = Literal["auto", "vmap", "map", "loop"]
LANES = ("auto", "vmap", "map", "loop")

_CACHE_BYTES = 2 << 20
"""The lanes' own state in a tile on the CPU: what the cores' caches hold beside the temporaries."""

_COUNTED = 8
"""Examples a slot up to which one product over all of them beats a gather of a batch a lane."""

_HEAVY = 2e6
"""Operations of a step from which one run keeps all cores busy."""

_WORTH_MEASURING = 1e11
"""Operations of all steps below which no layout is measured: the sweep takes seconds."""

_HASTY = 1e10
"""Below these, compiling takes longer than running."""

_TRIAL_SHARE = 0.1
"""Of the predicted time of a bucket, what trying other layouts may take."""


@dataclasses.dataclass
class Chosen:
    """The programs of a bucket in the layout that it will run in."""

    programs: Programs
    rate: float | None  # seconds a step of a lane, where measured
    why: str  # "given", "remembered", "as before", "guessed" or "tried"
    tried: dict[str, float]  # layout → seconds a step of a lane


@dataclasses.dataclass(frozen=True)
class Request:
    """What is known before a layout is chosen."""

    bucket: Bucket
    spec: Spec
    lanes: int
    steps: float  # of all lanes together
    every: int  # steps from record to record
    devices: list[Any]
    memory: float  # bytes of a device that the programs may take
    how: Lanes
    tile: int | None
    weighted: bool
    example: Callable[[int], tuple[Any, Any]]  # lanes of a block → (Inputs, seeds)

    def programs(self, layout: Layout) -> Programs:
        return Programs(
            self.spec, layout, self.devices, self.bucket.data, self.example(layout.block)
        )


def check(how: str, tile: int | None) -> None:
    """Refuse what is no way to lay lanes out.

    Raises:
      UserError: unknown lanes, or a tile of none.
    """
    if how not in LANES:
        raise UserError(f"unknown lanes {how!r}: {nearest(str(how), LANES)}")
    if tile is not None and tile < 1:
        raise UserError(f"tile is {tile}: expected at least 1 lane")


def choose(request: Request) -> Chosen:
    """The layout to run in; compiled and, where it was tried, measured."""
    if request.how != "auto" or request.tile is not None:
        return _fitting(request, request.programs(_given(request)), "given")
    memory = _Memory(request)
    # Processes may remember different things, and must run the same programs.
    known = memory.layout() if jax.process_count() == 1 else None
    if known is not None:
        return _fitting(request, request.programs(known), "remembered")
    before = _BEFORE.get(memory.key)
    if before is not None and request.steps <= 4 * before.steps and request.lanes >= before.lanes:
        programs = request.programs(before.layout)
        programs.hasty = before.hasty
        return dataclasses.replace(_fitting(request, programs, "as before"), rate=before.rate)
    chosen = _chosen(request, memory)
    programs = chosen.programs
    _BEFORE[memory.key] = _Before(
        programs.layout, programs.hasty, chosen.rate, request.steps, request.lanes
    )
    return chosen


def _chosen(request: Request, memory: "_Memory") -> Chosen:
    programs, flops = _guess(request)
    programs.hasty = flops * request.steps < _HASTY
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


def describe(layout: Layout, devices: int) -> str:
    """A layout in words.

    >>> describe(Layout(64, 16, True), 2)
    'lax.map over 2 tiles of 16 lanes on each of 2 devices, batches as counts'
    """
    each = layout.block // devices
    tiles = each // layout.tile
    if tiles > 1:
        text = f"lax.map over {tiles} tiles of {layout.tile} lanes"
    elif layout.tile > 1:
        text = f"vmap of {layout.tile} lanes"
    else:
        text = "one lane at a time"
    text += f" on each of {devices} devices" if devices > 1 else ""
    return text + (", batches as counts" if layout.counts else "")


def measure(programs: Programs, request: Request) -> float | None:
    """Seconds a step of a lane, by the difference of two short chunks; compiles the programs.

    None where the steps are too quick to be told apart from the rest.
    """
    inputs, seeds = programs.put(request.example(programs.layout.block))
    lanes = programs.start(inputs, seeds)

    def seconds(steps: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(programs.chunk(inputs, lanes, 0, 1, steps))
        return time.perf_counter() - begin

    seconds(1)
    short, steps = seconds(1), 4
    while (taken := seconds(steps) - short) < 0.05 and steps < 4096:
        steps *= 4
    lanes_steps = programs.layout.block * (steps - 1)
    return taken / lanes_steps if taken > 0 else None


def device_memory(device: Any) -> float:
    """Bytes that a sweep may take of a device: 80 % of it, half of what is free on the CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return 0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return 0.5 * psutil.virtual_memory().available


# -------------------------------------------------------------------------------------- candidates


def _given(request: Request) -> Layout:
    devices = len(request.devices)
    each = -(-request.lanes // devices)
    if request.how == "loop":
        return Layout(devices, 1)
    if request.how == "map":
        tile = min(request.tile or max(1, each // 4), each)
        return Layout(devices * tile * -(-each // tile), tile)
    tile = min(request.tile or each, each)
    return Layout(devices * tile, tile)


def _guess(request: Request) -> tuple[Programs, float]:
    """On the CPU tiles that stay in the cache, or one lane where a step is heavy; else all.

    Beside the programs the operations of a step.
    """
    devices = len(request.devices)
    each = -(-request.lanes // devices)
    on_cpu = request.devices[0].platform == "cpu"
    counts = _countable(request) and request.spec.plan.n <= _COUNTED * request.spec.plan.slots
    tile = each
    if on_cpu:
        state = lane_bytes(request.spec, request.bucket, request.example(1))
        # One product for all lanes of a tile wants many of them.
        tile = min(each, _power((2 if counts else 1) * _CACHE_BYTES / max(1, state)))
    programs = request.programs(Layout(devices * tile, tile, counts and tile > 1))
    flops = programs.operations()
    if on_cpu and flops >= _HEAVY and tile > 1:
        programs = request.programs(Layout(devices, 1))
    return programs, flops


def lane_bytes(spec: Spec, bucket: Bucket, example: Any) -> int:
    """Bytes of the state of one run.

    Args:
      example: inputs and seeds of a block.
    """
    lane = likes(spec, bucket.data, *example)[1]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(lane))


def _fitting(request: Request, programs: Programs, why: str = "guessed") -> Chosen:
    """The programs, with as few lanes in a tile as the device's memory asks for."""
    while True:
        layout = programs.layout
        try:
            programs.prepare()
            needed = programs.memory() or 0
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or layout.tile == 1:
                raise
            needed = 2 * request.memory
        if needed <= request.memory or layout.tile == 1:
            return Chosen(programs, None, why, {})
        tile = _power(max(1.0, layout.tile * request.memory / needed))
        hasty = programs.hasty
        programs = request.programs(Layout(len(request.devices) * tile, tile, layout.counts))
        programs.hasty = hasty


def _others(request: Request, first: Layout) -> list[Layout]:
    """Layouts worth a trial beside the first."""
    devices = len(request.devices)
    each = -(-request.lanes // devices)
    tile, found = first.tile, []

    def add(tile: int, counts: bool, tiles: int = 1) -> None:
        tile = max(1, min(tile, each))
        layout = Layout(devices * tile * tiles, tile, counts)
        if layout != first and layout not in found:
            found.append(layout)

    if _countable(request):
        add(tile if first.counts else 2 * tile, not first.counts)
    if request.devices[0].platform == "cpu":
        for other in (tile // 2, tile // 4, 4 * tile, 1) if tile > 1 else (4, 16):
            add(other, first.counts and other > 1)
    elif tile > 1:
        add(tile // 4, first.counts)
    if tile < each:
        add(tile, first.counts, min(4, -(-each // tile)))
    return found


def _countable(request: Request) -> bool:
    """Whether batches can be taken as counts: all examples, and how often each was drawn."""
    plan = request.spec.plan
    shared = request.bucket.which is None
    return request.weighted and shared and plan.n > 0 and plan.sampler != "full" and not plan.whole


def _power(x: float) -> int:
    """The largest power of two within x, at least 1."""
    return 1 << max(0, int(math.log2(max(1.0, x))))


def _name(layout: Layout) -> str:
    return f"block {layout.block}, tile {layout.tile}{', counts' if layout.counts else ''}"


# ---------------------------------------------------------------------------------------- memory


class _Before(NamedTuple):
    """What was chosen in this process, and for how much work."""

    layout: Layout
    hasty: bool
    rate: float | None
    steps: float
    lanes: int


_BEFORE: dict[str, _Before] = {}

LAYOUTS = Remembered("layouts.json")


class _Memory:
    """The layout found by trial, on this machine, for runs of one kind."""

    def __init__(self, request: Request) -> None:
        plan, bucket = request.spec.plan, request.bucket
        shapes = [
            (np.shape(leaf), str(jnp.result_type(leaf)))
            for leaf in jax.tree.leaves((bucket.data, bucket.hparams))
        ]
        facts = [
            files.plainly(plan),
            [files.plainly(rule) for rule in request.spec.rules],
            shapes,
            _countable(request),
            jax.config.read("jax_enable_x64"),
            [request.devices[0].device_kind, len(request.devices), os.cpu_count()],
            [jax.__version__, int(math.log2(request.lanes))],
        ]
        self.key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]
        self.lanes, self.devices = request.lanes, len(request.devices)

    def layout(self) -> Layout | None:
        entry: Any = LAYOUTS.entries().get(self.key)
        try:
            tile, tiles, counts = int(entry[0]), int(entry[1]), bool(entry[2])
        except (TypeError, ValueError, IndexError, KeyError):
            return None
        each = -(-self.lanes // self.devices)
        if not (1 <= tile <= 2 * each and 1 <= tiles <= each):
            return None
        tile = min(tile, each)
        return Layout(self.devices * tile * tiles, tile, counts)

    def keep(self, layout: Layout) -> None:
        tiles = layout.block // self.devices // layout.tile
        LAYOUTS.keep(self.key, [layout.tile, tiles, layout.counts])


def example(inputs: Inputs, seeds: np.ndarray) -> Callable[[int], Any]:
    """The first lanes of a bucket, repeated to fill a block."""

    def block(size: int) -> tuple[Any, Any]:
        at = np.arange(size) % len(seeds)
        return jax.tree.map(lambda a: a[at], inputs), seeds[at]

    return block
