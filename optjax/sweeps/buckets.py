"""A grid becomes buckets: runs that share a program and differ in numbers alone.

What shapes the program splits the points: the arguments of a function that makes the run (an
optimiser, a width), and the batch size where a program of its own is cheaper than masking. Batch
sizes that share a program get as many slots as the largest of them; the others leave some empty.
"""

import dataclasses
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optjax.run import core
from optjax.run.core import Plan
from optjax.run.problems import Data
from optjax.run.trajectory import Run
from optjax.support.errors import UserError, nearest
from optjax.sweeps.grid import Grid, label

Batching = Literal["auto", "static", "masked"]


class Point(NamedTuple):
    """A point of the grid, taken apart."""

    run: Run
    shape: tuple[tuple[str, Any], ...]  # what was given to the function that makes the run
    hparams: dict[str, Any]
    steps: int


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Points whose runs share a compiled program."""

    plan: Plan
    data: Data  # of all its runs; or, where they differ, those of each problem, stacked
    points: np.ndarray  # (G,) indices into the grid
    hparams: dict[str, np.ndarray]  # name → (G,)
    which: np.ndarray | None  # (G,) int32, each point's place in the stacked data
    name: str

    @property
    def waste(self) -> float:
        """The share of the slots of its batches that stay empty."""
        sizes = self.hparams.get("batch_size")
        if sizes is None or not self.plan.n:
            return 0.0
        return 1 - float(np.mean(sizes)) / self.plan.slots


def resolve(run: Run | Callable[..., Run], grid: Grid) -> list[Point]:
    """Every point's run, hyperparameters and steps.

    Args:
      run: a run; or a function that makes one from some of the grid's names, its parameters.

    Raises:
      UserError: an unknown name, a value that cannot be, runs that record at different steps.
    """
    parameters: list[str] = []
    if not isinstance(run, Run):
        if not callable(run):
            raise UserError(f"run is a {type(run).__name__}: expected oj.make_run(…)")
        taken = inspect.signature(run).parameters
        parameters = [name for name in taken if name in grid.columns]
        for name, parameter in taken.items():
            needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD
            )  # fmt: skip
            if needed and name not in grid.columns:
                raise UserError(f"{label(run)} needs {name}: make it an axis of the grid")
    made: dict[str, Run] = {}
    points = []
    for i in range(len(grid)):
        values = grid.point(i)
        shape = tuple((name, values.pop(name)) for name in parameters)
        said = repr(shape)
        if said not in made:
            made[said] = run if isinstance(run, Run) else run(**dict(shape))
            if not isinstance(made[said], Run):
                raise UserError(
                    f"{label(run)} gives a {type(made[said]).__name__}: expected a run, as "
                    "oj.make_run makes"
                )
        one = made[said]
        steps = values.pop("steps", one.plan.steps)
        if not isinstance(steps, int) or steps < 1 or steps % one.plan.record_every:
            raise UserError(
                f"steps is {steps}: expected a positive multiple of record_every = "
                f"{one.plan.record_every}"
            )
        for name in values:
            known = one.plan.own | {"l2", "batch_size", "steps"} | one.problem.hparams
            if name not in known and not isinstance(run, Run):
                known |= set(inspect.signature(run).parameters)
            if name not in known:
                raise UserError(f"unknown hyperparameter {name!r}: {nearest(name, known)}")
        points.append(Point(one, shape, dict(one.checked(values)), steps))
    if len({p.run.plan.record_every for p in points}) > 1:
        raise UserError("the runs record at different steps: give all of them one record_every")
    return points


def buckets(points: Sequence[Point], batching: Batching = "auto") -> list[Bucket]:
    """The points in groups that share a program, the dearest first.

    Args:
      batching: a program for each batch size ("static"), one for all ("masked"), or whichever
        is predicted to take less time, compilation included ("auto").
    """
    if batching not in ("auto", "static", "masked"):
        raise UserError(f"unknown batching {batching!r}: {nearest(batching, _BATCHING)}")
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        plan = dataclasses.replace(point.run.plan, steps=point.run.plan.record_every)
        if "batch_size" in point.hparams and plan.n:
            plan = dataclasses.replace(plan, slots=0, whole=False)
        kinds = _kinds(point.run.problem.data)
        groups.setdefault((plan, kinds, tuple(point.hparams)), []).append(i)
    found = []
    for (plan, _, _), members in groups.items():
        first = points[members[0]]
        if not ("batch_size" in first.hparams and plan.n):
            found.append(_bucket(points, members, plan))
            continue
        sizes = np.array([int(points[i].hparams["batch_size"]) for i in members])
        work = np.array([points[i].steps for i in members], float)
        for low, high in _shared(first, plan, sizes, work, batching):
            chosen = [i for i, b in zip(members, sizes, strict=True) if low <= b <= high]
            found.append(_bucket(points, chosen, dataclasses.replace(plan, slots=high)))
    return sorted(found, key=lambda b: -(b.plan.slots or 1) * len(b.points))


_BATCHING = ("auto", "static", "masked")


def _kinds(data: Data) -> Any:
    """Shapes and dtypes of data: those of equal kinds may share a program."""
    leaves, tree = jax.tree.flatten(data)
    return tree, tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)


def _stacked(points: Sequence[Point], members: list[int]) -> tuple[Data, np.ndarray | None]:
    """The data of some points, each once, and which are whose; None where all share them."""
    distinct: dict[int, Data] = {}
    for i in members:
        data = points[i].run.problem.data
        distinct.setdefault(id(data), data)
    if len(distinct) == 1:
        return next(iter(distinct.values())), None
    place = {key: at for at, key in enumerate(distinct)}
    which = [place[id(points[i].run.problem.data)] for i in members]
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *distinct.values())
    return data, np.array(which, np.int32)


def _bucket(points: Sequence[Point], members: list[int], plan: Plan) -> Bucket:
    data, which = _stacked(points, members)
    real = jax.dtypes.canonicalize_dtype(float)
    hparams = {
        name: np.array([float(np.asarray(points[i].hparams[name])) for i in members], real)
        for name in points[members[0]].hparams
    }
    sizes = hparams.get("batch_size")
    problem = points[members[0]].run.problem
    if sizes is not None and plan.n and len(set(sizes)) == 1:
        # A batch that is always full needs no mask.
        if "batch_size" not in problem.hparams:
            del hparams["batch_size"]
        batch = f"batch {plan.slots}"
    elif sizes is not None and plan.n:
        batch = f"batches {int(min(sizes))} to {plan.slots}"
    else:
        batch = ""
    shape = ", ".join(f"{k} {label(v)}" for k, v in points[members[0]].shape)
    name = ", ".join(part for part in (problem.name, shape, batch) if part)
    return Bucket(plan, data, np.array(members), hparams, which, name)


# ------------------------------------------------------------- static or masked, by predicted cost


def _shared(
    point: Point, plan: Plan, sizes: np.ndarray, work: np.ndarray, batching: Batching
) -> list[tuple[int, int]]:
    distinct = np.unique(sizes)
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
"""Compiling the programs of a bucket takes about as many times what lowering one step does."""


def operations(plan: Plan, data: Data, hparams: dict[str, Any]) -> tuple[float, float]:
    """(operations of one step, as XLA counts them before it optimises; seconds to lower it)."""
    begin = time.perf_counter()
    key = jax.random.key(0)
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
    """The cut of sorted batch sizes into neighbours that share a program, of least total time.

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
