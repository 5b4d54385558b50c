"""Many runs at once: `sweep` a grid of hyperparameters and seeds, `replay` one of its runs."""

import hashlib
import json
import os
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optjax import files, provenance, scan
from optjax.console import Console
from optjax.errors import UserError
from optjax.scan import Trajectory
from optjax.sweeps import layouts
from optjax.sweeps import rules as stop_rules
from optjax.sweeps.book import Book
from optjax.sweeps.buckets import Batching, Point, buckets, resolve
from optjax.sweeps.engine import Engine, Progress, Settings
from optjax.sweeps.grid import Grid, as_grid, label
from optjax.sweeps.identity import difference, identity, run_ids
from optjax.sweeps.layouts import Lanes
from optjax.sweeps.processes import agreed
from optjax.sweeps.store import Store, read_spec
from optjax.trajectory import Run

if TYPE_CHECKING:
    import xarray


class _Made:
    """What a sweep of this process was made of, for `replay`."""

    def __init__(self, run: Run | Callable[..., Run], grid: Grid) -> None:
        self.run, self.grid = run, grid


_MADE: "weakref.WeakValueDictionary[str, _Made]" = weakref.WeakValueDictionary()
_HELD: "weakref.WeakKeyDictionary[Any, dict[str, _Made]]" = weakref.WeakKeyDictionary()


def sweep(
    run: Run | Callable[..., Run],
    grid: Mapping[str, Any] | Grid,
    seeds: int | Sequence[int] = 1,
    *,
    stop: Any = (),
    keep_diverged: bool = False,
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
        (an optimiser, a width): each combination of these has a program of its own.
      grid: name → values, all combinations; or `zipped`, `table` or `drawn` points. The names are
        hyperparameters of the run, ``steps``, or parameters of the function.
      seeds: how many, 0, 1, …; or which.
      stop: rules by which a run ends early: `Target`, `Plateau`, `Halving`.
      keep_diverged: go on with runs that have diverged; without, they leave the sweep, their
        records are NaN after the divergence, and so is their final loss.
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
    grid = as_grid(grid)
    chosen = _seeds(seeds)
    points = resolve(run, grid)
    plan = points[0].run.plan
    metrics = _metrics(points[0])
    rules, halving = stop_rules.checked(stop, {"loss", *metrics}, plan.record_every)
    layouts.check(lanes, tile)
    if chunk_steps is not None and chunk_steps < plan.record_every:
        raise UserError(
            f"chunk_steps is {chunk_steps}: expected at least record_every = {plan.record_every}"
        )
    steps = [p.steps for p in points]
    ids = run_ids(grid, steps, chosen)
    columns = {name: [label(v) for v in column] for name, column in grid.columns.items()}
    names = [rule.name for rule in rules]
    book = Book(grid.axes, columns, chosen, steps, plan.record_every, ids, names)
    settings = Settings(
        devices=list(jax.devices() if devices is None else devices),
        lanes=lanes,
        tile=tile,
        chunk_steps=chunk_steps,
        chunk_seconds=chunk_seconds,
        checkpoint_seconds=checkpoint_seconds,
        memory=memory,
    )
    _fits(book, len(metrics), None)
    groups = buckets(points, batching)
    store, digest = None, uuid.uuid4().hex[:16]
    if out is not None:
        facts = identity(points, grid, {"stop": (rules, halving), "keep_diverged": keep_diverged})
        digest = _digest(facts)
        spec = {
            "identity": facts,
            "axes": dict(grid.axes),
            "columns": columns,
            "seeds": chosen,
            "steps": steps,
            "record_every": plan.record_every,
            "rules": names,
            "about": dict(about or {}),
        }
        store = _opened(out, spec, book, len(metrics), halving, anew)
    try:
        if store is not None:
            if store.spec is None:
                return _known(store, run, grid)
            for told, arrays in store.frames():
                book.restore(told, arrays)
        with _shown(progress) as show:
            engine = Engine(
                book, groups, rules, halving, not keep_diverged, store, settings, show,
                weighted=all(p.run.problem.weighted for p in points),
            )  # fmt: skip
            engine.run()
        dataset = book.dataset()
        dataset.attrs.update(
            sweep=digest,
            parameters=json.dumps([name for name, _ in points[0].shape]),
            buckets=json.dumps(engine.notes),
            device=settings.devices[0].device_kind,
            devices=len(settings.devices),
            seconds=time.perf_counter() - begin,
            commit=provenance.commit(),
            versions=json.dumps(provenance.versions()),
        )
        if store is not None and store.writer:
            files.save_dataset(dataset, store.result)
    finally:
        if store is not None:
            store.close()
    _remember(run, grid, dataset.attrs["sweep"])
    return dataset


def replay(
    selected: "xarray.Dataset", run: Run | Callable[..., Run] | None = None, *, every: int = 1
) -> Trajectory:
    """One run of a sweep again, alone, with the parameters at every record.

    Args:
      selected: one run of a sweep's dataset, as ``dataset.sel(learning_rate=0.1, seed=3)``.
      run: what was swept; found by itself for a sweep of this process.
      every: steps from record to record.

    Returns:
      Its `Trajectory`, with `path`, up to the step to which it came.

    Raises:
      UserError: more than one run is selected, or what was swept is not known.

    >>> import optax, optjax as oj
    >>> run = oj.make_run(oj.least_squares([[2.0, 1.0]], [2.0]), optax.sgd, 20)
    >>> found = oj.sweep(run, {"learning_rate": [0.01, 0.1]}, seeds=2)
    >>> oj.replay(found.sel(learning_rate=0.1, seed=1)).path.shape
    (21, 2)
    """
    import dataclasses

    many = {name: size for name, size in selected.sizes.items() if name != "step" and size > 1}
    if many:
        said = ", ".join(f"{name} ({size})" for name, size in many.items())
        raise UserError(f"several runs are selected, along {said}: choose one with .sel or .isel")
    made = _MADE.get(str(selected.attrs.get("sweep")))
    if run is None:
        if made is None:
            raise UserError(
                "what was swept is not known in this process: give it, oj.replay(selected, run)"
            )
        run = made.run
    selected = selected.squeeze(drop=False)
    skipped = {"seed", "step", "point"}
    coords = {str(k): v.item() for k, v in selected.coords.items() if k not in skipped}
    if made is not None:
        coords = {name: _original(made.grid, name, value) for name, value in coords.items()}
    point = resolve(run, Grid({name: [value] for name, value in coords.items()}, {"point": 1}))[0]
    steps = int(selected["steps_done"])
    plan = dataclasses.replace(point.run.plan, steps=steps, record_every=every, record_path=True)
    if steps < 1 or steps % every:
        raise UserError(f"every is {every}: expected a divisor of the {steps} steps of the run")
    again = Run(point.run.problem, plan)
    return again(point.hparams, jax.random.key(int(selected["seed"])))


def _original(grid: Grid, name: str, value: Any) -> Any:
    """The grid's own value of a coordinate, which may be its label."""
    column = grid.columns.get(name, ())
    return next((v for v in column if label(v) == value), value)


def _remember(run: Run | Callable[..., Run], grid: Grid, digest: str) -> None:
    made = _Made(run, grid)
    try:
        _HELD.setdefault(run, {})[digest] = made  # lives as long as what was swept
    except TypeError:
        return
    _MADE[digest] = made


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, bool):
        raise UserError(f"seeds is {seeds}: expected how many, or a list of them")
    if isinstance(seeds, int | np.integer):
        if seeds < 1:
            raise UserError(f"seeds is {seeds}: expected at least 1")
        return list(range(int(seeds)))
    try:
        chosen = [int(s) for s in seeds]
        whole = all(int(s) == s for s in seeds)
    except (TypeError, ValueError):
        raise UserError(f"seeds is {seeds!r}: expected how many, or a list of them") from None
    if not chosen or not whole or min(chosen) < 0 or max(chosen) >= 2**31:
        raise UserError(f"seeds is {list(seeds)}: expected at least one, from 0 to 2³¹ − 1")
    for seed in chosen:
        if chosen.count(seed) > 1:
            raise UserError(f"the seed {seed} is given twice: expected each once")
    return chosen


def _metrics(point: Point) -> list[str]:
    """Names of what the problem records beside the loss."""
    plan, data = point.run.plan, point.run.problem.data

    def names(data: Any, hparams: Any, key: Any) -> Any:
        state = scan.init(plan, data, hparams, key)
        numbers = scan.split(plan, hparams, state.params)[1]
        return plan.metrics(state.params, state.model_state, data, numbers)

    return list(jax.eval_shape(names, data, point.hparams, jax.random.key(0)))


def _fits(book: Book, metrics: int, store: Store | None) -> None:
    """Refuse what memory or the disk cannot hold before anything is computed."""
    needed = book.bytes(metrics)
    if store is None:
        import psutil

        free, what, instead = psutil.virtual_memory().available, "memory", ""
    else:
        # The log and the final file; the records in memory were checked before.
        needed, free, what, instead = 2 * needed, store.free(), "disk", ", or another folder"
    if needed > free:
        raise UserError(
            f"the records of {len(book):,} runs × {book.records:,} take up to "
            f"{needed / 1e9:.3g} GB and the {what} has {free / 1e9:.3g} GB free: record less often "
            f"(record_every), sweep fewer points{instead}"
        )


def _opened(
    out: str | os.PathLike[str],
    spec: dict[str, Any],
    book: Book,
    metrics: int,
    halving: Any,
    anew: bool,
) -> Store:
    """The store of the sweep, in every process; its `spec` is None where all is computed.

    Raises:
      UserError: as `sweep` says, in every process.
    """
    store, error, complete = None, None, False
    if jax.process_index() == 0:
        try:
            store = Store(out)
            complete = _continued(store, book, spec, halving is not None, anew)
            if not complete:
                _fits(book, metrics, store)
        except UserError as refused:
            error = refused
            if store is not None:
                store.close()
    failed, complete = agreed(error is not None, complete)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"the sweep in {str(out)!r} was refused: the first process says why")
    store = Store(out, writer=False) if store is None else store
    if complete:
        store.spec = None
    return store


def _continued(store: Store, book: Book, spec: dict[str, Any], compares: bool, anew: bool) -> bool:
    """Take over what the folder holds; whether there is nothing left to compute."""
    old = store.spec
    if old is None or anew:
        store.begin(spec, anew=True)
        return False
    where = f"the folder {str(store.folder)!r} holds another sweep"
    told = difference(old["identity"], spec["identity"])
    if told is not None:
        raise UserError(f"{where}: {told}; give another folder, or start anew (anew=True, --anew)")
    before = _ids_of(old)
    lost = before[book.find(before) < 0]
    if len(lost):
        raise UserError(
            f"{where}: {len(lost)} of its {len(before)} runs are not in this grid; add points or "
            "seeds to it, give another folder, or start anew (anew=True, --anew)"
        )
    if len(before) < len(book) and compares:
        raise UserError(
            f"{where} with fewer runs, and Halving compares runs with each other: give another "
            "folder, or start anew (anew=True, --anew)"
        )
    same = all(old[name] == spec[name] for name in ("axes", "columns", "seeds"))
    if same and store.result.is_file():
        return True
    store.result.unlink(missing_ok=True)
    store.begin(spec, anew=False)
    return False


def load_sweep(folder: str | os.PathLike[str]) -> "xarray.Dataset":
    """What a sweep's folder holds: the result, or as much of it as was computed so far.

    Raises:
      UserError: no sweep is there, or it is damaged.
    """
    spec = read_spec(folder)
    store = Store(folder, writer=False)
    if store.result.is_file():
        return files.read_dataset(store.result)
    try:
        book = Book(
            spec["axes"], spec["columns"], spec["seeds"], spec["steps"], spec["record_every"],
            _ids_of(spec), spec["rules"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"the sweep in {str(folder)!r} is damaged ({error!r})") from None
    for facts, arrays in store.frames():
        book.restore(facts, arrays)
    return book.dataset()


def _known(store: Store, run: Run | Callable[..., Run], grid: Grid) -> "xarray.Dataset":
    dataset = files.read_dataset(store.result)
    _remember(run, grid, dataset.attrs["sweep"])
    return dataset


def _ids_of(spec: Mapping[str, Any]) -> np.ndarray:
    grid = Grid(spec["columns"], spec["axes"])
    return run_ids(grid, spec["steps"], spec["seeds"]).ravel()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _shown(progress: Progress | None) -> Any:
    if progress is None:
        return Console().late("sweep")
    import contextlib

    return contextlib.nullcontext(progress)
