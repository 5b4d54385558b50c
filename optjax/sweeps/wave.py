"""Runs of one bucket that go on together, as blocks of lanes on the devices."""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from optjax.run import core
from optjax.support.errors import UserError
from optjax.support.types import PyTree
from optjax.sweeps import layouts
from optjax.sweeps.buckets import Bucket
from optjax.sweeps.lane import Inputs
from optjax.sweeps.processes import fetch
from optjax.sweeps.program import Layout, Programs

NONE = -1
"""In place of a run's number, of a lane that only fills its block up."""


@dataclasses.dataclass
class Block:
    """Lanes of one call: which run each is, what it is given and its state."""

    runs: np.ndarray  # (block,) int64, or NONE
    inputs: Inputs
    lanes: PyTree


@dataclasses.dataclass
class Chunk:
    """What was sent off: results that may not be there yet."""

    first: int  # record
    count: int  # records
    blocks: list[tuple[np.ndarray, PyTree, Any, Any, Any]]
    # of each block: runs, name → values (block, capacity), stopped_at, stopped_by, diverged_at


class Wave:
    """Lanes that are all at the same step.

    Args:
      name: of its file in the store. bucket, chosen: what runs, and how it is laid out.
      seeds: of all runs of the sweep: run p · S + s has the s-th.
      runs: their numbers. step: where they are.
      saved: run → the leaves of its state, where they have begun.
    """

    def __init__(
        self,
        name: str,
        bucket: Bucket,
        chosen: layouts.Chosen,
        seeds: list[int],
        runs: np.ndarray,
        step: int,
        saved: dict[int, list[np.ndarray]],
    ) -> None:
        self.name, self.bucket, self.programs = name, bucket, chosen.programs
        self.seeds, self.step = seeds, step
        self.records = 0  # of the chunk before
        self.calm = False  # in the chunk before no run ended: the next may be sent off unseen
        self.pace: float | None = None  # seconds a record
        self.preparing = 0.0  # seconds that compiling took
        self.blocks = []
        for part in _cut(runs, self.programs.layout.block):
            given, seeds_ = self.programs.put(inputs(bucket, seeds, part))
            if step:
                rows = [saved[int(r)] for r in np.where(part == NONE, part[0], part)]
                leaves = [np.stack(column) for column in zip(*rows, strict=True)]
                lanes = self.programs.put(_as_lanes(self.programs, leaves))
            else:
                lanes = self.programs.start(given, seeds_)
            self.blocks.append(Block(part, given, lanes))

    @property
    def lanes(self) -> int:
        """How many there are, those that fill up included."""
        return self.programs.layout.block * len(self.blocks)

    def runs(self) -> np.ndarray:
        """The numbers of its runs."""
        if not self.blocks:
            return np.empty(0, np.int64)
        runs = np.concatenate([block.runs for block in self.blocks])
        return runs[runs != NONE]

    def send(self, count: int, every: int) -> Chunk:
        """Send `count` records off; the wave is at their end, whether they are there or not."""
        sent = []
        for block in self.blocks:
            lanes, values = self.programs.chunk(block.inputs, block.lanes, self.step, count, every)
            block.lanes = lanes
            sent.append(
                (block.runs, values, lanes.stopped_at, lanes.stopped_by, lanes.run.diverged_at)
            )
        chunk = Chunk(self.step // every, count, sent)
        self.step += count * every
        return chunk

    def outcomes(
        self, block: Block, which: np.ndarray
    ) -> tuple[core.Outcome, dict[str, np.ndarray]]:
        """What some lanes of a block have reached, and what is kept of them."""
        out = fetch(self.programs.outcome(block.inputs, block.lanes, self.step))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[which], out)

    def keep(self, alive: np.ndarray, ahead: float) -> None:
        """Gather the runs that go on into fewer blocks, or into a smaller one where that pays.

        Args:
          alive: (N,) bool, over all runs of the sweep.
          ahead: seconds that the wave would still take as it is.
        """
        going = [(b.runs != NONE) & alive[b.runs] for b in self.blocks]
        left = int(sum(g.sum() for g in going))
        if not left:
            self.blocks = []
            return
        block = self.programs.layout.block
        needed = -(-left // block)
        smaller = self._smaller(left, ahead) if needed == 1 else None
        if needed >= len(self.blocks) and smaller is None:
            return
        states = [
            jax.tree.map(lambda leaf, g=g: np.asarray(leaf)[g], fetch(b.lanes))
            for b, g in zip(self.blocks, going, strict=True)
            if g.any()
        ]
        lanes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *states)
        runs = np.concatenate([b.runs[g] for b, g in zip(self.blocks, going, strict=True)])
        before = self.lanes
        if smaller is not None:
            example = layouts.example(*inputs(self.bucket, self.seeds, runs))(smaller.block)
            old = self.programs
            self.programs = Programs(old.spec, smaller, old.devices, self.bucket.data, example)
        self.blocks = []
        size = self.programs.layout.block
        for i, part in enumerate(_cut(runs, size)):
            at = np.minimum(np.arange(i * size, (i + 1) * size), len(runs) - 1)
            state = jax.tree.map(lambda leaf, at=at: leaf[at], lanes)
            given, _ = inputs(self.bucket, self.seeds, part)
            self.blocks.append(Block(part, self.programs.put(given), self.programs.put(state)))
        if self.pace is not None:
            self.pace *= self.lanes / before

    def _smaller(self, left: int, ahead: float) -> Layout | None:
        """A layout for one small block, where the time that it saves exceeds its compilation."""
        layout, devices = self.programs.layout, len(self.programs.devices)
        each = 1 << math.ceil(math.log2(-(-left // devices)))
        tile = min(1 << int(math.log2(layout.tile)), each)  # a power of two divides another
        candidate = Layout(devices * each, tile, layout.counts)
        share = candidate.block / self.lanes
        if share <= 0.5 and ahead * (1 - share) > 2 * self.preparing:
            return candidate
        return None

    def state(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The numbers of its runs, and the leaves of their state in that order."""
        parts = [(b.runs, fetch(b.lanes)) for b in self.blocks]
        runs = np.concatenate([r for r, _ in parts])
        columns = zip(*(jax.tree.leaves(lanes) for _, lanes in parts), strict=True)
        return runs[runs != NONE], [np.concatenate(c)[runs != NONE] for c in columns]

    def park(self) -> None:
        """To the host's memory, while other waves have the devices."""
        for block in self.blocks:
            block.lanes, block.inputs = fetch((block.lanes, block.inputs))

    def unpark(self) -> None:
        """Back to the devices."""
        for block in self.blocks:
            if isinstance(jax.tree.leaves(block.lanes)[0], np.ndarray):
                block.lanes = self.programs.put(block.lanes)
                block.inputs = self.programs.put(block.inputs)


def form(request: layouts.Request, make: Any) -> tuple[Wave, layouts.Chosen]:
    """A wave in a layout of its own, and how it was chosen.

    Args:
      make: a layout → the wave.
    """
    begin = time.perf_counter()
    chosen = layouts.choose(request)
    wave = make(chosen)
    wave.preparing = time.perf_counter() - begin
    if chosen.rate is not None:
        wave.pace = chosen.rate * request.every * wave.lanes
    return wave, chosen


def inputs(bucket: Bucket, seeds: list[int], runs: np.ndarray) -> tuple[Inputs, np.ndarray]:
    """What runs are given, and their seeds; those of the first where a lane only fills up."""
    runs = np.where(runs == NONE, runs[0], runs)
    place = {int(p): i for i, p in enumerate(bucket.points)}
    at = np.array([place[int(p)] for p in runs // len(seeds)])
    chosen = np.array(seeds, np.int32)[runs % len(seeds)]
    hparams = {name: values[at] for name, values in bucket.hparams.items()}
    return Inputs(hparams, None if bucket.which is None else bucket.which[at]), chosen


def _cut(runs: np.ndarray, block: int) -> list[np.ndarray]:
    """Blocks of runs, the last filled up."""
    padded = np.full(-(-len(runs) // block) * block, NONE, np.int64)
    padded[: len(runs)] = runs
    return list(padded.reshape(-1, block))


def _as_lanes(programs: Programs, leaves: list[np.ndarray]) -> PyTree:
    """Saved leaves as the lanes of a block, checked against what the program takes."""
    like, tree = jax.tree.flatten(programs.plain_like)
    shapes = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    if shapes != [(kind.shape, kind.dtype) for kind in like]:
        raise UserError(
            f"the saved state has {len(leaves)} arrays that are not those of the run: it belongs "
            "to other code; start anew (anew=True, --anew)"
        )
    return jax.tree.unflatten(tree, leaves)
