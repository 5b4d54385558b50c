"""The host's loop over a sweep: waves of lanes, chunk by chunk, with what lies between chunks."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from optjax.errors import UserError
from optjax.scan import Status
from optjax.sweeps import layouts
from optjax.sweeps.book import STOPPED_BY_HALVING, Book
from optjax.sweeps.buckets import Bucket
from optjax.sweeps.processes import agreed, fetch
from optjax.sweeps.program import Layout, Programs, Spec
from optjax.sweeps.rules import Halving
from optjax.sweeps.store import Store
from optjax.types import PyTree

CAPACITY = 1024
"""Records that one call holds at most."""

Progress = Callable[[str, float], None]


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


@dataclasses.dataclass
class Block:
    """Lanes of one call: which run each is (−1: none), its hyperparameters and its state."""

    runs: np.ndarray
    hparams: PyTree
    lanes: PyTree


@dataclasses.dataclass
class Wave:
    """Runs of one bucket that go on together, all at the same step."""

    name: str
    bucket: Bucket
    programs: Programs
    compiling: float  # seconds
    blocks: list[Block]
    step: int = 0
    records: int = 0  # of the chunk before
    pace: float | None = None  # seconds a record
    calm: bool = False  # in the chunk before no run ended: the next is sent off unseen


@dataclasses.dataclass
class Chunk:
    """What was sent off: results that may not be there yet."""

    first: int
    count: int
    blocks: list[tuple[np.ndarray, PyTree, Any, Any, Any]]


class Engine:
    """Carries a sweep out.

    Args:
      book: what is known already. buckets: what is to be run. rules: see `rules.checked`.
      drop_diverged: whether a run leaves once it has diverged.
      store: where it is kept, or None.
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
    ) -> None:
        self.book, self.buckets, self.rules, self.halving = book, buckets, rules, halving
        self.drop_diverged, self.settings = drop_diverged, settings
        self.store = store
        self.progress, self.weighted = progress, weighted
        self.notes: list[dict[str, Any]] = []
        self.saved: dict[int, tuple[int, list[np.ndarray]]] = {}  # run → (step, its state)
        self.interrupted = False
        self._waves = 0
        self._begun = time.perf_counter()
        self._done_before = 0

    # ------------------------------------------------------------------------------- the sweep

    def run(self) -> None:
        """Everything that is not known yet.

        Raises:
          KeyboardInterrupt: after the chunk under way, with all of it kept.
        """
        old = self._restore()
        self._done_before = int(self.book.done.sum())
        with self._interruptible():
            waves = [wave for bucket in self.buckets for wave in self._planned(bucket)]
            last = int(self.book.steps.max())
            stops = [] if self.halving is None else self.halving.steps(last, self.book.every)
            started: dict[int, Wave] = {}
            for until in [*stops, last]:
                for i, plan in enumerate(waves):
                    wave = started.get(i) or self._form(*plan)
                    if i not in started and wave.step:
                        self._checkpoint(wave)
                    self._unpark(wave)
                    self._go(wave, until)
                    if len(waves) > 1 and stops:
                        self._park(wave)
                        started[i] = wave
                    elif stops:
                        started[i] = wave
                if until in stops:
                    self._halve(list(started.values()), until)
        for name in old:
            self._drop(name)

    def _restore(self) -> list[str]:
        """Read the states of runs under way; the names of the files they were in."""
        if self.store is None:
            return []
        found = self.store.waves()
        for facts, arrays in found.values():
            step = int(facts["step"])
            runs = self.book.find(arrays["run"])
            leaves = [arrays[f"leaf{i}"] for i in range(len(arrays) - 1)]
            for row, run in enumerate(runs):
                if run >= 0 and step > self.saved.get(run, (0, []))[0]:
                    self.saved[int(run)] = (step, [leaf[row] for leaf in leaves])
        self._waves = 1 + max((int(name) for name in found), default=-1)
        agreed(0)  # no process writes before all have read
        return list(found)

    def _planned(self, bucket: Bucket) -> Iterator[tuple[Bucket, np.ndarray, int]]:
        """The bucket's runs that have not ended, cut by the step they are at."""
        seeds = len(self.book.seeds)
        runs = (bucket.points[:, None] * seeds + np.arange(seeds)[None]).ravel()
        runs = runs[~self.book.judged[runs]]
        at = np.array([self.saved[r][0] if r in self.saved else 0 for r in runs.tolist()], int)
        for step in sorted(set(at.tolist()), reverse=True):
            together = runs[at == step]
            most = self._most(bucket)
            if len(together) > most:
                parts = -(-len(together) // most)
                self.notes.append(
                    {"bucket": bucket.name, "split": f"into {parts}: the device's memory holds "
                     f"the state of {most} runs"}
                )  # fmt: skip
            for begin in range(0, len(together), most):
                yield bucket, together[begin : begin + most], step

    def _most(self, bucket: Bucket) -> int:
        """How many runs' states the devices hold beside what a chunk takes, at most."""
        devices = self.settings.devices
        memory = self.settings.memory or layouts.device_memory(devices[0])
        spec = Spec(bucket.plan, self.rules, 1, self.drop_diverged)
        hparams = {name: values[:1] for name, values in bucket.hparams.items()}
        each = layouts.lane_bytes(spec, bucket, (hparams, np.zeros(1, np.int32)))
        # Twice, since a chunk's input stays until its output is there; a third is left for it.
        return max(1, int(len(devices) * memory / 3 // max(1, each)))

    def _form(self, bucket: Bucket, runs: np.ndarray, step: int) -> Wave:
        """Choose the layout and put the runs on the devices."""
        settings, book = self.settings, self.book
        hparams, seeds = self._inputs(bucket, runs)
        every = book.every
        capacity = min(book.records, CAPACITY)
        if settings.chunk_steps is not None:
            capacity = min(capacity, max(1, settings.chunk_steps // every))
        spec = Spec(bucket.plan, self.rules, capacity, self.drop_diverged)
        memory = settings.memory or layouts.device_memory(settings.devices[0])
        begin = time.perf_counter()
        chosen = layouts.choose(
            layouts.Request(
                bucket=bucket,
                spec=spec,
                lanes=len(runs),
                steps=float(np.sum(book.steps[runs] - step)),
                devices=settings.devices,
                memory=memory,
                how=settings.lanes,
                tile=settings.tile,
                weighted=self.weighted,
                example=layouts.example(hparams, seeds),
            )
        )
        programs = chosen.programs
        wave = Wave(f"{self._waves:04d}", bucket, programs, 0.0, [], step)
        self._waves += 1
        for part in self._cut(runs, programs.layout.block):
            hparams, seeds = programs.put(self._inputs(bucket, part))
            lanes = self._revived(programs, part) if step else programs.start(hparams, seeds)
            wave.blocks.append(Block(part, hparams, lanes))
        wave.compiling = time.perf_counter() - begin
        if chosen.rate is not None:
            wave.pace = chosen.rate * every * programs.layout.block * len(wave.blocks)
        self.notes.append(
            {
                "bucket": bucket.name,
                "runs": len(runs),
                "slots": bucket.plan.slots,
                "waste": round(bucket.waste, 4),
                "layout": layouts.describe(programs.layout, len(settings.devices)),
                "why": chosen.why,
                "tried": {name: float(f"{rate:.4g}") for name, rate in chosen.tried.items()},
                "seconds to prepare": round(wave.compiling, 3),
            }
        )
        return wave

    def _inputs(self, bucket: Bucket, runs: np.ndarray) -> tuple[PyTree, np.ndarray]:
        """Hyperparameters and seeds of runs; those of the first where there is none."""
        seeds = self.book.seeds
        runs = np.where(runs < 0, runs[0], runs)
        place = {int(p): i for i, p in enumerate(bucket.points)}
        at = np.array([place[int(p)] for p in runs // len(seeds)])
        chosen = np.array(seeds, np.int32)[runs % len(seeds)]
        return {name: values[at] for name, values in bucket.hparams.items()}, chosen

    def _revived(self, programs: Programs, runs: np.ndarray) -> PyTree:
        rows = [self.saved[int(r)][1] for r in np.where(runs < 0, runs[0], runs)]
        leaves = [np.stack(column) for column in zip(*rows, strict=True)]
        return programs.put(_as_lanes(programs, leaves))

    @staticmethod
    def _cut(runs: np.ndarray, block: int) -> list[np.ndarray]:
        """Blocks of runs, the last filled up with −1."""
        padded = np.full(-(-len(runs) // block) * block, -1, np.int64)
        padded[: len(runs)] = runs
        return list(padded.reshape(-1, block))

    # ---------------------------------------------------------------------------------- a wave

    def _go(self, wave: Wave, until: int) -> None:
        """Advance a wave to a step, or until none of its runs is left."""
        pending: Chunk | None = None
        lap = saved = time.perf_counter()
        cost = 0.0
        while wave.blocks:
            count = self._count(wave, until)
            sent = self._send(wave, count) if count else None
            if pending is not None:
                self._settle(wave, pending)
                lap = self._paced(wave, pending, lap)
            pending = sent
            if pending is None:
                break
            ends = np.any(self.book.steps[self._alive(wave)] <= wave.step)
            # Saving is not to take more than a twentieth of the time, unless asked for always.
            pause = self.settings.checkpoint_seconds
            due = time.perf_counter() - saved >= (max(pause, 20 * cost) if pause else 0.0)
            due, stop = agreed(due, self.interrupted)
            if wave.calm and not due and not ends and not stop:
                continue
            self._settle(wave, pending)
            lap = self._paced(wave, pending, lap)
            pending = None
            self._judge_ended(wave)
            self._compact(wave)
            if wave.blocks and (due or stop):
                begin = time.perf_counter()
                self._checkpoint(wave)
                saved = time.perf_counter()
                cost = saved - begin
            if stop:
                raise KeyboardInterrupt
        if pending is not None:
            self._settle(wave, pending)
        self._judge_ended(wave)
        self._compact(wave)
        if not wave.blocks:
            self._drop(wave.name)
        elif self.store is not None:
            self._checkpoint(wave)

    def _count(self, wave: Wave, until: int) -> int:
        """Records of the next chunk: what takes about `chunk_seconds`, no run past its end."""
        every, capacity = self.book.every, wave.programs.spec.capacity
        ends = self.book.steps[self._alive(wave)]
        limit = min(until, int(ends.min()) if ends.size else until)
        left = (limit - wave.step) // every
        if left <= 0:
            return 0
        if self.settings.chunk_steps is not None:
            wanted = max(1, self.settings.chunk_steps // every)
        elif wave.pace is None:
            wanted = 1
        else:
            wanted = max(1, int(self.settings.chunk_seconds / max(wave.pace, 1e-9)))
            # A first guess may be far off, and rules drop runs between chunks.
            wanted = agreed(min(wanted, 4 * max(1, wave.records)))[0]
        wave.records = min(wanted, capacity, left)
        return wave.records

    def _send(self, wave: Wave, count: int) -> Chunk:
        every, sent = self.book.every, []
        for block in wave.blocks:
            lanes, values = wave.programs.chunk(block.hparams, block.lanes, wave.step, count, every)
            block.lanes = lanes
            sent.append(
                (block.runs, values, lanes.stopped_at, lanes.stopped_by, lanes.run.diverged_at)
            )
        chunk = Chunk(wave.step // every, count, sent)
        wave.step += count * every
        return chunk

    def _settle(self, wave: Wave, chunk: Chunk) -> None:
        """Read a chunk's records, keep them, and see which runs have ended."""
        book, ended = self.book, 0
        gathered: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for runs, values, stopped_at, stopped_by, diverged_at in chunk.blocks:
            values, stopped_at, stopped_by, diverged_at = fetch(
                (values, stopped_at, stopped_by, diverged_at)
            )
            real = (runs >= 0) & ~book.judged[runs]
            ids = runs[real]
            rows = {name: np.asarray(v)[real, : chunk.count] for name, v in values.items()}
            book.diverged_at[ids] = diverged_at[real]
            book.stopped_at[ids] = stopped_at[real]
            book.stopped_by[ids] = stopped_by[real]
            last = self._last(ids) // book.every - chunk.first
            beyond = np.arange(chunk.count)[None] >= last[:, None]
            for name, row in rows.items():
                if beyond.any():
                    rows[name] = np.where(beyond, np.asarray(np.nan, row.dtype), row)
            book.record(ids, chunk.first, rows)
            gathered.append((ids, rows))
            ended += int(np.sum(self._over(ids)))
        if self.store is not None and gathered:
            names = gathered[0][1]
            arrays = {n: np.concatenate([rows[n] for _, rows in gathered]) for n in names}
            runs = np.concatenate([ids for ids, _ in gathered])
            self.store.append("records", {"run": book.ids[runs], **arrays}, first=chunk.first)
        wave.calm = ended == 0
        self._show(wave)

    def _over(self, runs: np.ndarray) -> np.ndarray:
        """Which runs have stopped or, where that ends them, diverged."""
        over = self.book.stopped_at[runs] >= 0
        if self.drop_diverged:
            over |= self.book.diverged_at[runs] >= 0
        return over

    def _last(self, runs: np.ndarray) -> np.ndarray:
        """The step of the last record that counts."""
        book = self.book
        last = book.steps[runs].copy()
        stopped, diverged = book.stopped_at[runs], book.diverged_at[runs]
        last = np.where(stopped >= 0, np.minimum(last, stopped), last)
        if self.drop_diverged:
            # Up to the record that holds the step of the divergence.
            record = (diverged // book.every + 1) * book.every
            last = np.where(diverged >= 0, np.minimum(last, record), last)
        return last

    def _alive(self, wave: Wave) -> np.ndarray:
        """The runs of a wave that were not judged yet."""
        runs = np.concatenate([b.runs for b in wave.blocks])
        return runs[(runs >= 0) & ~self.book.judged[runs]]

    def _judge_ended(self, wave: Wave) -> None:
        """Outcomes of the runs that have ended and were not judged yet."""
        book = self.book
        for block in wave.blocks:
            real = (block.runs >= 0) & ~book.judged[block.runs]
            runs = block.runs
            ended = real & (self._over(runs) | (book.steps[runs] <= wave.step))
            if not ended.any():
                continue
            out = fetch(wave.programs.outcome(block.hparams, block.lanes, wave.step))
            self._end(runs[ended], *(np.asarray(leaf)[ended] for leaf in out))

    def _end(self, runs: np.ndarray, final: np.ndarray, status: np.ndarray, at: np.ndarray) -> None:
        book = self.book
        stopped = book.stopped_at[runs] >= 0
        status = np.where(stopped & (status == Status.RUNNING), Status.STOPPED, status)
        at = np.where(book.diverged_at[runs] >= 0, book.diverged_at[runs], at)
        if self.drop_diverged:
            final = np.where(status == Status.DIVERGED, np.asarray(np.nan, final.dtype), final)
        rows = {
            "final_loss": final,
            "status": status.astype(np.int32),
            "diverged_at": at.astype(np.int32),
            "stopped_at": book.stopped_at[runs],
            "stopped_by": book.stopped_by[runs],
            "done": self._last(runs),
        }
        book.end(runs, **rows)
        if self.store is not None:
            self.store.append("outcome", {"run": book.ids[runs], **rows})

    def _compact(self, wave: Wave) -> None:
        """Gather the runs that go on into fewer blocks, or into a smaller one where that pays."""
        book, programs = self.book, wave.programs
        layout, devices = programs.layout, len(self.settings.devices)
        alive = [(b.runs >= 0) & ~book.judged[b.runs] for b in wave.blocks]
        left = int(sum(a.sum() for a in alive))
        if not left:
            wave.blocks = []
            return
        needed = -(-left // layout.block)
        smaller = None
        if needed == 1 and layout.block > devices:
            each = 1 << max(0, math.ceil(math.log2(-(-left // devices))))
            tile = min(layout.tile, each)
            candidate = Layout(devices * each, tile, layout.counts)
            share = candidate.block / (layout.block * len(wave.blocks))
            ahead = (int(book.steps.max()) - wave.step) // book.every * (wave.pace or 0.0)
            if share <= 0.5 and ahead * (1 - share) > 2 * wave.compiling:
                smaller = candidate
        if needed >= len(wave.blocks) and smaller is None:
            return
        states = [
            jax.tree.map(lambda leaf, keep=keep: np.asarray(leaf)[keep], fetch(b.lanes))
            for b, keep in zip(wave.blocks, alive, strict=True)
            if keep.any()
        ]
        lanes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *states)
        runs = np.concatenate([b.runs[keep] for b, keep in zip(wave.blocks, alive, strict=True)])
        before = layout.block * len(wave.blocks)
        if smaller is not None:
            example = layouts.example(*self._inputs(wave.bucket, runs))
            programs = wave.programs = Programs(
                programs.spec, smaller, self.settings.devices, wave.bucket.data,
                example(smaller.block),
            )  # fmt: skip
        wave.blocks = []
        size = programs.layout.block
        for i, part in enumerate(self._cut(runs, size)):
            at = np.minimum(np.arange(i * size, (i + 1) * size), len(runs) - 1)
            block = jax.tree.map(lambda leaf, at=at: leaf[at], lanes)
            hparams, _ = self._inputs(wave.bucket, part)
            wave.blocks.append(Block(part, programs.put(hparams), programs.put(block)))
        if wave.pace is not None:
            wave.pace *= size * len(wave.blocks) / before

    # -------------------------------------------------------------------- between runs and waves

    def _halve(self, waves: list[Wave], step: int) -> None:
        """Successive halving at a step that all runs have reached."""
        rule, book = self.halving, self.book
        if rule is None:
            return
        blocks = [b.runs for wave in waves for b in wave.blocks]
        runs = np.concatenate(blocks) if blocks else np.empty(0, np.int64)
        runs = runs[(runs >= 0) & ~book.judged[runs]]
        if not len(runs):
            return
        runs = np.sort(runs)
        earlier = rule.steps(int(book.steps.max()), book.every).index(step)
        cohort = max(1, math.ceil(len(book) * rule.keep**earlier - 1e-9))
        chosen = rule.select(book.values[rule.metric][runs, step // book.every - 1], cohort)
        out = runs[~chosen]
        book.stopped_at[out], book.stopped_by[out] = step, STOPPED_BY_HALVING
        for wave in waves:
            self._unpark(wave)
            self._judge_ended(wave)
            self._compact(wave)
            if wave.blocks:
                self._checkpoint(wave)
            else:
                self._drop(wave.name)
            if len(waves) > 1:
                self._park(wave)

    @staticmethod
    def _park(wave: Wave) -> None:
        """To the host's memory, while other waves have the devices."""
        for block in wave.blocks:
            block.lanes, block.hparams = fetch((block.lanes, block.hparams))

    @staticmethod
    def _unpark(wave: Wave) -> None:
        for block in wave.blocks:
            if isinstance(jax.tree.leaves(block.lanes)[0], np.ndarray):
                block.lanes = wave.programs.put(block.lanes)
                block.hparams = wave.programs.put(block.hparams)

    def _checkpoint(self, wave: Wave) -> None:
        parts = [(b.runs, fetch(b.lanes)) for b in wave.blocks]
        if self.store is None:
            return
        runs = np.concatenate([r for r, _ in parts])
        keep = (runs >= 0) & ~self.book.judged[runs]
        leaves = zip(*(jax.tree.leaves(lanes) for _, lanes in parts), strict=True)
        arrays = {f"leaf{i}": np.concatenate(col)[keep] for i, col in enumerate(leaves)}
        arrays["run"] = self.book.ids[runs[keep]]
        self.store.save_wave(wave.name, arrays, step=wave.step)

    def _drop(self, name: str) -> None:
        if self.store is not None:
            self.store.drop_wave(name)

    # ------------------------------------------------------------------------- what a person sees

    def _paced(self, wave: Wave, chunk: Chunk, lap: float) -> float:
        now = time.perf_counter()
        pace = (now - lap) / chunk.count
        wave.pace = pace if wave.pace is None else 0.5 * (wave.pace + pace)
        return now

    def _show(self, wave: Wave) -> None:
        book = self.book
        over = self._over(np.arange(len(book))) | book.judged
        done = int(book.done.sum())
        total = max(1, int(np.where(over, book.done, book.steps).sum()))
        seconds = max(1e-9, time.perf_counter() - self._begun)
        speed = (done - self._done_before) / seconds
        ended = over | (book.done >= book.steps)
        diverged = int(np.sum(book.diverged_at >= 0))
        left = (total - done) / speed if speed > 0 else math.inf
        text = (
            f"{int(ended.sum()):,} of {len(book):,} runs"
            + (f", {diverged:,} diverged" if diverged else "")
            + f", {_si(speed)} steps/s"
            + (f", {_duration(left)} left" if math.isfinite(left) and done < total else "")
        )
        self.progress(text, min(1.0, done / total))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C is obeyed after the chunk under way, a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def obey(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        for name in before:
            signal.signal(name, obey)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def _as_lanes(programs: Programs, leaves: list[np.ndarray]) -> PyTree:
    """Saved leaves as the lanes of a block, checked against what the program takes."""
    like, tree = jax.tree.flatten(programs.plain_like)
    if len(leaves) != len(like):
        raise UserError(
            f"the saved state has {len(leaves)} arrays, the run {len(like)}: it belongs to other "
            "code; start anew (anew=True)"
        )
    for leaf, kind in zip(leaves, like, strict=True):
        if leaf.shape[1:] != kind.shape or leaf.dtype != kind.dtype:
            raise UserError(
                f"the saved state has an array {leaf.shape[1:]} of {leaf.dtype}, the run "
                f"{kind.shape} of {kind.dtype}: it belongs to other code; start anew (anew=True)"
            )
    return jax.tree.unflatten(tree, leaves)


def _si(x: float) -> str:
    """A number to three digits with its prefix.

    >>> _si(1234567.0)
    '1.23M'
    """
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.3g}{prefix}"
    return f"{x:.3g}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(75)
    '1 min 15 s'
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
