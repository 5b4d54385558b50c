"""optjax data: what data the claims need, and the commands that make, fetch or check them."""

import hashlib
import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from optjax.cli.words import grouped, number, one
from optjax.support.errors import UserError, nearest

if TYPE_CHECKING:
    from optjax.scaling.table import Runs

POINTS_ROWS = 245
POINTS_SHA256 = "193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30"
POINTS_COLUMNS = {"N": "Model Size", "C": "Training FLOP", "loss": "loss"}
POINTS_RANGE = {"N": (5.73e7, 1.62e10), "C": (1.39e18, 1.30e22), "loss": (2.07, 5.01)}
"""Lowest and highest of the published file, rounded outwards."""

USAGE = """\
usage: optjax data
       optjax data cifar10 [--class horse] [--archive FILE.tar.gz] [--out cifar10-horse.npz]
       optjax data palette --data FILE.npz [--colours 24] [--seed 0] [--out palette24.npy]
       optjax data points [FILE.csv]

With no word: which data there are, which claims need them, what makes or fetches them, what is in
the cache.

cifar10: one class of CIFAR-10 as an .npz file, arrays train and validation, uint8 (n, 32, 32, 3)

--class     airplane, automobile, bird, cat, deer, dog, frog, horse (the default), ship or truck
--archive   the binary version, cifar-10-binary.tar.gz, where you have it; without it, it is
            downloaded once (162 MB) to the cache. Its MD5 hash is checked in both cases
--out       the file (cifar10-CLASS.npz)

palette: colours by k-means of the training pictures' pixels, float64 (K, 3) in [0, 1]

--data      pictures: cifar10, FILE.npz or FOLDER/
--colours   K (24)
--seed      of k-means: the same seed, the same palette (0)
--out       the file (paletteK.npy)

points: where the points of Hoffmann et al. (2022) are published and how their file looks; with a
file, whether it is such a file

OPTJAX_CACHE names another folder than the user's cache.
"""

WHERE = f"""\
The points of Hoffmann et al. (2022), "Training compute-optimal large language models",
arXiv:2203.15556, figure 4, were read off by Besiroglu, Erdil, Barnett and You (2024), "Chinchilla
scaling: a replication attempt", arXiv:2404.10102. The paper's first page names the repository of
its data, analyzing-chinchilla of Epoch AI: take its file data/svg_extracted_data.csv.

Format     CSV in UTF-8: a header line, then a line for each of the {POINTS_ROWS} points
Columns    Model Size (parameters N), Training FLOP (C), loss; others are left unread. The tokens
           are D = C/(6N), or a column named tokens
SHA-256    {POINTS_SHA256}

check it   optjax data points FILE.csv
use it     optjax run scaling_laws --points FILE.csv
"""


def data(words: list[str]) -> int:
    """List the data that claims need, or make, fetch or check one of them."""
    actions: dict[str, Callable[[list[str]], int]] = {
        "cifar10": _cifar10,
        "palette": _palette,
        "points": _points,
    }
    if not words:
        return _table()
    if words[0] not in actions:
        raise UserError(
            f"data takes cifar10, palette or points, got {words[0]!r}; {nearest(words[0], actions)}"
        )
    return actions[words[0]](words[1:])


def _table() -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from optjax.colourisation import cifar10

    archive = cifar10.cached()
    try:
        there = f"in the cache, {archive.stat().st_size / 1e6:.0f} MB"
    except OSError:
        there = "not in the cache; 162 MB to download"
    rows = (
        (
            "CIFAR-10's horses",
            "colourisation/pool-upsample, colourisation/conv-transpose, colourisation/unet, "
            "colourisation/transpose-beats-pool",
            "optjax data cifar10 --out horses.npz",
            f"{there}; the file has 18 MB",
        ),
        (
            "a palette",
            "none: a run makes its own; a file fixes one for several runs",
            "optjax data palette --data horses.npz",
            "made from the pictures; 1 kB",
        ),
        (
            "Hoffmann's points",
            "scaling/hoffmann-refit",
            "optjax data points",
            "published elsewhere: the command says where; 23 kB",
        ),
        (
            "four photographs",
            "all others that train a network on pictures",
            "none",
            "inside scikit-image",
        ),
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("data", "claims that need them", "command", "where, and size"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, markup=False, width=width).print(table)
    print(f"cache: {archive.parent}")
    return 0


def _cifar10(words: list[str]) -> int:
    groups = grouped(words)
    class_name = one(groups, "class", "horse")
    archive = one(groups, "archive") if "archive" in groups else None
    out = _out(groups, f"cifar10-{class_name}.npz")
    _unknown(groups, "cifar10", "class", "archive", "out")

    import numpy as np

    from optjax.colourisation import cifar10
    from optjax.support.console import Console

    cifar10.class_index(class_name)
    with Console().late("cifar10") as progress:
        if archive is None:
            path = cifar10.fetch(lambda text, share: progress(text, 0.9 * share))
        else:
            path = Path(archive)
            cifar10.check_hash(path)
        progress("reading the archive", 0.9)
        (train, validation), _ = cifar10.read(path, class_name)
    _save(out, lambda stream: np.savez(stream, train=train, validation=validation))
    print(
        f"{out}: {len(train)} training and {len(validation)} validation pictures of 32 × 32, "
        f"{class_name}"
    )
    print(f"next: optjax run colourisation --data {shlex.quote(str(out))}")
    return 0


def _palette(words: list[str]) -> int:
    groups = grouped(words)
    if "data" not in groups:
        raise UserError("data palette needs --data: cifar10, FILE.npz or FOLDER/")
    pictures = one(groups, "data")
    colours, seed = number(groups, "colours", "24"), number(groups, "seed", "0")
    out = _out(groups, f"palette{colours}.npy")
    _unknown(groups, "palette", "data", "colours", "seed", "out")

    import numpy as np

    from optjax.colourisation.palette import MAX_COLOURS, kmeans_palette
    from optjax.colourisation.pictures import load_pictures

    if not 2 <= colours <= MAX_COLOURS:
        raise UserError(f"--colours is {colours}: expected 2 to {MAX_COLOURS}")
    found = load_pictures(pictures, seed=seed)
    palette = kmeans_palette(found.train, colours, seed)
    _save(out, lambda stream: np.save(stream, palette))
    print(f"{out}: {colours} colours by k-means of {len(found.train)} pictures, seed {seed}")
    given = f"--data {shlex.quote(pictures)} --palette {shlex.quote(str(out))}"
    more = "" if colours == 24 else f" --colours {colours}"
    print(f"next: optjax run colourisation {given}{more}")
    return 0


def _points(words: list[str]) -> int:
    if not words:
        print(WHERE, end="")
        return 0
    if len(words) > 1 or words[0].startswith("--"):
        raise UserError(f"data points takes one FILE.csv and no options, got {' '.join(words)!r}")

    from optjax.scaling.table import read_runs

    path = Path(words[0])
    runs, columns = read_runs(path, needed=("loss", "N", "D"))
    print(f"{path}: {len(runs.loss)} points")
    for name, column in columns.items():
        values = getattr(runs, name)
        print(f"  {name} from column {column!r}: {values.min():.4g} to {values.max():.4g}")
    if "D" not in columns:
        print(f"  D = C/(6N): {runs.D.min():.4g} to {runs.D.max():.4g}")  # pyright: ignore[reportOptionalMemberAccess]
    if hashlib.sha256(path.read_bytes()).hexdigest() == POINTS_SHA256:
        print("this is the published file, byte for byte")
    else:
        print("this is not the published file, byte for byte; its numbers:")
        for line in _wrong(runs) or ["as many points as published, in the published ranges"]:
            print(f"  {line}")
    print(f"next: optjax run scaling_laws --points {shlex.quote(str(path))}")
    return 0


def _wrong(runs: "Runs") -> list[str]:
    """List how runs differ from the published points, a line each."""
    lines = []
    if len(runs.loss) != POINTS_ROWS:
        lines.append(f"{len(runs.loss)} points: expected {POINTS_ROWS}")
    for name, (low, high) in POINTS_RANGE.items():
        values = getattr(runs, name)
        outside = int(((values < low) | (values > high)).sum())
        if outside:
            lines.append(
                f"{name} of {outside} points lies outside the published {low:.3g} to {high:.3g}: "
                f"check the units of column {POINTS_COLUMNS[name]!r}"
            )
    return lines


def _out(groups: dict[str, list[str]], default: str) -> Path:
    """Take --out, with the suffix by which other commands know such a file."""
    out, suffix = Path(one(groups, "out", default)), Path(default).suffix
    if out.suffix != suffix:
        raise UserError(f"--out is {str(out)!r}: expected a name ending in {suffix}")
    return out


def _unknown(groups: dict[str, list[str]], action: str, *known: str) -> None:
    for name in groups:
        name = name.replace("_", "-")
        if name in re.findall(r"--([a-z]+)", USAGE):
            raise UserError(f"--{name} is no option of 'optjax data {action}'; --help shows them")
        raise UserError(f"unknown option '--{name}'; {nearest(name, known)}")


def _save(out: Path, write: Callable[[io.BytesIO], None]) -> None:
    """Write an array file whole or not at all."""
    from optjax.support.files import write_bytes

    stream = io.BytesIO()
    write(stream)
    try:
        write_bytes(out, stream.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r}: {error.strerror or error}") from None
