"""The weights, outputs, connections and operations of a network, in numbers or in symbols."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
import sympy
from jax.typing import DTypeLike

from optjax.accounting import counts
from optjax.accounting.memory import peak_bytes
from optjax.accounting.operations import Dim, Program, Shape, symbol
from optjax.accounting.polynomials import latex, text
from optjax.accounting.traced_layers import Row
from optjax.accounting.tracing import name_of, trace
from optjax.support.errors import UserError

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


@dataclasses.dataclass(frozen=True)
class Accounting:
    """The cost of a network, by layer and in total; ints, or sympy expressions in symbols.

    Counts are of one example, forward, in evaluation mode. With k = taps:

    - ``weights``: entries of parameters that a convolution, a dot product or a lookup reads;
      ``biases``: all other parameters (biases, and the scales and shifts of a normalisation).
    - ``outputs``: values that convolutions, dot products, pools and upsamplings give. Activations,
      normalisations, sums and concatenations give none of their own.
    - ``connections``: the source's convention. One per term of each product, so that every output
      of a convolution has k·C_in and every input of a transposed one k·C_out, taps on padding
      included; one per input of a pool, one per output of an upsampling. ``connections_exact``
      leaves out taps on padding or outside the output.
    - ``multiply_adds``: the connections of products, without multiplications by an inserted zero.
    - ``flops``: 2 per multiply-add, 1 per elementwise operation (a comparison, a root or an
      exponential too), 1 per value that a pool or a sum takes in.
    - ``activation_bytes``: each layer's result, once.

    Operations on parameters alone (a weight normalisation, a hypernetwork) make no connections;
    their products count in ``training_flops`` only. Zeros that the program puts into the picture
    itself (`jnp.pad`, padding "CAUSAL") are part of the picture. A resize other than the nearest is
    a product with fixed weights, as in programs. Of the branches of a `cond` the longest counts.

    Attributes:
      rows: the layers, in order.
      name: of the model.
      input_shape: of one example.
      batch: examples of a training step.
      multiples: by symbol, the number that its value must be a multiple of.
      least: by symbol, the least value for which `connections_exact` holds.
      uncounted: parts of the program that were not counted.
      leaves: arrays that hold the parameters.
      step: traces a training step.
      substitutions: values of the traced symbols, to be put in one after the other.
    """

    rows: tuple[Row, ...]
    name: str
    input_shape: Shape
    batch: int
    multiples: Mapping[sympy.Symbol, int] = dataclasses.field(default_factory=dict)
    least: Mapping[sympy.Symbol, int] = dataclasses.field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    leaves: int = 0
    step: Callable[[], Program] | None = dataclasses.field(default=None, repr=False, compare=False)
    substitutions: tuple[Mapping[sympy.Symbol, Any], ...] = dataclasses.field(
        default=(), repr=False
    )

    def total(self, column: str) -> Dim:
        """Sum a column over the layers; `parameters` is weights + biases."""
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
    def _training_count(self) -> tuple[Dim, list[str]]:
        return _flops(self._training)

    @cached_property
    def training_flops(self) -> Dim:
        """FLOPs of a training step of `batch` examples: forward, and the parameters' gradient.

        Loss and optimiser are left out. Traced when first asked for.
        """
        return functools.reduce(_put, self.substitutions, self._training_count[0])

    @cached_property
    def training_bytes(self) -> int:
        """Most bytes alive at once in a training step of `batch` examples, with Adam's moments.

        In program order, each value until its last use, nothing fused: parameters, gradients, two
        further copies of the parameters, activations kept for the gradient, and temporary values.

        Raises:
          UserError: symbols are left; which moment needs most depends on them.
        """
        if self.substitutions or self.symbols:
            raise UserError("memory needs numbers: account for the model at one size")
        step = self._training
        held = sum(counts.size(step.shapes[v]) * step.itemsizes[v] for v in step.ins[: self.leaves])
        return peak_bytes(step) + 2 * held

    @cached_property
    def training_uncounted(self) -> tuple[str, ...]:
        """Operations of the training step that were not counted (besides `uncounted`)."""
        return tuple(dict.fromkeys(self._training_count[1]))

    @cached_property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The symbols in the counts, by name."""
        found = {*self.multiples, *self.least}
        for value in (*self.input_shape, *map(self.total, COLUMNS)):
            found |= sympy.sympify(value).free_symbols
        return tuple(sorted(found, key=str))

    def at(self, **values: int) -> "Accounting":
        """Substitute numbers for some of the symbols.

        Raises:
          UserError: a name is no symbol here, or a value is too small or not the required multiple.
        """
        known = {str(s): s for s in self.symbols}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"no symbol {name!r}: expected {', '.join(known) or 'none'}")
            multiple = self.multiples.get(known[name], 1)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or value < 1 or value % multiple:
                raise UserError(f"{name} is {value!r}: expected a positive multiple of {multiple}")
            least = self.least.get(known[name], 1)
            if value < least:
                raise UserError(
                    f"{name} is {value}: the formulas hold from {least} on; account for the "
                    "model at that size instead"
                )
        put = {known[name]: int(value) for name, value in values.items()}

        return dataclasses.replace(
            self,
            rows=tuple(_mapped(row, lambda value: _put(value, put)) for row in self.rows),
            input_shape=tuple(_put(n, put) for n in self.input_shape),
            substitutions=(*self.substitutions, put),
            multiples={s: m for s, m in self.multiples.items() if s not in put},
            least={s: m for s, m in self.least.items() if s not in put},
        )

    def text(self, column: str) -> str:
        """Format a total as text: ``9·NIC·NF + 36·NF² + ...``."""
        return text(self.total(column), self._sizes())

    def latex(self, column: str) -> str:
        """Format a total in LaTeX."""
        return latex(self.total(column), self._sizes())

    def function(self, column: str) -> Callable[..., Any]:
        """Compile a total to a function of keyword arguments, one per symbol; arrays broadcast."""
        names = [str(s) for s in self.symbols]
        compute = sympy.lambdify(self.symbols, self.total(column), "numpy")

        def total(**values: Any) -> Any:
            if set(values) != set(names):
                raise UserError(f"got {sorted(values)}: expected {', '.join(names) or 'nothing'}")
            return compute(*(values[name] for name in names))

        return total

    def _sizes(self) -> list[sympy.Symbol]:
        """Return the symbols of the picture's size, by which polynomials are collected."""
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
    """Count the weights, outputs, connections, operations and memory of any Flax model.

    The counts are read off the traced program, not off a list of known layers: convolutions with
    any stride, dilation and groups, transposed ones, dense layers and dot products, pools,
    upsamplings, lookups, attention. No parameter is allocated.

    Args:
      model: a Linen module, or a function of `nnx.Rngs` that makes an NNX module. With `widths`, a
        function (a Linen or NNX class, say) that makes one from the widths.
      input_shape: of one example, as (height, width, channels). A name makes a symbol of that
        length, and the counts expressions in it.
      batch: examples of a training step.
      dtype: of the input.
      widths: constructor arguments of `model`; names make symbols (of Linen models; the
        initialisers that NNX runs refuse symbols with jax 0.12).

    Raises:
      UserError: a shape, symbol or model that will not do. Where a stride does not divide a size,
        the message names the layer.

    >>> import flax.linen as nn
    >>> net = account(lambda NF: nn.Conv(NF, (3, 3)), ("H", "W", 3), NF="NF")
    >>> net.text("weights"), net.text("connections"), net.at(H=8, W=8, NF=2).connections
    ('27·NF', 'H·W·(27·NF)', 3456)
    """
    lattice, (forward, layout, step) = trace(model, input_shape, batch, dtype, widths)
    names = [n for n in (*input_shape, *widths.values()) if isinstance(n, str)]
    limits: counts.Limits = {}
    rows, _, uncounted = layout.rows(limits)
    back = {symbol(n): lattice.back(symbol(n)) for n in lattice.names}
    return Accounting(
        rows=tuple(_mapped(row, lambda value: _put(value, back)) for row in rows),
        name=name_of(model),
        input_shape=tuple(symbol(n) if isinstance(n, str) else n for n in input_shape),
        batch=batch,
        multiples={symbol(n): lattice.multiple for n in lattice.names if lattice.multiple > 1},
        least={s: least for s in map(symbol, names) if (least := lattice.least(s, limits)) > 1},
        uncounted=tuple(dict.fromkeys([*uncounted, *sorted(forward.endless)])),
        leaves=len(layout.parameters),
        step=step,
        substitutions=(back,) if back else (),
    )


def _put(value: Any, substitution: Mapping[sympy.Symbol, Any]) -> Any:
    """Substitute symbols in a value."""
    return _tidy(sympy.sympify(value).subs(substitution, simultaneous=True))


def _mapped(row: Row, change: Callable[[Any], Any]) -> Row:
    """Apply a function to the counts and the output shape of a row."""
    counted = {column: change(getattr(row, column)) for column in COLUMNS}
    return row._replace(output=tuple(map(change, row.output)), **counted)


def _flops(program: Program) -> tuple[Dim, list[str]]:
    """Sum the FLOPs of all operations that depend on an argument; list those not counted."""
    alive, total, uncounted = set(program.ins), 0, []
    for op in program.ops:
        if not any(v in alive for v in op.ins):
            continue
        alive.update(op.outs)
        found = counts.count(op, program.shapes, gradient=True)
        if found is None:
            uncounted.append(op.primitive)
        else:
            total = total + op.times * found.flops
    return _tidy(total), uncounted


def _tidy(value: Any) -> Dim:
    """Convert a value to an int where it is whole, and expand it where it has symbols."""
    value = sympy.sympify(value)
    if value.is_Integer:
        return int(value)
    return sympy.expand(value) if value.free_symbols else value
