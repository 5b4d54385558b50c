"""CIFAR-10's binary archive: downloaded once, checked by its hash, read without being extracted.

Its bytes may be hostile: member sizes are checked before anything is read, nothing is unpickled.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optjax.colourisation.sources import Split
from optjax.support import cache
from optjax.support.console import silent
from optjax.support.errors import UserError, nearest, one_line

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
HASH = "md5:c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)
RECORD_BYTES = 1 + 3 * 32 * 32
MEMBER_LIMIT = 100


def class_index(class_name: str) -> int:
    """Return CIFAR-10's label of a class name.

    Raises:
      UserError: not one of the ten names.

    >>> class_index("horse")
    7
    """
    if class_name not in CLASSES:
        raise UserError(
            f"class_name {class_name!r} is no CIFAR-10 class; " + nearest(class_name, CLASSES)
        )
    return CLASSES.index(class_name)


def read(
    archive: Path, class_name: str = "horse", records_per_file: int = 10_000
) -> tuple[Split, str]:
    """Read one class of CIFAR-10's binary archive, without extracting the archive.

    A record is 1 label byte and 3072 bytes: 1024 red, 1024 green, 1024 blue, row-major.

    Args:
      archive: cifar-10-binary.tar.gz.
      class_name: one of the ten class names.
      records_per_file: 10,000 in the published archive.

    Returns:
      (train, validation), uint8 (5000, 32, 32, 3) and (1000, 32, 32, 3), and a note of the split.

    Raises:
      UserError: unknown class, unreadable archive, a missing file or one of the wrong size.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    label = class_index(class_name)
    wanted = {f"{FOLDER}/{name}": name for name in TRAIN + TEST}
    size = records_per_file * RECORD_BYTES
    found: dict[str, NDArray[np.uint8]] = {}
    try:
        with tarfile.open(archive, mode="r:gz") as tar:
            for count, member in enumerate(tar):
                # Skipping a member inflates it, so an archive of endless or huge ones is refused.
                if count >= MEMBER_LIMIT or member.size > max(size, 2**20):
                    raise UserError(
                        f"{str(archive)!r}: not CIFAR-10's binary archive (member "
                        f"{member.name[:80]!r} of {member.size} bytes); download it again"
                    )
                name = wanted.get(member.name)
                if name is None or name in found:
                    continue
                if not member.isreg() or member.size != size:
                    raise UserError(
                        f"{str(archive)!r}: {name!r} holds {member.size} bytes, expected {size} "
                        f"({records_per_file} records of {RECORD_BYTES})"
                    )
                stream = tar.extractfile(member)
                assert stream is not None
                records = np.frombuffer(stream.read(size), np.uint8)
                records = records.reshape(records_per_file, RECORD_BYTES)
                if records[:, 0].max() >= len(CLASSES):
                    raise UserError(
                        f"{str(archive)!r}: {name!r} has label {records[:, 0].max()}, expected "
                        "0 to 9; download it again"
                    )
                of_class = records[records[:, 0] == label, 1:]
                found[name] = of_class.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                if len(found) == len(wanted):
                    break
    except UserError:
        raise
    except Exception as error:  # a library fed with hostile bytes raises nearly anything
        raise UserError(
            f"{str(archive)!r}: not a readable .tar.gz archive ({one_line(error)})"
        ) from error
    missing = sorted(set(wanted.values()) - set(found))
    if missing:
        raise UserError(
            f"{str(archive)!r}: {missing[0]!r} is missing; expected CIFAR-10's binary version"
        )
    train = np.concatenate([found[name] for name in TRAIN])
    validation = np.concatenate([found[name] for name in TEST])
    for split, pictures in (("training", train), ("test", validation)):
        if not len(pictures):
            raise UserError(f"{str(archive)!r}: no {class_name!r} among the {split} pictures")
    return (train, validation), f"CIFAR-10, class {class_name!r}, its own training and test split"


def cached() -> Path:
    """Return the path that the archive has in the user's cache, once it is downloaded."""
    return cache.folder() / "cifar-10-binary.tar.gz"


class _Shown:
    """The progress of a download, as pooch reports it: total, then the bytes of every chunk."""

    total = 0

    def __init__(self, progress: Callable[[str, float], None]) -> None:
        self.progress, self.done = progress, 0

    def update(self, size: int) -> None:
        self.done += size
        share = min(1.0, self.done / self.total) if self.total else 0.0
        self.progress(f"{self.done / 1e6:.0f} MB downloaded", share)

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        pass


def fetch(progress: Callable[[str, float], None] = silent) -> Path:
    """Return the path of CIFAR-10's binary archive, downloaded once to the user's cache.

    Raises:
      UserError: no network, an unwritable cache, or a hash that does not match.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    path = cached()
    try:
        pooch.retrieve(
            URL,
            known_hash=HASH,
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(
                progressbar=_Shown(progress),  # pyright: ignore[reportArgumentType]
                chunk_size=1 << 16,
            ),
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cifar10: the download failed ({one_line(error)}); connect, or pass a local "
            "cifar-10-binary.tar.gz, FILE.npz or FOLDER/"
        ) from error
    return path


def check_hash(archive: Path) -> None:
    """Refuse an archive that is not CIFAR-10's binary version, byte for byte.

    Raises:
      UserError: no readable file, or another hash.
    """
    import pooch

    kind, expected = HASH.split(":")
    try:
        if not archive.is_file():
            raise UserError(f"{str(archive)!r}: no such file; expected cifar-10-binary.tar.gz")
        found = pooch.file_hash(str(archive), kind)
    except OSError as error:
        raise UserError(f"{str(archive)!r}: cannot be read ({error.strerror})") from error
    if found != expected:
        raise UserError(
            f"{str(archive)!r}: {kind} {found}, expected {expected}, that of CIFAR-10's binary "
            "version; download it again"
        )
