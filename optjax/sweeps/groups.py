"""A grid becomes groups: runs that share a program and differ in their hyperparameters alone.

What shapes the program splits the points: the arguments of a function that makes the run (an
optimiser, a width), the mode of a hypergradient, and the batch size where a program of its own is
cheaper than masking. Batch sizes that share a program get as many slots as the largest of them;
the others leave some empty.
"""

import dataclasses
import inspect
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optjax.hypergradients.footprint import needed
from optjax.hypergradients.hypergradient import HypergradFn, HypergradientComputation
from optjax.hypergradients.job import looks_inside
from optjax.run import core, masking, optimizers
from optjax.run.computation import Computation
from optjax.run.core import Plan
from optjax.run.piecewise import Piecewise
from optjax.run.problems import Data
from optjax.run.trajectory import Run, as_value
from optjax.support.errors import UserError, nearest
from optjax.support.keys import make_key
from optjax.support.types import HParams, PyTree
from optjax.sweeps.grid import Grid, Labelled, label

Batching = Literal["auto", "static", "masked"]


class Point(NamedTuple):
    """A point of the grid, taken apart."""

    run: Run
    shape: tuple[tuple[str, Any], ...]  # what was given to the function that makes the run
    hparams: dict[str, Any]
    steps: int
    gradient: HypergradFn | None = None  # of the run, where that is what is swept


@dataclasses.dataclass(frozen=True)
class Column:
    """A hyperparameter that is no number: its distinct values, stacked, and which is whose."""

    values: PyTree  # leaves (distinct, ...)
    place: np.ndarray  # (G,) int

    def at(self, points: np.ndarray) -> PyTree:
        """Stack the values of some points."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[self.place[points]], self.values)


@dataclasses.dataclass(frozen=True)
class Group:
    """Points whose runs share a compiled program."""

    plan: Plan
    computation: Computation
    data: Data  # of all its runs; or, where they differ, those of each problem, stacked
    points: np.ndarray  # (G,) indices into the grid
    hparams: dict[str, np.ndarray | Column]  # numbers as (G,)
    which: np.ndarray | None  # (G,) int32, each point's place in the stacked data
    name: str
    bytes: int | None = None  # temporaries of a run, where predicted
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # to tell the user

    @property
    def waste(self) -> float:
        """The share of the slots of its batches that stay empty."""
        sizes = self.hparams.get("batch_size")
        if sizes is None or isinstance(sizes, Column) or not self.plan.n:
            return 0.0
        return 1 - float(np.mean(sizes)) / self.plan.slots

    def hparams_at(self, places: np.ndarray) -> HParams:
        """Stack the hyperparameters of some of its points."""
        return {
            name: column.at(places) if isinstance(column, Column) else column[places]
            for name, column in self.hparams.items()
        }


def resolve(run: Any, grid: Grid) -> list[Point]:
    """Take every point of a grid apart.

    Args:
      run: a run or a hypergradient; or a function that makes one from some of the grid's names,
        its parameters.

    Raises:
      UserError: an unknown name, a value that cannot be, runs that record at different steps.
    """
    kinds = Run | HypergradFn
    taken = {} if isinstance(run, kinds) else _parameters(run, grid)
    made: dict[Any, Any] = {}
    converted: dict[Any, Any] = {}
    runs: dict[Any, Run] = {}
    points = []
    for i in range(len(grid)):
        values = grid.point(i)
        shape = tuple((name, values.pop(name)) for name in taken if name in values)
        given = {name: _plain(value) for name, value in shape}
        key = tuple((name, _known(value)) for name, value in given.items())
        if key not in made:
            made[key] = run if isinstance(run, kinds) else run(**given)
            if not isinstance(made[key], kinds):
                raise UserError(
                    f"{label(run)} gives a {type(made[key]).__name__}: expected a run, as "
                    "oj.make_run makes"
                )
        gradient = made[key] if isinstance(made[key], HypergradFn) else None
        one = made[key] if gradient is None else gradient.run
        steps = values.pop("steps", one.plan.steps)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or (
            steps % one.plan.record_every
        ):  # fmt: skip
            raise UserError(
                f"steps is {steps}: expected a positive multiple of record_every = "
                f"{one.plan.record_every}"
            )
        known = one.plan.own | one.problem.hparams | set(taken)
        known |= {"l2", "batch_size", "steps", "initial_params", "example_weights"}
        for name in values:
            if name not in known:
                raise UserError(f"unknown hyperparameter {name!r}: {nearest(name, known)}")
        if (id(one), steps) not in runs:
            # A schedule is checked against the point's own steps.
            plan = dataclasses.replace(one.plan, steps=steps)
            runs[id(one), steps] = Run(one.problem, plan)
        for name, value in values.items():
            if not isinstance(value, int | float | str):
                place = name, id(value), steps
                if place not in converted:  # once, so that equal values stay one array
                    converted[place] = as_value(name, _plain(value), steps)
                values[name] = converted[place]
        checked = runs[id(one), steps].checked(values)
        points.append(Point(one, shape, dict(checked), steps, gradient))
    if len({p.gradient is None for p in points}) > 1:
        raise UserError("the function gives runs and hypergradients: expected one of them")
    if len({p.run.plan.record_every for p in points}) > 1 and points[0].gradient is None:
        raise UserError("the runs record at different steps: give all of them one record_every")
    return points


def _parameters(run: Any, grid: Grid) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function that makes runs; check that the grid has them."""
    if not callable(run):
        raise UserError(f"run is a {type(run).__name__}: expected oj.make_run(…)")
    try:
        taken = dict(inspect.signature(run).parameters)
    except ValueError:
        raise UserError(f"{label(run)} has no signature: expected a function of axes") from None
    for name, parameter in taken.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(f"{label(run)} takes {name} by position: expected it by name")
        open_ended = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not open_ended and name not in grid.columns:
            raise UserError(f"{label(run)} needs {name}: make it an axis of the grid")
    return taken


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Labelled) else value


def _known(value: Any) -> Any:
    """Return what tells an argument from another: numbers and text as they are, objects by id."""
    return (type(value), value) if isinstance(value, int | float | str | None) else id(value)


def grouped(points: Sequence[Point], batching: Batching = "auto", final: Any = None) -> list[Group]:
    """Group the points that share a program, the dearest first.

    Args:
      batching: a program for each batch size ("static"), one for all ("masked"), or whichever
        is predicted to take less time, compilation included ("auto").
      final: (params, model_state, data) → what is kept of a run that has ended.
    """
    if batching not in ("auto", "static", "masked"):
        raise UserError(f"unknown batching {batching!r}: {nearest(batching, _BATCHING)}")
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        plan = point.run.plan
        # A schedule needs the steps of its run; runs without one share a program whatever theirs.
        steps = point.steps if needs_steps(point) else plan.record_every
        plan = dataclasses.replace(plan, steps=steps, final=final)
        if _split_by_batch(point):
            plan = dataclasses.replace(plan, slots=0, whole=False)
        fn = point.gradient
        of = None if fn is None else (fn.job, fn.mode, fn.wrt, point.steps)
        trees = {name: v for name, v in point.hparams.items() if not is_number(v)}
        shapes = kinds_of(point.run.problem.data), kinds_of(trees)
        groups.setdefault((plan, of, shapes, tuple(point.hparams)), []).append(i)
    found = []
    for (plan, *_), members in groups.items():
        first = points[members[0]]
        if not _split_by_batch(first):
            masking.check(plan, first.run.problem.data, first.hparams)
            found.append(_group(points, members, plan))
            continue
        sizes = np.array([int(points[i].hparams["batch_size"]) for i in members])
        work = np.array([points[i].steps for i in members], float)
        for low, high in _shared(first, plan, sizes, work, batching):
            chosen = [i for i, b in zip(members, sizes, strict=True) if low <= b <= high]
            found.append(_group(points, chosen, dataclasses.replace(plan, slots=high)))
    return sorted(found, key=lambda g: -(g.plan.slots or 1) * len(g.points))


def needs_steps(point: Point) -> bool:
    """Whether what a run does at a step depends on how many it will take."""
    moving = any(isinstance(value, Piecewise) for value in point.hparams.values())
    return moving or optimizers.takes_steps(point.run.plan.optimizer)


_BATCHING = ("auto", "static", "masked")


def _split_by_batch(point: Point) -> bool:
    """Whether its batch size may have a program of its own."""
    fn = point.gradient
    # A perturbed batch size must stay free to take all slots of its run.
    perturbed = fn is not None and "batch_size" in (fn.wrt or ())
    return "batch_size" in point.hparams and bool(point.run.plan.n) and not perturbed


def kinds_of(tree: PyTree) -> Any:
    """Return structure, shapes and dtypes, hashable: equal ones may share a program."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)


def _distinct(values: Sequence[PyTree]) -> tuple[list[PyTree], np.ndarray]:
    """Return the distinct values, and which is whose; equal are those of the same arrays."""
    keys = [tuple(map(id, jax.tree.leaves(value))) for value in values]
    distinct = dict(zip(keys, values, strict=True))
    place = {key: at for at, key in enumerate(distinct)}
    return list(distinct.values()), np.array([place[key] for key in keys], np.int32)


def is_number(value: Any) -> bool:
    """Whether a hyperparameter is one number: no array, schedule or tree.

    >>> is_number(0.1), is_number([0.1]), is_number({"w": 0.1})
    (True, False, False)
    """
    return jax.tree.structure(value) == jax.tree.structure(0) and np.ndim(value) == 0


def _column(values: Sequence[Any]) -> np.ndarray | Column:
    """Stack the values of a hyperparameter at the points of a group."""
    if all(map(is_number, values)):
        real = jax.dtypes.canonicalize_dtype(float)
        return np.array([float(np.asarray(value)) for value in values], real)
    distinct, place = _distinct(values)

    def stacked(*leaves: Any) -> np.ndarray:
        return np.stack(leaves).astype(jnp.result_type(*leaves))  # float64 only if it is allowed

    return Column(jax.tree.map(stacked, *distinct), place)


def columns(hparams: Sequence[HParams]) -> dict[str, np.ndarray | Column]:
    """Stack the hyperparameters of the points of a group."""
    return {name: _column([one[name] for one in hparams]) for name in hparams[0]}


def _group(points: Sequence[Point], members: list[int], plan: Plan) -> Group:
    first = points[members[0]]
    distinct, which = _distinct([points[i].run.problem.data for i in members])
    data: Any = distinct[0]
    if len(distinct) > 1:
        data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *distinct)
    hparams = columns([points[i].hparams for i in members])
    sizes, problem, batch = hparams.get("batch_size"), first.run.problem, ""
    if isinstance(sizes, np.ndarray) and _split_by_batch(first):
        batch = f"batches {int(min(sizes))} to {plan.slots}"
        if len(set(sizes)) == 1:
            # A batch that is always full needs no mask.
            if "batch_size" not in problem.hparams:
                del hparams["batch_size"]
            batch = f"batch {plan.slots}"
    shape = ", ".join(f"{k} {label(v)}" for k, v in first.shape)
    name = ", ".join(part for part in (problem.name, shape, batch) if part)
    mine = which if len(distinct) > 1 else None
    group = Group(plan, plan, data, np.array(members), hparams, mine, name)
    return group if first.gradient is None else _of_gradient(group, first, first.gradient)


def _of_gradient(group: Group, point: Point, fn: HypergradFn) -> Group:
    """Make a group of hypergradients: choose its mode once, predict its memory."""
    plan = group.plan
    own = {"steps": point.steps, "slots": plan.slots, "whole": plan.whole}
    every = fn.job.plan.record_every if looks_inside(fn.job) else point.steps
    job = dataclasses.replace(
        fn.job, plan=dataclasses.replace(fn.job.plan, record_every=every, **own)
    )
    run = Run(point.run.problem, dataclasses.replace(point.run.plan, **own))
    fn = dataclasses.replace(fn, run=run, job=job)
    hparams = jax.tree.map(lambda leaf: leaf[0], group.hparams_at(np.zeros(1, int)))
    theta, rest = fn.parted(hparams)
    data = point.run.problem.data
    choice = fn.chosen(data, theta, rest)
    computation = HypergradientComputation(fn.job, choice.mode, fn.wrt)
    drawn = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
    if group.which is None and plan.n:
        drawn = drawn * plan.slots // plan.n
    bytes_of_a_run = needed(computation.mode, job, data, theta, rest) + drawn
    return dataclasses.replace(
        group,
        computation=computation,
        bytes=bytes_of_a_run,
        notes={
            "mode": computation.mode.name,
            "reason": choice.reason,
            "bytes of a run": bytes_of_a_run,
        },
    )


# ------------------------------------------------------------- static or masked, by predicted cost


def _shared(
    point: Point, plan: Plan, sizes: np.ndarray, work: np.ndarray, batching: Batching
) -> list[tuple[int, int]]:
    distinct = np.unique(sizes)
    try:
        largest = dataclasses.replace(plan, slots=int(distinct[-1]))
        masking.check(largest, point.run.problem.data, point.hparams)
    except UserError:
        cut = plan.sampler != "replacement" and any(plan.n % size for size in distinct.tolist())
        if cut or batching == "masked":
            raise
        batching = "static"  # full batches have no padding
    if batching == "masked" or len(distinct) == 1:
        return [(int(distinct[0]), int(distinct[-1]))]
    if batching == "static":
        return [(int(b), int(b)) for b in distinct]
    read = "batch_size" in point.run.problem.hparams
    hparams = {k: v for k, v in point.hparams.items() if k != "batch_size" or read}
    data = point.run.problem.data
    ends = [int(distinct[0]), int(distinct[-1])]
    predicted = [operations(dataclasses.replace(plan, slots=b), data, hparams) for b in ends]
    slope = (predicted[1][0] - predicted[0][0]) / (ends[1] - ends[0])
    rate = _RATE.get(jax.default_backend(), _RATE["gpu"])
    cost = [(predicted[0][0] + slope * (b - ends[0])) / rate for b in distinct.tolist()]
    total = [float(work[sizes == b].sum()) for b in distinct]
    compiling = _COMPILING * predicted[1][1]
    return cheapest(distinct.tolist(), total, cost, compiling)


_RATE = {"cpu": 2e10, "gpu": 5e12, "tpu": 2e13}
"""Operations a second that small steps reach: a guess to the order of magnitude will do."""

_COMPILING = 8.0
"""Compiling the programs of a group takes about as many times what lowering one step does."""


def operations(plan: Plan, data: Data, hparams: dict[str, Any]) -> tuple[float, float]:
    """(operations of one step, as XLA counts them before it optimises; seconds to lower it)."""
    begin = time.perf_counter()
    key = make_key(0)
    state = jax.eval_shape(lambda d, h, k: core.init(plan, d, h, k), data, hparams, key)
    step = jax.jit(lambda d, h, s: core.step(plan, d, h, s))
    lowered = step.lower(data, hparams, state)
    seconds = time.perf_counter() - begin
    return counted(lowered), seconds


def counted(lowered: Any) -> float:
    """Operations of a lowered program, as XLA counts them before it optimises.

    Of loops whose length it does not know it counts one turn.
    """
    cost = lowered.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return float(cost.get("flops", 0.0))


def cheapest(
    sizes: Sequence[int], work: Sequence[float], cost: Sequence[float], compiling: float
) -> list[tuple[int, int]]:
    """Cut sorted batch sizes into neighbours that share a program, for least total time.

    .. math:: \\min \\sum_{groups} \\Big(C + c_{max(group)} \\sum_{b ∈ group} W_b\\Big)

    by dynamic programming. What masking wastes is then less than what its compilations would take.

    Args:
      sizes: increasing. work: W_b, steps of all runs of a size. cost: c_b, seconds of a step with
        b slots. compiling: C, seconds to compile a program.

    >>> cheapest([1, 2, 64], [100, 100, 100], [1e-3, 1e-3, 1.0], compiling=1.0)
    [(1, 2), (64, 64)]
    """
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]
    for end in range(1, len(sizes) + 1):
        choices = [
            (
                best[begin][0] + compiling + cost[end - 1] * sum(work[begin:end]),
                [*best[begin][1], (sizes[begin], sizes[end - 1])],
            )
            for begin in range(end)
        ]
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]
