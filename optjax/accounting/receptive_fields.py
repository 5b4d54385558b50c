"""The part of the picture that each layer sees: receptive field, effective stride and offset."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optjax.accounting.counts import ELEMENTWISE, REDUCE, WINDOWS
from optjax.accounting.intervals import IDENTITY, Reach, repeated, union, windowed
from optjax.accounting.operations import Op
from optjax.accounting.traced_layers import Layout
from optjax.accounting.tracing import built, trace
from optjax.run.flax_models import boundary
from optjax.support.errors import UserError
from optjax.support.keys import make_key
from optjax.support.machine import quick_jit


class Field(NamedTuple):
    """The receptive field of a layer's outputs."""

    name: str
    kind: str
    output: tuple[int, ...]
    axes: tuple[Reach | None, ...]  # of each axis of the picture; None: the whole axis, or unknown


def receptive_fields(
    model: Any, input_shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> list[Field]:
    """Compute the receptive field of every layer from the traced program.

    r = last − first + 1 pixels; through a window of k taps, stride s and dilation d over inputs of
    effective stride S, r ← r + (k − 1)·d·S and S ← S·s; an upsampling by f takes S to S/f. After
    upsamplings the field differs between outputs; it is kept for a period of P outputs.

    Args:
      model: a Linen module or class, or a function of `nnx.Rngs` that makes an NNX module.
      input_shape: of one example, (height, width, channels), in numbers.
      dtype: of the input.

    Raises:
      UserError: input_shape holds a name, or the model cannot be traced.

    >>> import flax.linen as nn
    >>> net = nn.Sequential([nn.Conv(4, (3, 3), strides=2, padding=1), nn.Conv(4, (3, 3))])
    >>> [field.axes[0].size for field in receptive_fields(net, (32, 32, 1))]
    [3, 7]

    Source: Araujo, Norris and Sim (2019), for convolutions.
    """
    if any(isinstance(n, str) for n in input_shape):
        raise UserError(f"input_shape is {input_shape}: a receptive field needs numbers")
    _, (_, layout, _) = trace(model, input_shape, dtype=dtype)
    views = Propagation(layout, len(input_shape) - 1).views
    rows, operations, _ = layout.rows({})
    fields = []
    for row, ops in zip(rows, operations, strict=True):
        result = [op.outs[0] for op in ops if op.outs and op.outs[0] in layout.reached][-1]
        reaches = tuple(view.reach if view else None for view in views[result])
        fields.append(Field(row.name, row.kind, row.output, reaches))
    return fields


class View(NamedTuple):
    """The array axes that index one axis of the picture, major first, and their reach."""

    dims: tuple[int, ...]
    reach: Reach


Views = tuple[View | None, ...]
"""One view per axis of the picture; None where the value sees the whole axis."""


class Propagation:
    """The views of all values of a program, from its input's on."""

    def __init__(self, layout: Layout, axes: int) -> None:
        self.shapes, self.axes = layout.program.shapes, axes
        self.nothing: Views = (None,) * axes
        self.views: dict[int, Views] = {
            v: tuple(View((1 + axis,), IDENTITY) for axis in range(axes)) for v in layout.input
        }
        for op in layout.program.ops:
            if any(v in self.views for v in op.ins):
                self.views.update(dict.fromkeys(op.outs, self.through(op)))

    def through(self, op: Op) -> Views:
        """Return the views of the operation's results."""
        seen = [self.views.get(v) if v is not None else None for v in op.ins]
        name, params = op.primitive, op.params
        first = seen[0] or self.nothing
        if name in _MOVES and seen[0]:
            where = _MOVES[name](self, op)
            return tuple(view and _moved(view, where) for view in first)
        if name == "reshape":
            return tuple(view and self._reshaped(view, op) for view in first)
        if name == "conv_general_dilated" and seen[0] and not seen[1]:
            return tuple(view and self._convolved(view, op) for view in first)
        if name in REDUCE:
            return tuple(view and self._reduced(view, params["axes"], op) for view in first)
        if name == "dot_general":
            return self._product(seen, params["dimension_numbers"], op)
        if name in _SLIDES and seen[0]:
            of = _SLIDES[name](params)
            return tuple(view and of and _slid(view, of) for view in first)
        if name == "concatenate":
            return tuple(
                None if view and params["dimension"] in view.dims else view
                for view in self._together(op, seen)
            )
        if name in ELEMENTWISE or name in ("select_n", "clamp", "integer_pow", *_SAME):
            return self._together(op, seen)
        return self.nothing

    def shape(self, value: int | None) -> tuple[int, ...]:
        """Return the shape of a value; () for a literal."""
        return () if value is None else self.shapes[value]

    def _together(self, op: Op, seen: list[Views | None]) -> Views:
        """Unite the views of operands of one shape, or broadcast to it along axes of length 1."""
        shape, out = self.shapes[op.outs[0]], []
        for axis in range(self.axes):
            views = [views[axis] for views in seen if views is not None]
            merged = views[0]
            for view in views[1:]:
                if merged is None or view is None or merged.dims != view.dims:
                    merged = None
                    break
                reach = union(merged.reach, view.reach)
                merged = reach and View(merged.dims, reach)
            for v, views_of in zip(op.ins, seen, strict=True):
                view = views_of[axis] if views_of else None
                if view and any(self.shape(v)[d] != shape[d] for d in view.dims):
                    merged = None
            out.append(merged)
        return tuple(out)

    def _convolved(self, view: View, op: Op) -> View | None:
        """Pass a view through a convolution; None if its axis is not one that slides."""
        params, spec = op.params, op.params["dimension_numbers"]
        kernel = self.shape(op.ins[1])
        if len(view.dims) != 1 or view.dims[0] not in spec.lhs_spec[2:]:
            return None
        axis = spec.lhs_spec[2:].index(view.dims[0])
        reach = windowed(
            view.reach,
            kernel[spec.rhs_spec[2:][axis]],
            params["window_strides"][axis],
            params["padding"][axis][0],
            params["rhs_dilation"][axis],
            params["lhs_dilation"][axis],
        )
        return View((spec.out_spec[2:][axis],), reach)

    def _reduced(self, view: View, axes: tuple[int, ...], op: Op) -> View | None:
        """Pass a view through a reduction; None unless only its minor axes are reduced."""
        shape = self.shape(op.ins[0])
        kept = [d for d in view.dims if d not in axes]
        lost = view.dims[len(kept) :]
        if not kept or tuple(kept) != view.dims[: len(kept)]:
            return None
        times = math.prod(shape[d] for d in lost)
        reach = windowed(view.reach, times, times) if times > 1 else view.reach
        return View(tuple(d - sum(a < d for a in axes) for d in kept), reach)

    def _product(self, seen: list[Views | None], numbers: Any, op: Op) -> Views:
        """Pass views through a dot product; None where they are contracted or differ."""
        (contracted, batched), out = numbers, []
        free = [
            [d for d in range(len(self.shape(v))) if d not in (*contracted[i], *batched[i])]
            for i, v in enumerate(op.ins)
        ]
        ahead = (len(batched[0]), len(batched[0]) + len(free[0]))
        for axis in range(self.axes):
            views: list[View | None] = []
            for i, of in enumerate(seen):
                if of is None:
                    continue
                view, place = of[axis], {}
                place |= {d: j for j, d in enumerate(batched[i])}
                place |= {d: ahead[i] + j for j, d in enumerate(free[i])}
                known = view and all(d in place for d in view.dims)
                views.append(
                    View(tuple(place[d] for d in view.dims), view.reach) if view and known else None
                )
            one = len(views) == 1 or (len(views) == 2 and views[0] == views[1])
            out.append(views[0] if one else None)
        return tuple(out)

    def _reshaped(self, view: View, op: Op) -> View | None:
        """Pass a view through a reshape; None where its axes are mixed with others."""
        before, after = self.shape(op.ins[0]), self.shape(op.outs[0])
        dims, reach = list(view.dims), view.reach
        for old, new in _blocks(before, after):
            mine = [d for d in old if d in dims]
            if not mine:
                continue
            extra = [d for d in old if d not in dims and before[d] != 1]
            mine = [d for d in mine if before[d] != 1] or mine[:1]
            if not extra:
                at = dims.index(mine[0])
                if dims[at : at + len(mine)] != mine:
                    return None
                new = [d for d in new if after[d] != 1] or new[:1]
                dims[at : at + len(mine)] = [-1 - d for d in new]  # marked as done
            elif len(new) == 1 and old.index(extra[0]) > old.index(mine[-1]) and dims == mine:
                reach = repeated(reach, math.prod(before[d] for d in extra))
                dims = [-1 - new[0]]
            else:
                return None
        return View(tuple(-1 - d if d < 0 else d for d in dims), reach)


_SAME = ("convert_element_type", "stop_gradient", "copy", "reduce_precision", "name")


def _blocks(before: tuple, after: tuple) -> list[tuple[list[int], list[int]]]:
    """Match the axes of two shapes in the shortest groups that hold the same elements."""
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        a, b = (math.prod(s[d] for d in ds) for s, ds in ((before, old), (after, new)))
        i, j = i + len(old), j + len(new)
        while a != b:
            if a < b:
                old.append(i)
                a, i = a * before[i], i + 1
            else:
                new.append(j)
                b, j = b * after[j], j + 1
        blocks.append((old, new))
    return blocks


def _moved(view: View, where: Callable[[int], int | None]) -> View | None:
    """Renumber the axes of a view; None if one is lost."""
    dims = [where(d) for d in view.dims]
    kept = tuple(d for d in dims if d is not None)
    return View(kept, view.reach) if len(kept) == len(dims) else None


class AxisWindow(NamedTuple):
    """The window of an operation along one axis; by default it does not slide."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    up: int = 1


def _slid(view: View, of: Callable[[int], AxisWindow]) -> View | None:
    """Pass a view through windows along its axes."""
    if len(view.dims) == 1:
        return View(view.dims, windowed(view.reach, *of(view.dims[0])))
    # Where several axes index a position, none of them may slide.
    return view if all(of(d) == AxisWindow() for d in view.dims) else None


def _pool(params: Any) -> Callable[[int], AxisWindow]:
    ones = (1,) * len(params["window_dimensions"])
    kernel, stride = params["window_dimensions"], params["window_strides"]
    dilation = params.get("window_dilation", ones)
    up = params.get("base_dilation", ones)
    return lambda d: AxisWindow(kernel[d], stride[d], params["padding"][d][0], dilation[d], up[d])


def _slice(params: Any) -> Callable[[int], AxisWindow]:
    start, strides = (
        params["start_indices"],
        params["strides"] or (1,) * len(params["start_indices"]),
    )
    return lambda d: AxisWindow(stride=strides[d], padding=-start[d])


def _pad(params: Any) -> Callable[[int], AxisWindow] | None:
    edges = params["padding_config"]
    if any(inside for *_, inside in edges):
        return None
    return lambda d: AxisWindow(padding=edges[d][0])


_SLIDES = {"slice": _slice, "pad": _pad, **dict.fromkeys(WINDOWS, _pool)}
"""By primitive, a function of its params that gives the window of each axis; None where unknown."""


def _squeezed(propagation: Propagation, op: Op) -> Any:
    gone = op.params["dimensions"]
    return lambda d: None if d in gone else d - sum(g < d for g in gone)


def _broadcast(propagation: Propagation, op: Op) -> Any:
    to = op.params["broadcast_dimensions"]
    before, after = propagation.shape(op.ins[0]), propagation.shape(op.outs[0])
    return lambda d: to[d] if after[to[d]] == before[d] else None


def _transposed(propagation: Propagation, op: Op) -> Any:
    return op.params["permutation"].index


_MOVES = {"squeeze": _squeezed, "broadcast_in_dim": _broadcast, "transpose": _transposed}
"""By primitive, a function that maps each axis to its new place; None where positions are lost."""


def measured_field(
    model: Any,
    input_shape: tuple[int, ...],
    position: tuple[int, ...],
    *,
    samples: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Find the pixels that a network's output at `position` depends on, by its gradient.

    Weights and pictures are random; a pixel counts where the gradient of the sum of that output's
    channels is nonzero in at least one draw (a maximum passes its gradient to one input).

    Args:
      model: as in `receptive_fields`.
      input_shape: of one example, (height, width, channels), in numbers.
      position: of the output, an index for each axis of the picture.
      samples: draws.
      seed: of the draws.

    Returns:
      (height, width) bool.

    Raises:
      UserError: position does not have an index for each axis of the picture.

    >>> import flax.linen as nn
    >>> measured_field(nn.Conv(4, (3, 3)), (8, 8, 1), (0, 4)).sum(0).tolist()  # cut by the border
    [0, 0, 0, 2, 2, 2, 0, 0]
    """
    if len(position) != len(input_shape) - 1:
        raise UserError(f"position is {position}: expected an index for each axis of the picture")
    keys = jax.random.split(make_key(seed), samples)
    gradient = _gradient(built(model, {}), input_shape)
    found = gradient(keys, tuple(jnp.int32(p) for p in position))
    return np.asarray(jnp.any(found != 0, axis=(0, -1)))


@functools.lru_cache(maxsize=8)
def _gradient(model: Any, input_shape: tuple[int, ...]) -> Callable:
    """Return (keys, position) ↦ the gradients of that output by the picture, one per key."""
    net = boundary(model)

    def one(key: jax.Array, position: tuple[jax.Array, ...]) -> jax.Array:
        of_weights, of_picture = jax.random.split(key)
        picture = jax.random.uniform(of_picture, (1, *input_shape), jnp.float32)
        params, state = net.init(of_weights, picture)
        # Positive weights: no unit is off and nothing cancels.
        params = jax.tree.map(lambda leaf: jnp.abs(leaf) + jnp.asarray(0.01, leaf.dtype), params)

        def output(x: jax.Array) -> jax.Array:
            return jnp.sum(net.apply(params, state, x, train=False)[0][(0, *position)])

        return jax.grad(output)(picture)[0]

    return quick_jit(lambda keys, position: jax.lax.map(lambda key: one(key, position), keys))
