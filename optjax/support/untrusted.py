"""Files from anywhere: CSV tables and .npz archives, read as if they were hostile.

Sizes and shapes are checked before anything is allocated; nothing is evaluated, unpickled or
extracted to disk.
"""

import csv
import math
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from optjax.support.errors import UserError, one_line

MAX_BYTES = 64 << 20  # of a CSV file
ARRAY_LIMIT_BYTES = 4 * 2**30
"""The most that the arrays of one .npz file may declare in total."""
BOMB_RATIO = 200
BOMB_FLOOR_BYTES = 64 * 2**20
"""A member larger than the floor that packs better than the ratio is refused as a zip bomb."""

Check = Callable[[str, tuple[int, ...], np.dtype], None]


def csv_lines(path: Path) -> tuple[Iterator[tuple[int, list[str]]], str]:
    """Read a CSV's lines that are not blank, numbered; and the comma, semicolon or tab it has most.

    Raises:
      UserError: no UTF-8 text of at most 64 MiB; as it is iterated, a line that is no CSV.
    """
    text = _text(path)
    parted = max(",;\t", key=text.partition("\n")[0].count)
    return _rows(str(path), text, parted), parted


def _text(path: Path) -> str:
    """Read a file whole: it may change meanwhile without harm."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{str(path)!r} is no file: expected a CSV file")
        if about.st_size > MAX_BYTES:
            raise UserError(
                f"{str(path)!r} has {about.st_size / 2**20:.0f} MiB: expected at most "
                f"{MAX_BYTES >> 20}; keep only the columns that are needed"
            )
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {str(path)!r}: {why}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is no UTF-8 text (byte {error.start}): expected a CSV file"
        ) from None


def _rows(path: str, text: str, parted: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines that are not blank, each with its number."""
    reader = csv.reader(text.splitlines(keepends=True), skipinitialspace=True, delimiter=parted)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path!r} line {reader.line_num} is no CSV: {error}") from None


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"npy version {version}")
    return shape, dtype


def read_npy_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and dtype that an .npy stream declares, before any array is allocated.

    Raises:
      UserError: not an .npy header of version 1 or 2, or a negative dimension.

    >>> import io
    >>> stream = io.BytesIO()
    >>> np.save(stream, np.zeros((2, 3)))
    >>> _ = stream.seek(0)
    >>> read_npy_header(stream, "x")
    ((2, 3), dtype('float64'))
    """
    try:
        shape, dtype = _header(stream)
    except UserError:
        raise
    except Exception as error:  # a header is a Python literal: nearly anything may come back
        raise UserError(f"{where}: not a readable .npy array; save it with numpy.save") from error
    if any(not isinstance(size, int) or size < 0 for size in shape):
        raise UserError(f"{where}: the header declares the impossible shape {shape}")
    return shape, dtype


def npz_arrays(
    path: Path, choose: Callable[[list[str]], Sequence[str]], check: Check
) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file that `choose` picks from the names of all.

    `check` is called with (where, shape, dtype) before an array is read; both raise what they miss.

    Raises:
      UserError: unreadable, truncated, oversized, a zip bomb, a pickle, or what `check` refuses.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise UserError(f"{str(path)!r}: two members share a name; save it again")
            if sum(info.file_size for info in archive.infolist()) > ARRAY_LIMIT_BYTES:
                raise UserError(
                    f"{str(path)!r}: its members declare more than {ARRAY_LIMIT_BYTES} bytes; "
                    "save less"
                )
            chosen = choose([n.removesuffix(".npy") for n in names if n.endswith(".npy")])
            return {
                name: _member(archive, f"{name}.npy", f"{str(path)!r} array {name!r}", check)
                for name in chosen
            }
    except UserError:
        raise
    except Exception as error:  # a library fed with hostile bytes raises nearly anything
        raise UserError(f"{str(path)!r}: not a readable .npz file ({one_line(error)})") from error


def _member(archive: zipfile.ZipFile, name: str, where: str, check: Check) -> np.ndarray:
    info = archive.getinfo(name)
    if info.file_size > BOMB_FLOOR_BYTES and info.file_size > BOMB_RATIO * info.compress_size:
        raise UserError(
            f"{where}: {info.compress_size} bytes unpack to {info.file_size}; "
            "refused as a zip bomb, save it with numpy.savez"
        )
    with archive.open(info) as stream:
        shape, dtype = read_npy_header(stream, where)
        if dtype.hasobject:
            raise UserError(
                f"{where}: an object array (a pickle) is never read; save it as numbers"
            )
        check(where, shape, dtype)
        header_bytes = stream.tell()
    size = math.prod(shape) * dtype.itemsize
    if size > ARRAY_LIMIT_BYTES:
        raise UserError(f"{where}: {size} bytes, the limit is {ARRAY_LIMIT_BYTES}; save fewer")
    if header_bytes + size != info.file_size:
        raise UserError(
            f"{where}: shape {shape} needs {size} bytes, the file holds "
            f"{info.file_size - header_bytes}; save it again"
        )
    with archive.open(info) as stream:
        return np.ascontiguousarray(np.lib.format.read_array(stream, allow_pickle=False))
