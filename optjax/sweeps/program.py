"""The compiled programs of a bucket of runs: start a block of lanes, advance it, judge it.

A lane is one run. A block is the lanes of one call; it is laid over the devices, and within a
device cut into tiles, one after the other; the lanes of a tile are vmapped. So (block, tile) says
it all: vmap is one tile a block, `lax.map` several, a plain loop a block of one lane.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optjax import scan
from optjax.problems import Data
from optjax.scan import Plan, RunState
from optjax.types import Array, HParams, PyTree


class Lane(NamedTuple):
    """What persists of a run of a sweep from one record to the next."""

    run: RunState  # its `step` is None here: all lanes of a block share one clock
    rules: tuple[PyTree, ...]  # the state of each stop rule
    stopped_at: Array  # () int32, the step of the record at which a rule stopped it; −1
    stopped_by: Array  # () int32, which rule; −1


class Layout(NamedTuple):
    """How lanes are laid out in a call."""

    block: int  # lanes of a call, over all devices
    tile: int  # lanes that are vmapped together; divides block / devices
    counts: bool = False  # a batch as how often each example was drawn


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one lane computes: the static part of a bucket's programs."""

    plan: Plan
    rules: tuple[Any, ...]
    capacity: int  # records that one call can hold
    drop_diverged: bool


def lanes_mesh(devices: list[Any]) -> jax.sharding.Mesh:
    """The mesh that lanes are laid over."""
    return jax.sharding.Mesh(np.asarray(devices), ("lane",), axis_types=(AxisType.Auto,))


# ------------------------------------------------------------------------------------- one lane


def _start(spec: Spec, data: Data, hparams: HParams, key: Array) -> Lane:
    state = scan.init(spec.plan, data, hparams, jax.random.wrap_key_data(key))
    never = jnp.full((), -1, jnp.int32)
    rules = tuple(rule.init() for rule in spec.rules)
    return Lane(state._replace(step=None), rules, never, never)


def plain_start(spec: Spec, data: Data, hparams: HParams, key: Array) -> Lane:
    """The lane before its first step, its keys as numbers: as blocks hold it."""
    return _plain(_start(spec, data, hparams, key))


def _record(
    spec: Spec, data: Data, every: Array, hparams: HParams, lane: Lane, step: Array
) -> tuple[Lane, dict[str, Array]]:
    """`every` steps and what is recorded after them; a lane that has stopped stays as it is."""
    start = lane.run._replace(step=step)
    kind = jax.eval_shape(functools.partial(scan.step, spec.plan, data, hparams), start)[1]

    def one(_: Array, carry: tuple[RunState, Array]) -> tuple[RunState, Array]:
        state, loss = scan.step(spec.plan, data, hparams, carry[0])
        return state, carry[1] + loss

    state, total = lax.fori_loop(0, every, one, (start, jnp.zeros((), kind.dtype)))
    numbers = scan.split(spec.plan, hparams, state.params)[1]
    values = {
        "loss": total / every.astype(total.dtype),
        **spec.plan.metrics(state.params, state.model_state, data, numbers),
    }
    fresh = lane._replace(run=state._replace(step=None))
    if not spec.rules:
        return fresh, values
    rules = []
    for i, rule in enumerate(spec.rules):
        rule_state, fires = rule.update(lane.rules[i], state.step, values)
        rules.append(rule_state)
        first = fires & (fresh.stopped_at < 0)
        fresh = fresh._replace(
            stopped_at=jnp.where(first, state.step, fresh.stopped_at).astype(jnp.int32),
            stopped_by=jnp.where(first, i, fresh.stopped_by).astype(jnp.int32),
        )
    fresh = fresh._replace(rules=tuple(rules))
    return _where(lane.stopped_at >= 0, lane, fresh), values


def _where(take: Array, one: PyTree, other: PyTree) -> PyTree:
    """`one` where `take` is true, leaf by leaf; keys too."""
    return jax.tree.map(functools.partial(jnp.where, take), one, other)


def _outcome(spec: Spec, data: Data, hparams: HParams, lane: Lane, step: Array) -> scan.Outcome:
    return scan.outcome(spec.plan, data, hparams, lane.run._replace(step=step))


# ------------------------------------------------------------------------------- tiles and blocks


def _vectorised(one: Callable[..., Any], tile: int, lanes: int) -> Callable[..., Any]:
    """`one` over the first axis of its first `lanes` arguments; a tile of one is not vmapped."""
    if tile > 1:
        return lambda *args: jax.vmap(one, (0,) * lanes + (None,) * (len(args) - lanes))(*args)

    def alone(*args: Any) -> Any:
        first = [jax.tree.map(lambda leaf: leaf[0], a) for a in args[:lanes]]
        out = one(*first, *args[lanes:])
        return jax.tree.map(lambda leaf: leaf[None], out)

    return alone


def _by_tiles(whole: Callable[..., Any], tile: int, *args: PyTree) -> Any:
    """`whole`, written for a tile, over the tiles of the arguments."""
    size = jax.tree.leaves(args)[0].shape[0]
    if size == tile:
        return whole(*args)
    cut = jax.tree.map(lambda a: a.reshape(size // tile, tile, *a.shape[1:]), args)
    out = lax.map(lambda part: whole(*part), cut)
    return jax.tree.map(lambda a: a.reshape(size, *a.shape[2:]), out)


def _chunk_of_tile(
    spec: Spec,
    data: Data,
    every: Array,
    step: Array,
    records: Array,
    hparams: HParams,
    lanes: Lane,
) -> tuple[Lane, dict[str, Array]]:
    """At most `records` records of the lanes of a tile; ends early once none is left."""
    tile = lanes.stopped_at.shape[0]
    one = _vectorised(functools.partial(_record, spec, data, every), tile, 2)
    shapes = jax.eval_shape(one, hparams, lanes, step)[1]
    room = {k: jnp.zeros((tile, spec.capacity), v.dtype) for k, v in shapes.items()}

    def going(carry: Any) -> Array:
        done, lanes, _ = carry
        alive = lanes.stopped_at < 0
        if spec.drop_diverged:
            alive &= lanes.run.diverged_at < 0
        return (done < records) & jnp.any(alive)

    def go(carry: Any) -> Any:
        done, lanes, room = carry
        lanes, values = one(hparams, lanes, step + done * every)
        room = {
            name: lax.dynamic_update_slice_in_dim(room[name], value[:, None], done, 1)
            for name, value in values.items()
        }
        return done + 1, lanes, room

    _, lanes, room = lax.while_loop(going, go, (jnp.zeros((), jnp.int32), lanes, room))
    return lanes, room


def _plain(tree: PyTree) -> PyTree:
    """Keys as the numbers they are, so that all leaves can be saved and moved."""

    def leaf(a: Any) -> Any:
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(a) if is_key else a

    return jax.tree.map(leaf, tree)


def _typed(tree: PyTree, like: PyTree) -> PyTree:
    """The inverse of `_plain`, where `like` has the dtypes of one lane."""

    def leaf(a: Any, kind: Any) -> Any:
        is_key = jnp.issubdtype(kind.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(a) if is_key else a

    return jax.tree.map(leaf, tree, like)


class Programs:
    """The three programs of a bucket in one layout, each compiled when it is first called.

    Args:
      spec: what a lane computes. layout: see `Layout`. devices: that the lanes are laid over.
      data: of the problem. example: the hyperparameters and key data of a block, for their shapes.
    """

    def __init__(
        self, spec: Spec, layout: Layout, devices: list[Any], data: Data, example: PyTree
    ) -> None:
        self.layout, self.devices = layout, devices
        self.spec = dataclasses.replace(
            spec, plan=dataclasses.replace(spec.plan, counts=layout.counts)
        )
        self.mesh = lanes_mesh(devices) if len(devices) > 1 or jax.process_count() > 1 else None
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), example)
        self.plain_like = jax.eval_shape(functools.partial(plain_start, self.spec), data, *one)
        self.like = jax.eval_shape(functools.partial(_start, self.spec), data, *one)
        self.data = self.put(data, replicated=True)
        self._compiled: dict[str, Any] = {}

    def start(self, hparams: PyTree, keys: PyTree) -> PyTree:
        """The lanes before their first step."""
        return self._call("start", self._start, 2, hparams, keys)

    def chunk(self, hparams: PyTree, lanes: PyTree, step: int, records: int, every: int) -> Any:
        """(the lanes after at most `records` records, name → (block, capacity) values)."""
        numbers = [np.int32(x) for x in (step, records, every)]
        return self._call("chunk", self._chunk, 2, hparams, lanes, *numbers)

    def outcome(self, hparams: PyTree, lanes: PyTree, step: int) -> scan.Outcome:
        """What each lane has reached."""
        return self._call("outcome", self._outcome, 2, hparams, lanes, np.int32(step))

    def put(self, tree: PyTree, *, replicated: bool = False) -> PyTree:
        """Arrays of the host on the devices, the first axis over the lanes unless `replicated`."""
        if self.mesh is None:
            return jax.device_put(tree, self.devices[0])
        over, whole = (NamedSharding(self.mesh, PartitionSpec(*p)) for p in (("lane",), ()))

        def leaf(a: Any) -> Any:
            a = np.asarray(a)
            # XLA does not shard what is empty.
            sharding = whole if replicated or not a.size else over
            return jax.make_array_from_callback(a.shape, sharding, lambda at: a[at])

        return jax.tree.map(leaf, tree)

    def memory(self) -> int | None:
        """Bytes that a chunk takes on a device: arguments, results and temporaries."""
        analysis = self._compiled["chunk"].memory_analysis() if "chunk" in self._compiled else None
        if analysis is None:
            return None
        return int(
            analysis.temp_size_in_bytes
            + analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
        )

    def text(self) -> str:
        """The compiled chunk as HLO."""
        return self._compiled["chunk"].as_text()

    def _call(self, name: str, program: Callable[..., Any], lanes: int, *args: Any) -> Any:
        if name not in self._compiled:
            self._compiled[name] = _cached(
                (name, self.spec, self.layout, tuple(self.devices), _kinds((self.data, *args))),
                lambda: self._compile(program, lanes, *args),
            )
        return self._compiled[name](self.data, *args)

    def _compile(self, program: Callable[..., Any], lanes: int, *args: Any) -> Any:
        function = program
        if self.mesh is not None:
            over, whole = PartitionSpec("lane"), PartitionSpec()
            function = jax.shard_map(
                program,
                mesh=self.mesh,
                in_specs=(whole, *(over if i < lanes else whole for i in range(len(args)))),
                out_specs=over,
                check_vma=False,
            )
        return jax.jit(function).lower(self.data, *args).compile()

    def _start(self, data: Data, hparams: PyTree, keys: Array) -> PyTree:
        one = functools.partial(_start, self.spec, data)
        return _plain(
            _by_tiles(_vectorised(one, self.layout.tile, 2), self.layout.tile, hparams, keys)
        )

    def _chunk(
        self, data: Data, hparams: PyTree, lanes: PyTree, step: Array, records: Array, every: Array
    ) -> Any:
        tile = functools.partial(_chunk_of_tile, self.spec, data, every, step, records)
        lanes, values = _by_tiles(tile, self.layout.tile, hparams, _typed(lanes, self.like))
        return _plain(lanes), values

    def _outcome(self, data: Data, hparams: PyTree, lanes: PyTree, step: Array) -> scan.Outcome:
        one = functools.partial(_outcome, self.spec, data)
        over = _vectorised(one, self.layout.tile, 2)
        return _by_tiles(
            lambda h, lane: over(h, lane, step), self.layout.tile, hparams, _typed(lanes, self.like)
        )


_CACHE: dict[Any, Any] = {}
_ROOM = 64


def _cached(key: Any, make: Callable[[], Any]) -> Any:
    """A compiled program, kept for the next sweep of this process; the least used goes first."""
    found = _CACHE.pop(key, None)
    _CACHE[key] = make() if found is None else found
    if len(_CACHE) > _ROOM:
        _CACHE.pop(next(iter(_CACHE)))
    return _CACHE[key]


def forget() -> None:
    """Drop the compiled programs of this process."""
    _CACHE.clear()


def _kinds(tree: PyTree) -> Any:
    """What a compiled program is particular to in its arguments, hashable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def key_numbers(seeds: list[int]) -> np.ndarray:
    """The numbers of `jax.random.key(seed)` for each seed, (L, 2) uint32."""
    distinct = {s: np.asarray(jax.random.key_data(jax.random.key(s))) for s in set(seeds)}
    return np.stack([distinct[s] for s in seeds])
