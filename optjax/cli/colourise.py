"""optjax colourise and train-colouriser: colour photographs, and train what does it."""

import glob
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from optjax.cli.words import flag, grouped, number, one, real, switch
from optjax.support.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

USAGE = """\
usage: optjax colourise PHOTO... --out DIR [--model FILE] [--work-size 256] [--saturation 1.0]
                        [--temperature 0.38] [--side-by-side] [--overwrite]

Colour photographs. A picture keeps its size, its lightness and its detail; its own colours, where
it has any, are not looked at. EXIF is kept, and transparency where the format has any.

PHOTO          files, folders (with their subfolders), or patterns such as 'scans/*.jpg': JPEG, PNG,
               WebP, TIFF, BMP, GIF; of several pictures in a file, the first
--out          the folder for the results, under the same names (GIF and BMP as PNG)
--model        of train-colouriser (the one in the cache)
--work-size    longer side in pixels at which colours are predicted, a multiple of 4 (256)
--saturation   factor of the colours' strength; 0 gives grey (1.0)
--temperature  of the mean over a pixel's likely colours: lower is bolder, 1 their mean (0.38)
--side-by-side grey and coloured, next to each other
--overwrite    write over results that are there; without, they are left as they are

Exit status 1 where some pictures could not be read or written: each is named, the others are done.
"""

TRAIN_USAGE = """\
usage: optjax train-colouriser [--data FOLDER/] [--out FILE] [--net unet] [--filters 32] [--bins 64]
                               [--size 64] [--steps 2000] [--batch-size 32]
                               [--learning-rate 0.003] [--rebalance] [--seed 0] [--checkpoints DIR]

Train a network that colours photographs. Without --data, on the four photographs of scikit-image:
a demo, which knows the colours of little else.

--data          pictures: FOLDER/, cifar10 or FILE.npz, uint8 (n, H, W, 3)
--out           the model (in the cache, where colourise finds it)
--net           pool-upsample, conv-transpose, unet (the default) or residual
--filters       channels of its first stage (32)
--bins          bins of chroma, chosen by k-means (64)
--size          side of the pictures in pixels, a multiple of 4 (64)
--steps         of Adam, with a cosine schedule (2000)
--rebalance     weigh the pixels of rare colours more: bolder, less often right
--checkpoints   a folder that keeps the training: the same command resumes it
"""


def colourise(words: list[str]) -> int:
    """Colour photographs; return 1 where some failed."""
    count = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    given, groups = words[:count], grouped(words[count:])
    out, model = Path(one(groups, "out")), one(groups, "model") if "model" in groups else ""
    work_size = number(groups, "work_size", "256")
    saturation = real(groups, "saturation", "1.0", 0.0, 10.0)
    temperature = real(groups, "temperature", "0.38", 0.01, 100.0)
    beside, overwrite = switch(groups, "side_by_side"), switch(groups, "overwrite")
    _unknown(groups, "out model work-size saturation temperature side-by-side overwrite")
    if work_size < 4 or work_size % 4 or work_size > 1024:
        raise UserError(f"--work-size is {work_size}: expected a multiple of 4, 4 to 1024")
    if not given:
        raise UserError("colourise needs photographs, before its options: files, folders, patterns")
    photographs, failed = _found(given, out)

    from optjax.colourisation.colouriser import Colouriser, grey_picture
    from optjax.colourisation.photograph import Photograph, read_photograph, write_photograph
    from optjax.support.console import Console

    colouriser = Colouriser.load(_model(model))
    done, kept, console = 0, 0, Console()
    with console.late("colourise") as progress:
        for i, (source, name) in enumerate(photographs):
            progress(f"{i} of {len(photographs)}, {source.name}", i / len(photographs))
            target = out / name
            try:
                if not overwrite and os.path.lexists(target):
                    kept += 1
                    console.line(f"{str(target)!r} is there already: --overwrite writes over it")
                    continue
                seen = read_photograph(source)
                pixels = colouriser.colour(seen, work_size, temperature, saturation)
                alpha = seen.alpha
                if beside:
                    pixels, alpha = _side_by_side(grey_picture(seen.pixels), pixels, alpha)
                write_photograph(Photograph(pixels, alpha, seen.exif, seen.dpi), target)
            except UserError as error:
                failed += 1
                console.line(f"optjax: {error}")
                continue
            done += 1
            for note in seen.notes:
                console.line(f"{str(source)!r}: {note}")
    print(f"{done} coloured, {kept} kept, {failed} failed: {out}")
    return 1 if failed else 0


def _side_by_side(
    grey: "NDArray[np.uint8]", pixels: "NDArray[np.uint8]", alpha: "NDArray[np.uint8] | None"
) -> "tuple[NDArray[np.uint8], NDArray[np.uint8] | None]":
    """Set the grey picture to the left of the coloured one."""
    import numpy as np

    both = np.concatenate([np.repeat(grey[..., None], 3, axis=-1), pixels], axis=1)
    return both, None if alpha is None else np.concatenate([alpha, alpha], axis=1)


def _unknown(groups: dict[str, list[str]], known: str) -> None:
    """Refuse an option that is left over."""
    for name in groups:
        raise UserError(f"unknown option '--{flag(name)}'; {nearest(flag(name), known.split())}")


def _found(given: list[str], out: Path) -> tuple[list[tuple[Path, str]], int]:
    """List the pictures asked for, each with its name among the results, and count failures."""
    from optjax.colourisation.photograph import written_name

    found: dict[str, Path] = {}
    failed = 0
    for word in given:
        listed, broken = _of_word(word, out.resolve())
        failed += broken
        for source, name in listed:
            name = os.path.join(os.path.dirname(name), written_name(os.path.basename(name)))
            if name in found and found[name].resolve() != source.resolve():
                raise UserError(
                    f"{str(found[name])!r} and {str(source)!r} would both be written as {name!r}: "
                    "colour them into folders of their own"
                )
            found[name] = source
    own = {source.resolve() for source in found.values()}
    for name in found:
        if (out / name).resolve() in own:
            raise UserError(f"--out holds the photograph {name!r} itself: take another folder")
    return [(source, name) for name, source in found.items()], failed


def _of_word(word: str, out: Path) -> tuple[list[tuple[Path, str]], int]:
    """List the pictures of a file, folder or pattern, with their names; count unread folders."""
    path = Path(word)
    try:
        if path.is_dir():
            inside, failed = _walk(path, out)
            taken = _pictures(word, inside)
            if not taken:
                raise UserError(f"{word!r}: no pictures in this folder")
            return [(file, str(file.relative_to(path))) for file in taken], failed
        if path.is_file():
            return [(path, path.name)], 0
        matches = sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else []
        files = [Path(m) for m in matches if os.path.isfile(m)]
        files = [file for file in files if not file.resolve().is_relative_to(out)]
        if not files:
            raise UserError(f"{word!r}: no such file or folder, and no pattern that any file fits")
        return [(file, file.name) for file in _pictures(word, files)], 0
    except OSError as error:
        raise UserError(f"{word!r}: cannot be read ({error.strerror})") from error


def _pictures(word: str, files: list[Path]) -> list[Path]:
    """Keep the files whose endings are those of pictures; say which others there are."""
    from optjax.colourisation.photograph import SUFFIXES

    taken = [file for file in files if file.suffix.lower() in SUFFIXES]
    left = sorted({file.suffix.lower() or "no ending" for file in files if file not in taken})
    if left:
        print(f"{word!r}: not read: files ending in {', '.join(left)}", file=sys.stderr)
    return taken


def _walk(folder: Path, out: Path) -> tuple[list[Path], int]:
    """List the files below a folder, without hidden ones and the results; count what refuses."""
    listed: list[Path] = []
    refused: list[OSError] = []
    for where, folders, files in os.walk(folder, onerror=refused.append):
        kept = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in kept if (Path(where) / name).resolve() != out]
        named = [Path(where) / name for name in sorted(files) if not name.startswith(".")]
        listed += [file for file in named if file.is_file()]
    for error in refused:
        print(f"optjax: {error.filename!r}: cannot be read ({error.strerror})", file=sys.stderr)
    return listed, len(refused)


def _model(given: str) -> Path:
    """Return the path of the model: the one given, or that in the cache."""
    path = Path(given) if given else _cached()
    if not given and not path.is_file():
        path = _cached(demo=True)
    if not given and not path.is_file():
        raise UserError(
            "there is no model yet: 'optjax train-colouriser' makes a demo in a minute and a half, "
            "with --data FOLDER/ one of your pictures; or give --model FILE"
        )
    return path


def _writable(out: Path) -> None:
    """Check that a file can be written, before it takes an hour to make it."""
    try:
        if out.is_dir():
            raise UserError(f"--out {str(out)!r} is a folder: expected a file's name")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {str(out)!r}: cannot be written ({error.strerror})") from error


def _cached(demo: bool = False) -> Path:
    """Return where a model is kept: the user's, or the demo, which stands in for it."""
    from optjax.support import cache

    return cache.folder() / f"colouriser{'-demo' if demo else ''}.safetensors"


def train(words: list[str]) -> int:
    """Train a model, and say how well it does."""
    groups = grouped(words)
    data = one(groups, "data") if "data" in groups else None
    out = Path(one(groups, "out")) if "out" in groups else _cached(demo=data is None)
    net = one(groups, "net", "unet")
    # The demo's four photographs are soon learned.
    names = {"filters": 32, "bins": 64, "size": 64, "steps": 2000, "batch_size": 32, "seed": 0}
    names |= {} if data else {"filters": 16, "size": 32, "steps": 800}
    sizes = {name: number(groups, name, str(default)) for name, default in names.items()}
    rate = real(groups, "learning_rate", "0.003", 0.0)
    rebalance = switch(groups, "rebalance")
    folder = one(groups, "checkpoints") if "checkpoints" in groups else None
    known = " ".join(map(flag, names))
    _unknown(groups, f"{known} data out net learning-rate rebalance checkpoints")
    _writable(out)

    from optjax.colourisation.pictures import (
        DEMO_SCALES,
        DEMO_TRAIN,
        DEMO_VALIDATION,
        demo_pictures,
        load_pictures,
    )
    from optjax.colourisation.training import train_colouriser

    size, seed = sizes.pop("size"), sizes.pop("seed")
    pictures = (
        load_pictures(data, size=size, seed=seed)
        if data
        else demo_pictures((*DEMO_TRAIN, *DEMO_VALIDATION), size, DEMO_SCALES, seed)
    )
    model, scores = train_colouriser(
        pictures,
        net=net,
        filters=sizes["filters"],
        bins=sizes["bins"],
        steps=sizes["steps"],
        batch_size=sizes["batch_size"],
        learning_rate=rate,
        rebalance=rebalance,
        seed=seed,
        out=folder,
    )
    model.save(out)
    print(
        f"validation: loss {scores['loss']:.3f} nats a pixel, {100 * scores['accuracy']:.1f} % of "
        f"the pixels in their bin; {pictures.note}"
        + ("; tiles held out overlap those trained on" if pictures.demo else "")
    )
    print(out)
    return 0
