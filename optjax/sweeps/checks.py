"""What a sweep is asked for, checked before anything is computed or written."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.run import core
from optjax.run.core import Status
from optjax.run.piecewise import Piecewise
from optjax.run.problems import Data
from optjax.support.errors import UserError, nearest, whole
from optjax.support.keys import make_key
from optjax.support.machine import free_memory
from optjax.support.types import Array, PyTree
from optjax.sweeps.active_runs import inputs
from optjax.sweeps.grid import Grid
from optjax.sweeps.groups import Group, Point, needs_steps
from optjax.sweeps.layouts import ARRANGEMENTS
from optjax.sweeps.results import own_axes
from optjax.sweeps.swept_run import RunSpec, shapes
from optjax.sweeps.work import Settings

if TYPE_CHECKING:
    import xarray

Final = Callable[[PyTree, PyTree, Data], Mapping[str, Array]]
"""(params, model_state, data) → what is kept of a run that has ended, by name."""

RESERVED = frozenset(
    "loss final_loss status diverged_at stopped_at stopped_by steps_done seed step point".split()
)
"""Names of a sweep's own in its dataset."""


def chosen_seeds(seeds: int | Sequence[int]) -> Sequence[int]:
    """Return the seeds: 0 … n − 1, or those given.

    Raises:
      UserError: none, one twice, or what is no whole number from 0 to 2³¹ − 1.
    """
    if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool):
        if not 1 <= seeds < 2**31:
            raise UserError(f"seeds is {seeds}: expected how many, 1 to 2³¹ − 1")
        return range(int(seeds))
    try:
        chosen = [int(s) for s in seeds]  # pyright: ignore[reportGeneralTypeIssues]
        whole = all(int(s) == s for s in seeds)  # pyright: ignore[reportGeneralTypeIssues]
    except (TypeError, ValueError):
        raise UserError(f"seeds is {seeds!r}: expected how many, or a list of them") from None
    if not chosen or not whole or min(chosen) < 0 or max(chosen) >= 2**31:
        raise UserError(
            f"seeds is {str(chosen)[:80]}: expected at least one, whole numbers from 0 to 2³¹ − 1"
        )
    seen: set[int] = set()
    for seed in chosen:
        if seed in seen:
            raise UserError(f"the seed {seed} is given twice: expected each once")
        seen.add(seed)
    return chosen


def extends(points: Sequence[Point], grid: Grid, out: Any, keep_diverged: bool) -> None:
    """Check that the runs of a sweep can be given more steps later.

    Raises:
      UserError: there is no folder, or a run depends on how long it will be.
    """
    if out is None:
        raise UserError("keep_states needs out, the folder that keeps them")
    if "steps" in grid.columns or len({point.steps for point in points}) > 1:
        raise UserError("keep_states and steps, an axis of the grid: leave out one of them")
    if keep_diverged:
        raise UserError("keep_states and keep_diverged: a diverged run has ended; leave out one")
    for point in points:
        if needs_steps(point):
            names = [n for n, v in point.hparams.items() if isinstance(v, Piecewise)]
            raise UserError(
                f"keep_states: {', '.join(names) or 'the optimiser'} depends on the run's number "
                "of steps, so that a longer run is another one; leave keep_states out"
            )


def alike(dataset: "xarray.Dataset") -> str:
    """Say so where all seeds gave the same runs; else nothing."""
    final = dataset.final_loss.where(dataset.status != Status.DIVERGED)
    if final.sizes["seed"] < 2 or not final.notnull().all("seed").any():
        return ""
    for values in (final, dataset.loss) if "loss" in dataset else (final,):
        spread = values.max("seed") - values.min("seed")
        if bool((spread > 8 * np.finfo(values.dtype).eps * abs(values).max("seed")).any()):
            return ""
    return (
        f"all {final.sizes['seed']} seeds gave the same final losses: nothing in these runs is "
        "drawn at random, so that one seed would do"
    )


def settings(devices: Any, layout: Any, **numbers: Any) -> Settings:
    """Check how a sweep is carried out.

    Args:
      devices: those to use, or None for all.
      layout: "auto", "vmap", "map" or "loop".
      numbers: vmap_chunk, chunk_steps (whole, or None); chunk_seconds, checkpoint_seconds, memory.

    Raises:
      UserError: one that cannot be, named.
    """
    if layout not in ARRANGEMENTS:
        raise UserError(f"unknown layout {layout!r}: {nearest(str(layout), ARRANGEMENTS)}")
    for name in ("vmap_chunk", "chunk_steps"):
        if numbers[name] is not None:
            numbers[name] = whole(name, numbers[name], 1)
    for name, least in (("chunk_seconds", 1e-3), ("checkpoint_seconds", 0.0), ("memory", 1.0)):
        value = numbers[name]
        if name == "memory" and value is None:
            continue
        good = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not (good and math.isfinite(value) and value >= least):
            raise UserError(f"{name} is {value!r}: expected a finite number, at least {least:g}")
        numbers[name] = float(value)
    try:
        chosen = list(jax.devices() if devices is None else devices)
    except TypeError:
        raise UserError(f"devices is {devices!r}: expected a list, as jax.devices()[:2]") from None
    if not chosen or not all(isinstance(d, jax.Device) for d in chosen):
        raise UserError(f"devices is {devices!r}: expected some of jax.devices()")
    if len(set(chosen)) < len(chosen):
        raise UserError("a device is given twice: expected each once")
    return Settings(chosen, layout, **numbers)


def progress_and_about(progress: Any, about: Any) -> None:
    """Check that progress is a function or None, and about a dict that JSON can hold, or None."""
    if progress is not None and not callable(progress):
        raise UserError(f"progress is {progress!r}: expected a function (text, fraction)")
    try:
        json.dumps(dict(about or {}))
    except (TypeError, ValueError):
        raise UserError(f"about is {about!r}: expected a dict of numbers and text") from None


def names(
    points: Sequence[Point], grid: Grid, final: Final | None
) -> tuple[set[str], set[str], int]:
    """Collect the metrics that all runs record, those that any does, and the bytes of `final`.

    Raises:
      UserError: a metric that is no number, or a name that is taken.
    """
    if final is not None and not callable(final):
        raise UserError(f"final is {final!r}: expected a function (params, model_state, data)")
    found: list[set[str]] = []
    kept: dict[str, Any] = {}
    seen: set[Any] = set()
    for point in points:
        if (point.run.plan, tuple(point.hparams)) in seen:
            continue
        seen.add((point.run.plan, tuple(point.hparams)))
        metrics, ends = _shapes(point, final)
        for name, kind in metrics.items():
            if kind.shape:
                raise UserError(f"the metric {name} has shape {kind.shape}: expected one number")
        for name, kind in {**metrics, **ends}.items():
            if not isinstance(name, str) or "/" in name:
                raise UserError(f"a metric or part of final is named {name!r}: expected no slash")
            if not (jnp.issubdtype(kind.dtype, jnp.floating) or kind.dtype.kind in "biu"):
                raise UserError(f"{name} is {kind.dtype}: expected real numbers")
        found.append(set(metrics))
        kept |= ends
    common, every = set.intersection(*found), set.union(*found)
    inner = {axis for name, kind in kept.items() for axis in own_axes(name, len(kind.shape))}
    for given, names, taken in (
        ("an axis", set(grid.columns), RESERVED | every | set(kept) | inner),
        ("a metric", every, RESERVED | inner),
        ("final", set(kept), RESERVED | every | inner),
    ):
        _not_taken(given, names & taken)
    return common, every, sum(math.prod(kind.shape) * 8 for kind in kept.values())


def _not_taken(given: str, names: set[str]) -> None:
    for name in sorted(names):
        raise UserError(f"{given} is named {name!r}, which the dataset has already: rename it")


def _shapes(point: Point, final: Final | None) -> tuple[dict[str, Any], dict[str, Any]]:
    plan, data = point.run.plan, point.run.problem.data

    def look(data: Any, hparams: Any, key: Any) -> tuple[PyTree, PyTree]:
        state = core.init(plan, data, hparams, key)
        numbers = core.hparams_at(plan, hparams, state.params, state.step)
        metrics = plan.metrics(state.params, state.model_state, data, numbers)
        ends = {} if final is None else final(state.params, state.model_state, data)
        if not isinstance(ends, Mapping) or not all(
            isinstance(k, str) and isinstance(v, jax.Array | np.ndarray | int | float)
            for k, v in ends.items()
        ):
            raise UserError("final gives something else than a dict of arrays: expected that")
        return dict(metrics), dict(ends)

    return jax.eval_shape(look, data, point.hparams, make_key(0))


def kept(groups: Sequence[Group], seeds: Sequence[int], grid: Grid) -> dict[str, list[str]]:
    """Name the variables of hypergradients, each with its own axes.

    Raises:
      UserError: results of one name have different numbers of axes, an axis has the name of a
        variable, or the memory cannot hold them.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for group in groups:
        one = inputs(group, list(seeds), group.points[:1] * len(seeds))
        found = shapes(RunSpec(group.computation, (), 1, False), group.data, *one)[1].kept
        for name, kind in found.items():
            old = sizes.get(name, kind.shape)
            if len(old) != len(kind.shape):
                raise UserError(
                    f"{name} has shapes {old} and {kind.shape} at different points: sweep them "
                    "apart"
                )
            sizes[name] = tuple(map(max, old, kind.shape))
    axes = {name: _axes(name, len(shape)) for name, shape in sizes.items()}
    inner = {axis for own in axes.values() for axis in own}
    _not_taken("an axis", set(grid.columns) & (sizes.keys() | RESERVED | inner))
    count, free = len(grid) * len(seeds), free_memory()
    needed = 8 * count * sum(math.prod(shape) for shape in sizes.values())
    if needed > free:
        raise UserError(
            f"the gradients of {count:,} runs take {needed / 1e9:.3g} GB and the memory has "
            f"{free / 1e9:.3g} GB free: sweep fewer points, or by fewer names (wrt)"
        )
    return axes


def _axes(name: str, count: int) -> list[str]:
    """Name the axes of a gradient's entry; an entry and its standard error share theirs."""
    of = name.removeprefix("gradient_").removeprefix("standard_error_")
    return [f"{of}_index" + (f"_{i}" if count > 1 else "") for i in range(count)]


def bytes_of_a_run(records: int, metrics: int = 0) -> int:
    """Return the bytes of a run's records and outcome; the loss is no metric."""
    return records * (1 + metrics) * 8 + 40


def fits(runs: int, each: int, free: float, place: str, instead: str = "") -> None:
    """Refuse runs of `each` bytes that the free bytes of a place cannot hold.

    Args:
      place: "memory", or "disk", which holds the records twice: in the log and in the result.

    Raises:
      UserError: how much they take, and how much is free.
    """
    needed = runs * each * (2 if place == "disk" else 1)
    if needed > free:
        raise UserError(
            f"the records of {runs:,} runs take up to {needed / 1e9:.3g} GB and the {place} has "
            f"{free / 1e9:.3g} GB free: record less often (record_every), keep less (final), "
            f"sweep fewer points{instead}"
        )
