"""A model's traced program as one flat list of operations, its calls and loops inlined.

All accounting reads this list, so it is right for any model that JAX can trace.
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import sympy
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from optjax.convnets.device_forms import FORMS

Dim = Any
"""The length of one axis, or a count: an int, or a sympy expression in symbols."""

Shape = tuple[Dim, ...]


class Op(NamedTuple):
    """One primitive, applied `times` times."""

    primitive: str
    params: Mapping[str, Any]
    path: tuple[str, ...]  # the modules it is in, outermost first
    function: str  # the jitted function inside the innermost module, or ""
    ins: tuple[int | None, ...]  # values; None for a literal
    outs: tuple[int, ...]
    times: Dim


class Program(NamedTuple):
    """A flat program. Values are numbered; `shapes[v]` and `itemsizes[v]` describe value v."""

    ops: list[Op]
    ins: list[int]
    outs: list[int]
    shapes: list[Shape]
    itemsizes: list[int]
    endless: set[str]  # loops of an unknown number of turns


def flatten(closed: ClosedJaxpr) -> Program:
    """Flatten a jaxpr: calls inlined, a scan's body once with its number of turns.

    Of the branches of a `cond` the longest is taken; the body of a `while_loop` counts once and
    the loop is named in `Program.endless`.

    >>> import jax.numpy as jnp
    >>> program = flatten(jax.make_jaxpr(lambda x: jax.nn.relu(x) + 1.0)(jnp.ones((2, 3))))
    >>> [(op.primitive, op.function) for op in program.ops]
    [('max', 'relu'), ('add', '')]
    """
    builder = _Builder()
    jaxpr = closed.jaxpr
    ins = [builder.value(var.aval) for var in jaxpr.invars]
    constants = [builder.value(var.aval) for var in jaxpr.constvars]
    outs = builder.inline(jaxpr, constants + ins, (), "", 1)
    return Program(builder.ops, ins, outs, builder.shapes, builder.itemsizes, builder.endless)


_PRODUCTS = frozenset(("conv_general_dilated", "dot_general"))
_SHAPING = frozenset("convert_element_type reshape broadcast_in_dim transpose squeeze rev".split())


class _Builder:
    """A program under construction."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.shapes: list[Shape] = []
        self.itemsizes: list[int] = []
        self.endless: set[str] = set()
        self.fixed: set[int] = set()  # values that no input enters
        self.one_hot: set[int] = set()  # of them, those that compare positions: 0 and 1

    def value(self, aval: Any) -> int:
        """Add a value; return its number."""
        self.shapes.append(tuple(as_sympy(n) for n in getattr(aval, "shape", ())))
        dtype = getattr(aval, "dtype", None)
        # A key is two words of four bytes, which its dtype does not say.
        self.itemsizes.append(getattr(dtype, "itemsize", 0))
        return len(self.shapes) - 1

    def inline(
        self,
        jaxpr: Jaxpr,
        args: Sequence[int | None],
        path: tuple[str, ...],
        function: str,
        times: Dim,
    ) -> list[int]:
        """Append the jaxpr's operations; return the values of its results."""
        env: dict[Any, int | None] = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

        def read(atom: Any) -> int | None:
            return None if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            scope = str(eqn.source_info.name_stack)
            here = path + tuple(part for part in scope.split("/") if part)
            ins = [read(atom) for atom in eqn.invars]
            outs = self._equation(eqn, ins, here, function, times)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [self.value(v.aval) if (out := read(v)) is None else out for v in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list, path: tuple, function: str, times: Dim) -> list[int]:
        """Append an equation's operations; return the values of its results."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(eqn, ins, path, function, times)
        if name == "while":
            self.endless.add("while_loop (its number of turns is not in the program)")
            cond_n, body_n = params["cond_nconsts"], params["body_nconsts"]
            body, fixed = params["body_jaxpr"], ins[cond_n : cond_n + body_n]
            carry = self._carry(body, [*fixed, *ins[cond_n + body_n :]], body_n, path, times)
            test = params["cond_jaxpr"]
            self._call(test, ins[:cond_n] + carry, path, function, times)
            return self._call(body, fixed + carry, path, function, times)
        if name == "cond":
            longest = max(params["branches"], key=lambda branch: len(branch.jaxpr.eqns))
            return self._call(longest, ins[1:], path, function, times)
        if name in FORMS:
            form = partial(FORMS[name], window=params["window"])
            form = jax.vmap(form) if params["runs"] else form
            closed = jax.make_jaxpr(form)(*(var.aval for var in eqn.invars))
            return self._call(closed, ins, path, function, times)
        inner = [v for v in params.values() if isinstance(v, ClosedJaxpr | Jaxpr)]
        if len(inner) == 1 and len(_open(inner[0]).invars) == len(ins):
            label = params["name"] if name in ("jit", "pjit") else function
            return self._call(inner[0], ins, path, label or function, times)
        return self._append(name, params, path, function, ins, eqn.outvars, times)

    def _call(self, jaxpr: Any, ins: list, path: tuple, function: str, times: Dim) -> list[int]:
        """Append the operations of a jaxpr that is called with `ins`."""
        body = _open(jaxpr)
        constants = [self.value(var.aval) for var in body.constvars]
        return self.inline(body, constants + ins, path, function, times)

    def _append(self, name, params, path, function, ins, outvars, times) -> list[int]:
        """Append one operation; a product with a one-hot kernel as what it is, a rearrangement."""
        outs = [self.value(var.aval) for var in outvars]
        given = {v for v in ins if v is not None}
        if given <= self.fixed:
            self.fixed.update(outs)
            if name == "eq" or (name in _SHAPING and given and given <= self.one_hot):
                self.one_hot.update(outs)
        elif name in _PRODUCTS and given & self.one_hot:
            name = "rearrange"
        self.ops.append(Op(name, params, path, function, tuple(ins), tuple(outs), times))
        return outs

    def _scan(self, eqn: Any, ins: list, path: tuple, function: str, times: Dim) -> list[int]:
        """Append a scan's body once, with its number of turns."""
        params = eqn.params
        body, turns = _open(params["jaxpr"]), as_sympy(params["length"])

        def sliced_or_stacked(outside: Any, inside: Any) -> bool:
            return len(outside.aval.shape) != len(inside.aval.shape)

        # Constants and carry come first, then the sliced inputs: JAX 0.12 gives no counts.
        fixed = sum(not sliced_or_stacked(*v) for v in zip(eqn.invars, body.invars, strict=True))
        carried = sum(
            not sliced_or_stacked(*v) for v in zip(eqn.outvars, body.outvars, strict=True)
        )
        constants = fixed - carried
        sliced = [
            self._append("scan_slice", {}, path, function, [v], [var], times)[0]
            for v, var in zip(ins[fixed:], body.invars[fixed:], strict=True)
        ]
        into = [*ins[:fixed], *sliced]
        into[constants:fixed] = self._carry(params["jaxpr"], into, constants, path, times, carried)
        outs = self._call(params["jaxpr"], into, path, function, times * turns)
        stacked = [
            self._append("scan_stack", {}, path, function, [v], [var], times)[0]
            for v, var in zip(outs[carried:], eqn.outvars[carried:], strict=True)
        ]
        return outs[:carried] + stacked

    def _carry(
        self, jaxpr: Any, ins: list, first: int, path: tuple, times: Dim, many: int | None = None
    ) -> list[int]:
        """Append a loop's carry: made of its start and of all that the body adds to it."""
        body = _open(jaxpr)
        many = len(ins) - first if many is None else many
        sources = _loop_sources(body, first, many)
        return [
            self._append(
                "loop_carry",
                {},
                path,
                "",
                [ins[first + i], *(ins[j] for j in sorted(sources[i] - {first + i}))],
                [body.invars[first + i]],
                times,
            )[0]
            for i in range(many)
        ]


def _loop_sources(body: Jaxpr, first: int, many: int) -> list[set[int]]:
    """Return, for each carried value, the body's inputs (by index) that any turn makes it from."""
    made: dict[Any, set[int]] = {var: {i} for i, var in enumerate(body.invars)}

    def of(atom: Any) -> set[int]:
        return set() if isinstance(atom, Literal) else made.get(atom, set())

    for eqn in body.eqns:
        sources = set().union(*map(of, eqn.invars))
        made.update(dict.fromkeys(eqn.outvars, sources))
    found = [of(var) for var in body.outvars[:many]]
    for _ in range(many):
        found = [
            sources.union(*(found[i - first] for i in sources if first <= i < first + many))
            for sources in found
        ]
    return found


def _open(jaxpr: Any) -> Jaxpr:
    """Return the jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floordiv": lambda a, b: sympy.floor(a / b),
    "mod": lambda a, b: a - b * sympy.floor(a / b),
    "max": sympy.Max,
    "min": sympy.Min,
    "non_negative": lambda a: sympy.Max(a, 0),
}


def symbol(name: str) -> sympy.Symbol:
    """Make the sympy symbol of a length, a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


def as_sympy(dim: Any) -> Dim:
    """Convert a length of JAX to an int or a sympy expression.

    >>> from jax import export
    >>> n, = export.symbolic_shape("n")
    >>> as_sympy((4 * n + 3) // 2), as_sympy(7)
    (2*n + 1, 7)
    """
    if isinstance(dim, int):
        return dim
    value = _parse(ast.parse(str(dim), mode="eval").body)
    return int(value) if value.is_Integer else sympy.expand(value)


def _parse(node: ast.expr) -> Any:
    """Convert a parsed length to sympy."""
    match node:
        case ast.Constant(value=int(number)):
            return sympy.Integer(number)
        case ast.Name(id=name):
            return symbol(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_parse(left), _parse(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parse(operand)
        case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_parse, args))
    raise ValueError(f"a length that JAX writes as {ast.unparse(node)!r} is not understood")
