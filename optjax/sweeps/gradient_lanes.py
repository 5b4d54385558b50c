"""Points whose hypergradients share a program, and the program: `vmap` of the one hypergradient."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optjax.hypergradients import kept_bytes
from optjax.hypergradients.auto import Auto
from optjax.hypergradients.hypergradient import HypergradFn, Hypergradient, Pinned
from optjax.hypergradients.job import looks_inside
from optjax.run.problems import Data
from optjax.run.trajectory import Run
from optjax.support.errors import UserError
from optjax.support.types import Array, PyTree
from optjax.sweeps.buckets import Batching, Bucket, Point, buckets
from optjax.sweeps.lane import Inputs
from optjax.sweeps.wave import inputs


class Lanes(NamedTuple):
    """Points that share a program."""

    bucket: Bucket  # in its hparams a tree is a place in `trees`
    trees: dict[str, PyTree]  # hyperparameters that are no numbers: the values of each, stacked
    program: Pinned
    why: str  # it has this mode
    each: int  # bytes of a lane, predicted

    def given(self, seeds: Sequence[int], runs: np.ndarray) -> tuple[Any, Any]:
        """What `block` takes for some runs: what they share, and what is each one's own."""
        return (self.bucket.data, self.trees), inputs(self.bucket, list(seeds), runs)


def planned(
    points: Sequence[Point], asked: Mapping[int, HypergradFn], batching: Batching
) -> Iterator[Lanes]:
    """The points in groups that share a program.

    Args:
      asked: the hypergradient of each point's run, by the run's id.
    """
    groups: dict[Any, list[tuple[int, dict[str, PyTree]]]] = {}
    for i, point in enumerate(points):
        fn = asked.get(id(point.run))
        if fn is None:
            raise UserError("the function gives runs and hypergradients: expected one of them")
        # A perturbed batch size must stay free to take all slots of its run.
        apart = {"batch_size"} & set(fn.wrt or ())
        trees = {n: v for n, v in point.hparams.items() if n in apart or not is_number(v)}
        leaves, structure = jax.tree.flatten(trees)
        kinds = tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)
        key = fn.job, fn.mode, fn.wrt, point.steps, structure, kinds
        groups.setdefault(key, []).append((i, trees))
    for members in groups.values():
        names = members[0][1].keys()
        plain = [
            points[i]._replace(
                hparams={n: v for n, v in points[i].hparams.items() if n not in names}
            )
            for i, _ in members
        ]
        for bucket in buckets(plain, batching):
            stacked = {n: _stacked([members[j][1][n] for j in bucket.points]) for n in names}
            places = {name: place for name, (_, place) in stacked.items()}
            whole = dataclasses.replace(
                bucket,
                points=np.array([members[j][0] for j in bucket.points]),
                hparams={**bucket.hparams, **places},
            )
            first = points[whole.points[0]]
            trees = {name: tree for name, (tree, _) in stacked.items()}
            yield _lanes(whole, trees, first, asked[id(first.run)])


def is_number(value: Any) -> bool:
    """Whether a hyperparameter is one number: no array, schedule or tree.

    >>> is_number(0.1), is_number([0.1]), is_number({"w": 0.1})
    (True, False, False)
    """
    return jax.tree.structure(value) == jax.tree.structure(0) and np.ndim(value) == 0


def _stacked(values: Sequence[PyTree]) -> tuple[PyTree, np.ndarray]:
    """The values, each once, and which is whose."""
    keys = [tuple(map(id, jax.tree.leaves(value))) for value in values]
    distinct = dict(zip(keys, values, strict=True))
    place = {key: i for i, key in enumerate(distinct)}
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *distinct.values())
    return stack, np.array([place[key] for key in keys], np.int32)


def _lanes(bucket: Bucket, trees: dict[str, PyTree], point: Point, fn: HypergradFn) -> Lanes:
    """A bucket with its mode, chosen once for all of it."""
    problem, steps = point.run.problem, point.steps
    own: dict[str, Any] = {
        "steps": steps, "slots": bucket.plan.slots, "whole": bucket.plan.whole
    }  # fmt: skip
    every = fn.job.plan.record_every if looks_inside(fn.job) else steps
    job = dataclasses.replace(
        fn.job, plan=dataclasses.replace(fn.job.plan, record_every=every, **own)
    )
    run = Run(problem, dataclasses.replace(point.run.plan, **own))
    fn = dataclasses.replace(fn, run=run, job=job)
    first = {name: values[0] for name, values in bucket.hparams.items()}
    first |= {name: _at(tree, first[name]) for name, tree in trees.items()}
    theta, rest = fn.parted(first)
    program = fn.pinned(theta, rest)
    why = fn.explain(first).reason if isinstance(fn.mode, Auto) else "asked for"
    each = kept_bytes.needed(program.mode, job, problem.data, theta, rest)
    return Lanes(bucket, trees, program, why, each + _drawn(bucket, problem.data))


def _drawn(bucket: Bucket, data: Data) -> int:
    """Bytes of a batch, or of all the data where each lane has its own."""
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
    if bucket.which is not None or not bucket.plan.n:
        return whole
    return whole * bucket.plan.slots // bucket.plan.n


@functools.partial(jax.jit, static_argnums=(0, 1))
def block(
    program: Pinned, mesh: jax.sharding.Mesh | None, shared: Any, own: tuple[Inputs, Array]
) -> Hypergradient:
    """The hypergradients of a block of lanes, laid over the mesh.

    Args:
      shared, own: see `Lanes.given`.
    """
    over, whole = PartitionSpec("lane"), PartitionSpec()
    some = functools.partial(_some, program)
    if mesh is not None:
        some = jax.shard_map(
            some, mesh=mesh, in_specs=(whole, over), out_specs=over, check_vma=False
        )
    return some(shared, own)


def _some(program: Pinned, shared: tuple[Data, Any], own: tuple[Inputs, Array]) -> Hypergradient:
    data, trees = shared

    def one(own: tuple[Inputs, Array]) -> Hypergradient:
        (hparams, which), seed = own
        mine = data if which is None else _at(data, which)
        hparams = {**hparams, **{name: _at(tree, hparams[name]) for name, tree in trees.items()}}
        return program.pure(mine, hparams, jax.random.key(seed))

    # A lane alone is not vmapped: its branches stay branches.
    return lax.map(one, own) if own[1].shape[0] == 1 else jax.vmap(one)(own)


def _at(tree: PyTree, place: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[place], tree)


def put(tree: PyTree, mesh: jax.sharding.Mesh | None, device: Any, *over: str) -> PyTree:
    """Arrays of the host on the device; or on all of the mesh, their first axis over `over`."""
    if mesh is None:
        return jax.device_put(tree, device)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*over)))
