"""A sweep on disk: what it is, what has come of it, where it stands.

::

  DIR/sweep.json                what is swept: problem, optimiser, points, seeds, code, versions
  DIR/records.log               append-only: frames of length, checksum and safetensors bytes
  DIR/state-N.frame             the state of the runs under way, replaced whole
  DIR/state-N.before            the one before it
  DIR/result.nc                 the dataset, once it is complete
  DIR/lock, DIR/holder          held by the process that writes; which one that is

Every byte has a checksum. A frame that was cut off (a killed process, a full disk) fails its own
and is dropped with all that follows it. A damaged state is set aside and the one before it used:
records that come again are the same. A damaged result is made again from the log; a damaged
sweep.json is read from the log, too.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from optjax.support import files
from optjax.support.console import Console
from optjax.support.errors import UserError

if TYPE_CHECKING:
    import xarray

FORMAT = 4
_HEAD = struct.Struct("<4sIQ")
_MAGIC = b"oj1\n"
_LARGEST = 4 << 30
_STATE = re.compile(r"state-(\d{4,9})\.(frame|before)")
_DAMAGED = "damaged-"

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
            what = "out" if writer else "the folder"
            raise UserError(f"{what} is {folder!r}: expected the name of a folder") from None
        self.dataset: xarray.Dataset | None = None  # of a sweep that is complete
        self._log: Any = None
        self._lock = filelock.FileLock(self.folder / "lock")
        self._holder = self.folder / "holder"
        if not writer:
            self.spec = self._read_spec()
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            with contextlib.suppress(OSError):  # a full disk: then others are not told
                self._holder.write_text(f"process {os.getpid()} on {platform.node()}")
        except filelock.Timeout:
            who = self._holder.read_text(errors="replace")[:99] if self._holder.is_file() else ""
            raise UserError(
                f"another process is writing the sweep in {str(self.folder)!r} ({who}): wait for "
                "it, or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write to the folder {str(self.folder)!r} ({_why(error)}); give another"
            ) from None
        try:
            for path in filter(files.is_under_way, self.folder.iterdir()):
                path.unlink()  # of a process that was killed
            self.spec = self._read_spec(overwrite)
            names = [p.name for p in self.folder.iterdir() if p.name not in ("lock", "holder")]
            others = [name for name in names if not (overwrite and _is_ours(name))]
            if self.spec is None and others and "sweep.json" not in names:
                raise UserError(
                    f"the folder {str(self.folder)!r} holds {others[0]!r} and no sweep: give an "
                    "empty or a new one"
                )
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Let other processes write."""
        try:
            self.close_log()
        finally:
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
                    if path.name != "sweep.json" and _is_ours(path.name):
                        path.unlink()
        self._write_spec(spec)

    def _write_spec(self, spec: Mapping[str, Any]) -> None:
        self.spec = json.loads(json.dumps(spec))  # as it is read again
        with self._writing():
            told = {"format": FORMAT, "crc32": _crc(self.spec), **self.spec}
            files.write_text(self.folder / "sweep.json", json.dumps(told, indent=1))

    def append(self, kind: str, arrays: Arrays, **facts: int) -> None:
        """Append a frame of records, on the disk when this returns."""
        if not self.writer:
            return
        count = len(next(iter(arrays.values())))
        if count > 1 and sum(a.nbytes for a in arrays.values()) > _LARGEST // 4:
            for part in (slice(count // 2), slice(count // 2, None)):
                self.append(kind, {name: a[part] for name, a in arrays.items()}, **facts)
            return
        self._append(_packed(arrays, {"kind": kind, **facts}))

    def _append(self, payload: bytes) -> None:
        path = self.folder / "records.log"
        with self._writing():
            if self._log is None:
                self._log = path.open("ab")
            at = path.stat().st_size
            try:
                self._log.write(_framed(payload))
                self._log.flush()
                os.fsync(self._log.fileno())
            except OSError:
                log, self._log = self._log, None
                with contextlib.suppress(OSError):  # it writes once more what it still holds
                    log.close()
                os.truncate(path, at)
                raise

    def frames(self) -> Iterator[tuple[dict[str, str], dict[str, np.ndarray]]]:
        """Read (facts, arrays) of all whole frames of runs, in order.

        Where this process writes, a torn or damaged end is then cut off, and the log is told what
        is swept now.
        """
        path, good, told = self.folder / "records.log", 0, None
        for facts, arrays, end in _frames(path):
            good = end
            if facts.get("kind") == "spec":
                told = facts.get("spec")
            else:
                yield facts, arrays
        if not self.writer:
            return
        if path.is_file() and good < path.stat().st_size:
            with self._writing():
                if not _is_torn(path, good):
                    kept = path.with_name(_DAMAGED + path.name)
                    shutil.copyfile(path, kept)
                    Console().line(
                        f"optjax: {path} is damaged at byte {good}, kept as {kept.name}: what "
                        "follows is computed again"
                    )
                os.truncate(path, good)
        spec = {name: value for name, value in (self.spec or {}).items() if name != "result"}
        if spec and json.dumps(spec) != told:
            self._append(_packed({}, {"kind": "spec", "spec": json.dumps(spec)}))

    def save_state(self, name: str, arrays: Arrays, **facts: int) -> None:
        """Write where runs under way stand; where they stood is kept, in case of damage."""
        if not self.writer:
            return
        path = self.folder / f"state-{name}.frame"
        with self._writing():
            if path.is_file():
                os.replace(path, path.with_suffix(".before"))
            files.write_bytes(path, _framed(_packed(arrays, facts)))

    def states(self) -> list[tuple[str, dict[str, str], dict[str, np.ndarray]]]:
        """Read the states of the runs under way, each with its name; set damaged ones aside."""
        found = []
        for path in sorted(self.folder.glob("state-*")):
            if (named := _STATE.fullmatch(path.name)) is None:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # the process that writes has set it aside
                continue
            magic, crc, length = _HEAD.unpack(content[: _HEAD.size].ljust(_HEAD.size, b"\0"))
            payload = content[_HEAD.size :]
            if magic != _MAGIC or length != len(payload) or zlib.crc32(payload) != crc:
                self._set_aside(path, "the state before it is used, or its runs start again")
                continue
            found.append((named[1], *_parsed(payload, path)))
        return found

    def drop_state(self, name: str) -> None:
        """Remove a state whose runs have ended, and the one before it."""
        if self.writer:
            for kind in ("frame", "before"):
                (self.folder / f"state-{name}.{kind}").unlink(missing_ok=True)

    def save_result(self, dataset: "xarray.Dataset") -> None:
        """Write the dataset of a complete sweep, and its checksum into sweep.json."""
        content = files.netcdf(dataset)
        with self._writing():
            files.write_bytes(self.result, content)
        self._write_spec({**(self.spec or {}), "result": zlib.crc32(content)})

    def read_result(self) -> "xarray.Dataset | None":
        """Read the dataset of a complete sweep; None where there is none that is whole."""
        try:
            content = self.result.read_bytes()
        except FileNotFoundError:
            return None
        if not self.writer:  # the process that writes may have written both since
            self.spec = self._read_spec()
        if self.spec is None or "result" not in self.spec:
            return None
        if zlib.crc32(content) != self.spec["result"]:
            self._set_aside(self.result, "it is made again from the log")
            return None
        return files.read_dataset(self.result, content)

    def _set_aside(self, path: Path, then: str) -> None:
        """Say that a file is damaged; rename it, where this process writes."""
        kept = path.with_name(_DAMAGED + path.name)
        if self.writer:
            with self._writing():
                os.replace(path, kept)
        where = f", kept as {kept.name}" if self.writer else ""
        Console().line(f"optjax: {path} is damaged{where}: {then}")

    def free(self) -> int:
        """Bytes that are free on its disk."""
        return shutil.disk_usage(self.folder).free

    @property
    def result(self) -> Path:
        """Where the complete dataset is kept."""
        return self.folder / "result.nc"

    def _read_spec(self, overwrite: bool = False) -> dict[str, Any] | None:
        if not (self.folder / "sweep.json").is_file() and not _specs(self.folder / "records.log"):
            return None
        try:
            return read_spec(self.folder)
        except UserError:
            if overwrite:
                return None
            raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that refuses is one clear line."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room" if full else "see to it"
            raise UserError(
                f"cannot write to {str(self.folder)!r} ({_why(error)}): {advice} and start the "
                "sweep again; it resumes from what was computed"
            ) from error


def _is_ours(name: str) -> bool:
    """Whether a file of this name is a store's."""
    name = name.removeprefix(_DAMAGED)
    return name in ("sweep.json", "records.log", "result.nc") or bool(_STATE.fullmatch(name))


def _is_torn(log: Path, at: int) -> bool:
    """Whether what follows a byte is the beginning of a frame, as a kill leaves it."""
    with log.open("rb") as file:
        file.seek(at)
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return True
    magic, _, length = _HEAD.unpack(head)
    return magic == _MAGIC and at + _HEAD.size + length > log.stat().st_size


def _framed(payload: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload


def _crc(spec: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(spec, sort_keys=True).encode())


def _specs(log: Path) -> list[dict[str, Any]]:
    """What is swept, as a log says it, the latest last."""
    found = []
    for facts, *_ in _frames(log):
        with contextlib.suppress(ValueError):
            if isinstance(spec := files.parsed_json(facts.get("spec", "")), dict):
                found.append(spec)
    return found


def _frames(path: Path) -> Iterator[tuple[dict[str, str], dict[str, np.ndarray], int]]:
    """Read facts and arrays of every whole frame of a log, and where the frame ends."""
    if not path.is_file():
        return
    size, good = path.stat().st_size, 0
    with path.open("rb") as file:
        while good + _HEAD.size <= size:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:  # the process that writes has cut it meanwhile
                return
            magic, crc, length = _HEAD.unpack(head)
            if magic != _MAGIC or length > min(_LARGEST, size - good - _HEAD.size):
                return
            payload = file.read(length)
            if zlib.crc32(payload) != crc:
                return
            good += _HEAD.size + length
            yield *_parsed(payload, path), good


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
        facts = files.parsed_json(payload[8 : 8 + size]).get("__metadata__", {})
        arrays = load(payload)
        for name, array in arrays.items():
            if f"dtype {name}" in facts:
                kind = np.dtype(jnp.dtype(facts[f"dtype {name}"]))
                arrays[name] = array.view(kind).reshape(array.shape[:-1])
        return facts, arrays
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it to compute again") from None


def read_spec(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the spec of the sweep in a folder, without a lock; from the log, if its file is damaged.

    Raises:
      UserError: no sweep is there, or one of another format.
    """
    path, log = Path(folder) / "sweep.json", Path(folder) / "records.log"
    if not path.is_file() and not log.is_file():
        raise UserError(f"no sweep in {str(folder)!r}: expected the folder that --out named")
    try:
        spec = files.parsed_json(path.read_text(encoding="utf-8"))
        other = spec.pop("format", None) != FORMAT
        if not other and spec.pop("crc32", None) != _crc(spec):
            raise ValueError("its checksum is another")
    except (ValueError, OSError, AttributeError, TypeError) as error:
        kept = _specs(log)
        if not kept:
            raise UserError(
                f"{path} is not readable as a sweep ({error}): start over (overwrite=True, "
                "--overwrite)"
            ) from None
        Console().line(f"optjax: {path} is damaged: the log says what is swept")
        return kept[-1]
    if other:
        raise UserError(
            f"{path} is of another format, of another version of optjax: expected format {FORMAT}; "
            "read it with that version, or start over (overwrite=True, --overwrite)"
        )
    return spec


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
