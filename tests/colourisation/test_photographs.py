"""Photographs of every kind through `optjax colourise`, and files that are none."""

import io
import os
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms

from optjax.cli.main import main
from optjax.colourisation import networks
from optjax.colourisation.colouriser import Colouriser, guided, to_lab, to_rgb
from optjax.colourisation.photograph import read_photograph

SIZE = (37, 23)  # odd, wide


@pytest.fixture
def model(tmp_path, float32):
    """A network that is not trained, with strong colours."""
    net = networks.model("conv-transpose", filters=2, colours=3)
    variables = net.init(jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32))
    bins = np.array([[60, 40], [0, 50], [50, 0]], np.float32)
    path = tmp_path / "model.safetensors"
    Colouriser("conv-transpose", 2, bins, variables, "untrained").save(path)
    return path


def _gradient(channels):
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    return np.stack([(5 * x + 3 * y + 40 * c) % 256 for c in range(channels)], -1).astype(np.uint8)


def _srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _rotated(path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a cat"
    Image.fromarray(_gradient(3)).save(path, exif=exif, dpi=(72, 72))


def _sixteen(path):
    grey = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) * 70
    Image.fromarray(grey).save(path)


def _palette_clear(path):
    picture = Image.fromarray(_gradient(3)).quantize(16)
    picture.save(path, transparency=3)


def _animated(path):
    frames = [Image.fromarray(_gradient(3) + i).quantize(16) for i in (0, 9)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _tagged(path):
    tags = Image.Exif()
    tags[0x010E] = "a cat"
    Image.fromarray(_gradient(3)).save(path, exif=tags)


def _mirrored(path):
    exif = Image.Exif()
    exif[0x0112] = 2
    half = np.zeros((*SIZE[::-1], 3), np.uint8)
    half[:, :9] = 255
    Image.fromarray(half).save(path, exif=exif)


def _black_cmyk(path):
    Image.new("CMYK", SIZE, (0, 0, 0, 255)).save(path)


def _jpeg_with_alpha(path):
    Image.fromarray(_gradient(4)).save(path, "PNG")


def _two_in_one(path):
    """An MPO, as cameras write with a preview."""
    first, second = (Image.fromarray(_gradient(3) + i) for i in (0, 9))
    first.save(path, "MPO", save_all=True, append_images=[second])


def _endless_dots(path):
    tags = Image.Exif()
    tags[282], tags[283], tags[296] = 1e300, 0.0, 2
    Image.fromarray(_gradient(3)).save(path, exif=tags)


KINDS = {
    "camera.jpg": _two_in_one,
    "dots.tif": _endless_dots,
    "tagged.tif": _tagged,
    "mirrored.png": _mirrored,
    "black.jpg": _black_cmyk,
    "named.jpg": _jpeg_with_alpha,
    "rgb.jpg": lambda p: Image.fromarray(_gradient(3)).save(p, quality=95),
    "rotated.jpg": _rotated,
    "cmyk.jpg": lambda p: Image.fromarray(_gradient(4), "CMYK").save(p),
    "profile.png": lambda p: Image.fromarray(_gradient(3)).save(p, icc_profile=_srgb()),
    "badprofile.png": lambda p: Image.fromarray(_gradient(3)).save(p, icc_profile=b"none"),
    "grey.png": lambda p: Image.fromarray(_gradient(1)[..., 0]).save(p),
    "bits.png": lambda p: Image.fromarray(_gradient(1)[..., 0] > 99).save(p),
    "sixteen.png": _sixteen,
    "sixteen.tif": _sixteen,
    "alpha.webp": lambda p: Image.fromarray(_gradient(4)).save(p, lossless=True),
    "clear.png": _palette_clear,
    "animated.gif": _animated,
    "plain.bmp": lambda p: Image.fromarray(_gradient(3)).save(p),
    "one.png": lambda p: Image.new("RGB", (1, 1), (9, 200, 9)).save(p),
}


def _bomb(width=30_000, height=30_000):
    """A PNG that says it is large, in a few bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_every_kind_keeps_its_size_and_its_lightness(model, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "below").mkdir(parents=True)
    for name, write in KINDS.items():
        write(photos / name)
    KINDS["rgb.jpg"](photos / "below/deep.jpg")
    (photos / "notes.txt").write_text("no picture")
    os.mkfifo(photos / "pipe.jpg")  # whoever opens it waits for ever
    words = [str(photos), "--out", str(out), "--model", str(model), "--work-size", "32"]
    assert main(["colourise", *words]) == 0
    said = capsys.readouterr()
    assert "21 coloured, 0 kept, 0 failed" in said.out
    assert "not read: files ending in .txt" in said.err
    assert "tagged.tif': " not in said.err
    assert "camera.jpg': the first of several pictures" in said.err
    assert "animated.gif': the first of several pictures" in said.err
    assert "badprofile.png': a colour profile that does not fit was left out" in said.err
    assert (out / "below/deep.jpg").is_file()
    for name in KINDS:
        stem, ending = name.split(".")
        before = read_photograph(photos / name)
        after = read_photograph(out / (name if ending not in ("gif", "bmp") else f"{stem}.png"))
        assert after.pixels.shape == before.pixels.shape
        light = [to_lab(p.pixels).light for p in (before, after)]
        # JPEG and WebP round.
        assert np.median(np.abs(light[0] - light[1])) < 1.5, name
        if before.alpha is not None and ending != "jpg":
            np.testing.assert_array_equal(after.alpha, before.alpha)
    # By other means than ours: which side is white, what is black, how light 16 bits are.
    white = np.asarray(Image.open(photos / "mirrored.png").convert("L"))
    assert white[0, 0] == 255
    seen = read_photograph(out / "mirrored.png").pixels.astype(int)
    assert seen[:, -5:].mean() > 200 > 60 > seen[:, :5].mean()
    assert read_photograph(photos / "black.jpg").pixels.max() < 40
    deep = np.asarray(Image.open(photos / "sixteen.tif")).astype(float) / 257
    assert np.abs(read_photograph(photos / "sixteen.tif").pixels[..., 1] - deep).max() <= 1
    with Image.open(out / "tagged.tif") as tagged:
        assert tagged.getexif()[0x010E] == "a cat"
    with Image.open(out / "rotated.jpg") as turned:
        assert turned.size == SIZE[::-1]
        assert (turned.getexif()[0x010E], turned.getexif().get(0x0112)) == ("a cat", None)
    assert to_lab(read_photograph(out / "grey.png").pixels).chroma.mean() > 10


def test_what_is_there_stays_and_one_beside_the_other(model, tmp_path, capsys):
    KINDS["alpha.webp"](tmp_path / "a.webp")
    words = ["colourise", str(tmp_path / "*.webp"), "--out", str(tmp_path / "out")]
    words += ["--model", str(model), "--work-size", "16"]
    assert main(words) == 0
    first = (tmp_path / "out/a.webp").read_bytes()
    assert main([*words, "--side-by-side"]) == 0
    assert "0 coloured, 1 kept" in capsys.readouterr().out
    assert (tmp_path / "out/a.webp").read_bytes() == first
    assert main([*words, "--side-by-side", "--overwrite"]) == 0
    assert read_photograph(tmp_path / "out/a.webp").pixels.shape == (SIZE[1], 2 * SIZE[0], 3)


def test_the_photographs_themselves_are_never_written_over(model, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    KINDS["rgb.jpg"](photos / "a.jpg")
    before = (photos / "a.jpg").read_bytes()
    for given in (photos, photos / "a.jpg"):
        words = ["colourise", str(given), "--out", str(photos), "--model", str(model)]
        assert main([*words, "--overwrite"]) == 2
        assert "--out holds the photograph 'a.jpg' itself" in capsys.readouterr().err
    assert (photos / "a.jpg").read_bytes() == before


BROKEN = {
    "zero.png": b"",
    "long.png": _bomb(100_000, 1),
    "text.jpg": b"not a picture",
    "bomb.png": _bomb(),
}


def test_a_broken_picture_is_one_line_and_the_others_are_done(model, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in BROKEN.items():
        (photos / name).write_bytes(content)
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    (photos / "cut.png").write_bytes(buffer.getvalue()[:5000])
    KINDS["rgb.jpg"](photos / "good.jpg")
    words = [str(photos), "--out", str(tmp_path / "out"), "--model", str(model)]
    assert main(["colourise", *words, "--work-size", "16"]) == 1
    said = capsys.readouterr()
    assert "1 coloured, 0 kept, 5 failed" in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("optjax: ")]
    assert len(lines) == 5
    for name in (*BROKEN, "cut.png"):
        assert sum(name in line for line in lines) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.jpg"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--out takes one value"),
        (["--out", "o"], "needs photographs"),
        (["none.jpg", "--out", "o"], "no such file or folder"),
        (["/dev/null", "--out", "o"], "no such file or folder"),
        (["a.png", "--out", "o"], "there is no model yet: 'optjax train-colouriser'"),
        (["a.png", "--out", "o", "--model", "a.png"], "not a model of 'optjax train-colouriser'"),
        (["a.png", "--out", "o", "--model", "gone"], "cannot be read (No such file"),
        (["a.png", "--out", "o", "--work-size", "2048"], "--work-size is 2048: expected a multip"),
        (["a.png", "--out", "o", "--saturation", "1e9"], "expected a number from 0 to 10"),
        (["--side-by-side", "a.png", "--out", "o"], "--side-by-side takes no value, got 'a.png'"),
        (["a.png", "--out", "o", "--work-size", "30"], "--work-size is 30: expected a multiple"),
        (["a.png", "--out", "o", "--temperature", "0"], "--temperature is '0': expected a number"),
        (["a.png", "--out", "o", "--tint", "1"], "unknown option '--tint'"),
        (["a.png", "b/a.png", "--out", "o"], "would both be written as 'a.png'"),
    ],
)
def test_a_mistake_is_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/a.png"):
        KINDS["grey.png"](tmp_path / name)
    assert main(["colourise", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("change", ["filters", "many", "endless", "net", "cut", "flip"])
def test_a_model_of_another_architecture_or_damaged_is_one_line(model, change, tmp_path, capsys):
    KINDS["grey.png"](tmp_path / "a.png")
    content = model.read_bytes()
    swaps = {"filters": (b'filters\\": 2', b'filters\\": 4'), "net": (b"conv-transpose", b"unet")}
    swaps |= {"many": (swaps["filters"][0], b'filters\\": 999999999')}
    swaps |= {"endless": (swaps["filters"][0], b'filters\\": Infinity')}
    if change in swaps:
        old, new = swaps[change]
        assert old in content
        size = int.from_bytes(content[:8], "little") + len(new) - len(old)
        content = size.to_bytes(8, "little") + content[8:].replace(old, new, 1)
    else:
        content = content[:-40] if change == "cut" else content[:9] + b"\xff" + content[10:]
    model.write_bytes(content)
    words = [str(tmp_path / "a.png"), "--out", str(tmp_path / "o"), "--model", str(model)]
    assert main(["colourise", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_lab_is_there_and_back_again():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    back = to_rgb(to_lab(pixels))
    assert np.abs(back.astype(int) - pixels).max() <= 1


def test_colours_follow_the_edges_of_the_light():
    light = np.zeros((16, 16), np.float32)
    light[:, 8:] = 80
    chroma = np.repeat(light[..., None], 2, axis=-1) / 2
    slope, offset = guided(light, chroma)
    np.testing.assert_allclose(slope * light[..., None] + offset, chroma, atol=0.5)


@pytest.mark.slow
def test_a_model_is_trained_on_a_folder_and_used(tmp_path, capsys, float32):
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        noise = rng.integers(0, 256, (32, 32, 1), np.uint8)
        Image.fromarray(np.concatenate([noise, noise // 2, noise // 4], -1)).save(
            folder / f"{i}.png"
        )
    words = ["--data", str(folder), "--size", "16", "--filters", "4", "--bins", "4"]
    words += ["--steps", "40", "--batch-size", "4", "--out", str(tmp_path / "m")]
    words += ["--checkpoints", str(tmp_path / "kept"), "--rebalance"]
    assert main(["train-colouriser", *words]) == 0
    first = (tmp_path / "m").read_bytes()
    assert main(["train-colouriser", *words]) == 0  # from the folder
    assert (tmp_path / "m").read_bytes() == first
    assert "% of the pixels in their bin" in capsys.readouterr().out
    words = [str(folder / "0.png"), "--out", str(tmp_path / "o"), "--model", str(tmp_path / "m")]
    assert main(["colourise", *words]) == 0
    assert to_lab(read_photograph(tmp_path / "o/0.png").pixels).chroma.mean() > 5  # reddish


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "0"], "size 0: expected a positive multiple of 4"),
        (["--net", "vgg"], "unknown net 'vgg'"),
        (["--out", "."], "is a folder: expected a file's name"),
        (["--bins", "1"], "bins is 1: expected a whole number of at least 2"),
        (["--learning-rate", "0"], "learning_rate is 0.0: expected a number above 0"),
        (["--batch-size", "99999"], "batch_size is 99999: expected 1 to"),
        (["--tint", "1"], "unknown option '--tint'"),
    ],
)
def test_a_mistake_in_a_training_is_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train-colouriser", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
