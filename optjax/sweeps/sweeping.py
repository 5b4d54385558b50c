"""Every point of a grid from every seed."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil

from optjax.run.trajectory import Run
from optjax.support import files, provenance
from optjax.support.console import Console
from optjax.support.errors import UserError
from optjax.sweeps import checks, gradients, layouts
from optjax.sweeps import rules as stop_rules
from optjax.sweeps.book import Book
from optjax.sweeps.buckets import Batching, buckets, resolve
from optjax.sweeps.engine import Engine, Settings
from optjax.sweeps.folder import opened, restore, result
from optjax.sweeps.grid import Grid, as_grid, label
from optjax.sweeps.identity import identity, run_ids
from optjax.sweeps.lane import Final
from optjax.sweeps.layouts import Lanes
from optjax.sweeps.progress import Progress
from optjax.sweeps.replaying import remember
from optjax.sweeps.store import Store

if TYPE_CHECKING:
    import xarray


def sweep(
    run: Run | Callable[..., Any],
    grid: Mapping[str, Any] | Grid,
    seeds: int | Sequence[int] = 1,
    *,
    stop: Any = (),
    keep_diverged: bool = False,
    final: Final | None = None,
    out: str | os.PathLike[str] | None = None,
    anew: bool = False,
    batching: Batching = "auto",
    lanes: Lanes = "auto",
    tile: int | None = None,
    devices: Sequence[Any] | None = None,
    memory: float | None = None,
    chunk_steps: int | None = None,
    chunk_seconds: float = 10.0,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    """Run every point of a grid from every seed: a run a lane, thousands of lanes at once.

    The run of point h and seed s is ``run(h, jax.random.key(s))``, whatever runs beside it: its
    draws are those of that call to the bit, its values agree to rounding.

    Args:
      run: a run, as `make_run` gives; or a function that makes one from some of the grid's names
        (an optimiser, a width): each combination of these has a program of its own. Or a
        hypergradient, as `hypergrad` gives, or a function that makes one: see below.
      grid: name → values, all combinations; or `zipped`, `table` or `drawn` points. The names are
        hyperparameters of the run, ``steps``, or parameters of the function.
      seeds: how many, 0, 1, …; or which.
      stop: rules by which a run ends early: `Target`, `Plateau`, `Halving`.
      keep_diverged: go on with runs that have diverged; without, they leave the sweep, their
        records are NaN after the divergence, and so is their final loss.
      final: (params, model_state, data) → named arrays, kept of every run as it ends: parameters,
        predictions, a score; variables of the dataset.
      out: a folder that keeps the sweep. The same call again goes on where it stopped, or returns
        the result; with more points or seeds it computes the new ones.
      anew: drop what the folder holds.
      batching: a program for each batch size ("static"), one for all with part of the batch masked
        ("masked"), or what is predicted to be quicker ("auto").
      lanes: "vmap" over all lanes of a call, "map" over tiles of them, "loop" over single runs; or
        "auto", guessed, tried where it pays, and remembered for the next sweep of the kind.
      tile: lanes that are vmapped together.
      devices: all by default; the lanes are laid over them.
      memory: bytes of a device that may be used; by default what is free, less a reserve.
      chunk_steps, chunk_seconds: how long the devices run between two looks at the records.
      checkpoint_seconds: at least so long between two checkpoints.
      progress: called with (text, fraction); a bar or lines on stderr by default.
      about: kept in the folder beside the sweep (how it was called), and no part of what it is.

    Returns:
      A Dataset with an axis for each of the grid's (or ``point``), ``seed`` and ``step``:
      ``loss`` and the problem's metrics at every record, ``final_loss``, ``status`` (a `Status`),
      ``diverged_at``, ``stopped_at``, ``steps_done``.

      Of a hypergradient: ``value``, ``gradient_NAME`` (an array's on an axis ``NAME_index``, a
      tree's a variable a leaf), ``finite``, ``status``, ``diverged_at`` and what the mode adds; the
      attributes say which mode, and why. Axes of a dict may then hold arrays, schedules and trees.
      ``stop``, ``final``, ``out`` and the chunks are of runs alone. An interrupt loses what it has.

    Raises:
      UserError: a value or name that cannot be, in a line; a folder that belongs to another sweep
        (what differs is said), that another process is writing, or whose disk is too small.
      KeyboardInterrupt: after the chunk under way; with `out`, nothing is lost.

    >>> import jax, optax, optjax as oj
    >>> run = oj.make_run(oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0]), optax.sgd, 100)
    >>> found = oj.sweep(run, {"learning_rate": [0.01, 0.1], "batch_size": [1, 2]}, seeds=3)
    >>> dict(found.sizes)
    {'learning_rate': 2, 'batch_size': 2, 'seed': 3, 'step': 100}
    >>> best = found.final_loss.mean("seed").sel(batch_size=2).idxmin("learning_rate")
    >>> float(best)
    0.1
    """
    begin = time.perf_counter()
    devices = checks.settings(
        devices, tile=tile, chunk_steps=chunk_steps, chunk_seconds=chunk_seconds,
        checkpoint_seconds=checkpoint_seconds, memory=memory,
    )  # fmt: skip
    layouts.check(lanes, tile)
    made, asked = gradients.parted(run)
    grid = as_grid(gradients.held(grid) if asked else grid)
    chosen = checks.chosen_seeds(seeds)
    points = gradients.resolved(made, grid) if asked else resolve(made, grid)
    plan = points[0].run.plan
    steps = [p.steps for p in points]
    if asked:
        gradients.refuse(
            stop=stop, keep_diverged=keep_diverged, final=final, out=out, anew=anew, about=about,
            lanes=lanes != "auto", chunk_steps=chunk_steps, chunk_seconds=chunk_seconds != 10.0,
            checkpoint_seconds=checkpoint_seconds != 30.0,
        )  # fmt: skip
        with _shown(progress) as show:
            dataset = gradients.compute(
                points, asked, grid, chosen, devices, show, batching, tile, memory
            )
        dataset.attrs.update(_origin(grid, devices, begin))
        return dataset
    common, metrics = checks.names(points, grid, final)
    rules, halving = stop_rules.checked(stop, {"loss", *common}, plan.record_every)
    if chunk_steps is not None and chunk_steps < plan.record_every:
        raise UserError(
            f"chunk_steps is {chunk_steps}: expected at least record_every = {plan.record_every}"
        )
    runs, records = len(grid) * len(chosen), max(steps) // plan.record_every
    checks.fits(runs, records, len(metrics), psutil.virtual_memory().available, "memory")
    columns = {name: [label(v) for v in column] for name, column in grid.columns.items()}
    names = [rule.name for rule in rules]
    ids = run_ids(grid, steps, chosen)
    book = Book(grid.axes, columns, chosen, steps, plan.record_every, ids, names)
    settings = Settings(
        devices=devices,
        lanes=lanes,
        tile=tile,
        chunk_steps=chunk_steps,
        chunk_seconds=chunk_seconds,
        checkpoint_seconds=checkpoint_seconds,
        memory=memory,
    )
    groups = buckets(points, batching)
    store, digest = None, uuid.uuid4().hex[:16]
    if out is not None:
        facts = identity(
            points, grid, {"stop": (rules, halving), "keep_diverged": keep_diverged, "final": final}
        )
        digest = _digest(facts)
        spec = {
            "identity": facts,
            "axes": dict(grid.axes),
            "columns": columns,
            "seeds": list(chosen),
            "steps": steps,
            "record_every": plan.record_every,
            "rules": names,
            "about": dict(about or {}),
        }
        store = opened(out, spec, book, len(metrics), halving, anew)
    try:
        if store is not None:
            if store.spec is None:
                return _known(store, run, grid)
            restore(store, book)
        with _shown(progress) as show:
            engine = Engine(
                book, groups, rules, halving, not keep_diverged, store, settings, show,
                weighted=all(p.run.problem.weighted for p in points), final=final,
            )  # fmt: skip
            engine.run()
        dataset = book.dataset()
        dataset.attrs.update(
            sweep=digest, buckets=json.dumps(engine.notes), **_origin(grid, devices, begin)
        )
        if store is not None and store.writer:
            files.save_dataset(dataset, store.result)
        if engine.interrupt.asked:
            raise KeyboardInterrupt
    finally:
        if store is not None:
            store.close()
    remember(run, grid, dataset.attrs["sweep"])
    return dataset


def _origin(grid: Grid, devices: list[Any], begin: float) -> dict[str, Any]:
    """Where a dataset comes from, as its attributes."""
    return {
        "named": json.dumps(
            [n for n, column in grid.columns.items() if any(map(callable, column))]
        ),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "seconds": time.perf_counter() - begin,
        "commit": provenance.commit(),
        "versions": json.dumps(provenance.versions()),
    }


def _known(store: Store, run: Run | Callable[..., Run], grid: Grid) -> "xarray.Dataset":
    dataset = result(store)
    remember(run, grid, dataset.attrs["sweep"])
    return dataset


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _shown(progress: Progress | None) -> Any:
    if progress is None:
        return Console().late("sweep")
    import contextlib

    return contextlib.nullcontext(progress)
