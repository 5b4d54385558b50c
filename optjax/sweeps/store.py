"""A sweep on disk: what it is, what has come of it, where it stands.

::

  DIR/sweep.json                what is swept: problem, optimiser, points, seeds, code, versions
  DIR/records.log               append-only: frames of length, checksum and safetensors bytes
  DIR/state-N.safetensors         the state of the runs under way, replaced whole
  DIR/result.nc                 the dataset, once it is complete
  DIR/lock                      held by the process that writes

A frame that was cut off (a killed process, a full disk) fails its checksum and is dropped with all
that follows it; the state under way is never older than the records it needs.
"""

import errno
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from optjax.support.errors import UserError
from optjax.support.files import write_text

FORMAT = 2
_HEAD = struct.Struct("<4sIQ")
_MAGIC = b"oj1\n"
_LARGEST = 4 << 30
_STATE = re.compile(r"state-\d{4,9}\.(safetensors|part)")

Arrays = Mapping[str, np.ndarray]


class Store:
    """The folder of a sweep, locked while it is open.

    Args:
      folder: made if it is not there.
      writer: whether this process writes; others of the same sweep only read, without a lock.

    Raises:
      UserError: it cannot be written, another process holds it, or it holds something else.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, writer: bool = True, overwrite: bool = False
    ) -> None:
        import filelock

        try:
            self.folder, self.writer = Path(folder), writer
        except TypeError:
            raise UserError(f"out is {folder!r}: expected the name of a folder") from None
        self._log: Any = None
        self._lock = filelock.FileLock(self.folder / "lock")
        if not writer:
            self.spec = self._read_spec()
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"another process is writing the sweep in {str(self.folder)!r}: wait for it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write to the folder {str(self.folder)!r} ({_why(error)}); give another"
            ) from None
        try:
            self.spec = self._read_spec(overwrite)
            others = [p.name for p in self.folder.iterdir() if p.name != "lock"]
            if self.spec is None and others and "sweep.json" not in others:
                raise UserError(
                    f"the folder {str(self.folder)!r} holds {others[0]!r} and no sweep: give an "
                    "empty or a new one"
                )
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Let other processes write."""
        self.close_log()
        self._lock.release()

    def close_log(self) -> None:
        """Write no more to the log that was open."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def begin(self, spec: Mapping[str, Any], *, overwrite: bool) -> None:
        """Write what the sweep is; `overwrite` drops what was there."""
        with self._writing():
            if overwrite:
                self.close_log()
                for path in self.folder.iterdir():
                    if path.name in ("records.log", "result.nc") or _STATE.fullmatch(path.name):
                        path.unlink()
            write_text(self.folder / "sweep.json", json.dumps({"format": FORMAT, **spec}, indent=1))
            self.spec = dict(spec)

    def append(self, kind: str, arrays: Arrays, **facts: int) -> None:
        """Append a frame of records, on the disk when this returns."""
        if not self.writer:
            return
        count = len(next(iter(arrays.values())))
        if count > 1 and sum(a.nbytes for a in arrays.values()) > _LARGEST // 4:
            for part in (slice(count // 2), slice(count // 2, None)):
                self.append(kind, {name: a[part] for name, a in arrays.items()}, **facts)
            return
        payload = _packed(arrays, {"kind": kind, **facts})
        with self._writing():
            if self._log is None:
                self._log = (self.folder / "records.log").open("ab")
            at = self._log.tell()
            try:
                self._log.write(_HEAD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload)
                self._log.flush()
                os.fsync(self._log.fileno())
            except OSError:
                self._log.truncate(at)
                raise

    def frames(self) -> Iterator[tuple[dict[str, str], dict[str, np.ndarray]]]:
        """Read (facts, arrays) of every whole frame, the oldest first; cut off a torn end."""
        path = self.folder / "records.log"
        if not path.is_file():
            return
        size, good = path.stat().st_size, 0
        with path.open("rb") as file:
            while good + _HEAD.size <= size:
                magic, crc, length = _HEAD.unpack(file.read(_HEAD.size))
                if magic != _MAGIC or length > min(_LARGEST, size - good - _HEAD.size):
                    break
                payload = file.read(length)
                if zlib.crc32(payload) != crc:
                    break
                yield _parsed(payload, path)
                good += _HEAD.size + length
        if good < size and self.writer:
            with self._writing():
                os.truncate(path, good)

    def save_state(self, name: str, arrays: Arrays, **facts: int) -> None:
        """Write where runs under way stand, in place of where they stood."""
        if not self.writer:
            return
        payload = _packed(arrays, facts)
        path = self.folder / f"state-{name}.safetensors"
        part = path.with_suffix(".part")
        with self._writing():
            try:
                with part.open("wb") as file:
                    file.write(payload)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    def states(self) -> dict[str, tuple[dict[str, str], dict[str, np.ndarray]]]:
        """Read the states of the runs under way, by name."""
        found = {}
        for path in sorted(self.folder.glob("state-*.safetensors")):
            if not _STATE.fullmatch(path.name):
                continue
            found[path.stem.removeprefix("state-")] = _parsed(path.read_bytes(), path)
        return found

    def drop_state(self, name: str) -> None:
        """Remove a state whose runs have ended."""
        if not self.writer:
            return
        (self.folder / f"state-{name}.safetensors").unlink(missing_ok=True)

    def free(self) -> int:
        """Bytes that are free on its disk."""
        return shutil.disk_usage(self.folder).free

    @property
    def result(self) -> Path:
        """Where the complete dataset is kept."""
        return self.folder / "result.nc"

    def _read_spec(self, overwrite: bool = False) -> dict[str, Any] | None:
        path = self.folder / "sweep.json"
        if not path.is_file():
            return None
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(spec, dict) or spec.pop("format", None) != FORMAT:
                raise ValueError("another format")
        except (ValueError, OSError) as error:
            if overwrite:
                return None
            raise UserError(
                f"{path} is not readable as a sweep ({error}): start over (overwrite=True, "
                "--overwrite)"
            ) from None
        return spec

    def _writing(self) -> "_Writing":
        return _Writing(self.folder)


class _Writing:
    """A disk that refuses is one clear line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room" if full else "see to it"
            raise UserError(
                f"cannot write to {str(self.folder)!r} ({_why(error)}): {advice} and start the "
                "sweep again; it resumes from what was computed"
            ) from error


_PLAIN = "?bBhHiIlLqQefd"
"""Types that safetensors reads back; others are kept as bytes, with their name."""


def _packed(arrays: Arrays, facts: Mapping[str, Any]) -> bytes:
    from safetensors.numpy import save

    told = {name: str(value) for name, value in facts.items()}
    plain = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array).reshape(array.shape)
        if array.dtype.char not in _PLAIN:
            told[f"dtype {name}"] = str(array.dtype)
            array = array.reshape(*array.shape, 1).view(np.uint8)
        plain[name] = array
    return save(plain, told)


def _parsed(payload: bytes, path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Facts and arrays of safetensors bytes, whose header the library checks against their size."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = int.from_bytes(payload[:8], "little")
        facts = json.loads(payload[8 : 8 + size]).get("__metadata__", {})
        arrays = load(payload)
        for name, array in arrays.items():
            if f"dtype {name}" in facts:
                kind = np.dtype(jnp.dtype(facts[f"dtype {name}"]))
                arrays[name] = array.view(kind).reshape(array.shape[:-1])
        return facts, arrays
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it to compute again") from None


def read_spec(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the spec of the sweep in a folder, without a lock.

    Raises:
      UserError: no sweep is there.
    """
    try:
        path = Path(folder) / "sweep.json"
    except TypeError:
        raise UserError(f"the folder is {folder!r}: expected its name") from None
    if not path.is_file():
        raise UserError(f"no sweep in {str(folder)!r}: expected the folder that --out named")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable as a sweep ({error})") from None
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise UserError(f"{path} is of another format: expected format {FORMAT}")
    return spec


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
