"""The host's loop over a sweep: runs side by side, chunk by chunk, and what is between chunks."""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from optjax.run.computation import Finished
from optjax.run.core import Status
from optjax.support.machine import free_memory
from optjax.sweeps import layouts
from optjax.sweeps.active_runs import NONE, ActiveRuns, Chunk, form, inputs
from optjax.sweeps.groups import Group
from optjax.sweeps.processes import agreed, fetch
from optjax.sweeps.progress import Interrupt, Meter, Progress
from optjax.sweeps.recording import new_records
from optjax.sweeps.results import KEPT, RUN, STOPPED_BY_HALVING
from optjax.sweeps.results import real as as_real
from optjax.sweeps.states import States, save
from optjax.sweeps.store import Store
from optjax.sweeps.swept_run import RunSpec
from optjax.sweeps.work import Settings, Work

ROOM, CAPACITY = 64, 1024
"""Records that one call has room for: at least, that runs of other lengths may share a program, and
at most."""

_MOST = 128
"""Hypergradients of a call on the CPU: more take no less time each, and show no progress."""


_COMPACTIONS = 16
"""Moments, evenly spaced, when runs that are left move up, beside the ends of runs."""


class Formation(NamedTuple):
    """Runs of a group that are to advance together."""

    group: Group
    runs: np.ndarray  # in their places; NONE where one is empty
    step: int  # where they are
    vmap_chunk: int | None  # how many are vmapped together, where that is known
    before: layouts.Kept | None  # of runs that go on


class Executor:
    """Carries work out; keeps it in a store, or in memory where there is none."""

    def __init__(
        self, work: Work, store: Store | None, settings: Settings, progress: Progress
    ) -> None:
        results = work.results
        self.results, self.groups, self.rules = results, work.groups, work.rules
        self.halving, self.drop_diverged = work.halving, work.drop_diverged
        self.weighted, self.keep_states = work.weighted, work.keep_states
        self.on_records = work.on_records
        self.store, self.settings = store, settings
        self.notes: list[dict[str, Any]] = []
        self.states = States()
        self.interrupt = Interrupt()
        self.meter = Meter(results, progress, work.describe)
        self._named = 0
        # When runs that are left move up: the same moments however often it is interrupted.
        most, every = int(results.steps.max()), results.every
        chunk = max(1, (settings.chunk_steps or 0) // every)
        apart = -(-max(1, most // every // _COMPACTIONS) // chunk) * chunk * every
        evenly = np.arange(apart, most, apart)
        self.moments = np.union1d(evenly, results.steps)

    def run(self) -> None:
        """Compute everything that is not known yet.

        Raises:
          KeyboardInterrupt: after the chunk under way, with all of it kept.
        """
        if self.store is not None:
            self.states.read(self.store, self.results)
            agreed(0)  # no process writes before all have read
        self._named = 1 + max(map(int, self.states.files), default=-1)
        last = int(self.results.steps.max())
        stops = [] if self.halving is None else self.halving.steps(last, self.results.every)
        with self.interrupt.listening():
            planned = [formation for group in self.groups for formation in self._planned(group)]
            started: dict[int, ActiveRuns] = {}
            for until in [*stops, last]:
                for i, formation in enumerate(planned):
                    active = started.pop(i, None) or self._form(formation)
                    active.unpark()
                    self._go(active, until)
                    if stops:
                        started[i] = active
                    if stops and len(planned) > 1:
                        active.park()
                if until in stops:
                    self._halve(list(started.values()), until)
        # The states of runs that are not under way are in no newer file.
        going = np.concatenate([formation.runs for formation in planned] or [np.zeros(0, int)])
        ended = self._over(np.arange(len(self.results)))
        for name, runs in self.states.files.items():
            needed = [run for run in runs if run != NONE and not ended[run]]
            if not self.keep_states or np.isin(needed, going).all():
                self._drop(name)

    # ---------------------------------------------------------------------------- forming them

    def _planned(self, group: Group) -> Iterator[Formation]:
        """Cut the group's runs that have not ended, by where they were and by memory."""
        seeds = len(self.results.seeds)
        runs = (group.points[:, None] * seeds + np.arange(seeds)[None]).ravel()
        runs = runs[~self.results.judged[runs]]
        vmap_chunk = self.settings.vmap_chunk
        devices = len(self.settings.devices)
        known = [run for run in runs.tolist() if run in self.states.placed]
        loose = {0: runs[~np.isin(runs, known)]}  # step → runs that have no place yet
        for kept, step, placed in self.states.formations(known):
            if kept.layout.batch % (devices * kept.layout.vmap_chunk):  # it was on other devices
                more = placed[placed != NONE]
                loose[step] = np.concatenate([loose.get(step, more[:0]), more])
            else:
                yield Formation(group, placed, step, None, kept)
        count = sum(map(len, loose.values()))
        if not count:
            return
        if group.bytes is None:
            most = self._most(group)
        else:
            # What a run takes while it is under way is known: calls of one size, few places empty.
            fit = max(1.0, self._memory() / group.bytes)
            fit = min(fit, _MOST) if self.settings.devices[0].platform == "cpu" else fit
            calls = -(-count // ((vmap_chunk or int(fit)) * devices))
            vmap_chunk = -(-count // (calls * devices))
            most = vmap_chunk * devices
        for step, together in sorted(loose.items(), reverse=True):
            if len(together) > most and group.bytes is None:
                self.notes.append(
                    {
                        "group": group.name,
                        "split": f"into {-(-len(together) // most)}: the device's memory holds "
                        f"the state of {most} runs",
                    }
                )
            for begin in range(0, len(together), most):
                yield Formation(group, together[begin : begin + most], step, vmap_chunk, None)

    def _memory(self) -> float:
        """Return the bytes of a device that may be used: the least of any process."""
        if self.settings.memory:
            return self.settings.memory
        # Another process's device tells nothing of its memory.
        mine = next(d for d in self.settings.devices if d.process_index == jax.process_index())
        share = 0.5 if mine.platform == "cpu" else 0.8
        # In MiB: without float64 a whole number that is sent has 32 bits.
        return -(2.0**20) * agreed(-share * free_memory(mine) / 2**20)[0]

    def _most(self, group: Group) -> int:
        """Count the runs whose states the devices hold while a chunk is under way."""
        spec = RunSpec(group.computation, self.rules, 1, self.drop_diverged)
        one = inputs(group, self.results.seeds, group.points[:1] * len(self.results.seeds))
        each = layouts.run_bytes(spec, group, one)
        # Twice, since a chunk's input stays until its output is there; a third is left for it.
        return max(1, int(len(self.settings.devices) * self._memory() / 3 // max(1, each)))

    def _form(self, formation: Formation) -> ActiveRuns:
        """Choose the layout and put the runs on the devices."""
        group, runs, step, vmap_chunk, before = formation
        settings, results = self.settings, self.results
        capacity = min(max(results.records, ROOM), CAPACITY)
        if settings.chunk_steps is not None:
            capacity = min(capacity, max(1, settings.chunk_steps // results.every))
        real = filled = runs[runs != NONE]
        if group.bytes is not None and vmap_chunk is not None:
            filled = np.resize(runs, max(len(runs), vmap_chunk * len(settings.devices)))
        request = layouts.Request(
            group=group,
            spec=RunSpec(group.computation, self.rules, capacity, self.drop_diverged),
            runs=len(filled),
            steps=float(np.sum(results.steps[real] - step)),
            every=results.every,
            devices=settings.devices,
            memory=self._memory(),
            how=settings.layout,
            vmap_chunk=vmap_chunk,
            before=before,
            weighted=self.weighted,
            example=layouts.example(*inputs(group, results.seeds, filled)),
        )
        name = f"{self._named:04d}"
        self._named += 1
        formed, chosen = form(
            request,
            lambda chosen: ActiveRuns(
                name, group, chosen, results.seeds, runs, step, self.states.leaves
            ),
        )
        layout = formed.programs.layout
        self._note(
            {
                "group": group.name,
                "runs": len(real),
                "slots": group.plan.slots,
                "calls": -(-len(runs) // layout.batch),
                **group.notes,
                "waste": round(group.waste, 4),
                "layout": layouts.describe(layout, len(settings.devices)),
                "why": chosen.why,
                "tried": {name: float(f"{rate:.4g}") for name, rate in chosen.tried.items()},
                "seconds to prepare": round(formed.preparing, 3),
            }
        )
        self._checkpoint(formed)
        return formed

    def _note(self, note: dict[str, Any]) -> None:
        """Say how runs are laid out; once for those of a group that follow each other alike."""
        last = self.notes[-1] if self.notes else {}
        if all(last.get(name) == note[name] for name in ("group", "layout", "slots")):
            last["runs"] += note["runs"]
            last["calls"] += note["calls"]
        else:
            self.notes.append(note)

    # --------------------------------------------------------------------------- advancing them

    def _go(self, active: ActiveRuns, until: int) -> None:
        """Advance runs to a step, or until none of them is left."""
        pending: Chunk | None = None
        lap = saved = time.perf_counter()
        cost = 0.0
        while active.batches:
            count = self._count(active, until)
            sent = active.send(count, self.results.every) if count else None
            if pending is not None:
                lap = self._settle(active, pending, lap)
            pending = sent
            if pending is None:
                break
            # Saving is not to take more than a twentieth of the time, unless asked for always.
            pause = self.settings.checkpoint_seconds
            due = time.perf_counter() - saved >= (max(pause, 20 * cost) if pause else 0.0)
            due, stop = agreed(due and not jax.process_index(), self.interrupt.asked)
            moment = active.step in self.moments
            if active.calm and not (due or stop or moment):
                continue
            lap = self._settle(active, pending, lap)
            pending = None
            self._clear(active)
            if moment:
                self._compact(active)
            if active.batches and (due or stop):
                begin = time.perf_counter()
                self._checkpoint(active)
                saved = time.perf_counter()
                cost = saved - begin
            if stop:
                raise self.interrupt.error()
        self._clear(active)
        if active.batches:
            self._checkpoint(active)
        elif not self.keep_states:
            self._drop(active.name)

    def _count(self, active: ActiveRuns, until: int) -> int:
        """Count the records of the next chunk: about `chunk_seconds`, up to the next moment."""
        settings, every = self.settings, self.results.every
        ahead = self.moments[self.moments > active.step]
        left = (min(until, int(ahead.min()) if ahead.size else until) - active.step) // every
        if left <= 0:
            return 0
        if settings.chunk_steps is not None:
            wanted = max(1, settings.chunk_steps // every)
        elif active.pace is None:
            wanted = 1
        else:
            wanted = max(1, int(settings.chunk_seconds / max(active.pace, 1e-9)))
            # A first guess may be far off, and rules drop runs between chunks.
            wanted = agreed(min(wanted, 4 * max(1, active.records)))[0]
        active.records = min(wanted, active.programs.spec.capacity, left)
        return active.records

    def _settle(self, active: ActiveRuns, chunk: Chunk, lap: float) -> float:
        """Read a chunk's records, keep them, and see which runs have ended; the time now."""
        results = self.results
        told: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for runs, *sent in chunk.batches:
            values, stopped_at, stopped_by, diverged_at = fetch(sent)
            here = (runs != NONE) & ~results.judged[runs]
            runs = runs[here]
            results.diverged_at[runs] = diverged_at[here]
            results.stopped_at[runs] = stopped_at[here]
            results.stopped_by[runs] = stopped_by[here]
            last = self._last(runs) // results.every - chunk.first
            beyond = np.arange(chunk.count)[None] >= last[:, None]
            rows = {name: as_real(np.asarray(v)[here, : chunk.count]) for name, v in values.items()}
            for row in rows.values():
                row[beyond] = np.nan
            results.record(runs, chunk.first, chunk.count, rows)
            told.append((runs, rows))
        if told:
            arrays = {n: np.concatenate([rows[n] for _, rows in told]) for n in told[0][1]}
            runs = np.concatenate([runs for runs, _ in told])
            facts = {"first": chunk.first, "count": chunk.count}
            if self.store is not None:
                self.store.append("records", {RUN: results.ids[runs], **arrays}, **facts)
            if self.on_records is not None and jax.process_index() == 0:
                self.on_records(new_records(results, runs, chunk.first, arrays))
        over = self._over(np.arange(len(results)))
        active.calm = not over[self._alive(active)].any()
        self.meter.show(over)
        now = time.perf_counter()
        pace = (now - lap) / chunk.count
        active.pace = pace if active.pace is None else 0.5 * (active.pace + pace)
        return now

    def _alive(self, active: ActiveRuns) -> np.ndarray:
        """Those that were not judged yet."""
        runs = active.runs()
        return runs[~self.results.judged[runs]]

    def _over(self, runs: np.ndarray) -> np.ndarray:
        """Which runs have stopped or, where that ends them, diverged."""
        over = self.results.stopped_at[runs] >= 0
        if self.drop_diverged:
            over |= self.results.diverged_at[runs] >= 0
        return over

    def _last(self, runs: np.ndarray) -> np.ndarray:
        """Return the step of the last record that counts."""
        results = self.results
        stopped, diverged = results.stopped_at[runs], results.diverged_at[runs]
        last = np.where(stopped >= 0, np.minimum(results.steps[runs], stopped), results.steps[runs])
        if self.drop_diverged:
            # Up to the record that holds the step of the divergence.
            record = (diverged // results.every + 1) * results.every
            last = np.where(diverged >= 0, np.minimum(last, record), last)
        return last

    def _clear(self, active: ActiveRuns) -> None:
        """Record the runs that ended."""
        results = self.results
        if self.keep_states and active.batches:
            self._checkpoint(active)
        for batch in active.batches:
            runs = batch.runs
            real = (runs != NONE) & ~results.judged[runs]
            ended = real & (self._over(runs) | (results.steps[runs] <= active.step))
            if ended.any():
                self._end(runs[ended], active.finished(batch, ended))
        active.keep(~results.judged)

    def _compact(self, active: ActiveRuns) -> None:
        active.compact(~self.results.judged, int(self.results.steps.max()) - active.step)

    def _end(self, runs: np.ndarray, found: Finished) -> None:
        """Keep what runs have reached."""
        results = self.results
        stopped = results.stopped_at[runs] >= 0
        status, at, kept = np.asarray(found.status), np.asarray(found.diverged_at), found.kept
        status = np.where(stopped & (status == Status.COMPLETED), Status.STOPPED, status)
        # A run that stopped stands still; the clock by which it was judged does not.
        at = np.where((at >= 0) & stopped, results.stopped_at[runs], at)
        at = np.where(results.diverged_at[runs] >= 0, results.diverged_at[runs], at)
        if self.drop_diverged:
            # How far a diverged run got depends on the chunk.
            lost = status == Status.DIVERGED
            kept = {name: _blank(np.asarray(values), lost) for name, values in kept.items()}
        rows = {
            "status": status.astype(np.int32),
            "diverged_at": at.astype(np.int32),
            "stopped_at": results.stopped_at[runs],
            "stopped_by": results.stopped_by[runs],
            "done": self._last(runs),
        }
        rows |= {KEPT + name: np.asarray(values) for name, values in kept.items()}
        results.end(runs, rows)
        if self.store is not None:
            self.store.append("outcome", {RUN: results.ids[runs], **rows})

    def _halve(self, actives: list[ActiveRuns], step: int) -> None:
        """Successive halving at a step that all runs have reached."""
        rule, results = self.halving, self.results
        alive = [self._alive(active) for active in actives]
        runs = np.sort(np.concatenate(alive or [[]])).astype(int)
        if rule is None or not len(runs):
            return
        earlier = rule.steps(int(results.steps.max()), results.every).index(step)
        # Of the runs that go beyond this step at all.
        entered = int(np.sum(results.steps > step))
        cohort = max(1, math.ceil(entered * rule.keep**earlier - 1e-9))
        chosen = rule.select(results.values[rule.metric][runs, step // results.every - 1], cohort)
        out = runs[~chosen]
        results.stopped_at[out], results.stopped_by[out] = step, STOPPED_BY_HALVING
        for active in actives:
            active.unpark()
            self._clear(active)
            self._compact(active)
            if active.batches:
                self._checkpoint(active)
            else:
                self._drop(active.name)
            if len(actives) > 1:
                active.park()

    def _checkpoint(self, active: ActiveRuns) -> None:
        if self.store is not None:
            save(self.store, active, self.results)

    def _drop(self, name: str) -> None:
        if self.store is not None:
            self.store.drop_state(name)


def _blank(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """NaN, or 0 for whole numbers, in some rows."""
    values = as_real(values, keep_whole=True).copy()
    values[where] = np.nan if values.dtype.kind == "f" else 0
    return values
