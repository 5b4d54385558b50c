"""Files written whole or not at all: datasets as netCDF, values as JSON, text."""

import errno
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optjax.support.errors import UserError

if TYPE_CHECKING:
    import xarray


def save_dataset(dataset: "xarray.Dataset", path: Path) -> None:
    """Write a dataset as netCDF, whole or not at all."""
    try:
        write_bytes(path, netcdf(dataset))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def netcdf(dataset: "xarray.Dataset") -> bytes:
    """Return a dataset as netCDF, made in memory: HDF5 ends the process where a disk is full."""
    dataset = dataset.copy()
    dataset.attrs = {key: _attr(value) for key, value in dataset.attrs.items() if value is not None}
    encoding = {
        name: {"zlib": True, "complevel": 4}
        for name, variable in dataset.variables.items()
        if variable.dtype.kind in "fiu" and variable.size > 10_000
    }
    return bytes(dataset.to_netcdf(engine="h5netcdf", encoding=encoding))


def read_dataset(path: Path, content: bytes | None = None) -> "xarray.Dataset":
    """Read a saved dataset wholly into memory.

    Args:
      path: its file. content: the bytes of the file, where they have been read.

    Raises:
      UserError: not a netCDF dataset, or one that does not fit into the memory.
    """
    import xarray

    from optjax.support.machine import free_memory

    try:
        source = path if content is None else io.BytesIO(content)
        with xarray.open_dataset(source, engine="h5netcdf") as dataset:
            if dataset.nbytes > free_memory():
                raise UserError(
                    f"{path} says that it holds {dataset.nbytes / 1e9:.3g} GB, more than the free "
                    "memory: expected a file that optjax wrote"
                )
            return dataset.load()
    except UserError:
        raise
    except Exception as error:  # HDF5, given bytes of anybody
        said = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a readable dataset ({said}): remove it") from error


def read_attrs(path: Path) -> Mapping[str, Any]:
    """Read a saved dataset's attributes; none if the file is absent or not netCDF."""
    import h5netcdf

    try:
        with h5netcdf.File(path, "r") as file:
            return dict(file.attrs)
    except Exception:  # HDF5, given bytes of anybody
        return {}


def _attr(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return json.dumps(plain(value)) if isinstance(value, Mapping) else value


def plain(value: Any) -> Any:
    """Convert a value to JSON's types: arrays to lists; NaN and infinity to null and a text.

    >>> plain({"loss": float("nan"), "steps": (1, 2)})
    {'loss': None, 'loss_text': 'nan', 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        result: dict[str, Any] = {}
        for key, item in value.items():
            result[str(key)] = plain(item)
            if odd := _odd(item):
                result[f"{key}_text"] = odd
        return result
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return str(value)


def _odd(value: Any) -> str | None:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple) and any(
        isinstance(item, float) and not math.isfinite(item) for item in value
    ):
        return ", ".join(str(item) for item in value)
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_UNDER_WAY}{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for folders
            raise
    finally:
        os.close(folder)


_UNDER_WAY = ".writing-"


def is_under_way(path: Path) -> bool:
    """Whether a file is one that `write_bytes` has not finished: its process works, or died."""
    return path.name.startswith(_UNDER_WAY)


def parsed_json(text: str | bytes) -> Any:
    """Parse JSON that anybody may have written.

    Raises:
      ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plainly(value: Any) -> str:
    """Describe a value in one line that is the same in every process: no addresses.

    >>> plainly(len)
    '<built-in function len>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(repr(value).split()))
