"""Pictures: their reading and splitting, and the refusal of hostile files in one line."""

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from optjax.colourisation import cifar10, pictures, sources
from optjax.colourisation.pictures import Pictures, load_pictures
from optjax.support import untrusted
from optjax.support.errors import UserError


def some_pictures(n, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def refusal(data, **options):
    with pytest.raises(UserError) as caught:
        load_pictures(str(data), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def npy_header(shape, dtype="|u1"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def save_members(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_demo_is_split_by_photograph_and_labelled():
    demo = load_pictures(None)
    assert demo.demo
    assert "demo" in demo.note
    assert not set(pictures.DEMO_TRAIN) & set(pictures.DEMO_VALIDATION)
    assert 1500 <= len(demo.train) <= 2500
    assert 300 <= len(demo.validation) <= 800
    train = {tile.tobytes() for tile in demo.train}
    assert not any(tile.tobytes() in train for tile in demo.validation)


def test_demo_tiles_are_windows_of_the_photograph():
    import skimage.data

    coffee = np.asarray(skimage.data.coffee())
    tiles = pictures.demo_tiles(("coffee",), 32)
    full = 12 * 18
    np.testing.assert_array_equal(tiles[19], coffee[32:64, 32:64])
    block = coffee[:32, :32].astype(float).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(tiles[full][:16, :16], np.rint(block))


def test_demo_needs_no_network(monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the demo opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    load_pictures(None)


def test_demo_at_other_sizes():
    demo = load_pictures(None, size=64)
    assert demo.size == (64, 64)
    with pytest.raises(UserError, match="larger than the demo"):
        load_pictures(None, size=1024)


@pytest.mark.parametrize("size", [0, -4, 30])
def test_size_must_be_a_multiple_of_four(size):
    with pytest.raises(UserError, match="multiple of 4"):
        load_pictures(None, size=size)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((2, 8, 8, 3)), "dtype float64"),
        (np.zeros((2, 8, 8), np.uint8), r"\(2, 8, 8\), expected \(n, H, W, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"expected \(n, H, W, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no picture"),
        (np.zeros((2, 8, 10, 3), np.uint8), "multiples of 4"),
        (np.zeros((2, 0, 8, 3), np.uint8), "multiples of 4"),
        (np.array([None]), "object"),
    ],
)
def test_pictures_refuse_a_wrong_array(tmp_path, array, match):
    good = some_pictures(2)
    with pytest.raises(UserError, match=match):
        Pictures(array, good, "x")
    with pytest.raises(UserError, match=match):
        Pictures(good, array, "x")
    np.savez(tmp_path / "x.npz", train=array, test=good)
    with pytest.raises(UserError, match=match):
        load_pictures(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("second", ["test", "validation"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_as_it_is_split(tmp_path, second, save):
    train, held_out = some_pictures(5), some_pictures(3, seed=1)
    save(tmp_path / "mine.npz", train=np.asfortranarray(train), **{second: held_out})
    loaded = load_pictures(str(tmp_path / "mine.npz"))
    np.testing.assert_array_equal(loaded.train, train)
    np.testing.assert_array_equal(loaded.validation, held_out)
    assert loaded.name == "mine"
    assert not loaded.demo


@pytest.mark.parametrize("first", ["train", "images"])
def test_npz_splits_a_sixth_off_by_the_seed(tmp_path, first):
    everything = some_pictures(30)
    np.savez(tmp_path / "x.npz", **{first: everything})
    splits = [load_pictures(str(tmp_path / "x.npz"), seed=seed) for seed in (0, 0, 1)]
    a, again, b = ({p.tobytes() for p in split.validation} for split in splits)
    assert a == again != b
    for split in splits:
        assert (len(split.train), len(split.validation)) == (25, 5)
        train, held_out = ({p.tobytes() for p in half} for half in (split.train, split.validation))
        assert not train & held_out
        assert train | held_out == {p.tobytes() for p in everything}


def test_npz_never_unpickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    content = npy_header((2, 8, 8, 3), "|O") + pickle.dumps(Bomb())
    path = save_members(tmp_path / "x.npz", {"train.npy": content})
    assert "object array" in refusal(path)
    assert not (tmp_path / "touched").exists()


def test_npz_refuses_a_zip_bomb(tmp_path):
    zeros = npy_header((22_000, 32, 32, 3)) + bytes(22_000 * 3072)
    path = save_members(tmp_path / "x.npz", {"train.npy": zeros}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert "zip bomb" in refusal(path)


def test_npz_refuses_what_its_header_cannot_hold(tmp_path):
    path = save_members(tmp_path / "x.npz", {"train.npy": npy_header((10**12, 32, 32, 3))})
    assert "limit" in refusal(path)
    path = save_members(tmp_path / "y.npz", {"train.npy": npy_header((9, 8, 8, 3)) + b"short"})
    assert "needs 1728 bytes, the file holds 5" in refusal(path)
    path = save_members(tmp_path / "z.npz", {"train.npy": npy_header((-1, 8, 8, 3))})
    assert "impossible shape" in refusal(path)


def test_npz_limit_on_all_members(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", train=some_pictures(4), unread=np.zeros(1000))
    monkeypatch.setattr(untrusted, "ARRAY_LIMIT_BYTES", 5000)
    assert "more than 5000 bytes" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage" * 100, b"\x93NUMPY\x01\x00"])
def test_npz_unreadable(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    assert "not a readable .npz" in refusal(tmp_path / "x.npz")


def test_npz_survives_any_truncation_and_any_flipped_byte(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", train=some_pictures(2), test=some_pictures(2))
    good = (tmp_path / "good.npz").read_bytes()
    rng = np.random.default_rng(0)
    bad = [good[:cut] for cut in rng.integers(0, len(good), 30)]
    for _ in range(120):
        mutated = bytearray(good)
        mutated[rng.integers(len(good))] ^= int(rng.integers(1, 256))
        bad.append(bytes(mutated))
    for content in bad:
        (tmp_path / "x.npz").write_bytes(content)
        try:
            load_pictures(str(tmp_path / "x.npz"))
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 (a harmless flip may be read)


@pytest.mark.parametrize("content", [b"not npy", b"\x93NUMPY\x03\x00" + bytes(40)])
def test_npz_member_is_no_array(tmp_path, content):
    path = save_members(tmp_path / "x.npz", {"train.npy": content})
    assert "not a readable .npy" in refusal(path)


def test_npz_member_names_are_looked_up_never_extracted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    buffer = io.BytesIO()
    np.save(buffer, some_pictures(6))
    members = {"../train.npy": buffer.getvalue(), "/train.npy": buffer.getvalue()}
    path = save_members(folder / "x.npz", members)
    assert "expected an array 'train' or 'images', found '../train', '/train'" in refusal(path)
    assert [p.name for p in tmp_path.rglob("*.npy")] == []


def test_npz_refuses_two_members_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("train.npy", b"a")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("train.npy", b"b")
    assert "share a name" in refusal(tmp_path / "x.npz")


def test_npz_sizes_that_differ(tmp_path):
    np.savez(tmp_path / "x.npz", train=some_pictures(2, 8), test=some_pictures(2, 12))
    assert "same H and W" in refusal(tmp_path / "x.npz")


def test_npz_of_one_picture_cannot_be_split(tmp_path):
    np.savez(tmp_path / "x.npz", images=some_pictures(1))
    assert "2 or more" in refusal(tmp_path / "x.npz")


def save_folder(folder, n=6):
    for i in range(n):
        suffix = (".png", ".JPG", ".jpeg", ".webp", ".bmp")[i % 5]
        Image.new("RGB", (24, 16), (40 * i, 10, 10)).save(folder / f"{i}{suffix}")


def test_folder_reads_every_format_and_splits_by_file(tmp_path):
    save_folder(tmp_path, 12)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    (tmp_path / "more").mkdir()
    with pytest.warns(UserWarning, match="not read: 'more', 'notes.txt'$"):
        loaded = load_pictures(str(tmp_path), size=8)
    chex.assert_shape([loaded.train, loaded.validation], [(10, 8, 8, 3), (2, 8, 8, 3)])


def test_folder_crops_the_centre(tmp_path):
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 200
    for i in range(2):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    loaded = load_pictures(str(tmp_path), size=8)
    assert (loaded.train == 200).all()


def test_folder_turns_grey_palette_and_transparent_pictures_to_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "LA", "1"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    with pytest.warns(UserWarning, match="transparent in places.*: 'LA.png', 'RGBA.png'$"):
        assert load_pictures(str(tmp_path), size=8).train.shape == (5, 8, 8, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_folder_names_the_truncated_picture(tmp_path, suffix):
    save_folder(tmp_path)
    picture = Image.fromarray(some_pictures(1, 64)[0])
    picture.save(tmp_path / f"bad.{suffix}")
    content = (tmp_path / f"bad.{suffix}").read_bytes()
    (tmp_path / f"bad.{suffix}").write_bytes(content[: len(content) // 2])
    assert f"bad.{suffix}': not a readable picture" in refusal(tmp_path, size=8)


def test_folder_names_the_undecodable_picture(tmp_path):
    save_folder(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"garbage")
    assert "bad.png" in refusal(tmp_path, size=8)


def test_folder_refuses_a_decompression_bomb(tmp_path):
    save_folder(tmp_path)
    Image.new("1", (12_000, 11_000)).save(tmp_path / "bomb.png")
    assert "bomb.png': 12000 × 11000 pixels, the limit is" in refusal(tmp_path, size=8)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    assert "bomb.png': more than the limit" in refusal(tmp_path, size=8)


def test_folder_reads_sixteen_bits(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / f"{i}.png")
    assert (load_pictures(str(tmp_path), size=8).train == 100).all()


def test_folder_leaves_out_links_that_lead_outside(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    save_folder(inside)
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "own.png").symlink_to(inside / "0.png")
    with pytest.warns(UserWarning, match="not read: 'link.png', 'loop.png'$"):
        loaded = load_pictures(str(inside), size=8)
    assert len(loaded.train) + len(loaded.validation) == 7


def test_folder_without_pictures(tmp_path):
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert "no pictures" in refusal(tmp_path)


def test_folder_too_large_in_all(tmp_path, monkeypatch):
    save_folder(tmp_path)
    monkeypatch.setattr(sources, "FOLDER_LIMIT_BYTES", 100)
    assert "exceed 100 bytes" in refusal(tmp_path, size=8)


def test_what_is_neither_file_nor_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.npz")
    assert "no such file" in refusal("cifar100")
    assert "cannot be opened" in refusal("x" * 5000)
    assert "no such file" in refusal("nul\0byte\n.npz")
    (tmp_path / "x.zip").write_bytes(b"")
    assert "expected cifar10" in refusal(tmp_path / "x.zip")
    (tmp_path / "d.npz").mkdir()
    assert "no pictures" in refusal(tmp_path / "d.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    assert "not a regular file" in refusal(tmp_path / "pipe.npz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    np.savez(tmp_path / "x.npz", train=some_pictures(6))
    (tmp_path / "x.npz").chmod(0)
    assert "not a readable .npz" in refusal(tmp_path / "x.npz")


RECORDS = 20


def cifar_records(seed, records=RECORDS):
    content = np.random.default_rng(seed).integers(0, 256, (records, 3073)).astype(np.uint8)
    content[:, 0] = np.arange(records) % 10
    return content


def save_cifar(path, files, folder="cifar-10-batches-bin/"):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def cifar_files():
    names = cifar10.TRAIN + cifar10.TEST
    return {name: cifar_records(seed).tobytes() for seed, name in enumerate(names)}


def cifar_refusal(path, **options):
    with pytest.raises(UserError) as caught:
        cifar10.read(path, **{"records_per_file": RECORDS, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cifar10_parser_reads_the_class(tmp_path, cifar_files):
    extra = {"batches.meta.txt": b"airplane\n", **cifar_files, "readme.html": b"x"}
    path = save_cifar(tmp_path / "c.tar.gz", extra)
    (train, held_out), note = cifar10.read(path, "horse", records_per_file=RECORDS)
    chex.assert_shape([train, held_out], [(10, 32, 32, 3), (2, 32, 32, 3)])
    assert "horse" in note
    record = cifar_records(1)[17]
    for row, column, channel in [(0, 0, 0), (3, 5, 1), (31, 30, 2)]:
        expected = record[1 + channel * 1024 + row * 32 + column]
        assert train[3, row, column, channel] == expected
    assert [p.name for p in tmp_path.iterdir()] == ["c.tar.gz"]


def test_cifar10_refusals(tmp_path, cifar_files):
    path = tmp_path / "c.tar.gz"
    short = {**cifar_files, "data_batch_2.bin": b"short"}
    assert "'data_batch_2.bin' holds 5 bytes" in cifar_refusal(save_cifar(path, short))
    missing = {k: v for k, v in cifar_files.items() if k != "test_batch.bin"}
    assert "'test_batch.bin' is missing" in cifar_refusal(save_cifar(path, missing))
    elsewhere = save_cifar(path, cifar_files, folder="../cifar-10-batches-bin/")
    assert "is missing" in cifar_refusal(elsewhere)
    mislabelled = cifar_records(0)
    mislabelled[4, 0] = 10
    bad = {**cifar_files, "data_batch_1.bin": mislabelled.tobytes()}
    assert "has label 10" in cifar_refusal(save_cifar(path, bad))
    huge = {"huge.bin": bytes(2 * 2**20), **cifar_files}
    assert "'cifar-10-batches-bin/huge.bin'" in cifar_refusal(save_cifar(path, huge))
    many = {**{f"{i}": b"" for i in range(200)}, **cifar_files}
    assert "not CIFAR-10's binary archive" in cifar_refusal(save_cifar(path, many))
    none = {k: bytes(RECORDS * 3073) for k in cifar_files}
    assert "no 'horse'" in cifar_refusal(save_cifar(path, none))
    assert "did you mean 'horse'" in cifar_refusal(path, class_name="hrose")


def test_cifar10_refuses_a_link_in_place_of_a_file(tmp_path, cifar_files):
    path = tmp_path / "c.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert "holds 0 bytes" in cifar_refusal(path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_cifar10_truncated(tmp_path, cifar_files, keep):
    path = save_cifar(tmp_path / "c.tar.gz", cifar_files)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert "not a readable .tar.gz" in cifar_refusal(path)


def test_cifar10_absent_or_a_directory(tmp_path):
    assert "not a readable .tar.gz" in cifar_refusal(tmp_path / "absent.tar.gz")
    assert "not a readable .tar.gz" in cifar_refusal(tmp_path)


def test_cifar10_local_archive_is_dispatched(tmp_path, cifar_files):
    path = save_cifar(tmp_path / "c.tar.gz", cifar_files)
    assert "'data_batch_1.bin' holds 61460 bytes, expected 30730000" in refusal(path)


def test_cifar10_unknown_class_before_any_download(monkeypatch):
    monkeypatch.setattr(cifar10, "URL", "never://opened")
    assert "known: 'airplane'" in refusal("cifar10", class_name="zebra")


def test_cifar10_without_network(tmp_path, monkeypatch):
    import socket

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{port}/c.tar.gz")
    assert "the download failed" in refusal("cifar10")


@pytest.mark.needs_data
def test_horses(data_folder):
    horses = load_pictures(str(data_folder / "cifar10_horses.npz"))
    shapes = [(5000, 32, 32, 3), (1000, 32, 32, 3)]
    chex.assert_shape([horses.train, horses.validation], shapes)
    assert not horses.demo
