"""The points that a sweep visits: a product of axes, axes zipped, a list, or a sample of ranges.

Every grid comes to the same thing: named columns of P values each, and the axes by which the P
results are laid out.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from optjax.run.piecewise import Piecewise
from optjax.support.errors import UserError, nearest, whole
from optjax.support.files import plainly


class _Absent:
    """The value of a hyperparameter that a point does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclasses.dataclass(frozen=True)
class Grid:
    """P points: one value a point for every name, and how the points lie on axes.

    Attributes:
      columns: name → P values.
      axes: name of an axis → its length, P their product; a product grid has an axis a name,
        the others the one axis ``point``.
    """

    columns: Mapping[str, Sequence[Any]]
    axes: Mapping[str, int]

    def __len__(self) -> int:
        return math.prod(self.axes.values())

    def point(self, index: int) -> dict[str, Any]:
        """Return the values of one point; a name that it lacks is left out."""
        values = {name: column[index] for name, column in self.columns.items()}
        return {name: value for name, value in values.items() if value is not ABSENT}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A value that is no number and no name (an array, a schedule, a tree), by its place."""

    value: Any
    name: str


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A range to draw from, low to high, uniform or uniform in the logarithm."""

    low: float
    high: float
    log: bool
    whole: bool = False

    def at(self, u: np.ndarray) -> np.ndarray:
        """Return the values at u in [0, 1): low + u(high − low), or low (high / low)ᵘ."""
        if self.log:
            values = self.low * (self.high / self.low) ** u
        else:
            values = self.low + u * (self.high - self.low)
        return np.rint(values).astype(int) if self.whole else values


def uniform(low: float, high: float, *, whole: bool = False) -> Uniform:
    """Describe a range for `sample`, uniform from low to high; `whole` rounds to whole numbers.

    Raises:
      UserError: no finite low below high.

    >>> uniform(0, 8, whole=True).at(np.array([0.0, 0.55])).tolist()
    [0, 4]
    """
    numbers = all(isinstance(x, int | float | np.number) for x in (low, high))
    if not (numbers and math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"range from {low} to {high}: expected finite numbers, the first smaller")
    return Uniform(float(low), float(high), False, whole)


def loguniform(low: float, high: float, *, whole: bool = False) -> Uniform:
    """Describe a range for `sample`, uniform in the logarithm; `whole` rounds to whole numbers.

    Raises:
      UserError: no finite low above 0 and below high.

    >>> loguniform(1e-4, 1e-1).at(np.array([0.0, 0.5])).round(5).tolist()
    [0.0001, 0.00316]
    """
    drawn = uniform(low, high, whole=whole)
    if low <= 0:
        raise UserError(f"range from {low} on a log scale: expected a start above 0; or uniform")
    return dataclasses.replace(drawn, log=True)


def product(axes: Mapping[str, Any]) -> Grid:
    """Combine the values of all axes, as `sweep` does with a plain dict.

    A single number is held fixed: it has no axis.

    Raises:
      UserError: an axis is empty or repeats a value.

    >>> grid = product({"learning_rate": [0.1, 0.2], "batch_size": [1, 4, 8]})
    >>> len(grid), grid.point(4)
    (6, {'learning_rate': 0.2, 'batch_size': 4})
    """
    fixed = {name: _axis(name, [v])[0] for name, v in axes.items() if _is_number(v)}
    values = {name: _axis(name, v) for name, v in axes.items() if name not in fixed}
    for name, axis in values.items():
        _no_repeats(name, axis)
    lengths = {name: len(axis) for name, axis in values.items()}
    count = math.prod(lengths.values())
    places = np.indices(tuple(lengths.values())).reshape(len(values), count)
    columns = {
        name: [axis[i] for i in where]
        for (name, axis), where in zip(values.items(), places, strict=True)
    }
    return Grid({name: columns.get(name) or [fixed[name]] * count for name in axes}, lengths)


def zip_grid(axes: Mapping[str, Any]) -> Grid:
    """Pair the first values of all axes, then the second, …; one axis, ``point``.

    >>> zip_grid({"learning_rate": [0.1, 0.2], "batch_size": [4, 8]}).point(1)
    {'learning_rate': 0.2, 'batch_size': 8}
    """
    many = {name: _axis(name, v) for name, v in axes.items() if not _is_number(v)}
    lengths = {name: len(column) for name, column in many.items()}
    count = next(iter(lengths.values()), 1)
    columns = {n: many[n] if n in many else _axis(n, [v]) * count for n, v in axes.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UserError(f"zipped axes differ in length: {said}; expected equal lengths")
    return _points(columns)


def points(rows: Iterable[Mapping[str, Any]]) -> Grid:
    """List points one by one; one axis, ``point``.

    A point may lack a name that others have (momentum, where the optimiser takes none).

    >>> len(points([{"learning_rate": 0.1}, {"learning_rate": 0.5}]))
    2
    """
    try:
        rows = [dict(row) for row in rows]
    except (TypeError, ValueError):
        raise UserError(f"points is {rows!r}: expected a list of dicts, name → value") from None
    if not rows:
        raise UserError("the list of points is empty: expected at least one row")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _points({name: _axis(name, [row.get(name, ABSENT) for row in rows]) for name in names})


def sample(
    count: int,
    ranges: Mapping[str, Any],
    *,
    method: Literal["sobol", "random"] = "sobol",
    seed: int = 0,
) -> Grid:
    """Draw points from ranges; one axis, ``point``.

    Args:
      count: P. ranges: name → `uniform` or `loguniform`, or a list to choose from.
      method: ``"sobol"``, a scrambled quasi-random sequence, whose first points are the same for
        every count; or ``"random"``, independent and uniform.
      seed: of the draw.

    >>> grid = sample(8, {"learning_rate": loguniform(1e-4, 1e-1), "batch_size": [8, 32]})
    >>> sorted(set(grid.columns["batch_size"]))
    [8, 32]

    Source: Bergstra and Bengio (2012); Owen (1998) for the scrambling (scipy.stats.qmc.Sobol).
    """
    count, seed = whole("count", count, 1), whole("seed", seed, 0)
    if not isinstance(ranges, Mapping) or not ranges:
        raise UserError(f"ranges is {ranges!r}: expected a dict, name → oj.uniform(low, high)")
    if method not in ("sobol", "random"):
        raise UserError(f"unknown method {method!r}: {nearest(str(method), ['sobol', 'random'])}")
    axes = {n: g if isinstance(g, Uniform) else _axis(n, g) for n, g in ranges.items()}
    drawn = 1 << (count - 1).bit_length()  # a power of two, as Sobol's sequence is balanced
    while True:
        u = _cube(method, drawn, len(axes), seed)
        columns = {
            name: _at(axis, part) for (name, axis), part in zip(axes.items(), u.T, strict=True)
        }
        # Whole numbers and lists repeat: only the first of equal points counts.
        places: dict[Any, int] = {}
        for i, row in enumerate(zip(*columns.values(), strict=True)):
            places.setdefault(tuple(map(label, row)), i)
        if len(places) >= count:
            first = list(places.values())[:count]
            return _points({name: [column[i] for i in first] for name, column in columns.items()})
        if drawn > 64 * count:
            raise UserError(
                f"count is {count}, and {drawn:,} draws gave {len(places)} different points: ask "
                "for fewer points, or give wider ranges"
            )
        drawn *= 2


def _at(axis: Uniform | list[Any], u: np.ndarray) -> list[Any]:
    """Return the values of a range or a list at u in [0, 1)."""
    if isinstance(axis, Uniform):
        return axis.at(u).tolist()
    return [axis[int(x * len(axis))] for x in u]


def _cube(method: str, count: int, dims: int, seed: int) -> np.ndarray:
    """Draw points of the unit cube, (count, dims); fewer are the first of more."""
    rng = np.random.default_rng(seed)
    if method == "random":
        return rng.random((count, dims))
    from scipy.stats import qmc

    return qmc.Sobol(dims, rng=rng).random(count)


def as_grid(given: Any) -> Grid:
    """Return a grid, or the product of a dict of axes; {} is the one empty point."""
    if isinstance(given, Grid):
        return given
    if isinstance(given, Mapping):
        return product(given)
    raise UserError(
        f"grid is a {type(given).__name__}: expected a dict of axes, or oj.zip_grid, oj.points, "
        "oj.sample"
    )


def _points(columns: Mapping[str, Sequence[Any]]) -> Grid:
    count = len(next(iter(columns.values()), [None]))
    seen: set[Any] = set()
    for row in zip(*columns.values(), strict=True):
        named = tuple(label(value) for value in row)
        if named in seen:
            said = ", ".join(f"{k} = {_said(v)}" for k, v in zip(columns, row, strict=True))
            raise UserError(f"the point {said} is given twice: expected each once, by its name")
        seen.add(named)
    return Grid(columns, {"point": count})


def _axis(name: str, given: Any) -> list[Any]:
    """Return the values of an axis as plain Python values."""
    if not isinstance(name, str) or name in ("seed", "step", "point"):
        raise UserError(f"an axis is named {name!r}: expected a hyperparameter's name")
    if isinstance(given, Uniform):
        raise UserError(f"{name} is a range: draw from it with oj.sample(count, {{...}})")
    if isinstance(given, str | bytes | Mapping) or callable(given):
        raise UserError(f"{name} is {given!r}: expected a list of values")
    try:
        rows = hasattr(given, "__array__") and np.ndim(given) == 1
        values = np.asarray(given).tolist() if rows else list(given)
    except TypeError:
        raise UserError(f"{name} is {given!r}: expected a list of values, [{given!r}]") from None
    if not isinstance(values, list) or not values:
        raise UserError(f"the axis {name} is empty: expected at least one value")
    values = [v.item() if hasattr(v, "__array__") and np.ndim(v) == 0 else v for v in values]
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} holds {value}: expected finite numbers")
        if isinstance(value, list | tuple):
            raise UserError(f"{name} holds {value!r}: expected one number or array a point")
    objects = [v for v in values if not isinstance(v, int | float | str | _Absent | None)]
    labels = [label(v) for v in objects]
    # Different functions of one name are told apart by their place.
    alike = {label(v) for v in objects if labels.count(label(v)) > 1}
    if len({id(v) for v in objects}) < len(objects):
        alike = set()  # one is given twice: refused by its name
    return [
        Labelled(v, str(i)) if _is_tree(v) or label(v) in alike else v for i, v in enumerate(values)
    ]


def _is_number(value: Any) -> bool:
    """Tell whether a value is one number; what a tuning has found is an array of no axes."""
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    return getattr(value, "ndim", None) == 0 and np.asarray(value).dtype.kind in "iuf"


def _is_tree(value: Any) -> bool:
    return isinstance(value, Mapping | Piecewise) or (
        hasattr(value, "__array__") and np.ndim(value) > 0
    )


def _no_repeats(name: str, axis: Sequence[Any]) -> None:
    seen: set[Any] = set()
    for value in axis:
        if label(value) in seen:
            raise UserError(
                f"{name} holds {_said(value)} twice: expected each value once, and functions by "
                "names of their own"
            )
        seen.add(label(value))


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else label(value)


def label(value: Any) -> Any:
    """Return a value as a coordinate: numbers and text as they are, others by their name.

    >>> label(0.1), label(math.sqrt), label(functools.partial(math.pow, 2))
    (0.1, 'sqrt', 'pow(2)')
    """
    if value is ABSENT:
        return ""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, functools.partial):
        given = [*map(str, map(label, value.args))]
        given += [f"{name}={label(v)}" for name, v in value.keywords.items()]
        return f"{label(value.func)}({', '.join(given)})"
    name = getattr(value, "__name__", None) or getattr(value, "name", None)
    return name if isinstance(name, str) else plainly(value)
