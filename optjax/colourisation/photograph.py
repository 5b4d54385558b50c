"""A photograph in a file: read upright and in sRGB, written whole or not at all.

Every byte read here may be hostile: a picture's size is checked before it is decoded.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optjax.support.errors import UserError
from optjax.support.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
LIMIT_PIXELS = 128_000_000
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
                if width * height > LIMIT_PIXELS:
                    raise UserError(
                        f"{str(path)!r}: {width} × {height} pixels, the limit is {LIMIT_PIXELS}; "
                        "shrink the picture"
                    )
                return _upright(picture)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"{str(path)!r}: more than the limit of {LIMIT_PIXELS} pixels; shrink the picture"
        ) from None
    except Exception as error:  # a decoder fed with hostile bytes raises nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"{str(path)!r}: not a readable picture ({reason or type(error).__name__}); repair or "
            "remove it"
        ) from error


def _upright(picture: "Image") -> Photograph:
    """Convert an open picture."""
    from PIL import ImageOps

    notes, dpi = [], picture.info.get("dpi")
    try:
        picture.seek(1)
        notes.append("the first frame of an animation")
    except EOFError:
        pass
    picture.seek(0)
    upright = ImageOps.exif_transpose(picture)
    exif = upright.getexif()
    alpha = None
    if upright.mode[0] in "IF":
        upright = _eight_bits(upright)
    elif upright.has_transparency_data:
        upright = upright.convert("RGBA")
        alpha = np.asarray(upright.getchannel("A"))
        alpha = None if alpha.min() == 255 else alpha
    pixels = np.asarray(_in_srgb(upright, picture.info.get("icc_profile"), notes))
    return Photograph(pixels, alpha, exif.tobytes() if len(exif) else b"", dpi, tuple(notes))


def _eight_bits(picture: "Image") -> "Image":
    """Convert grey of 16 bits to 8."""
    from PIL import Image

    if picture.mode == "F":
        raise ValueError("floats of unknown range: save it with 8 or 16 bits a channel")
    values = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
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
    """Write a photograph in the format of the name's ending.

    Raises:
      UserError: the folder cannot be written to; a picture too large for its format.
    """
    from PIL import Image

    picture = Image.fromarray(photograph.pixels)
    if photograph.alpha is not None:
        picture.putalpha(Image.fromarray(photograph.alpha))
    kind, options = _WRITTEN[path.suffix.lower()]
    kept = {"exif": photograph.exif, "dpi": photograph.dpi}
    content = io.BytesIO()
    try:
        picture.save(content, kind, **options, **{k: v for k, v in kept.items() if v})
        write_bytes(path, content.getvalue())
    except (OSError, ValueError) as error:  # a WebP has at most 16,383 pixels a side
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{str(path)!r}: cannot be written ({reason})") from error
