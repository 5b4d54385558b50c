"""The traced program of a Flax model, at a shape in numbers or symbols."""

import contextlib
import functools
import inspect
import keyword
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import sympy
from jax import export
from jax.typing import DTypeLike

from optjax.accounting.counts import Limits
from optjax.accounting.operations import Program, Shape, flatten
from optjax.accounting.traced_layers import Layout
from optjax.run.flax_models import boundary
from optjax.support.errors import UserError, nearest
from optjax.support.keys import make_key

_LARGEST = 4096
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 3, 6, 12, 24, 5, 10, 20)


class Traced(NamedTuple):
    """The programs of a model."""

    forward: Program  # of one example
    layout: Layout
    step: Callable[[], Program]  # of a training step


class Lattice(NamedTuple):
    """The sizes that a program is traced for: n = multiple · (h + offset), h = 1, 2, ...

    JAX's own symbol of that name stands for h.
    """

    names: tuple[str, ...]  # symbols placed on the lattice; the others are left as they are
    multiple: int
    offset: int

    def place(self, name: str, dim: Any) -> Any:
        """Return the size that stands for `dim` of a name."""
        return self.multiple * (dim + self.offset) if name in self.names else dim

    def back(self, n: sympy.Symbol) -> Any:
        """Return h for the size n."""
        return n / self.multiple - self.offset

    def least(self, n: sympy.Symbol, limits: Limits) -> int:
        """Return the least size of a symbol for which formulas hold, from the least h."""
        least = limits.get(n, 1)
        if str(n) not in self.names:
            return least
        return self.multiple * (least + self.offset) if least + self.offset > 1 else 1


def _whole(
    traced: Callable[[Lattice], Traced], sizes: list[str], names: list[str]
) -> tuple[Lattice, Traced]:
    """Find the first lattice of sizes on which no layer rounds a length, and its program.

    Multiples of the picture's size come first, then of the widths, then of both; each from 1 on,
    then from a size that leaves something of the picture behind layers that do not pad. After those
    come multiples by the divisors of the lengths that were rounded. Where every program rounds
    somewhere, the first that traces is taken; its counts hold ⌊ ⌋.
    """
    widths = [n for n in names if n not in sizes]
    groups = [sizes, widths, names] if sizes and widths else [names]
    ahead = [Lattice((), 1, 0)] + [
        Lattice(tuple(group), multiple, offset)
        for group in filter(None, groups)
        for offset in (0, 2)
        for multiple in _MULTIPLES
    ]
    tried: set[Lattice] = set()
    refused, rounded = None, None
    while ahead:
        lattice = ahead.pop(0)
        if lattice in tried:
            continue
        tried.add(lattice)
        try:
            program = traced(lattice)
        except UserError as error:
            refused = refused or error
            continue
        divisor, of = _rounding(program.forward)
        if not of:
            return lattice, program
        rounded = rounded or (lattice, program)
        if lattice.multiple * divisor <= _LARGEST:
            named = lattice.names or tuple(n for n in names if n in of)
            ahead += [Lattice(named, lattice.multiple * divisor, offset) for offset in (0, 2)]
    if rounded is not None:
        return rounded
    raise refused or UserError("the model cannot be traced")


def trace(
    model: Any,
    input_shape: tuple[int | str, ...],
    batch: int = 1,
    dtype: DTypeLike = jnp.float32,
    widths: Mapping[str, int | str] | None = None,
) -> tuple[Lattice, Traced]:
    """Trace the programs of `model` on one example, and find the sizes that they stand for.

    The arguments are those of `optjax.accounting.account.account`.

    Raises:
      UserError: a shape, symbol or model that will not do.
    """
    _check_shape(input_shape, batch)
    given: dict[str, Any] = dict(widths or {})
    names = list(dict.fromkeys(n for n in (*input_shape, *given.values()) if isinstance(n, str)))
    sizes = [n for n in names if n in (input_shape[:-1] or input_shape)]
    dims: dict[Any, Any] = _symbols(names)

    def traced(lattice: Lattice) -> Traced:
        placed: dict[Any, Any] = {n: lattice.place(n, dim) for n, dim in dims.items()}
        build = built(model, {k: placed.get(v, v) for k, v in given.items()})
        return _trace(build, tuple(placed.get(n, n) for n in input_shape), batch, dtype)

    return _whole(traced, sizes, names)


def _check_shape(input_shape: tuple, batch: int) -> None:
    """Check the shape of an example and the batch size."""
    if not isinstance(input_shape, tuple) or not input_shape:
        raise UserError(f"input_shape is {input_shape!r}: expected a tuple such as (32, 32, 1)")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise UserError(f"batch is {batch!r}: expected a positive whole number")
    for n in input_shape:
        if not isinstance(n, str) and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise UserError(f"a length is {n!r}: expected a positive whole number or a name")


def _symbols(names: list[str]) -> dict[str, Any]:
    """Make JAX's symbolic lengths of some names."""
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(f"symbol {name!r}: expected a name, such as NF; a number has no quotes")
    if not names:
        return {}
    try:
        return dict(zip(names, export.symbolic_shape(", ".join(names)), strict=True))
    except ValueError as error:
        raise UserError(f"symbols {', '.join(names)}: {error}") from None


def built(model: Any, widths: Mapping[str, Any]) -> Any:
    """Build the model of constructor arguments: a Linen module, or a function of `nnx.Rngs`."""
    from flax import linen, nnx

    if not widths and not isinstance(model, type):
        return model
    if isinstance(model, linen.Module | nnx.Module) or not callable(model):
        raise UserError(
            f"model is a {type(model).__name__} and widths are given: expected its class, or a "
            "function that makes it from them"
        )
    if isinstance(model, type) and not issubclass(model, linen.Module | nnx.Module):
        raise UserError(f"{model.__name__} is no Flax module: expected one of Linen or NNX")
    _check_arguments(model, widths)
    if isinstance(model, type) and issubclass(model, nnx.Module):
        nnx_class: Any = model
        return lambda rngs: nnx_class(**widths, rngs=rngs)
    return model(**widths)


def _check_arguments(model: Any, widths: Mapping[str, Any]) -> None:
    """Check widths against the arguments of a constructor."""
    bound = model.__init__ if isinstance(model, type) else model
    taken = list(inspect.signature(bound).parameters.values())[isinstance(model, type) :]
    named = [p for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [
        p.name for p in named if p.default is p.empty and p.name not in widths and p.name != "rngs"
    ]
    if missing:
        raise UserError(
            f"{name_of(model)} wants arguments: {', '.join(missing)}; give them by name"
        )
    known = [p.name for p in named]
    for name in widths:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in taken):
            raise UserError(f"{name_of(model)} takes no {name!r}; {nearest(name, known)}")


def name_of(model: Any) -> str:
    """Return a model's name in messages: its class, or the function that makes it."""
    return getattr(model, "__name__", None) or type(model).__name__


def _trace(build: Any, shape: Shape, batch: int, dtype: DTypeLike) -> Traced:
    """Trace one example forward; return the program, its layout and a training step."""
    net = boundary(build)
    key = jax.eval_shape(lambda: make_key(0))
    one, many = (jax.ShapeDtypeStruct((b, *shape), dtype) for b in (1, batch))
    with _naming_layer(), _shapes_only():
        params, state = jax.eval_shape(net.init, key, one)
        closed = jax.make_jaxpr(lambda p, s, x: net.apply(p, s, x, train=False)[0])(
            params, state, one
        )
        forward = flatten(closed)
        layout = Layout(forward, _paths(params), _paths(state))

    @functools.cache  # an account at other sizes has the same step
    def training() -> Program:
        def step(p: Any, s: Any, x: Any, ct: Any, k: Any) -> Any:
            def apply(p: Any) -> Any:
                return net.apply(p, s, x, train=True, mask=None, key=k)

            _, vjp, state = jax.vjp(apply, p, has_aux=True)
            return vjp(ct), state

        with _naming_layer(), _shapes_only():
            cotangent = jax.eval_shape(
                lambda p, s, x, k: net.apply(p, s, x, train=True, mask=None, key=k)[0],
                *(params, state, many, key),
            )
            return flatten(jax.make_jaxpr(step)(params, state, many, cotangent, key))

    return Traced(forward, layout, training)


@contextlib.contextmanager
def _shapes_only() -> Iterator[None]:
    """Make Linen parameters of symbolic shape zeros where their initialiser fails.

    Initialisers compute with their sizes (a fan-in in a square root, a comparison with 0), which
    symbols do not allow everywhere; only the shape of a parameter is needed here.
    """
    from flax import linen

    original = linen.Module.param

    def param(self: Any, name: str, init_fn: Callable, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        shape = next(filter(_symbolic, given), None)
        if shape is None:
            return original(self, name, init_fn, *args, **kwargs)
        dtype = next((a for a in given if a is not shape and _is_dtype(a)), jnp.float32)
        unbox = {k: v for k, v in kwargs.items() if k == "unbox"}
        rest = {k: v for k, v in kwargs.items() if k != "unbox"}

        def init(key: Any) -> Any:
            try:
                return init_fn(key, *args, **rest)
            except Exception:
                return jnp.zeros(shape, dtype)

        return original(self, name, init, **unbox)

    linen.Module.param = param
    try:
        yield
    finally:
        linen.Module.param = original


def _symbolic(shape: Any) -> bool:
    """Return whether a value is a shape with a symbol."""
    return isinstance(shape, tuple | list) and any(export.is_symbolic_dim(n) for n in shape)


def _is_dtype(value: Any) -> bool:
    """Return whether a value is a dtype."""
    try:
        return jnp.dtype(value) is not None
    except TypeError:
        return False


def _paths(tree: Any) -> list[str]:
    """Return the path of each leaf of a tree."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


@contextlib.contextmanager
def _naming_layer() -> Iterator[None]:
    """Raise errors of the model as one line that names the innermost Linen layer."""
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


def _rounding(program: Program) -> tuple[int, set[str]]:
    """Return the divisor of a program's rounded lengths, and the symbols in them."""
    rounded: set[Any] = {
        part
        for shape in program.shapes
        for n in shape
        if isinstance(n, sympy.Expr)
        for part in n.atoms(sympy.floor, sympy.Max, sympy.Min)
    }
    divisors = [part.args[0].as_numer_denom()[1] for part in rounded if part.func is sympy.floor]
    divisor = math.lcm(*(int(d) for d in divisors if d.is_Integer))
    return divisor, {str(x) for part in rounded for x in part.free_symbols}
