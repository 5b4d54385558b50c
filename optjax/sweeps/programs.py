"""The compiled programs of a group of runs: start a batch of runs, advance it, judge it.

A batch is the runs of one call. It is laid over the devices, and within a device cut into vmap
chunks, one after the other; the runs of a chunk are vmapped. So (batch, vmap_chunk) says it all:
`vmap` is one chunk a batch, `lax.map` several, a plain loop a batch of one run.
"""

import dataclasses
import functools
import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optjax.run.problems import Data
from optjax.support.machine import hasty_options
from optjax.support.types import Array, PyTree
from optjax.sweeps import swept_run
from optjax.sweeps.groups import counted, kinds_of
from optjax.sweeps.swept_run import Inputs, RunSpec, SweptRun


class BatchLayout(NamedTuple):
    """How runs are laid out in a call."""

    batch: int  # runs of a call, over all devices
    vmap_chunk: int  # runs that are vmapped together; divides batch / devices
    counts: bool = False  # a batch as how often each example was drawn


def runs_mesh(devices: list[Any]) -> jax.sharding.Mesh:
    """Return the mesh that runs are laid over."""
    return jax.sharding.Mesh(np.asarray(devices), ("run",), axis_types=(AxisType.Auto,))


def _vectorised(
    one: Callable[..., Any], spec: RunSpec, data: Data, inputs: Inputs, vmap_chunk: int
) -> Callable[..., Any]:
    """`one(spec, data, hparams, x, …)` over the runs of a vmap_chunk: a function of (x, …).

    A vmap chunk of one is not vmapped. Runs that have data of their own take them here, once.
    """
    own = inputs.which is not None
    if own:
        data = jax.tree.map(lambda a: a[inputs.which], data)
    one = functools.partial(one, spec)
    if vmap_chunk > 1:
        axis = 0 if own else None
        return lambda x, *rest: jax.vmap(one, (axis, 0, 0, *(None for _ in rest)))(
            data, inputs.hparams, x, *rest
        )

    def first(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[0], tree)

    def alone(x: Any, *rest: Any) -> Any:
        out = one(first(data) if own else data, first(inputs.hparams), first(x), *rest)
        return jax.tree.map(lambda leaf: leaf[None], out)

    return alone


def _by_chunks(whole: Callable[..., Any], vmap_chunk: int, *args: PyTree) -> Any:
    """`whole`, written for a vmap chunk, over the vmap chunks of the arguments."""
    size = jax.tree.leaves(args)[0].shape[0]
    if size == vmap_chunk:
        return whole(*args)
    cut = jax.tree.map(lambda a: a.reshape(size // vmap_chunk, vmap_chunk, *a.shape[1:]), args)
    out = lax.map(lambda part: whole(*part), cut)
    return jax.tree.map(lambda a: a.reshape(size, *a.shape[2:]), out)


def _advance_chunk(
    spec: RunSpec,
    data: Data,
    step: Array,
    records: Array,
    every: Array,
    inputs: Inputs,
    states: SweptRun,
) -> tuple[SweptRun, dict[str, Array]]:
    """At most `records` records of the runs of a vmap chunk; ends early once none is left."""
    vmap_chunk = states.stopped_at.shape[0]
    one = _vectorised(swept_run.advance, spec, data, inputs, vmap_chunk)
    shapes = jax.eval_shape(one, states, step, every)[1]
    room = {
        name: jnp.zeros((vmap_chunk, spec.capacity, *kind.shape[1:]), kind.dtype)
        for name, kind in shapes.items()
    }

    def going(carry: Any) -> Array:
        done, states, _ = carry
        alive = states.stopped_at < 0
        if spec.drop_diverged:
            alive &= states.state.diverged_at < 0
        return (done < records) & jnp.any(alive)

    def go(carry: Any) -> Any:
        done, states, room = carry
        states, values = one(states, step + done * every, every)
        room = {
            name: lax.dynamic_update_slice_in_dim(room[name], value[:, None], done, 1)
            for name, value in values.items()
        }
        return done + 1, states, room

    _, states, room = lax.while_loop(going, go, (jnp.zeros((), jnp.int32), states, room))
    return states, room


class Programs:
    """The three programs of a group in one layout, each compiled when it is first called.

    Args:
      spec: what a run computes. layout: see `BatchLayout`. devices: that the runs are laid over.
      data: of the problem; stacked where each run's inputs say which are its own.
      example: inputs and seeds of a batch, for their shapes.
      haste: 0 to 2: with how little effort to compile.
    """

    def __init__(
        self, spec: RunSpec, layout: BatchLayout, devices: list[Any], data: Data, example: PyTree,
        haste: int = 0,
    ) -> None:  # fmt: skip
        self.layout, self.devices = layout, devices
        if layout.counts:
            computation: Any = spec.computation
            spec = dataclasses.replace(
                spec, computation=dataclasses.replace(computation, counts=True)
            )
        self.spec = spec
        self.mesh = runs_mesh(devices) if len(devices) > 1 or jax.process_count() > 1 else None
        self.like, self.plain_like = swept_run.likes(self.spec, data, *example)
        self.data = self.put(data, replicated=True)
        self.inputs_like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), example
        )
        self._compiled: dict[str, Any] = {}
        self._chunk_lowered: Any = None
        self._operations: float | None = None
        self.compiling = 0.0  # seconds, when its programs were compiled
        self.haste = haste

    def start(self, inputs: Inputs, seeds: PyTree) -> PyTree:
        """Start the runs."""
        return self._call("start", self._start, inputs, seeds)

    def chunk(self, inputs: Inputs, states: PyTree, step: int, records: int, every: int) -> Any:
        """Advance the runs by at most `records` records: (runs, name → (batch, capacity, …))."""
        numbers = [np.int32(x) for x in (step, records, every)]
        return self._call("chunk", self._chunk, inputs, states, *numbers)

    def finish(self, inputs: Inputs, states: PyTree, step: int) -> Any:
        """Judge the runs at a step."""
        return self._call("finish", self._finish, inputs, states, np.int32(step))

    def put(self, tree: PyTree, *, replicated: bool = False) -> PyTree:
        """Arrays of the host on the devices, the first axis over the runs unless `replicated`."""
        if self.mesh is None:
            return jax.device_put(tree, self.devices[0])
        over, whole = (NamedSharding(self.mesh, PartitionSpec(*p)) for p in (("run",), ()))

        def leaf(a: Any) -> Any:
            a = np.asarray(a)
            # XLA does not shard what is empty.
            sharding = whole if replicated or not a.size else over
            return jax.make_array_from_callback(a.shape, sharding, lambda at: a[at])

        return jax.tree.map(leaf, tree)

    def operations(self) -> float:
        """Operations of one step of a run; see `counted`."""
        if self._operations is None:
            self._operations = counted(self._lowered()) / self.layout.vmap_chunk
        return self._operations

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

    def _call(self, name: str, program: Callable[..., Any], *args: Any) -> Any:
        if name not in self._compiled:
            self._take(
                name,
                (name, *self._key(args)),
                lambda: self._compile(self._lower(program, *args), name),
            )
        return self._compiled[name](self.data, *args)

    def _take(self, name: str, key: Any, make: Callable[[], Any] | None) -> None:
        self._compiled[name], seconds = _cached(key, make)
        self.compiling += seconds

    def _key(self, args: Any) -> Any:
        kinds = kinds_of((self.data, *args))
        return self.spec, self.layout, tuple(self.devices), self.haste, kinds

    def _options(self, name: str) -> dict[str, Any] | None:
        """Return XLA's options; a user's own XLA_FLAGS on them stand."""
        haste = self.haste if name == "chunk" else 2
        return hasty_options(haste) if self.devices[0].platform == "cpu" else None

    def _compile(self, lowered: Any, name: str) -> Any:
        """Compile a program, or return the one of the same text.

        Groups of other batch sizes or numbers of steps start and finish by the same programs.
        """
        options, text = self._options(name), lowered.as_text()
        # The text says neither which arguments it reads nor which Python functions it calls.
        read = getattr(lowered._lowering, "compile_args", {}).get("kept_var_idx")
        if read is None or "callback" in text:
            return lowered.compile(compiler_options=options)
        digest = hashlib.sha256(text.encode()).hexdigest()
        own = tuple(self.devices), tuple((options or {}).items()), str(lowered.in_avals)
        key = digest, lowered.in_tree, lowered.out_tree, tuple(sorted(read)), own
        return _cached(key, lambda: lowered.compile(compiler_options=options))[0]

    def prepare(self) -> None:
        """Compile all three programs, side by side, before their arguments are there."""
        inputs, seeds, states = self._shapes()
        step = np.int32(1)
        wanted = {
            "chunk": (self._chunk, (inputs, states, step, step, step)),
            "start": (self._start, (inputs, seeds)),
            "finish": (self._finish, (inputs, states, step)),
        }
        lowered = {}
        for name, (program, args) in wanted.items():
            key = (name, *self._key(args))
            if key in _CACHE:
                self._take(name, key, None)
            else:
                lowered[name] = key, self._lower(program, *args)
        if not lowered:
            return
        with ThreadPoolExecutor(len(lowered)) as pool:
            jobs = {
                name: pool.submit(self._compile, low, name) for name, (_, low) in lowered.items()
            }
            for name, job in jobs.items():
                self._take(name, lowered[name][0], job.result)

    def _lower(self, program: Callable[..., Any], *args: Any) -> Any:
        if program == self._chunk and self._chunk_lowered is not None:
            return self._chunk_lowered
        return self._jitted(program, len(args)).lower(self.data, *args)

    def _jitted(self, program: Callable[..., Any], count: int) -> Any:
        """Compile a program of the data and so many arguments, the first two laid over the runs."""
        if self.mesh is None:
            return jax.jit(program)
        over, whole = PartitionSpec("run"), PartitionSpec()
        function = jax.shard_map(
            program,
            mesh=self.mesh,
            in_specs=(whole, over, over, *(whole for _ in range(count - 2))),
            out_specs=over,
            check_vma=False,
        )
        return jax.jit(function)

    def _lowered(self) -> Any:
        """Lower the chunk for arguments of which only the shapes are known."""
        if self._chunk_lowered is None:
            inputs, _, states = self._shapes()
            self._chunk_lowered = self._lower(self._chunk, inputs, states, *[np.int32(1)] * 3)
        return self._chunk_lowered

    def _shapes(self) -> tuple[PyTree, PyTree, PyTree]:
        """Return inputs, seeds and runs of a batch as shapes, laid over the devices."""
        batch = self.layout.batch
        over = self.put(np.zeros(batch, np.int32)).sharding
        empty = self.put(np.zeros((batch, 0), np.int32)).sharding

        def leaf(kind: Any) -> Any:
            shape = (batch, *kind.shape)
            return jax.ShapeDtypeStruct(shape, kind.dtype, sharding=empty if 0 in shape else over)

        return jax.tree.map(leaf, (*self.inputs_like, self.plain_like))

    def _start(self, data: Data, inputs: Inputs, seeds: Array) -> PyTree:
        def chunk(inputs: Inputs, seeds: Array) -> SweptRun:
            return _vectorised(swept_run.start, self.spec, data, inputs, self.layout.vmap_chunk)(
                seeds
            )

        return swept_run.plain(_by_chunks(chunk, self.layout.vmap_chunk, inputs, seeds))

    def _chunk(
        self, data: Data, inputs: Inputs, states: PyTree, step: Array, records: Array, every: Array
    ) -> Any:
        chunk = functools.partial(_advance_chunk, self.spec, data, step, records, every)
        states = swept_run.typed(states, self.like)
        states, values = _by_chunks(chunk, self.layout.vmap_chunk, inputs, states)
        return swept_run.plain(states), values

    def _finish(self, data: Data, inputs: Inputs, states: PyTree, step: Array) -> Any:
        def chunk(inputs: Inputs, states: SweptRun) -> Any:
            one = _vectorised(swept_run.finish, self.spec, data, inputs, self.layout.vmap_chunk)
            return one(states, step)

        return _by_chunks(chunk, self.layout.vmap_chunk, inputs, swept_run.typed(states, self.like))


_CACHE: dict[Any, Any] = {}
_ROOM = 128
_LOCK = threading.Lock()  # programs are compiled side by side


def _cached(key: Any, make: Callable[[], Any] | None) -> tuple[Any, float]:
    """Return a compiled program and the seconds it took; keep it for the next sweep.

    The one that was used longest ago goes first.
    """
    with _LOCK:
        found = _CACHE.pop(key, None)
    if found is None:
        if make is None:
            raise KeyError(key)
        begin = time.perf_counter()
        made = make()
        found = made, time.perf_counter() - begin
    with _LOCK:
        _CACHE[key] = found
        if len(_CACHE) > _ROOM:
            _CACHE.pop(next(iter(_CACHE)))
    return found


def forget() -> None:
    """Drop the compiled programs of this process."""
    _CACHE.clear()
