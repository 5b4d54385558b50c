"""Runs of one group that advance together, as batches on the devices."""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from optjax.run.computation import Finished
from optjax.support.errors import UserError
from optjax.support.types import PyTree
from optjax.sweeps import layouts
from optjax.sweeps.groups import Group
from optjax.sweeps.processes import fetch
from optjax.sweeps.programs import BatchLayout, Programs
from optjax.sweeps.swept_run import Inputs

_WORTH_COMPILING = {True: 2e10, False: 2e12}
"""Operations that take about as long as compiling a program does, on the CPU and elsewhere."""

NONE = -1
"""In place of a run's number, of a run that only fills its batch up."""


@dataclasses.dataclass
class RunBatch:
    """Runs of one call: which run each is, what it is given and its state."""

    runs: np.ndarray  # (batch,) int64, or NONE
    inputs: Inputs
    states: PyTree


@dataclasses.dataclass
class Chunk:
    """What was sent off: results that may not be there yet."""

    first: int  # record
    count: int  # records
    batches: list[tuple[np.ndarray, PyTree, Any, Any, Any]]
    # of each batch: runs, name → values (batch, capacity), stopped_at, stopped_by, diverged_at


class ActiveRuns:
    """Runs that are all at the same step.

    Args:
      name: of its file in the store. group, chosen: what runs, and how it is laid out.
      seeds: of all runs of the sweep: run p · S + s has the s-th.
      runs: their numbers, in their places; NONE where a place is empty. step: where they are.
      saved: run → the leaves of its state, where they have begun.
    """

    def __init__(
        self,
        name: str,
        group: Group,
        chosen: layouts.Chosen,
        seeds: list[int],
        runs: np.ndarray,
        step: int,
        saved: dict[int, list[np.ndarray]],
    ) -> None:
        self.name, self.group, self.programs = name, group, chosen.programs
        self.seeds, self.step = seeds, step
        self.records = 0  # of the chunk before
        self.calm = False  # in the chunk before no run ended: the next may be sent off unseen
        self.pace: float | None = None  # seconds a record
        self.preparing = 0.0  # seconds that compiling took
        self.batches = []
        for part in _cut(runs, self.programs.layout.batch):
            if (part == NONE).all():
                continue
            given, seeds_ = self.programs.put(inputs(group, seeds, part))
            if step:
                rows = [saved[int(r)] for r in _filled(part)]
                leaves = [np.stack(column) for column in zip(*rows, strict=True)]
                states = self.programs.put(_as_states(self.programs, leaves))
            else:
                states = self.programs.start(given, seeds_)
            self.batches.append(RunBatch(part, given, states))

    @property
    def places(self) -> int:
        """Runs that its batches hold, those that only fill up included."""
        return self.programs.layout.batch * len(self.batches)

    def in_places(self) -> np.ndarray:
        """Return the run in each place, or NONE."""
        return np.concatenate([batch.runs for batch in self.batches] or [np.empty(0, np.int64)])

    def runs(self) -> np.ndarray:
        """Return the numbers of the runs."""
        runs = self.in_places()
        return runs[runs != NONE]

    def send(self, count: int, every: int) -> Chunk:
        """Send `count` records off; the clock is at their end, whether they are there or not."""
        sent = []
        for batch in self.batches:
            states, values = self.programs.chunk(
                batch.inputs, batch.states, self.step, count, every
            )
            batch.states = states
            sent.append(
                (batch.runs, values, states.stopped_at, states.stopped_by, states.state.diverged_at)
            )
        chunk = Chunk(self.step // every, count, sent)
        self.step += count * every
        return chunk

    def finished(self, batch: RunBatch, which: np.ndarray) -> Finished:
        """Judge some runs of a batch."""
        out = fetch(self.programs.finish(batch.inputs, batch.states, self.step))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[which], out)

    def keep(self, alive: np.ndarray) -> None:
        """Let go of the batches of which no run is left.

        Args:
          alive: (N,) bool, over all runs of the sweep.
        """
        self.batches = [b for b in self.batches if alive[b.runs[b.runs != NONE]].any()]

    def compact(self, alive: np.ndarray, ahead: int) -> None:
        """Move the runs that `keep` left into fewer batches, or into a smaller one where that pays.

        When and how depends on the runs alone, never on the time that they take: another program
        rounds differently, and a sweep is to give the same bits whenever it is interrupted.

        Args:
          alive: (N,) bool, over all runs of the sweep.
          ahead: steps of the longest run that are left.
        """
        going = [(b.runs != NONE) & alive[b.runs] for b in self.batches]
        left = int(sum(g.sum() for g in going))
        batch = self.programs.layout.batch
        needed = -(-left // batch)
        smaller = self._smaller(left, ahead) if needed == 1 else None
        if needed >= len(self.batches) and smaller is None:
            return
        states = [
            jax.tree.map(lambda leaf, g=g: np.asarray(leaf)[g], fetch(b.states))
            for b, g in zip(self.batches, going, strict=True)
        ]
        states = jax.tree.map(lambda *leaves: np.concatenate(leaves), *states)
        runs = np.concatenate([b.runs[g] for b, g in zip(self.batches, going, strict=True)])
        before = self.places
        if smaller is not None:
            example = layouts.example(*inputs(self.group, self.seeds, runs))(smaller.batch)
            old = self.programs
            self.programs = Programs(
                old.spec, smaller, old.devices, self.group.data, example, old.haste
            )
        self.batches = []
        size = self.programs.layout.batch
        for i, part in enumerate(_cut(runs, size)):
            at = np.minimum(np.arange(i * size, (i + 1) * size), len(runs) - 1)
            state = jax.tree.map(lambda leaf, at=at: leaf[at], states)
            given, _ = inputs(self.group, self.seeds, part)
            self.batches.append(RunBatch(part, self.programs.put(given), self.programs.put(state)))
        if self.pace is not None:
            self.pace *= self.places / before

    def _smaller(self, left: int, ahead: int) -> BatchLayout | None:
        """Find a layout for one small batch, where it saves more work than compiling costs."""
        layout, devices = self.programs.layout, len(self.programs.devices)
        each = 1 << math.ceil(math.log2(-(-left // devices)))
        # A power of two divides another.
        vmap_chunk = min(1 << int(math.log2(layout.vmap_chunk)), each)
        candidate = BatchLayout(devices * each, vmap_chunk, layout.counts)
        if 2 * candidate.batch > self.places:
            return None
        spared = (self.places - candidate.batch) * ahead * self.programs.operations()
        worth = _WORTH_COMPILING[self.programs.devices[0].platform == "cpu"]
        return candidate if spared > worth else None

    def state(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the run in each place, or NONE, and the leaves of the places' states."""
        columns = zip(*(jax.tree.leaves(fetch(b.states)) for b in self.batches), strict=True)
        return self.in_places(), [np.concatenate(column) for column in columns]

    def park(self) -> None:
        """Move to the host's memory, while other runs have the devices."""
        for batch in self.batches:
            batch.states, batch.inputs = fetch((batch.states, batch.inputs))

    def unpark(self) -> None:
        """Move back to the devices."""
        for batch in self.batches:
            if isinstance(jax.tree.leaves(batch.states)[0], np.ndarray):
                batch.states = self.programs.put(batch.states)
                batch.inputs = self.programs.put(batch.inputs)


def form(request: layouts.Request, make: Any) -> tuple[ActiveRuns, layouts.Chosen]:
    """Form runs in a layout of their own; and how it was chosen.

    Args:
      make: a layout → the runs in it.
    """
    begin = time.perf_counter()
    chosen = layouts.choose(request)
    active = make(chosen)
    active.preparing = time.perf_counter() - begin
    if chosen.rate is not None:
        active.pace = chosen.rate * request.every * active.places
    return active, chosen


def inputs(group: Group, seeds: list[int], runs: np.ndarray) -> tuple[Inputs, np.ndarray]:
    """Gather the inputs and seeds of runs; those of the first where a place is only filled up."""
    runs = _filled(runs)
    place = {int(p): i for i, p in enumerate(group.points)}
    at = np.array([place[int(p)] for p in runs // len(seeds)])
    chosen = np.array(seeds, np.int32)[runs % len(seeds)]
    return Inputs(group.hparams_at(at), None if group.which is None else group.which[at]), chosen


def _filled(part: np.ndarray) -> np.ndarray:
    """Put the first run into the empty places."""
    return np.where(part == NONE, part[np.argmax(part != NONE)], part)


def _cut(runs: np.ndarray, batch: int) -> list[np.ndarray]:
    """Cut runs into batches, the last filled up."""
    padded = np.full(-(-len(runs) // batch) * batch, NONE, np.int64)
    padded[: len(runs)] = runs
    return list(padded.reshape(-1, batch))


def _as_states(programs: Programs, leaves: list[np.ndarray]) -> PyTree:
    """Restore a batch from saved leaves; check them against the program."""
    like, tree = jax.tree.flatten(programs.plain_like)
    shapes = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    if shapes != [(kind.shape, kind.dtype) for kind in like]:
        raise UserError(
            f"the saved state has {len(leaves)} arrays that are not those of the run: it belongs "
            "to other code; start over (overwrite=True, --overwrite)"
        )
    return jax.tree.unflatten(tree, leaves)
