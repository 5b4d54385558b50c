"""Sweeps beside what one writes without them: loops, vmap by hand, NumPy and PyTorch."""

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax.colourisation.networks import model
from optjax.colourisation.problem import colourisation_problem
from optjax.run.problems import Problem, least_squares
from optjax.run.trajectory import Run, make_run
from optjax.support.console import silent
from optjax.support.types import Array, Key
from optjax.sweeps import sweep
from optjax.sweeps.programs import forget

from .measure import Entry, Side, seconds
from .peers import NO_TORCH


class SweepSizes(NamedTuple):
    """Least squares of n × d; `runs` runs of T steps at batch b; and the other sweeps' sizes."""

    n: int = 64
    d: int = 256
    batch_size: int = 8
    steps: int = 1000
    runs: int = 4096
    part: int = 20  # of the peers' steps a part is run, and scaled: each step is alike
    alone: int = 64  # runs of the Python loop, scaled
    tile: int = 1024  # of the peers that are tiled by hand
    net_seeds: int = 8
    net_batches: tuple[int, ...] = (25, 50, 100)
    net_steps: int = 20
    side: int = 32
    filters: int = 32
    largest_batch: int = 512
    early_runs: int = 1024
    early_steps: int = 20_000
    long_steps: int = 10_000

    def __str__(self) -> str:
        return f"n = {self.n}, d = {self.d}, batch {self.batch_size}, {self.steps} steps"


QUICK = SweepSizes(
    n=8, d=6, batch_size=4, steps=40, runs=8, part=2, alone=2, tile=4, net_seeds=1,
    net_batches=(2, 4), net_steps=2, side=8, filters=2, largest_batch=8, early_runs=10,
    early_steps=400, long_steps=80,
)  # fmt: skip


def entries(sizes: SweepSizes) -> list[Entry]:
    """The sweeps, each beside its peers."""
    return [
        Entry(
            "sweep/least-squares",
            f"{sizes.runs} RMSProp runs of least squares ({sizes})",
            "s",
            "oj.sweep",
            lambda entry: _squares(entry, sizes),
        ),
        Entry(
            "sweep/network",
            f"conv-transpose, {sizes.net_seeds} seeds × batches {sizes.net_batches}, a model-step",
            "ms",
            "one model alone",
            lambda _: _network(sizes),
        ),
        Entry(
            "sweep/batch-sizes",
            f"batch sizes 1 to {sizes.largest_batch}, compilation included",
            "s",
            "a program for each, by hand",
            lambda _: _batches(sizes),
        ),
        Entry(
            "sweep/early-stop",
            f"{sizes.early_runs} runs of which 90 % diverge early",
            "s",
            "the surviving tenth alone",
            lambda _: _early(sizes),
        ),
        Entry(
            "sweep/overhead",
            "chunks of 10 s, records and checkpoints on disk, progress",
            "s",
            "one chunk, nothing kept",
            lambda _: _overhead(sizes),
        ),
        Entry(
            "sweep/compile",
            "trace and compile a sweep of 256 runs",
            "s",
            "one run",
            lambda _: _compiling(sizes),
        ),
    ]


def data(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal X (n, d) and t (n,), float32."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=n).astype(np.float32)


# --------------------------------------------------------------------- many least-squares runs


class _Squares(NamedTuple):
    run: Run
    grid: dict[str, np.ndarray]
    seeds: int
    rates: Array  # (runs,)
    keys: Key  # (runs,)

    def one(self, rate: Array, key: Key) -> Array:
        return self.run({"learning_rate": rate}, key).final_loss

    @classmethod
    def of(cls, sizes: SweepSizes) -> "_Squares":
        run = make_run(
            least_squares(*data(sizes.n, sizes.d)), optax.rmsprop, sizes.steps,
            max_batch_size=sizes.batch_size, record_every=sizes.steps,
        )  # fmt: skip
        seeds = 32 if sizes.runs % 32 == 0 else 1
        grid = {"learning_rate": np.geomspace(1e-4, 1e-2, sizes.runs // seeds)}
        rates = jnp.repeat(jnp.asarray(grid["learning_rate"], jnp.float32), seeds)
        keys = jnp.tile(jax.vmap(jax.random.key)(jnp.arange(seeds)), sizes.runs // seeds)
        return cls(run, grid, seeds, rates, keys)


def squares(sizes: SweepSizes) -> list[Side]:
    """All least-squares runs by `oj.sweep` and by plain vmap."""
    run, grid, seeds, rates, keys = work = _Squares.of(sizes)
    naive = jax.jit(jax.vmap(work.one))
    calls = {
        "oj.sweep": lambda: sweep(run, grid, seeds, progress=silent) and None,
        "jit(vmap(run))": lambda: naive(rates, keys),
    }
    for call in (*calls.values(), calls["oj.sweep"]):
        jax.block_until_ready(call())
    return [Side(name, lambda call=call: seconds(call)) for name, call in calls.items()]


def _squares(entry: Entry, sizes: SweepSizes) -> list[Side]:
    ours = squares(sizes)
    work, (X, t) = _Squares.of(sizes), data(sizes.n, sizes.d)
    alone = jax.jit(work.one)
    few = list(zip(list(work.rates), list(work.keys), strict=True))[: sizes.alone]
    jax.block_until_ready(alone(*few[0]))
    host = np.asarray(work.rates)
    part = max(1, sizes.steps // sizes.part)

    def scaled(step: Callable[..., Any], lanes: int, steps: int) -> Callable[[], float]:
        """Seconds of all runs and steps, from some of them."""
        factor = sizes.steps / steps * sizes.runs / lanes
        return lambda: factor * seconds(lambda: _numpy(step, X, t, host[:lanes], sizes, steps))

    sides = [
        *ours,
        Side(
            "Python loop of a compiled run",
            lambda: sizes.runs / len(few) * seconds(lambda: [alone(r, k) for r, k in few]),
        ),
        Side("NumPy, loop over runs", scaled(numpy_rows, 1, sizes.steps), 2),
        Side("NumPy, batched over runs", scaled(numpy_rows, sizes.runs, part), 2),
        Side("NumPy, batched, batches as counts", scaled(numpy_counts, sizes.runs, part), 2),
        *_torch(entry, sizes, X, t, host, part),
        Side("floor: products at the measured peak", lambda: _floor(sizes)),
    ]
    entry.notes.append(
        "NumPy and PyTorch were given a part of the steps and their time is scaled; "
        "'batches as counts' and 'tiles by hand' are our own means, written for them"
    )
    return sides


def numpy_rows(w, v, rate, picks, X, t):
    """A step of RMSProp for every run, each on its own gathered rows."""
    rows = X[picks]
    residual = (rows @ w[:, :, None])[..., 0] - t[picks]
    g = (residual[:, None] @ rows)[:, 0] * np.float32(2 / picks.shape[1])
    return _numpy_rmsprop(w, v, rate, g)


def numpy_counts(w, v, rate, picks, X, t):
    """The same, on all rows with how often each was drawn."""
    counts = np.zeros((len(w), len(X)), w.dtype)
    np.add.at(counts, (np.arange(len(w))[:, None], picks), 1)
    g = ((w @ X.T - t) * counts) @ X * np.float32(2 / picks.shape[1])
    return _numpy_rmsprop(w, v, rate, g)


def _numpy_rmsprop(w, v, rate, g):
    v = np.float32(0.9) * v + np.float32(0.1) * g * g
    return w - rate[:, None] * g / np.sqrt(v + np.float32(1e-8)), v


def _numpy(step, X, t, rates, sizes: SweepSizes, steps: int) -> None:
    rng = np.random.default_rng(1)
    w = np.zeros((len(rates), sizes.d), np.float32)
    v = np.zeros_like(w)
    for _ in range(steps):
        picks = rng.integers(0, sizes.n, (len(rates), sizes.batch_size))
        w, v = step(w, v, rates, picks, X, t)


def _torch(entry: Entry, sizes: SweepSizes, X, t, rates: np.ndarray, part: int) -> list[Side]:
    try:
        from . import torch_squares
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        entry.notes.append(NO_TORCH)
        return []
    sides = []
    for name, tile, compiled in (
        ("PyTorch, batched over runs", sizes.runs, False),
        ("PyTorch, batched, torch.compile", sizes.runs, True),
        ("PyTorch, torch.compile, tiles by hand", sizes.tile, True),
    ):
        go = torch_squares.trainer(X, t, rates[:tile], sizes.batch_size, compiled)
        try:
            go(2)
        except Exception as error:
            entry.notes.append(f"{name}: {type(error).__name__}, {str(error).splitlines()[0]}")
            continue
        factor = sizes.steps / part * sizes.runs / tile
        sides.append(Side(name, lambda go=go, f=factor: f * seconds(lambda: go(part)), 3))
    return sides


def _floor(sizes: SweepSizes) -> float:
    """Seconds that the products of all steps take at the speed of a large matrix product."""
    a = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, a))
    best = min(seconds(lambda: product(a, a)) for _ in range(10))
    rate = 2 * 1024**3 / best
    return sizes.runs * sizes.steps * 4 * sizes.batch_size * sizes.d / rate


# ------------------------------------------------------------------------------------- networks


def _network(sizes: SweepSizes) -> list[Side]:
    rng = np.random.default_rng(0)
    shape = (2 * max(sizes.net_batches), sizes.side, sizes.side)
    grey = rng.uniform(size=(*shape, 1)).astype(np.float32)
    labels = rng.integers(0, 24, shape).astype(np.int32)
    problem = colourisation_problem(model("conv-transpose", filters=sizes.filters), (grey, labels))
    grid = {"learning_rate": [1e-3], "batch_size": list(sizes.net_batches)}
    steps = sizes.net_steps

    def made(largest: int) -> Run:
        return make_run(
            problem, optax.adam, steps, max_batch_size=largest, record_every=max(1, steps // 2)
        )

    alone = [made(b) for b in sizes.net_batches]
    whole = made(max(sizes.net_batches))

    def loop() -> list[Any]:
        return [run({"learning_rate": 1e-3}, jax.random.key(0)).final_loss for run in alone]

    def swept() -> None:
        # Compiled beforehand: over so few steps two sizes would share a program.
        sweep(whole, grid, sizes.net_seeds, batching="static", progress=silent)

    loop(), swept()
    each = len(sizes.net_batches) * steps
    return [
        Side("one model alone", lambda: 1000 / each * seconds(loop)),
        Side("oj.sweep", lambda: 1000 / (each * sizes.net_seeds) * seconds(swept), 3),
    ]


# ------------------------------------------------------------------------- groups and survivors


def _batches(sizes: SweepSizes) -> list[Side]:
    problem = least_squares(*data(sizes.largest_batch, 64))
    batches = [2**i for i in range(sizes.largest_batch.bit_length())]
    steps, seeds, rate = sizes.steps, 16, 1e-3
    run = make_run(problem, optax.sgd, steps, record_every=steps)
    grid = {"learning_rate": [rate], "batch_size": batches}

    def swept() -> None:
        forget()
        sweep(run, grid, seeds, progress=silent)

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))

    def by_hand() -> list[Array]:
        found = []
        for b in batches:
            one = make_run(problem, optax.sgd, steps, max_batch_size=b, record_every=steps)
            many = jax.jit(jax.vmap(lambda k, one=one: one({"learning_rate": rate}, k).final_loss))
            found.append(many(keys))
        return found

    def fresh(call: Callable[[], Any]) -> float:
        jax.clear_caches()
        return seconds(call)

    fresh(by_hand)
    return [
        Side("a program for each, by hand", lambda: fresh(by_hand)),
        Side("oj.sweep", lambda: fresh(swept)),
    ]


def _early(sizes: SweepSizes) -> list[Side]:
    problem = least_squares(*data(sizes.n, sizes.d))
    run = make_run(
        problem, optax.sgd, sizes.early_steps, max_batch_size=sizes.batch_size, record_every=20
    )
    good = math.ceil(0.1 * sizes.early_runs)
    limit = 0.1 / float(np.max(np.sum(data(sizes.n, sizes.d)[0] ** 2, axis=1)))
    survivors = np.geomspace(0.1 * limit, limit, good)
    others = np.geomspace(1e3 * limit, 1e5 * limit, sizes.early_runs - good)

    def swept(rates: np.ndarray) -> None:
        sweep(run, {"learning_rate": np.random.default_rng(0).permutation(rates)}, progress=silent)

    every = np.concatenate([survivors, others])
    for rates in (survivors, every):
        swept(rates)
        swept(rates)
    return [
        Side("the surviving tenth alone", lambda: seconds(lambda: swept(survivors))),
        Side("oj.sweep of all", lambda: seconds(lambda: swept(every))),
    ]


def _overhead(sizes: SweepSizes) -> list[Side]:
    problem = least_squares(*data(sizes.n, sizes.d))
    run = make_run(
        problem, optax.rmsprop, sizes.long_steps, max_batch_size=sizes.batch_size,
        record_every=max(1, sizes.long_steps // 100),
    )  # fmt: skip
    grid = {"learning_rate": np.geomspace(1e-4, 1e-2, max(1, sizes.runs // 2))}
    folder, number = Path(tempfile.mkdtemp()), itertools.count()

    def kept() -> None:
        out = folder / str(next(number))
        sweep(run, grid, out=out, chunk_seconds=10, checkpoint_seconds=10, vmap_chunk=512)
        shutil.rmtree(out)

    def bare() -> None:
        sweep(run, grid, chunk_steps=sizes.long_steps, progress=silent, vmap_chunk=512)

    short = make_run(
        problem, optax.rmsprop, run.plan.record_every, max_batch_size=sizes.batch_size,
        record_every=run.plan.record_every,
    )  # fmt: skip
    sweep(short, grid, vmap_chunk=512, progress=silent)
    return [
        Side("one chunk, nothing kept", lambda: seconds(bare), 2),
        Side("kept, in chunks of 10 s", lambda: seconds(kept), 2),
    ]


def _compiling(sizes: SweepSizes) -> list[Side]:
    problem: Problem = least_squares(*data(sizes.n, sizes.d))
    run = make_run(problem, optax.rmsprop, 2, max_batch_size=sizes.batch_size)
    rates = np.geomspace(1e-4, 1e-2, 256)

    def one() -> Any:
        jax.clear_caches()
        return seconds(lambda: run({"learning_rate": 1e-3}, jax.random.key(0)))

    def many() -> Any:
        jax.clear_caches()
        forget()
        return seconds(lambda: sweep(run, {"learning_rate": rates}, progress=silent) and None)

    one(), many()
    return [Side("one run", one), Side("oj.sweep", many)]
