"""How many weights, outputs, connections and operations a network has: in numbers or in symbols."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import sympy
from jax import export
from jax.typing import DTypeLike

from optjax.convnets import counts
from optjax.convnets.layout import Layout, Row
from optjax.convnets.memory import peak_bytes
from optjax.convnets.polynomials import latex, text
from optjax.convnets.program import Dim, Program, Shape, flatten, symbol
from optjax.errors import UserError
from optjax.networks import boundary

COLUMNS = (
    "weights",
    "biases",
    "outputs",
    "connections",
    "connections_exact",
    "multiply_adds",
    "flops",
    "activation_bytes",
)
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 3, 6, 12, 24, 5, 10, 20)


@dataclasses.dataclass(frozen=True)
class Accounting:
    """What a network costs, by layer and in all; ints, or sympy expressions in symbols.

    Counts are of one example, forward, in evaluation mode. With o = outputs, k = taps:

    - ``weights``: entries of parameters that a convolution, a dot product or a lookup reads;
      ``biases``: all other parameters (biases, and the scales and shifts of a normalisation).
    - ``outputs``: values that convolutions, dot products, pools and upsamplings give. Activations,
      normalisations, sums and concatenations give none of their own.
    - ``connections``: the source's convention. One a term of each product, so that every output of
      a convolution has k·C_in of them and every input of a transposed one k·C_out, taps on padding
      included; one an input of a pool, one an output of an upsampling.
      ``connections_exact`` leaves out what falls on padding or outside the output.
    - ``multiply_adds``: the connections of products, no multiplication by an inserted zero.
    - ``flops``: 2 a multiply-add, 1 an elementwise operation (a comparison, a root or an
      exponential too), 1 a value that a pool or a sum takes in.
    - ``activation_bytes``: each layer's result, once.

    Attributes:
      rows: the layers, in order. name: of the model. input_shape: of one example.
      batch: examples of a training step.
      multiples: a symbol → what its value has to be a multiple of.
      least: a symbol → its least value for which `connections_exact` holds.
      uncounted: what of the program was not counted.
    """

    rows: tuple[Row, ...]
    name: str
    input_shape: Shape
    batch: int
    multiples: Mapping[sympy.Symbol, int] = dataclasses.field(default_factory=dict)
    least: Mapping[sympy.Symbol, int] = dataclasses.field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    step: Callable[[], Program] | None = dataclasses.field(default=None, repr=False, compare=False)
    substitution: Mapping[sympy.Symbol, Any] = dataclasses.field(default_factory=dict, repr=False)

    def total(self, column: str) -> Dim:
        """The sum of a column over the layers; `parameters` is weights + biases."""
        if column == "parameters":
            return _tidy(self.total("weights") + self.total("biases"))
        if column == "training_flops":
            return self.training_flops
        if column not in COLUMNS:
            raise UserError(f"no count {column!r}: expected one of {', '.join(COLUMNS)}")
        return _tidy(sum(getattr(row, column) for row in self.rows))

    weights = property(lambda self: self.total("weights"))
    biases = property(lambda self: self.total("biases"))
    parameters = property(lambda self: self.total("parameters"))
    outputs = property(lambda self: self.total("outputs"))
    connections = property(lambda self: self.total("connections"))
    connections_exact = property(lambda self: self.total("connections_exact"))
    multiply_adds = property(lambda self: self.total("multiply_adds"))
    flops = property(lambda self: self.total("flops"))
    activation_bytes = property(lambda self: self.total("activation_bytes"))

    @cached_property
    def _training(self) -> Program:
        if self.step is None:
            raise UserError("this account has no training step")
        return self.step()

    @cached_property
    def training_flops(self) -> Dim:
        """Of one training step of `batch` examples: forward, and the gradient by the parameters.

        Loss and optimiser are left out. Traced when first asked for.
        """
        return _put(_flops(self._training)[0], self.substitution)

    @cached_property
    def training_bytes(self) -> int:
        """The most alive at once in a training step of `batch` examples; with Adam's moments.

        In program order, each value until its last use, nothing fused: parameters, gradients, two
        further copies of the parameters, activations kept for the gradient and what is at work.

        Raises:
          UserError: symbols are left; which moment needs most depends on them.
        """
        if self.substitution or self.symbols:
            raise UserError("memory needs numbers: account for the model at one size")
        parameters = sum(row.weights + row.biases for row in self.rows)
        itemsize = self._training.itemsizes[self._training.ins[0]] if parameters else 0
        return peak_bytes(self._training) + 2 * parameters * itemsize

    @cached_property
    def training_uncounted(self) -> tuple[str, ...]:
        """What of the training step is in no count (besides `uncounted`)."""
        return tuple(dict.fromkeys(_flops(self._training)[1]))

    @cached_property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The symbols that the counts are in, by name."""
        found = {*self.multiples, *self.least}
        for value in (*self.input_shape, *map(self.total, COLUMNS)):
            found |= sympy.sympify(value).free_symbols
        return tuple(sorted(found, key=str))

    def at(self, **values: int) -> "Accounting":
        """The same account with numbers (or other symbols) for some of the symbols.

        Raises:
          UserError: a name that is no symbol of this account, or a value that is too small or not
            the multiple it has to be.
        """
        known = {str(s): s for s in self.symbols}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"no symbol {name!r}: expected {', '.join(known) or 'none'}")
            multiple = self.multiples.get(known[name], 1)
            if not isinstance(value, int) or value < 1 or value % multiple:
                raise UserError(f"{name} is {value!r}: expected a positive multiple of {multiple}")
            least = self.least.get(known[name], 1)
            if value < least:
                raise UserError(
                    f"{name} is {value}: the formulas hold from {least} on; account for the "
                    "model at that size instead"
                )
        put = {known[name]: value for name, value in values.items()}

        return dataclasses.replace(
            self,
            rows=tuple(_mapped(row, lambda value: _put(value, put)) for row in self.rows),
            input_shape=tuple(_put(n, put) for n in self.input_shape),
            substitution={
                **{s: _put(value, put) for s, value in self.substitution.items()},
                **{s: value for s, value in put.items() if s not in self.substitution},
            },
            multiples={s: m for s, m in self.multiples.items() if s not in put},
            least={s: m for s, m in self.least.items() if s not in put},
        )

    def text(self, column: str) -> str:
        """A total as text: ``9·NIC·NF + 36·NF² + ...``."""
        return text(self.total(column), self._sizes())

    def latex(self, column: str) -> str:
        """A total in LaTeX."""
        return latex(self.total(column), self._sizes())

    def function(self, column: str) -> Callable[..., Any]:
        """A total as a function of keyword arguments, one a symbol; arrays broadcast."""
        names = [str(s) for s in self.symbols]
        compute = sympy.lambdify(self.symbols, self.total(column), "numpy")

        def total(**values: Any) -> Any:
            if set(values) != set(names):
                raise UserError(f"got {sorted(values)}: expected {', '.join(names) or 'nothing'}")
            return compute(*(values[name] for name in names))

        return total

    def _sizes(self) -> list[sympy.Symbol]:
        """The symbols of the picture's size, which polynomials are collected by."""
        spatial = [sympy.sympify(n).free_symbols for n in self.input_shape[:-1]]
        return sorted(set().union(*spatial), key=str)


def account(
    model: Any,
    input_shape: tuple[int | str, ...],
    *,
    batch: int = 1,
    dtype: DTypeLike = jnp.float32,
    **widths: int | str,
) -> Accounting:
    """Weights, outputs, connections, operations and memory of any Flax model.

    They are read off the traced program, not off a list of known layers: convolutions with any
    stride, dilation and groups, transposed ones, dense layers and dot products, pools,
    upsamplings, lookups, attention. No parameter is allocated.

    Args:
      model: a Linen module, or a function of `nnx.Rngs` that builds an NNX one. With `widths`, a
        function (a Linen or NNX class, say) that makes one of the widths.
      input_shape: of one example, as (height, width, channels). A name makes a symbol of that
        length, and the counts expressions in it.
      batch: examples of a training step.
      dtype: of the input.
      widths: constructor arguments of `model`; names make symbols.

    Raises:
      UserError: a shape, symbol or model that will not do. A size that a stride does not divide
        names the layer.

    >>> import flax.linen as nn
    >>> net = account(lambda NF: nn.Conv(NF, (3, 3)), ("H", "W", 3), NF="NF")
    >>> net.text("weights"), net.text("connections"), net.at(H=8, W=8, NF=2).connections
    ('27·NF', 'H·W·(27·NF)', 3456)
    """
    _check_shape(input_shape, batch)
    names = list(dict.fromkeys(n for n in (*input_shape, *widths.values()) if isinstance(n, str)))
    sizes = [n for n in names if n in (input_shape[:-1] or input_shape)]
    dims: dict[Any, Any] = _symbols(names)
    given: dict[str, Any] = dict(widths)

    def traced(lattice: _Lattice) -> _Traced:
        placed: dict[Any, Any] = {n: lattice.place(n, dim) for n, dim in dims.items()}
        build = _builder(model, {k: placed.get(v, v) for k, v in given.items()}, bool(given))
        return _trace(build, tuple(placed.get(n, n) for n in input_shape), batch, dtype)

    lattice, program = _whole(traced, sizes, names)
    forward, layout, step = program
    limits: counts.Limits = {}
    rows, uncounted = layout.rows(limits)
    back = {symbol(n): lattice.back(symbol(n)) for n in lattice.names}
    return Accounting(
        rows=tuple(_mapped(row, lambda value: _put(value, back)) for row in rows),
        name=_name(model),
        input_shape=tuple(symbol(n) if isinstance(n, str) else n for n in input_shape),
        batch=batch,
        multiples={symbol(n): lattice.multiple for n in lattice.names if lattice.multiple > 1},
        least={s: least for s in map(symbol, names) if (least := lattice.least(s, limits)) > 1},
        uncounted=tuple(dict.fromkeys([*uncounted, *sorted(forward.names)])),
        step=step,
        substitution=back,
    )


class _Traced(NamedTuple):
    forward: Program  # of one example
    layout: Layout
    step: Callable[[], Program]  # of a training step


class _Lattice(NamedTuple):
    """The sizes that a program is traced for: n = multiple · (h + offset), h = 1, 2, ...

    JAX's own symbol of that name stands for h.
    """

    names: list[str]  # of the symbols that are so placed; the others are themselves
    multiple: int
    offset: int

    def place(self, name: str, dim: Any) -> Any:
        return self.multiple * (dim + self.offset) if name in self.names else dim

    def back(self, n: sympy.Symbol) -> Any:
        return n / self.multiple - self.offset

    def least(self, n: sympy.Symbol, limits: counts.Limits) -> int:
        least = limits.get(n, 1)
        if str(n) not in self.names:
            return least
        return self.multiple * (least + self.offset) if least + self.offset > 1 else 1


def _whole(
    traced: Callable[[_Lattice], _Traced], sizes: list[str], names: list[str]
) -> tuple[_Lattice, _Traced]:
    """The first lattice of sizes on which no layer rounds a length, and the program there.

    First multiples of the picture's size, then of the widths too, then from a size on that leaves
    something of the picture behind layers that do not pad. Where every one rounds somewhere, the
    first that traces; the counts then hold ⌊ ⌋.
    """
    lattices = [_Lattice([], 1, 0)]
    for scaled, offset in ((sizes, 0), (sizes, 2), (names, 0), (names, 2)):
        if scaled and (scaled is sizes or scaled != sizes):
            lattices += [_Lattice(scaled, m, offset) for m in _MULTIPLES]
    refused, rounded = None, None
    for lattice in lattices:
        try:
            program = traced(lattice)
        except UserError as error:
            refused = error
            continue
        if not _rounded(program.forward):
            return lattice, program
        rounded = rounded or (lattice, program)
    if rounded is not None:
        return rounded
    raise refused or UserError("the model cannot be traced")


def _put(value: Any, substitution: Mapping[sympy.Symbol, Any]) -> Any:
    return _tidy(sympy.sympify(value).subs(substitution, simultaneous=True))


def _mapped(row: Row, change: Callable[[Any], Any]) -> Row:
    counted = {column: change(getattr(row, column)) for column in COLUMNS}
    return row._replace(output=tuple(map(change, row.output)), **counted)


def _check_shape(input_shape: tuple, batch: int) -> None:
    if not isinstance(input_shape, tuple) or not input_shape:
        raise UserError(f"input_shape is {input_shape!r}: expected a tuple such as (32, 32, 1)")
    for n in (*input_shape, batch):
        if isinstance(n, str):
            if not n.isidentifier():
                raise UserError(
                    f"a length is {n!r}: expected a whole number, or a name for a symbol"
                )
        elif not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise UserError(f"a length is {n!r}: expected a positive whole number or a name")


def _symbols(names: list[str]) -> dict[str, Any]:
    for name in names:
        if not name.isidentifier():
            raise UserError(f"symbol {name!r}: expected a name, such as NF; a number has no quotes")
    names = list(dict.fromkeys(names))
    if not names:
        return {}
    try:
        return dict(zip(names, export.symbolic_shape(", ".join(names)), strict=True))
    except ValueError as error:
        raise UserError(f"symbols {', '.join(names)}: {error}") from None


def _builder(model: Any, widths: dict[str, Any], make: bool) -> Any:
    """The model itself, of those widths."""
    if not make:
        if isinstance(model, type):
            return _no_arguments(model)
        return model
    from flax import nnx

    if isinstance(model, type) and issubclass(model, nnx.Module):
        nnx_class: Any = model
        return lambda rngs: nnx_class(**widths, rngs=rngs)
    if not callable(model):
        raise UserError(
            f"model is a {type(model).__name__} and widths are given: expected its class, or a "
            "function that makes it of them"
        )
    try:
        inspect.signature(model).bind(**widths)
    except TypeError as error:
        raise UserError(f"{_name(model)} is called with {', '.join(widths)}: {error}") from None
    return model(**widths)


def _no_arguments(model: Any) -> Any:
    from flax import linen, nnx

    kind: type = model
    if issubclass(kind, nnx.Module):
        return lambda rngs: model(rngs=rngs)
    if not issubclass(kind, linen.Module):
        raise UserError(f"{model.__name__} is no Flax module: expected one of Linen or NNX")
    try:
        return model()
    except TypeError as error:
        raise UserError(f"{model.__name__} wants arguments ({error}): give them by name") from None


def _name(model: Any) -> str:
    return getattr(model, "__name__", None) or type(model).__name__


def _trace(build: Any, shape: Shape, batch: int, dtype: DTypeLike) -> _Traced:
    """The forward program of one example, its layout, and how to trace a training step."""
    net = boundary(build)
    key = jax.eval_shape(lambda: jax.random.key(0))
    one, many = (jax.ShapeDtypeStruct((b, *shape), dtype) for b in (1, batch))
    with _naming_layer():
        params, state = jax.eval_shape(net.init, key, one)
        closed, out = jax.make_jaxpr(
            lambda p, s, x: net.apply(p, s, x, train=False)[0], return_shape=True
        )(params, state, one)
        forward = flatten(closed)
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
        ]
        layout = Layout(forward, paths, len(jax.tree.leaves(state)))

    def training() -> Program:
        cotangent = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), out
        )

        def step(p: Any, s: Any, x: Any, ct: Any, k: Any) -> Any:
            def apply(p: Any) -> Any:
                return net.apply(p, s, x, train=True, mask=None, key=k)

            _, vjp, state = jax.vjp(apply, p, has_aux=True)
            return vjp(ct), state

        with _naming_layer():
            return flatten(jax.make_jaxpr(step)(params, state, many, cotangent, key))

    return _Traced(forward, layout, training)


@contextlib.contextmanager
def _naming_layer() -> Iterator[None]:
    """Errors of the model as one line that names the innermost Linen layer they rose in."""
    from flax import linen

    layers: list[str] = []

    def watch(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception:
            layers.append("/".join(context.module.path) or type(context.module).__name__)
            raise

    try:
        with linen.intercept_methods(watch):
            yield
    except Exception as error:
        where = f"layer {layers[0]}: " if layers else ""
        line = " ".join(str(error).split())
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(where + kind + (line[:300] + "…" if len(line) > 300 else line)) from error


def _rounded(program: Program) -> bool:
    """Whether a length of the program is a quotient rounded down."""
    return any(
        isinstance(n, sympy.Expr) and n.has(sympy.floor, sympy.Max, sympy.Min)
        for shape in program.shapes
        for n in shape
    )


def _flops(program: Program) -> tuple[Dim, list[str]]:
    """FLOPs of all that depends on an argument, and what was not counted."""
    alive, total, uncounted = set(program.ins), 0, []
    for op in program.ops:
        if not any(v in alive for v in op.ins):
            continue
        alive.update(op.outs)
        found = counts.count(op, program.shapes)
        if found is None:
            uncounted.append(op.primitive)
        else:
            total = total + op.times * found.flops
    return _tidy(total), uncounted


def _tidy(value: Any) -> Dim:
    value = sympy.sympify(value)
    if value.is_Integer:
        return int(value)
    return sympy.expand(value) if value.free_symbols else value
