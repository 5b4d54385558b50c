"""Sweeps that nobody gave a folder are kept in one while a larger work is under way."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_FOLDERS: ContextVar[Iterator[Path] | None] = ContextVar("folders of sweeps", default=None)


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Keep every sweep and tuning of a block, also without `out`, in the order of the calls.

    A block that is entered again with the same folder, and makes the same calls, goes on from where
    it was; a call that differs from the one kept starts over.

    Args:
      folder: for the sweeps' own folders; whoever enters the block removes it in the end.
    """
    token = _FOLDERS.set(folder / f"{i:03d}" for i in itertools.count())
    try:
        yield
    finally:
        _FOLDERS.reset(token)


def next_folder() -> Path | None:
    """Return the folder of the next sweep, where sweeps are kept."""
    folders = _FOLDERS.get()
    return None if folders is None else next(folders)
