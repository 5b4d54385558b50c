"""Give a reader damaged and hostile files: each is read, or refused in one clear line.

python hostile.py READER COUNT SEED: COUNT files, each a valid one with a few edits; the process has
a gigabyte of memory to itself and ten seconds for a file. It leaves the file that broke it.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import optax
from hypothesis import strategies as st
from PIL import Image

import optjax as oj
from optjax.colourisation import cifar10, sources
from optjax.colourisation.colouriser import Colouriser
from optjax.colourisation.palette import load_palette
from optjax.colourisation.photograph import read_photograph
from optjax.experiments.which_solution import own_data
from optjax.report.claims import read_claims
from optjax.scaling import read_runs
from optjax.support import files
from optjax.support.errors import UserError
from optjax.sweeps import store as stored
from optjax.sweeps.states import States

SECONDS, BYTES, ROUND = 10, 1 << 30, 1000
TOKENS = (
    b"", b"\0", b"\xff" * 8, b'"', b"{", b"]", b",", b"-1", b"1e999", b"NaN", b"null", b"../../x",
    b"<script>", b"\r\n", b"99999999999999999999", b"[" * 2000, "é".encode(), b"\xed\xa0\x80",
)  # fmt: skip

EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "number", "cut", "drop", "twice", "token")),
        st.floats(0, 1, exclude_max=True, width=32),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=5,
)


def edited(content: bytes, edits) -> bytes:
    """Change bytes at places that are shares of the length."""
    for kind, share, value in edits:
        at = int(share * len(content))
        before, after = content[:at], content[at:]
        if kind == "flip" and after:
            content = before + bytes([after[0] ^ 1 << value % 8]) + after[1:]
        elif kind == "number":
            width = 1 << value % 4
            content = before + value.to_bytes(8, "little")[-width:] + after[width:]
        elif kind == "cut":
            content = before
        elif kind == "drop":
            content = before + after[1 + value % 64 :]
        elif kind == "twice":
            content = before + after[: value % 256] + after
        elif kind == "token":
            content = before + TOKENS[value % len(TOKENS)] + after
    return content


# ------------------------------------------------------------ valid contents, and what reads them


def _saved(save, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        save(path)
        return path.read_bytes()


def _csv():
    text = "Model Size,Training Tokens,loss\n1e6,2e7,3.5\n10M,200M,2.9\n1e8,2e9,\n"
    return [text.encode(), text.replace(",", ";").encode()], read_runs


def _npz():
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    both = [
        _saved(lambda p, s=save: s(p, train=pictures, test=pictures[:2]), "a.npz")
        for save in (np.savez, np.savez_compressed)
    ]
    return both, sources.read_npz


def _equations():
    X, t = np.eye(2, 3), np.ones(2)
    arrays = _saved(lambda p: np.savez(p, X=X, t=t), "a.npz")

    def read(path):
        zipped = path.read_bytes()[:2] == b"PK"
        return (own_data._npz if zipped else own_data._csv)(path, None)

    return [b"a,b,t\n1,2.5,3\n-1e3,0,1\n", b"y;a;b\n1;2;3\n", arrays], read


def _npy():
    kinds = (np.float64, np.float32)
    valid = [_saved(lambda p, k=kind: np.save(p, np.eye(3, dtype=k)), "a.npy") for kind in kinds]
    return valid, lambda path: load_palette(path, colours=3)


def _archive():
    import tarfile

    def save(path):
        with tarfile.open(path, "w:gz") as tar, tempfile.TemporaryDirectory() as folder:
            for name in cifar10.TRAIN + cifar10.TEST:
                file = Path(folder) / name
                file.write_bytes((b"\x07" + bytes(3072)) * 2)
                tar.add(file, f"{cifar10.FOLDER}/{name}")

    whole = _saved(save, "a.tar.gz")
    inside = zlib.decompress(whole, 31)

    def again(content, edits):  # what is inside is edited, or what is outside
        if edits[0][2] % 2:
            return edited(whole, edits)
        maker = zlib.compressobj(1, wbits=31)
        return maker.compress(edited(content, edits)) + maker.flush()

    return [inside], lambda path: cifar10.read(path, records_per_file=2), again


def _model():
    from optjax.colourisation import networks
    from optjax.colourisation.colouriser import variables_of

    net = networks.model("conv-transpose", filters=2, colours=3)
    zeros = optax.tree.zeros_like(variables_of(net))
    model = Colouriser("conv-transpose", 2, np.zeros((3, 2), np.float32), zeros, "a note")
    return [_saved(model.save, "a.safetensors")], Colouriser.load


def _pictures():
    grey, colour = Image.new("L", (9, 7), 90), Image.new("RGB", (9, 7), (200, 30, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    each = [
        _saved(lambda p: grey.save(p), "a.png"),
        _saved(lambda p: colour.save(p, exif=exif), "a.jpg"),
        _saved(lambda p: colour.convert("CMYK").save(p), "b.jpg"),
        _saved(lambda p: colour.save(p, compression="tiff_deflate"), "a.tiff"),
        _saved(lambda p: colour.save(p, lossless=True), "a.webp"),
        _saved(lambda p: grey.save(p, save_all=True, append_images=[grey]), "a.gif"),
        _saved(lambda p: colour.save(p), "a.bmp"),
    ]
    return each, read_photograph


def _netcdf():
    import xarray as xr

    small = xr.Dataset(
        {
            "loss": (("seed", "step"), np.arange(12.0).reshape(3, 4)),
            "name": ("seed", ["a", "b", "c"]),
        },
        {"seed": [0, 1, 2]}, {"config": json.dumps({"steps": 4})},
    )  # fmt: skip
    large = xr.Dataset({"loss": ("step", np.zeros(20_000))})
    return [files.netcdf(small), files.netcdf(large)], files.read_dataset


def _run():
    problem = oj.least_squares(np.eye(4, 3), np.arange(4.0))
    return oj.make_run(problem, optax.adam, 8, max_batch_size=2, record_every=2)


def _swept(folder):
    return oj.sweep(
        _run(), {"learning_rate": [0.01, 0.1]}, 2, out=folder, progress=lambda *_: None,
        checkpoint_seconds=0, chunk_steps=2,
    )  # fmt: skip


def _sweep(name, resumed=False):
    """A sweep's folder whose file `name` is edited; checksums are put right, mostly."""

    def made():
        results = []
        with (
            mock.patch.object(States, "read", lambda _, store, found: results.append(found)),
            mock.patch.object(stored.Store, "drop_state"),
            tempfile.TemporaryDirectory() as folder,
        ):
            _swept(folder)
            parts = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "lock"}
        parts.pop("result.nc", None)
        first = next(n for n in parts if n.startswith("state-") and n.endswith("frame"))
        which = first if name == "state" else name
        # As if it had been killed; a damaged spec is else taken from the log.
        kind = b"outcome" if name == "state" else b"spec"
        log = [p for p in _payloads(parts["records.log"]) if name == "records.log" or kind not in p]
        parts["records.log"] = b"".join(map(stored._framed, log))

        def again(content, edits):
            if edits[0][2] % 4 == 0:
                return edited(content, edits)
            if which == "sweep.json":
                return _signed(edited(content, edits))
            payloads = list(_payloads(content))
            which_one = edits[0][2] // 4 % len(payloads)
            payloads[which_one] = edited(payloads[which_one], edits)
            return b"".join(map(stored._framed, payloads))

        def read(path):
            folder = path.parent / "sweep"
            folder.mkdir(exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            for other, content in parts.items():
                (folder / other).write_bytes(content)
            (folder / which).write_bytes(path.read_bytes())
            if resumed:
                _swept(folder)
            elif name == "state":
                states = States()
                states.read(stored.Store(folder, writer=False), results[0])
                states.formations(list(states.placed))
            else:
                oj.load_sweep(folder)

        return [parts[which]], read, again

    return made


def _payloads(content):
    at, head = 0, stored._HEAD
    while at + head.size <= len(content):
        length = head.unpack(content[at : at + head.size])[2]
        yield content[at + head.size : at + head.size + length]
        at += head.size + length


def _signed(content):
    try:
        told = json.loads(content)
        del told["format"], told["crc32"]
        return json.dumps({"format": stored.FORMAT, "crc32": stored._crc(told), **told}).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return content


def _claims():
    from dataclasses import asdict

    from optjax.report.claims import Claim

    claim = Claim(
        id="a/b", statement="s", source="t", measured={"x": 1.0}, tolerance="1", n_runs=1,
        interval=[0.0, 1.0], verdict="holds", evidence="a/b",
    )  # fmt: skip
    rows = files.plain([asdict(claim)])
    return [json.dumps(rows).encode()], read_claims


def _record():
    from optjax.report import catalogue, page, runner

    module = catalogue.load(catalogue.find("padding"))
    with tempfile.TemporaryDirectory() as folder:
        runner.run_experiment("padding", module.Config(), folder, module=module)
        figures = Path(folder) / "figures" / "padding"
        parts = {file.name: file.read_bytes() for file in figures.iterdir()}

    def read(path):
        folder = path.parent / "figures" / "padding"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**parts, "record.json": path.read_bytes()}.items():
            (folder / name).write_bytes(content)
        page.write_page(path.parent, page.read_records(path.parent, ["padding"]))

    return [parts["record.json"]], read


OURS = {
    "CSV": _csv, "npz": _npz, "npy": _npy, "archive": _archive, "model": _model,
    "log": _sweep("records.log"), "spec": _sweep("sweep.json"), "state": _sweep("state"),
    "claims": _claims, "equations": _equations,
}  # fmt: skip
WRAPPED = {
    "picture": _pictures, "netCDF": _netcdf, "record": _record,
    "resumed": _sweep("state", resumed=True),
}  # fmt: skip
"""Of others' code, or as dear as a page or a sweep: these get a tenth of the files."""


def main(reader: str, count: int, seed: int) -> None:
    valid, read, *changed = {**OURS, **WRAPPED}[reader]()
    change = changed[0] if changed else edited
    around = Path(tempfile.mkdtemp(prefix="hostile-"))
    folder = around / "a" / "b"
    folder.mkdir(parents=True)
    path = folder / "input"
    outcomes = {"read": 0, "refused": 0}
    for content in valid:
        path.write_bytes(change(content, [("twice", 0.0, 1 << 8)]) if changed else content)
        read(path)
    pages = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages + BYTES, most))
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - for what is said of damage

    def once(which: int, edits) -> None:
        path.write_bytes(change(valid[which % len(valid)], edits))
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stderr(nowhere):
                read(path)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
        signal.alarm(0)

    for begin in range(0, count, ROUND):
        tried = hypothesis.given(st.integers(0, 63), EDITS)(once)
        tried = hypothesis.seed(seed + begin)(tried)
        hypothesis.settings(
            max_examples=min(ROUND, count - begin), database=None, deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
        )(tried)()  # fmt: skip
    known = {"input", "sweep", "figures", "report"}
    others = {p.name for f in (folder, folder.parent, around) for p in f.iterdir()}
    assert others <= known | {"a", "b"}, others
    shutil.rmtree(around)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"reader": reader, **outcomes, "peak GiB": round(used, 2)}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
