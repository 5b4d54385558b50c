"""What is known of every hypergradient of a sweep, and the dataset that it becomes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import psutil

from optjax.hypergradients.hypergradient import Hypergradient
from optjax.run.schedules import plain
from optjax.support.errors import UserError
from optjax.sweeps.book import Book, real
from optjax.sweeps.checks import RESERVED

if TYPE_CHECKING:
    import xarray


class _Kind(NamedTuple):
    """A variable of the dataset."""

    shape: tuple[int, ...]  # beside the axes of the sweep
    dtype: np.dtype
    of: str  # what its own axes are named after


class Results:
    """A book and, of its N runs, what a hypergradient knows."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.kinds: dict[str, _Kind] = {}

    def expect(self, found: Hypergradient) -> None:
        """Results of these shapes will come; the smaller of a name are filled up with NaN.

        Raises:
          UserError: results of one name have different numbers of axes.
        """
        for name, of, leaf in _variables(found):
            shape, dtype = leaf.shape[1:], real(np.empty(0, leaf.dtype), keep_whole=True).dtype
            old = self.kinds.get(name, _Kind(shape, dtype, of))
            if len(old.shape) != len(shape):
                raise UserError(
                    f"{name} has shapes {old.shape} and {shape} at different points: sweep them "
                    "apart"
                )
            shape = tuple(map(max, old.shape, shape))
            self.kinds[name] = _Kind(shape, np.promote_types(old.dtype, dtype), of)

    def begin(self) -> None:
        """Make room for all that is expected.

        Raises:
          UserError: there is none, or an axis has the name of a variable.
        """
        book, kinds = self.book, self.kinds
        for name in sorted(set(book.columns) & (kinds.keys() | RESERVED)):
            raise UserError(f"an axis is named {name!r}, which the dataset has already: rename it")
        needed = sum(len(book) * int(np.prod(k.shape)) * k.dtype.itemsize for k in kinds.values())
        free = psutil.virtual_memory().available
        if needed > free:
            raise UserError(
                f"the gradients of {len(book):,} runs take {needed / 1e9:.3g} GB and the memory "
                f"has {free / 1e9:.3g} GB free: sweep fewer points, or by fewer names (wrt)"
            )
        for name, kind in kinds.items():
            empty = np.nan if kind.dtype.kind == "f" else 0
            book.kept[name] = np.full((len(book), *kind.shape), empty, kind.dtype)

    def end(self, runs: np.ndarray, found: Hypergradient) -> None:
        """What was found for some runs; lanes that follow only filled their call up."""
        book, count = self.book, len(runs)
        for name, _, values in _variables(found):
            values = real(values[:count], keep_whole=True)
            book.kept[name][(runs, *map(slice, values.shape[1:]))] = values
        book.status[runs] = found.status[:count]
        book.diverged_at[runs] = found.diverged_at[:count]
        book.done[runs], book.judged[runs] = book.steps[runs], True

    def dataset(self) -> "xarray.Dataset":
        """Named axes: those of the grid, ``seed``, and ``NAME_index`` of what is no number."""
        found = self.book.dataset()[[*self.kinds, "status", "diverged_at"]]
        for name, kind in self.kinds.items():
            # One by one, since a gradient and its standard error share their axes.
            own = [f"{name}_{i}" for i in range(len(kind.shape))]
            ends = [f"_{i}" for i in range(len(own))] if len(own) > 1 else [""]
            axes = {axis: f"{kind.of}_index{end}" for axis, end in zip(own, ends, strict=False)}
            found[name] = found[name].rename(axes)
        return found


def _variables(found: Hypergradient) -> Iterator[tuple[str, str, Any]]:
    """(name, what its own axes are named after, (L, ...)) of all that a book lacks."""
    yield "value", "", found.value
    for first, tree in (("gradient", found.gradient), *found.aux.items()):
        tree = plain(tree)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            inner = jax.tree_util.keystr(path, simple=True, separator=".")
            yield f"{first}_{inner}" if inner else first, inner or first, leaf
    yield "finite", "", found.finite
