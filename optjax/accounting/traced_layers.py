"""The layers of a traced program: which operations belong together, and the kind of each."""

import sys
from collections import Counter
from functools import cached_property
from typing import NamedTuple

import sympy

from optjax.accounting.counts import (
    DATA,
    ELEMENTWISE,
    PRODUCTS,
    REDUCE,
    WINDOWS,
    Count,
    Limits,
    count,
    size,
)
from optjax.accounting.operations import Dim, Op, Program, Shape


class Row(NamedTuple):
    """One layer; see `Accounting` for the columns."""

    name: str
    kind: str
    output: Shape  # of one example
    weights: Dim = 0
    biases: Dim = 0
    outputs: Dim = 0
    connections: Dim = 0
    connections_exact: Dim = 0
    multiply_adds: Dim = 0
    flops: Dim = 0
    activation_bytes: Dim = 0


class Table(NamedTuple):
    """The layers of a program."""

    rows: list[Row]
    ops: list[list[Op]]  # of each row
    uncounted: list[str]  # primitives, and parameters that nothing reads


class Layout:
    """The layers of a forward program of one example, told apart by the values they read.

    A *main* operation (product, pool, upsampling, lookup) makes a layer of its own; all else
    (activations, normalisations, sums) joins the layer of its module, or stands by itself where
    its module has several.
    """

    def __init__(self, program: Program, parameters: list[str], states: list[str]) -> None:
        """Index a program that takes parameters, state (both named by paths) and an input."""
        self.program = program
        self.parameters = dict(zip(program.ins, parameters, strict=False))
        self.names = dict(zip(program.ins, [*parameters, *states], strict=False))
        self.input = set(program.ins[len(self.names) :])
        self.readers: dict[int, list[Op]] = {}
        for op in program.ops:
            for v in {v for v in op.ins if v is not None}:
                self.readers.setdefault(v, []).append(op)
        # The parameters and state that each value is made of, where the input does not reach it.
        self.origins: dict[int, frozenset[int]] = {
            v: frozenset({v} if v in self.names else ()) for v in program.ins
        }
        self.reached = set(self.input)
        for op in program.ops:
            if any(v in self.reached for v in op.ins):
                self.reached.update(op.outs)
                continue
            made_of = frozenset().union(*(self.origins.get(v, ()) for v in op.ins if v is not None))
            self.origins.update(dict.fromkeys(op.outs, made_of))

    @cached_property
    def kinds(self) -> dict[int, str]:
        """The kind of each main operation, by its identity."""
        return {id(op): kind for op in self.program.ops if (kind := self._kind(op))}

    def _kind(self, op: Op) -> str | None:
        """Return the kind of a main operation; None for any other."""
        ins = [v for v in op.ins if v is not None]
        if not any(v in self.reached for v in ins):
            return None
        if op.primitive in PRODUCTS:
            if any(self._weighs(v) for v in ins):
                if op.primitive == "dot_general":
                    return "dense"
                up = any(d != 1 for d in op.params["lhs_dilation"])
                return "transposed conv" if up else "conv"
            return "product" if all(v in self.reached for v in ins) else "fixed weights"
        if op.primitive == "gather":
            if self._weighs(ins[0]):
                return "lookup"
            return "upsample" if self._grows(op) and not self._grows_on(op) else None
        if op.primitive in WINDOWS:
            return "pool"
        if op.primitive in REDUCE and not self._normalises(op):
            return "pool" if self.size(op.outs[0]) != self.size(ins[0]) else None
        if op.primitive == "broadcast_in_dim" and self._upsamples(op):
            return "upsample"
        return None

    def size(self, value: int) -> Dim:
        """Return the number of elements of a value."""
        return size(self.program.shapes[value])

    def _weighs(self, value: int) -> bool:
        """Return whether a value is made of parameters and not of the input."""
        return value not in self.reached and not self.origins[value].isdisjoint(self.parameters)

    def _grows(self, op: Op) -> bool:
        """Return whether an operation's result is larger than its operand."""
        return _more(self.size(op.outs[0]), self.size(op.ins[0]))  # type: ignore[arg-type]

    def _grows_on(self, op: Op) -> bool:
        """Return whether a gather's only reader gathers again (a resize, an axis at a time)."""
        readers = self.readers.get(op.outs[0], [])
        return len(readers) == 1 and readers[0].primitive == "gather" and self._grows(readers[0])

    def _normalises(self, op: Op) -> bool:
        """Return whether a reduction's result is broadcast back to values of its operand's size.

        So are the sums of a softmax or of a layer's normalisation, unlike those of a pool.
        """
        whole, seen, ahead = self.size(op.ins[0]), set(op.outs), list(op.outs)  # type: ignore[arg-type]
        while ahead:
            for reader in self.readers.get(ahead.pop(), ()):
                if reader.primitive == "broadcast_in_dim" and self._upsamples(reader):
                    continue
                if reader.primitive in ELEMENTWISE | {"integer_pow", "clamp"}:
                    others = [v for v in reader.ins if v in self.reached and v not in seen]
                    if any(self.size(v) == whole for v in others):
                        return True
                elif reader.primitive not in DATA:
                    continue
                fresh = [v for v in reader.outs if v not in seen]
                seen.update(fresh)
                ahead.extend(fresh)
        return False

    def _upsamples(self, op: Op) -> bool:
        """Return whether a broadcast's copies end up in a row (a reshape merges their axis)."""
        if not self._grows(op):
            return False
        value = op.outs[0]
        while True:
            readers = self.readers.get(value, [])
            if len(readers) != 1 or readers[0].primitive not in ("reshape", "transpose", "copy"):
                return False
            after = readers[0].outs[0]
            if readers[0].primitive == "reshape":
                before, merged = self.program.shapes[value], self.program.shapes[after]
                # Copies along the last axis repeat channels, as a normalisation by groups does.
                return len(merged) < len(before) and merged[-1] == before[-1]
            value = after

    @cached_property
    def layers(self) -> list[tuple[str, str, list[Op]]]:
        """The (name, kind, operations) of each layer; parameter arithmetic joins its module."""
        paths = {op.path for op in self.program.ops}
        inner = {path[:depth] for path in paths for depth in range(len(path))}
        root = 1 if len({path[:1] for path in paths if path}) == 1 else 0
        mains = self.kinds
        of_path = Counter(op.path for op in self.program.ops if id(op) in mains)
        groups: dict[tuple, list[Op]] = {}
        run, turn, previous, module = 0, 0, None, ""
        for op in self.program.ops:
            if op.path != previous:
                run, turn, previous, module = run + 1, 0, op.path, ""
            whole = op.path not in inner and bool(op.path)
            if whole and of_path[op.path] <= 1:
                key = (op.path, "")  # a module and all its operations, wherever they are
            elif whole:
                # Operations before the first main one of a call join it.
                turn += id(op) in mains
                key = (op.path, run, max(turn, 1))
            else:
                # In the parent of several modules; where a program names no modules (NNX), the
                # parameters' paths do.
                turn += id(op) in mains
                module = self._module(op) or ("" if op.function or id(op) in mains else module)
                if op.path or not module:
                    module = "" if op.path else module
                    label = "" if id(op) in mains else op.function or "elementwise"
                    key = (op.path, run, turn, label)
                else:
                    key = (op.path, module)
            groups.setdefault(key, []).append(op)
        layers = []
        for key, ops in groups.items():
            main = next((op for op in ops if id(op) in mains), None)
            kind = mains[id(main)] if main else "elementwise"
            names = key[0][root:]
            if key[0] in inner or not names:
                given = key[-1] if isinstance(key[-1], str) else ""
                label = (main.function if main and key[0] else "") or given or kind
                names = (*names, label)
            layers.append(("/".join(names), kind, ops))
        return layers

    def _module(self, op: Op) -> str:
        """Return the module of an operation's parameters and state; empty if not exactly one."""
        used = {p for v in op.ins if v is not None for p in self._made_of(v)}
        modules = {self.names[p].rpartition("/")[0] for p in used}
        return modules.pop() if len(modules) == 1 else ""

    def _made_of(self, value: int) -> frozenset[int]:
        """Return the parameters and state that a value is made of."""
        return self.origins.get(value, frozenset()) if value not in self.reached else frozenset()

    def rows(self, limits: Limits) -> Table:
        """Make the table of layers; collect in `limits` the least values for which it holds."""
        shapes, used, rows, kept, uncounted = self.program.shapes, set(), [], [], []
        for name, kind, ops in self.layers:
            total, weights, biases, outputs = Count(), 0, 0, 0
            result: int | None = None
            for op in ops:
                made_of = {p for v in op.ins if v is not None for p in self._made_of(v)}
                parameters = made_of & set(self.parameters)
                if not any(v in self.reached for v in op.ins):
                    if not made_of:
                        continue  # a constant
                    if op.primitive in PRODUCTS:
                        uncounted.append(f"{op.primitive} of parameters alone")
                        continue
                main = self.kinds.get(id(op))
                found = count(op, shapes, limits)
                if found is None:
                    uncounted.append(op.primitive)
                    found = Count()
                if main:
                    outputs += op.times * self.size(op.outs[0])
                    if main == "upsample":
                        found = Count(self.size(op.outs[0]), self.size(op.outs[0]))
                else:
                    found = Count(flops=found.flops)
                total = Count(*(a + op.times * b for a, b in zip(total, found, strict=True)))
                if op.primitive != "loop_carry" and any(v in self.reached for v in op.ins):
                    result = op.outs[0]
                    fresh = sum(self.size(p) for p in parameters - used)
                    if main:
                        weights += fresh
                    else:
                        biases += fresh
                    used |= parameters
            if result is None or not (any(total) or weights or biases or outputs):
                continue
            kept.append(ops)
            held = self.size(result) * self.program.itemsizes[result]
            rows.append(Row(name, kind, shapes[result][1:], weights, biases, outputs, *total, held))
        idle = [path for value, path in self.parameters.items() if value not in used]
        uncounted += [f"parameter {path} (not read)" for path in idle]
        return Table(_numbered(rows), kept, uncounted)


def _more(a: Dim, b: Dim) -> bool:
    """Return whether a > b, for large values of the symbols."""
    difference = sympy.sympify(a - b)
    return bool(difference.subs(dict.fromkeys(difference.free_symbols, sys.maxsize)) > 0)


def _numbered(rows: list[Row]) -> list[Row]:
    """Tell rows of one name apart as Flax does modules: max_pool_0, max_pool_1."""
    again, turn = Counter(row.name for row in rows), Counter()
    out = []
    for row in rows:
        if again[row.name] > 1:
            out.append(row._replace(name=f"{row.name}_{turn[row.name]}"))
            turn[row.name] += 1
        else:
            out.append(row)
    return out
