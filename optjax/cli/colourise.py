"""optjax colourise and train-colouriser: colour photographs, and train what does it."""

import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from optjax.cli.words import grouped, number, one, real, switch
from optjax.support.errors import UserError, nearest

USAGE = """\
usage: optjax colourise PHOTO... --out DIR [--model FILE] [--work-size 256] [--saturation 1.0]
                        [--temperature 0.38] [--side-by-side] [--overwrite]

Colour photographs. A picture keeps its size, its lightness and its detail; its own colours, where
it has any, are not looked at. EXIF and transparency are kept.

PHOTO          files, folders (with their subfolders), or patterns such as 'scans/*.jpg': JPEG, PNG,
               WebP, TIFF, BMP, GIF; of an animation, the first frame
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
--out           the model (colouriser.safetensors in the cache, which colourise takes by default)
--net           pool-upsample, conv-transpose or unet
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
    saturation = real(groups, "saturation", "1.0", 0.0)
    temperature = real(groups, "temperature", "0.38", 0.01)
    beside, overwrite = switch(groups, "side_by_side"), switch(groups, "overwrite")
    known = "out model work-size saturation temperature side-by-side overwrite".split()
    for name in groups:
        raise UserError(f"unknown option '--{name}'; {nearest(name.replace('_', '-'), known)}")
    if work_size < 4 or work_size % 4 or work_size > 4096:
        raise UserError(f"--work-size is {work_size}: expected a multiple of 4, 4 to 4096")
    if not given:
        raise UserError("colourise needs photographs: files, folders or patterns")
    photographs = _found(given, out)

    from optjax.colourisation.colouriser import Colouriser, grey_picture
    from optjax.colourisation.photograph import Photograph, read_photograph, write_photograph
    from optjax.support.console import Console

    colouriser = Colouriser.load(_model(model))
    failed = kept = 0
    console = Console()
    with console.late("colourise") as progress:
        for i, (source, name) in enumerate(photographs):
            progress(f"{i} of {len(photographs)}, {source.name}", i / len(photographs))
            target = out / name
            if target.exists() and not overwrite:
                kept += 1
                console.line(f"{source}: {target} is there already; --overwrite writes over it")
                continue
            try:
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
            for note in seen.notes:
                console.line(f"{source}: {note}")
    done = len(photographs) - failed - kept
    print(f"{done} coloured, {kept} kept, {failed} failed: {out}")
    return 1 if failed else 0


def _side_by_side(grey, pixels, alpha):
    """Set the grey picture to the left of the coloured one."""
    import numpy as np

    both = np.concatenate([np.repeat(grey[..., None], 3, axis=-1), pixels], axis=1)
    return both, None if alpha is None else np.concatenate([alpha, alpha], axis=1)


def _found(given: list[str], out: Path) -> list[tuple[Path, str]]:
    """List the pictures that were asked for, each with its name among the results."""
    from optjax.colourisation.photograph import written_name

    found: dict[str, Path] = {}
    for word in given:
        for source, name in _of_word(word, out):
            name = os.path.join(os.path.dirname(name), written_name(os.path.basename(name)))
            if name in found and found[name].resolve() != source.resolve():
                raise UserError(
                    f"{str(found[name])!r} and {str(source)!r} would both be written as {name!r}: "
                    "colour them into folders of their own"
                )
            found[name] = source
    return [(source, name) for name, source in found.items()]


def _of_word(word: str, out: Path) -> Iterator[tuple[Path, str]]:
    """Yield the pictures of a file, folder or pattern, with their names below its folder."""
    from optjax.colourisation.photograph import SUFFIXES

    path = Path(word)
    try:
        if path.is_dir():
            inside = _walk(path, out.resolve())
            taken = [file for file in inside if file.suffix.lower() in SUFFIXES]
            if not taken:
                raise UserError(f"{word!r}: no pictures in this folder ({', '.join(SUFFIXES)})")
            left = sorted(
                {file.suffix.lower() or "no ending" for file in inside if file not in taken}
            )
            if left:
                print(f"{word}: not read: files ending in {', '.join(left)}", file=sys.stderr)
            yield from ((file, str(file.relative_to(path))) for file in taken)
        elif path.exists():
            yield path, path.name
        else:
            matches = sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else []
            if not matches:
                raise UserError(f"{word!r}: no such file or folder")
            for match in matches:
                yield from _of_word(match, out)
    except OSError as error:
        raise UserError(f"{word!r}: cannot be read ({error.strerror})") from error


def _walk(folder: Path, out: Path) -> list[Path]:
    """List the files below a folder that may be read, without hidden ones and the results."""
    listed = []

    def refuse(error: OSError) -> None:
        print(f"optjax: {error.filename!r}: cannot be read ({error.strerror})", file=sys.stderr)

    for where, folders, files in os.walk(folder, onerror=refuse):
        kept = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in kept if (Path(where) / name).resolve() != out]
        listed += [Path(where) / name for name in sorted(files) if not name.startswith(".")]
    return listed


def _model(given: str) -> Path:
    """Return the path of the model: the one given, or that in the cache."""
    path = Path(given) if given else _cached()
    if not given and not path.is_file():
        raise UserError(
            "there is no model yet: 'optjax train-colouriser' makes a demo in two minutes, with "
            "--data FOLDER/ one of your pictures; or give --model FILE"
        )
    return path


def _cached() -> Path:
    from optjax.support import cache

    return cache.folder() / "colouriser.safetensors"


def train(words: list[str]) -> int:
    """Train a model, and say how well it does."""
    groups = grouped(words)
    data = one(groups, "data") if "data" in groups else None
    out = Path(one(groups, "out")) if "out" in groups else _cached()
    net = one(groups, "net", "unet")
    # The demo's four photographs are soon learned.
    names = {"filters": 32, "bins": 64, "size": 64, "steps": 2000, "batch_size": 32, "seed": 0}
    names |= {} if data else {"filters": 16, "size": 32, "steps": 800}
    sizes = {name: number(groups, name, str(default)) for name, default in names.items()}
    rate = real(groups, "learning_rate", "0.003", 0.0)
    rebalance = switch(groups, "rebalance")
    folder = one(groups, "checkpoints") if "checkpoints" in groups else None
    known = [*names, "data", "out", "net", "learning_rate", "rebalance", "checkpoints"]
    for name in groups:
        raise UserError(f"unknown option '--{name.replace('_', '-')}'; {nearest(name, known)}")

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
    )
    print(out)
    return 0
