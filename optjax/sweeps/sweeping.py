"""Every point of a grid from every seed."""

import contextlib
import functools
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from optjax.support import provenance
from optjax.support.console import Console, silent
from optjax.support.errors import UserError
from optjax.support.keeping import next_folder
from optjax.support.machine import free_memory
from optjax.sweeps import checks, stop_rules
from optjax.sweeps.checks import Final
from optjax.sweeps.executor import Executor
from optjax.sweeps.folder import opened, restore
from optjax.sweeps.grid import Grid, Labelled, as_grid, label
from optjax.sweeps.groups import Batching, Point, grouped, resolve
from optjax.sweeps.identity import identity, run_ids
from optjax.sweeps.layouts import Arrangement
from optjax.sweeps.progress import Progress
from optjax.sweeps.recording import OnRecords
from optjax.sweeps.replaying import remember
from optjax.sweeps.results import Results
from optjax.sweeps.work import Settings, Work

if TYPE_CHECKING:
    import xarray


def sweep(
    run: Any,
    grid: Mapping[str, Any] | Grid,
    seeds: int | Sequence[int] = 1,
    *,
    stop: Any = (),
    keep_diverged: bool = False,
    final: Final | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    keep_states: bool = False,
    batching: Batching = "auto",
    layout: Arrangement = "auto",
    vmap_chunk: int | None = None,
    devices: Sequence[Any] | None = None,
    memory: float | None = None,
    chunk_steps: int | None = None,
    chunk_seconds: float = 1.0,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
    on_records: OnRecords | None = None,
    about: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    """Run every point of a grid from every seed: a run a run, thousands of runs at once.

    The run of point h and seed s is ``run(h, jax.random.key(s))``, whatever else runs: its
    draws are those of that call to the bit, its values agree to rounding.

    Args:
      run: a run, as `make_run` gives; or a function that makes one from some of the grid's names
        (an optimiser, a width): each combination of these has a program of its own. Or a
        hypergradient, as `hypergrad` gives, or a function that makes one: see below.
      grid: name → values, all combinations; or `zip_grid`, `points` or `sample`. The names are
        hyperparameters of the run, ``steps``, or parameters of the function.
      seeds: how many, 0, 1, …; or which.
      stop: rules by which a run ends early: `Target`, `Plateau`, `Halving`.
      keep_diverged: advance runs that have diverged; without, they leave the sweep, their
        records are NaN after the divergence, and so is their final loss.
      final: (params, model_state, data) → named arrays, kept of every run as it ends: parameters,
        predictions, a score; variables of the dataset.
      out: a folder that keeps the sweep. The same call again resumes it, or returns
        the result; with more points or seeds it computes the new ones.
      overwrite: drop what the folder holds.
      keep_states: keep in `out` where every run ended, so that the same call with a run of more
        steps takes only those that are missing. Not where a run depends on how long it will be.
      batching: a program for each batch size ("static"), one for all with part of the batch masked
        ("masked"), or what is predicted to be quicker ("auto").
      layout: "vmap" over all runs of a call, "map" over chunks of them, "loop" over single runs; or
        "auto", guessed, tried where it pays, and remembered for the next sweep of the kind.
      vmap_chunk: runs that are vmapped together.
      devices: all by default; the runs are laid over them.
      memory: bytes of a device that may be used; by default half of what is free on a CPU, 80 % on
        an accelerator.
      chunk_steps, chunk_seconds: how long the devices run between two looks at the records; an
        interrupt waits for two such chunks, at most.
      checkpoint_seconds: at least so long between two checkpoints.
      progress: called with (text, fraction); a bar or lines on stderr by default.
      on_records: called with the new records after every chunk, a Dataset with axes ``run`` and
        ``step`` and each run's point and seed; `json_lines` and `scalars` (TensorBoard) make one.
      about: notes kept in the folder, such as how the sweep was called; no part of its fingerprint.

    Returns:
      A Dataset with an axis for each of the grid's (or ``point``), ``seed`` and ``step``:
      ``loss`` and the problem's metrics at every record, ``final_loss``, ``status`` (a `Status`),
      ``diverged_at``, ``stopped_at``, ``steps_done``.

      Of a hypergradient: ``value``, ``gradient_NAME`` (an array's on an axis ``NAME_index``, a
      tree's a variable a leaf), ``finite``, ``status``, ``diverged_at`` and what the mode adds; the
      attributes say which mode, and why. ``stop`` and ``final`` are for runs alone.

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
    settings = checks.settings(
        devices, layout, vmap_chunk=vmap_chunk, chunk_steps=chunk_steps,
        chunk_seconds=chunk_seconds, checkpoint_seconds=checkpoint_seconds, memory=memory,
    )  # fmt: skip
    checks.progress_and_about(progress, about)
    if jax.process_index():
        progress = silent  # the first process shows it
    grid, chosen = as_grid(grid), checks.chosen_seeds(seeds)
    points = resolve(run, grid)
    if points[0].gradient is None:
        if keep_states:
            checks.extends(points, grid, out, keep_diverged)
        work = _of_runs(points, grid, chosen, batching, stop, keep_diverged, final, keep_states)
        every = work.results.every
        if chunk_steps is not None and chunk_steps < every:
            raise UserError(
                f"chunk_steps is {chunk_steps}: expected at least record_every = {every}"
            )
    else:
        given = {
            "stop": stop != (), "final": final is not None, "keep_diverged": keep_diverged,
            "chunk_steps": chunk_steps is not None, "keep_states": keep_states,
            "on_records": on_records is not None,
        }  # fmt: skip
        for name, asked in given.items():
            if asked:
                raise UserError(f"{name} is for runs: a hypergradient is one record; leave it out")
        work = _of_gradients(points, grid, chosen, batching)
    work.on_records, attrs = on_records, work.attrs
    work.attrs = lambda: attrs() | _origin(grid, settings.devices, begin)
    dataset = carry_out(work, settings, out, overwrite, progress, about)
    if points[0].gradient is None:
        remember(run, grid, dataset.attrs["sweep"])
        if note := checks.alike(dataset):
            dataset.attrs["note"] = note
            if progress is None:
                Console().line(f"sweep: {note}")
    return dataset


def carry_out(
    work: Work,
    settings: Settings,
    out: str | os.PathLike[str] | None,
    overwrite: bool,
    progress: Progress | None,
    about: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    """Compute a dataset or read it from its folder.

    Raises:
      UserError, KeyboardInterrupt: as `sweep`.
    """
    results, store, digest = work.results, None, uuid.uuid4().hex[:16]
    given, out = out is not None, next_folder() if out is None else out
    if out is not None:
        facts = work.facts()
        ids = [str(i) for i in results.ids]
        digest = _digest({**facts, "runs": ids})
        spec = {
            "kind": results.kind,
            "identity": facts,
            "axes": results.axes,
            "columns": {n: [label(v) for v in c] for n, c in results.columns.items()},
            "seeds": results.seeds,
            "steps": results.steps[:: len(results.seeds)].tolist(),
            "record_every": results.every,
            "rules": results.rules,
            "inner": results.inner,
            "ids": ids,
            "about": dict(about or {}),
        }
        try:
            store = opened(out, spec, results, work.bytes, work.halving, overwrite)
        except UserError:
            if given:
                raise
            store = opened(out, spec, results, work.bytes, work.halving, True)
    try:
        if store is not None and store.dataset is not None:
            if work.keep_states:
                restore(store, results)
            return store.dataset
        if store is not None:
            restore(store, results)
            results.reopen()
            if progress is None and results.done.any() and not results.judged.all():
                text = f"{results.judged.sum():,} of {len(results):,} runs have ended"
                most = results.done[~results.judged].max()
                Console().line(
                    f"{results.kind}: resumed: {text}, the others have records up to step {most:,}"
                )
        with _shown(progress, results.kind.split()[0]) as show:
            executor = Executor(work, store, settings, show)
            executor.run()
        dataset = results.dataset()
        dataset.attrs.update(sweep=digest, groups=json.dumps(executor.notes), **work.attrs())
        if store is not None and store.writer:
            store.save_result(dataset)
        if executor.interrupt.asked:
            raise executor.interrupt.error()
        return dataset
    finally:
        if store is not None:
            store.close()


def _of_runs(
    points: Sequence[Point],
    grid: Grid,
    seeds: Sequence[int],
    batching: Batching,
    stop: Any,
    keep_diverged: bool,
    final: Final | None,
    keep_states: bool,
) -> Work:
    """Prepare a sweep of runs."""
    plan = points[0].run.plan
    common, metrics, kept = checks.names(points, grid, final)
    rules, halving = stop_rules.checked(stop, {"loss", *common}, plan.record_every)
    if keep_states and halving is not None:
        raise UserError("keep_states and Halving, which compares runs of one length: leave out one")
    steps = [p.steps for p in points]
    each = checks.bytes_of_a_run(max(steps) // plan.record_every, len(metrics)) + kept
    checks.fits(len(grid) * len(seeds), each, free_memory(), "memory")
    results = Results(
        grid.axes, grid.columns, seeds, steps, plan.record_every,
        run_ids(grid, [0] * len(grid) if keep_states else steps, seeds),
        [rule.name for rule in rules], {"final_loss": []},
    )  # fmt: skip
    own = {"stop": (rules, halving), "keep_diverged": keep_diverged, "final": final}
    return Work(
        results, grouped(points, batching, final),
        lambda: identity(points, grid, own, any_steps=keep_states),
        rules, halving, not keep_diverged,
        weighted=all(p.run.problem.weighted for p in points), bytes=each, keep_states=keep_states,
    )  # fmt: skip


def _of_gradients(
    points: Sequence[Point],
    grid: Grid,
    seeds: Sequence[int],
    batching: Batching,
) -> Work:
    """Prepare a sweep of hypergradients: of one record each, the gradient kept at its end."""
    groups = grouped(points, batching)
    ids = run_ids(grid, [p.steps for p in points], seeds)
    results = Results(
        grid.axes, grid.columns, seeds, [1] * len(grid), 1, ids,
        inner=checks.kept(groups, seeds, grid), kind="sweep of hypergradients",
    )  # fmt: skip

    def attrs() -> dict[str, Any]:
        return {
            "problem": _listed(p.run.problem.name for p in points),
            "optimizer": _listed(label(p.run.plan.optimizer) for p in points),
            "objective": _listed(p.gradient.job.name for p in points if p.gradient is not None),
            "mode": _listed(group.notes["mode"] for group in groups),
            "why": "; ".join(dict.fromkeys(group.notes["reason"] for group in groups)),
        }

    facts = functools.partial(identity, points, grid, {})
    return Work(results, groups, facts, drop_diverged=False, attrs=attrs)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, names)))


def _by_name_only(value: Any) -> bool:
    """Whether a value of the grid is known by its label alone in its dataset."""
    return callable(value) or isinstance(value, Labelled)


def _origin(grid: Grid, devices: list[Any], begin: float) -> dict[str, Any]:
    """Say where a dataset comes from, as its attributes."""
    return {
        "named": json.dumps(
            [n for n, column in grid.columns.items() if any(map(_by_name_only, column))]
        ),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "seconds": time.perf_counter() - begin,
        "commit": provenance.commit(),
        "versions": json.dumps(provenance.versions()),
    }


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _shown(progress: Progress | None, title: str) -> Any:
    return Console().late(title) if progress is None else contextlib.nullcontext(progress)
