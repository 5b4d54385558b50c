"""An experiment's dataset on disk: netCDF, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optjax.errors import UserError
from optjax.report.claims import plain

if TYPE_CHECKING:
    import xarray


def save_dataset(dataset: "xarray.Dataset", path: Path) -> None:
    """Write a dataset as netCDF, whole or not at all."""
    dataset = dataset.copy()
    dataset.attrs = {key: _attr(value) for key, value in dataset.attrs.items() if value is not None}
    encoding = {
        name: {"zlib": True, "complevel": 4}
        for name, variable in dataset.variables.items()
        if variable.dtype.kind in "fiu" and variable.size > 10_000
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".nc")
    os.close(handle)
    try:
        dataset.to_netcdf(name, engine="h5netcdf", encoding=encoding)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def read_dataset(path: Path) -> "xarray.Dataset":
    """A saved dataset, wholly in memory."""
    import xarray

    with xarray.open_dataset(path, engine="h5netcdf") as dataset:
        return dataset.load()


def read_attrs(path: Path) -> Mapping[str, Any]:
    """A saved dataset's attributes; none where the file is absent or not readable as netCDF."""
    import h5netcdf

    try:
        with h5netcdf.File(path, "r") as file:
            return dict(file.attrs)
    except (OSError, ValueError, KeyError):
        return {}


def _attr(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return json.dumps(plain(value)) if isinstance(value, Mapping) else value
