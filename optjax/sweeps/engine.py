"""The host's loop over a sweep: waves of lanes, chunk by chunk, with what lies between chunks."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from optjax.run.core import Status
from optjax.support.errors import UserError
from optjax.sweeps import layouts
from optjax.sweeps.book import KEPT, RUN, STOPPED_BY_HALVING, Book
from optjax.sweeps.book import real as as_real
from optjax.sweeps.buckets import Bucket
from optjax.sweeps.lane import Final, Spec
from optjax.sweeps.processes import agreed, fetch
from optjax.sweeps.progress import Interrupt, Meter, Progress
from optjax.sweeps.rules import Halving
from optjax.sweeps.store import Store
from optjax.sweeps.wave import NONE, Chunk, Wave, form, inputs

CAPACITY = 1024
"""Records that one call holds at most."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a sweep is carried out; changes no result beyond rounding."""

    devices: list[Any]
    lanes: layouts.Lanes = "auto"
    tile: int | None = None
    chunk_steps: int | None = None
    chunk_seconds: float = 10.0
    checkpoint_seconds: float = 30.0
    memory: float | None = None


class Engine:
    """Carries a sweep out.

    Args:
      book: what is known already. buckets: what is to be run. rules, halving: see `rules.checked`.
      drop_diverged: whether a run leaves once it has diverged.
      store: where it is kept, or None.
      weighted: whether batches may be taken as counts. final: what is kept of runs that ended.
    """

    def __init__(
        self,
        book: Book,
        buckets: list[Bucket],
        rules: tuple[Any, ...],
        halving: Halving | None,
        drop_diverged: bool,
        store: Store | None,
        settings: Settings,
        progress: Progress,
        weighted: bool,
        final: Final | None,
    ) -> None:
        self.book, self.buckets, self.rules, self.halving = book, buckets, rules, halving
        self.drop_diverged, self.store, self.settings = drop_diverged, store, settings
        self.weighted, self.final = weighted, final
        self.notes: list[dict[str, Any]] = []
        self.saved: dict[int, list[np.ndarray]] = {}  # run → its state
        self.at = np.zeros(len(book), np.int64)  # the step of that state
        self.interrupt = Interrupt()
        self.meter = Meter(book, progress)
        self._named = 0

    def run(self) -> None:
        """Everything that is not known yet.

        Raises:
          KeyboardInterrupt: after the chunk under way, with all of it kept.
        """
        old = self._restore()
        last = int(self.book.steps.max())
        stops = [] if self.halving is None else self.halving.steps(last, self.book.every)
        with self.interrupt.listening():
            planned = [wave for bucket in self.buckets for wave in self._planned(bucket)]
            started: dict[int, Wave] = {}
            for until in [*stops, last]:
                for i, plan in enumerate(planned):
                    wave = started.pop(i, None) or self._form(*plan)
                    wave.unpark()
                    self._go(wave, until)
                    if stops:
                        started[i] = wave
                    if stops and len(planned) > 1:
                        wave.park()
                if until in stops:
                    self._halve(list(started.values()), until)
        for name in old:
            self._drop(name)

    # ---------------------------------------------------------------------------- forming waves

    def _restore(self) -> list[str]:
        """Read the states of runs under way; the names of the files they were in."""
        if self.store is None:
            return []
        found = self.store.waves()
        for facts, arrays in found.values():
            try:
                step = int(facts["step"])
                leaves = [arrays[f"leaf{i}"] for i in range(len(arrays) - 1)]
                runs = self.book.find(arrays[RUN]).tolist()
                if step < 1 or any(len(leaf) != len(runs) for leaf in leaves):
                    raise ValueError("shapes that do not fit")
            except (KeyError, ValueError) as error:
                raise UserError(
                    f"a state in {str(self.store.folder)!r} is damaged ({error}): remove the "
                    "wave-* files to compute its runs again"
                ) from None
            for row, run in enumerate(runs):
                # A state whose records were lost is of no use.
                if run != NONE and self.at[run] < step <= self.book.done[run]:
                    self.at[run] = step
                    self.saved[run] = [leaf[row] for leaf in leaves]
        self._named = 1 + max((int(name) for name in found), default=-1)
        agreed(0)  # no process writes before all have read
        return list(found)

    def _planned(self, bucket: Bucket) -> Iterator[tuple[Bucket, np.ndarray, int]]:
        """The bucket's runs that have not ended, cut by the step they are at and by memory."""
        seeds = len(self.book.seeds)
        runs = (bucket.points[:, None] * seeds + np.arange(seeds)[None]).ravel()
        runs = runs[~self.book.judged[runs]]
        most = self._most(bucket)
        for step in sorted(set(self.at[runs].tolist()), reverse=True):
            together = runs[self.at[runs] == step]
            if len(together) > most:
                self.notes.append(
                    {
                        "bucket": bucket.name,
                        "split": f"into {-(-len(together) // most)}: the device's memory holds "
                        f"the state of {most} runs",
                    }
                )
            for begin in range(0, len(together), most):
                yield bucket, together[begin : begin + most], step

    def _memory(self) -> float:
        return self.settings.memory or layouts.device_memory(self.settings.devices[0])

    def _most(self, bucket: Bucket) -> int:
        """How many runs' states the devices hold beside what a chunk takes, at most."""
        spec = Spec(bucket.plan, self.rules, 1, self.drop_diverged)
        one = inputs(bucket, self.book.seeds, bucket.points[:1] * len(self.book.seeds))
        each = layouts.lane_bytes(spec, bucket, one)
        # Twice, since a chunk's input stays until its output is there; a third is left for it.
        return max(1, int(len(self.settings.devices) * self._memory() / 3 // max(1, each)))

    def _form(self, bucket: Bucket, runs: np.ndarray, step: int) -> Wave:
        """Choose the layout and put the runs on the devices."""
        settings, book = self.settings, self.book
        capacity = min(book.records, CAPACITY)
        if settings.chunk_steps is not None:
            capacity = min(capacity, max(1, settings.chunk_steps // book.every))
        request = layouts.Request(
            bucket=bucket,
            spec=Spec(bucket.plan, self.rules, capacity, self.drop_diverged, self.final),
            lanes=len(runs),
            steps=float(np.sum(book.steps[runs] - step)),
            every=book.every,
            devices=settings.devices,
            memory=self._memory(),
            how=settings.lanes,
            tile=settings.tile,
            weighted=self.weighted,
            example=layouts.example(*inputs(bucket, book.seeds, runs)),
        )
        name = f"{self._named:04d}"
        self._named += 1
        formed, chosen = form(
            request,
            lambda chosen: Wave(name, bucket, chosen, book.seeds, runs, step, self.saved),
        )
        layout = formed.programs.layout
        self.notes.append(
            {
                "bucket": bucket.name,
                "runs": len(runs),
                "slots": bucket.plan.slots,
                "waste": round(bucket.waste, 4),
                "layout": layouts.describe(layout, len(settings.devices)),
                "why": chosen.why,
                "tried": {name: float(f"{rate:.4g}") for name, rate in chosen.tried.items()},
                "seconds to prepare": round(formed.preparing, 3),
            }
        )
        if step:
            self._checkpoint(formed)
        return formed

    # --------------------------------------------------------------------------- advancing them

    def _go(self, wave: Wave, until: int) -> None:
        """Advance a wave to a step, or until none of its runs is left."""
        pending: Chunk | None = None
        lap = saved = time.perf_counter()
        cost = 0.0
        while wave.blocks:
            count = self._count(wave, until)
            sent = wave.send(count, self.book.every) if count else None
            if pending is not None:
                lap = self._settle(wave, pending, lap)
            pending = sent
            if pending is None:
                break
            # Saving is not to take more than a twentieth of the time, unless asked for always.
            pause = self.settings.checkpoint_seconds
            due = time.perf_counter() - saved >= (max(pause, 20 * cost) if pause else 0.0)
            due, stop = agreed(due, self.interrupt.asked)
            ends = np.any(self.book.steps[self._alive(wave)] <= wave.step)
            if wave.calm and not (due or stop or ends):
                continue
            lap = self._settle(wave, pending, lap)
            pending = None
            self._clear(wave)
            if wave.blocks and (due or stop):
                begin = time.perf_counter()
                self._checkpoint(wave)
                saved = time.perf_counter()
                cost = saved - begin
            if stop:
                raise KeyboardInterrupt
        self._clear(wave)
        if wave.blocks:
            self._checkpoint(wave)
        else:
            self._drop(wave.name)

    def _count(self, wave: Wave, until: int) -> int:
        """Records of the next chunk: what takes about `chunk_seconds`, no run past its end."""
        settings, every = self.settings, self.book.every
        ends = self.book.steps[self._alive(wave)]
        left = (min(until, int(ends.min()) if ends.size else until) - wave.step) // every
        if left <= 0:
            return 0
        if settings.chunk_steps is not None:
            wanted = max(1, settings.chunk_steps // every)
        elif wave.pace is None:
            wanted = 1
        else:
            wanted = max(1, int(settings.chunk_seconds / max(wave.pace, 1e-9)))
            # A first guess may be far off, and rules drop runs between chunks.
            wanted = agreed(min(wanted, 4 * max(1, wave.records)))[0]
        wave.records = min(wanted, wave.programs.spec.capacity, left)
        return wave.records

    def _settle(self, wave: Wave, chunk: Chunk, lap: float) -> float:
        """Read a chunk's records, keep them, and see which runs have ended; the time now."""
        book = self.book
        told: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for runs, *results in chunk.blocks:
            values, stopped_at, stopped_by, diverged_at = fetch(results)
            here = (runs != NONE) & ~book.judged[runs]
            runs = runs[here]
            book.diverged_at[runs] = diverged_at[here]
            book.stopped_at[runs] = stopped_at[here]
            book.stopped_by[runs] = stopped_by[here]
            last = self._last(runs) // book.every - chunk.first
            beyond = np.arange(chunk.count)[None] >= last[:, None]
            rows = {name: as_real(np.asarray(v)[here, : chunk.count]) for name, v in values.items()}
            for name, row in rows.items():
                if beyond.any():
                    rows[name] = np.where(beyond, np.asarray(np.nan, row.dtype), row)
            book.record(runs, chunk.first, rows)
            told.append((runs, rows))
        if self.store is not None and told:
            arrays = {n: np.concatenate([rows[n] for _, rows in told]) for n in told[0][1]}
            runs = np.concatenate([runs for runs, _ in told])
            self.store.append("records", {RUN: book.ids[runs], **arrays}, first=chunk.first)
        over = self._over(np.arange(len(book)))
        wave.calm = not over[self._alive(wave)].any()
        self.meter.show(over)
        now = time.perf_counter()
        pace = (now - lap) / chunk.count
        wave.pace = pace if wave.pace is None else 0.5 * (wave.pace + pace)
        return now

    def _alive(self, wave: Wave) -> np.ndarray:
        """The runs of a wave that were not judged yet."""
        runs = wave.runs()
        return runs[~self.book.judged[runs]]

    def _over(self, runs: np.ndarray) -> np.ndarray:
        """Which runs have stopped or, where that ends them, diverged."""
        over = self.book.stopped_at[runs] >= 0
        if self.drop_diverged:
            over |= self.book.diverged_at[runs] >= 0
        return over

    def _last(self, runs: np.ndarray) -> np.ndarray:
        """The step of the last record that counts."""
        book = self.book
        stopped, diverged = book.stopped_at[runs], book.diverged_at[runs]
        last = np.where(stopped >= 0, np.minimum(book.steps[runs], stopped), book.steps[runs])
        if self.drop_diverged:
            # Up to the record that holds the step of the divergence.
            record = (diverged // book.every + 1) * book.every
            last = np.where(diverged >= 0, np.minimum(last, record), last)
        return last

    def _clear(self, wave: Wave) -> None:
        """Judge the runs that have ended, and let the others close ranks."""
        book = self.book
        for block in wave.blocks:
            runs = block.runs
            real = (runs != NONE) & ~book.judged[runs]
            ended = real & (self._over(runs) | (book.steps[runs] <= wave.step))
            if ended.any():
                self._end(runs[ended], *wave.outcomes(block, ended))
        ahead = (int(book.steps.max()) - wave.step) // book.every * (wave.pace or 0.0)
        wave.keep(~book.judged, ahead)

    def _end(self, runs: np.ndarray, reached: Any, kept: dict[str, np.ndarray]) -> None:
        book = self.book
        final, status, at = reached
        stopped = book.stopped_at[runs] >= 0
        status = np.where(stopped & (status == Status.RUNNING), Status.STOPPED, status)
        # A run that stopped stands still; the wave's clock, by which it was judged, goes on.
        at = np.where((at >= 0) & stopped, book.stopped_at[runs], at)
        at = np.where(book.diverged_at[runs] >= 0, book.diverged_at[runs], at)
        final = as_real(final)
        if self.drop_diverged:
            # How far a diverged run went on depends on the chunk.
            lost = status == Status.DIVERGED
            final = np.where(lost, np.asarray(np.nan, final.dtype), final)
            kept = {name: _blank(values, lost) for name, values in kept.items()}
        rows = {
            "final_loss": final,
            "status": status.astype(np.int32),
            "diverged_at": at.astype(np.int32),
            "stopped_at": book.stopped_at[runs],
            "stopped_by": book.stopped_by[runs],
            "done": self._last(runs),
        }
        rows |= {KEPT + name: values for name, values in kept.items()}
        book.end(runs, rows)
        if self.store is not None:
            self.store.append("outcome", {RUN: book.ids[runs], **rows})

    def _halve(self, waves: list[Wave], step: int) -> None:
        """Successive halving at a step that all runs have reached."""
        rule, book = self.halving, self.book
        runs = np.sort(np.concatenate([self._alive(wave) for wave in waves] or [[]])).astype(int)
        if rule is None or not len(runs):
            return
        earlier = rule.steps(int(book.steps.max()), book.every).index(step)
        # Of the runs that go beyond this step at all.
        entered = int(np.sum(book.steps > step))
        cohort = max(1, math.ceil(entered * rule.keep**earlier - 1e-9))
        chosen = rule.select(book.values[rule.metric][runs, step // book.every - 1], cohort)
        out = runs[~chosen]
        book.stopped_at[out], book.stopped_by[out] = step, STOPPED_BY_HALVING
        for wave in waves:
            wave.unpark()
            self._clear(wave)
            if wave.blocks:
                self._checkpoint(wave)
            else:
                self._drop(wave.name)
            if len(waves) > 1:
                wave.park()

    def _checkpoint(self, wave: Wave) -> None:
        if self.store is None:
            return
        runs, leaves = wave.state()
        going = ~self.book.judged[runs]
        arrays = {f"leaf{i}": leaf[going] for i, leaf in enumerate(leaves)}
        arrays[RUN] = self.book.ids[runs[going]]
        self.store.save_wave(wave.name, arrays, step=wave.step)

    def _drop(self, name: str) -> None:
        if self.store is not None:
            self.store.drop_wave(name)


def _blank(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """NaN, or 0 for whole numbers, in some rows."""
    values = as_real(values, keep_whole=True).copy()
    values[where] = np.nan if values.dtype.kind == "f" else 0
    return values
