"""A photograph in a file: read upright and in sRGB, written whole or not at all.

Every byte read here may be hostile: a picture's size is checked before it is decoded.
"""

import contextlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optjax.support.errors import UserError, one_line
from optjax.support.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
LIMIT_PIXELS = 128_000_000
LIMIT_SIDE = 65_535
_WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".png": ("PNG", {}),
}


@dataclass(frozen=True, eq=False)
class Photograph:
    """A picture as it is looked at.

    Attributes:
      pixels: uint8 (H, W, 3), sRGB, upright.
      alpha: uint8 (H, W); None where it is opaque.
      exif: its metadata, without the orientation; b"" for none.
      dpi: dots an inch, across and down; None if not said.
      notes: what was left out, in words.
    """

    pixels: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    exif: bytes = b""
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def read_photograph(path: Path) -> Photograph:
    """Read a picture of any mode: 16 bits a channel, grey, palette, CMYK, with alpha, rotated.

    Of an animation, the first frame. Colours with a profile are converted to sRGB.

    Raises:
      UserError: not a picture, truncated, too large, or of 32-bit floats.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (3, 2), 7).save(Path(folder) / "grey.png")
    ...     read_photograph(Path(folder) / "grey.png").pixels.shape
    (2, 3, 3)
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > LIMIT_PIXELS or max(width, height) > LIMIT_SIDE:
                    raise UserError(
                        f"{str(path)!r}: {width} × {height} pixels, the limit is {LIMIT_PIXELS}, "
                        f"{LIMIT_SIDE} a side; shrink the picture"
                    )
                return _upright(picture)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"{str(path)!r}: more than the limit of {LIMIT_PIXELS} pixels; shrink the picture"
        ) from None
    except Exception as error:  # a decoder fed with hostile bytes raises nearly anything
        raise UserError(
            f"{str(path)!r}: not a readable picture ({one_line(error)}); repair or remove it"
        ) from error


def _upright(picture: "Image") -> Photograph:
    """Convert an open picture."""
    from PIL import ImageOps

    notes: list[str] = []
    several = False
    with contextlib.suppress(Exception):  # a second picture may be broken
        several = bool(getattr(picture, "is_animated", False))
    if several:
        notes.append("the first of several pictures")
    exif = _exif(picture, notes)
    upright = ImageOps.exif_transpose(picture)
    alpha = None
    if upright.mode[0] in "IF":
        upright = _eight_bits(upright)
    elif upright.has_transparency_data:
        upright = upright.convert("RGBA")
        alpha = np.asarray(upright.getchannel("A"))
        alpha = None if alpha.min() == 255 else alpha
    pixels = np.asarray(_in_srgb(upright, picture.info.get("icc_profile"), notes))
    dpi = picture.info.get("dpi", ())
    sound = len(dpi) == 2 and all(1 <= float(number) <= 65_535 for number in dpi)
    return Photograph(
        pixels, alpha, exif, (float(dpi[0]), float(dpi[1])) if sound else None, tuple(notes)
    )


def _exif(picture: "Image", notes: list[str]) -> bytes:
    """Return what a picture says of itself, but for how its pixels are stored and turned."""
    from PIL import Image

    kept = Image.Exif()
    try:
        kept.load(picture.getexif().tobytes())
        for tag in [tag for tag in kept if tag in _OF_PIXELS]:
            del kept[tag]
        return kept.tobytes() if len(kept) else b""
    except Exception:  # written by anybody
        picture.info.pop("exif", None)
        notes.append("EXIF that cannot be read was left out")
        return b""


_OF_PIXELS = frozenset(
    (*range(254, 270), *range(273, 298), 301, *range(317, 340), 347, *range(512, 533), 34675)
)
"""TIFF's tags of how pixels are stored: size, strips, orientation, resolution, profile, …"""


def _eight_bits(picture: "Image") -> "Image":
    """Convert grey of 16 bits to 8."""
    from PIL import Image

    tags: Any = getattr(picture, "tag_v2", {})
    if not picture.mode.startswith("I;16") or tags.get(258, (16,)) != (16,) or tags.get(262) == 0:
        raise ValueError("neither 8 nor 16 bits a channel: save it with one of them")
    values = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _in_srgb(picture: "Image", profile: bytes | None, notes: list[str]) -> "Image":
    """Convert to RGB, by the colour profile where there is one that fits."""
    from PIL import ImageCms

    if not profile:
        return picture.convert("RGB")
    flat = picture if picture.mode in ("RGB", "CMYK", "L") else picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.profileToProfile(
            flat, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert found is not None
        return found
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append("a colour profile that does not fit was left out")
        return picture.convert("RGB")


def written_name(name: str) -> str:
    """Return the name under which a picture is written: of a kind that cannot be, as PNG.

    >>> written_name("cat.JPG"), written_name("cat.gif")
    ('cat.JPG', 'cat.png')
    """
    path = Path(name)
    return name if path.suffix.lower() in _WRITTEN else f"{path.stem}.png"


def write_photograph(photograph: Photograph, path: Path) -> None:
    """Write a photograph in the format of the name's ending; JPEG has no transparency.

    Raises:
      UserError: the folder cannot be written to; a picture too large for its format.
    """
    from PIL import Image

    picture = Image.fromarray(photograph.pixels)
    kind, options = _WRITTEN[path.suffix.lower()]
    if photograph.alpha is not None and kind != "JPEG":
        picture.putalpha(Image.fromarray(photograph.alpha))
    kept = {"exif": photograph.exif, "dpi": photograph.dpi}
    content = io.BytesIO()
    try:
        picture.save(content, kind, **options, **{k: v for k, v in kept.items() if v})
        write_bytes(path, content.getvalue())
    except Exception as error:  # an encoder, given metadata that anybody wrote
        raise UserError(f"{str(path)!r}: cannot be written ({one_line(error)})") from error
