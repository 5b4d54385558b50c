"""The data that claims need: what there is, and the commands that make, fetch and check them."""

import hashlib
import io
import re
import shlex
import socket
import tarfile

import numpy as np
import pytest

from optjax.cli import data
from optjax.cli.main import main
from optjax.colourisation import cifar10
from optjax.colourisation.palette import kmeans_palette, load_palette
from optjax.colourisation.pictures import load_pictures
from optjax.report.claims import ORDER

RECORDS = 10


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of CIFAR-10's form with ten pictures a file, and its hash in place of the true."""
    path = tmp_path / "small.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for i, name in enumerate(cifar10.TRAIN + cifar10.TEST):
            content = np.full((RECORDS, cifar10.RECORD_BYTES), 20 * i, np.uint8)
            content[:, 0] = np.arange(RECORDS)
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            member.size = content.size
            tar.addfile(member, io.BytesIO(content.tobytes()))
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(cifar10, "HASH", f"md5:{digest}")
    read = cifar10.read
    monkeypatch.setattr(cifar10, "read", lambda path, name: read(path, name, RECORDS))
    return path


def save_pictures(path, seed=0):
    pictures = np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    np.savez(path, train=pictures[:4], validation=pictures[4:])


def test_the_table_names_claims_that_there_are_and_what_is_in_the_cache(capsys):
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert "not in the cache" in out
    claims = re.findall(r"(?:colourisation|scaling)/[a-z-]+", out)
    assert len(claims) > 3
    assert set(claims) <= set(ORDER)
    cifar10.cached().write_bytes(bytes(2_000_000))
    assert main(["data"]) == 0
    assert "in the cache, 2 MB" in capsys.readouterr().out


def test_a_class_of_an_archive_is_written_as_runs_read_it(archive, capsys):
    assert main(["data", "cifar10", "--archive", str(archive), "--out", "horses.npz"]) == 0
    out = capsys.readouterr().out
    assert "5 training and 1 validation pictures of 32 × 32, horse" in out
    assert "optjax run colourisation --data horses.npz" in out
    found = load_pictures("horses.npz")
    assert [picture.max() for picture in found.train] == [0, 20, 40, 60, 80]
    assert found.validation.shape == (1, 32, 32, 3)


def test_another_class_has_a_file_of_its_own(archive, tmp_path):
    assert main(["data", "cifar10", "--class", "ship", "--archive", str(archive)]) == 0
    assert (tmp_path / "cifar10-ship.npz").is_file()


def test_a_download_is_kept_and_shows_its_progress(archive, monkeypatch, capsys):
    import pooch

    class Local:
        def __init__(self, progressbar, chunk_size):
            self.progress = progressbar

        def __call__(self, url, output_file, pooch):
            self.progress.total = archive.stat().st_size
            self.progress.update(self.progress.total)
            with open(output_file, "wb") as file:
                file.write(archive.read_bytes())

    seen = []
    monkeypatch.setattr(pooch, "HTTPDownloader", Local)
    path = cifar10.fetch(lambda text, share: seen.append((text, share)))
    assert path == cifar10.cached()
    assert seen == [("0 MB downloaded", 1.0)]
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **options: None)  # a call would fail
    assert main(["data", "cifar10"]) == 0
    assert "next: optjax run colourisation --data cifar10-horse.npz" in capsys.readouterr().out


def test_an_archive_of_another_hash_is_refused(archive, capsys):
    with archive.open("ab") as file:
        file.write(b"more")
    assert main(["data", "cifar10", "--archive", str(archive)]) == 2
    assert "that of CIFAR-10's binary version; download it again" in capsys.readouterr().err


def test_a_palette_is_the_one_that_a_run_of_the_seed_makes(tmp_path, capsys):
    save_pictures(tmp_path / "mine.npz")
    words = ["data", "palette", "--data", "mine.npz", "--colours", "3", "--seed", "2"]
    assert main(words) == 0
    assert "--data mine.npz --palette palette3.npy --colours 3" in capsys.readouterr().out
    expected = kmeans_palette(load_pictures("mine.npz").train, 3, seed=2)
    np.testing.assert_array_equal(load_palette("palette3.npy", 3), expected)


def test_points_say_where_they_are_published_and_how_they_look(capsys):
    assert main(["data", "points"]) == 0
    out = capsys.readouterr().out
    assert "arXiv:2404.10102" in out
    for column in data.POINTS_COLUMNS.values():
        assert column in out


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("1e9,1e20,2.5\n" * 245, "as many points as published, in the published ranges"),
        ("1e9,1e20,2.5\n" * 3, "3 points: expected 245"),
        ("1000,1e20,2.5\n" * 245, "N of 245 points lies outside the published 5.73e+07"),
    ],
)
def test_points_of_a_file_are_checked(rows, says, tmp_path, capsys):
    (tmp_path / "points.csv").write_text("Model Size,Training FLOP,loss\n" + rows)
    assert main(["data", "points", "points.csv"]) == 0
    out = capsys.readouterr().out
    assert "N from column 'Model Size'" in out
    assert "not the published file" in out
    assert says in out


@pytest.mark.needs_data
def test_the_published_points_are_recognised(data_folder, capsys):
    assert main(["data", "points", str(data_folder / "chinchilla_points.csv")]) == 0
    out = capsys.readouterr().out
    assert "245 points" in out
    assert "byte for byte\nnext" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("cifar", "data takes cifar10, palette or points, got 'cifar'; did you mean 'cifar10'?"),
        ("cifar10 --class hrose", "did you mean 'horse'?"),
        ("cifar10 --klass horse", "unknown option '--klass'; did you mean 'class'?"),
        ("cifar10 --colours 3", "--colours is no option of 'optjax data cifar10'"),
        ("cifar10 --out horses.npy", "expected a name ending in .npz"),
        ("cifar10 --archive", "--archive takes one value, got 'none'"),
        ("cifar10 --archive absent.tar.gz", "'absent.tar.gz': no such file"),
        ("cifar10 --archive .", "'.': no such file"),
        ("palette", "data palette needs --data"),
        ("palette --data absent.npz", "no such file; expected cifar10, FILE.npz or FOLDER/"),
        ("palette --data mine.npz --colours 1", "--colours is 1: expected 2 to 65536"),
        ("palette --data mine.npz --colours 5000", "distinct colours; ask for fewer"),
        ("palette --data mine.npz --out folder.npy", "cannot write 'folder.npy': Is a directory"),
        ("points absent.csv", "cannot read 'absent.csv': No such file"),
        ("points mine.npz", "is no UTF-8 text"),
        ("points empty.csv", "has no column for loss"),
        ("points --all", "takes one FILE.csv and no options, got '--all'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, says, tmp_path, capsys):
    save_pictures(tmp_path / "mine.npz")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "empty.csv").write_text("Model Size,Training FLOP\n")
    assert main(["data", *shlex.split(words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("optjax: ")
    assert err.count("\n") == 1
    assert says in err


def test_no_network_is_one_line(monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{port}/c.tar.gz")
    assert main(["data", "cifar10"]) == 2
    assert "the download failed" in capsys.readouterr().err
