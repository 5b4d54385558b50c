"""The benchmarks run, save what they measured, and refuse what they cannot do in one line."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optjax.experiments.bench import __main__ as bench
from optjax.experiments.bench.measure import Entry, Side


@pytest.fixture(autouse=True)
def signals():
    """`main` takes SIGTERM for an interruption, as a process of its own may."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_the_cheap_benchmarks_leave_a_whole_record(tmp_path):
    # A process of its own: the suite's float64 and strict promotion are not what is timed.
    file = tmp_path / "new" / "bench.json"
    words = ["--quick", "--repeats", "2", "--only", "start-up", "--only", "sweep/batch-sizes"]
    words += ["--only", "accounting", "--only"]
    done = subprocess.run(
        [sys.executable, "-m", "optjax.experiments.bench", *words, "gradient", "--output", file],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "a program for each, by hand" in done.stdout
    record = json.loads(file.read_text())
    assert record["finished"]
    assert record["quick"]
    assert record["repeats"] == 2
    assert {"started", "commit", "load_average"} <= record.keys()
    assert {"python", "jax", "optjax", "torch"} <= record["versions"].keys()
    assert {"processor", "cores", "memory_gib", "backend", "device"} <= record["machine"].keys()
    names = [entry["name"] for entry in record["benchmarks"]]
    assert names[:3] == ["start-up/help", "start-up/import", "gradient"]
    assert names[3:] == ["sweep/batch-sizes", "accounting"]
    for entry in record["benchmarks"]:
        assert entry["reference"] in entry["sides"]
        assert entry["ratios"].keys() == entry["sides"].keys() - {entry["reference"]}
        for side in entry["sides"].values():
            assert len(side["values"]) == 2
            assert 0 < side["min"] <= side["median"] <= side["max"]
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]


def _entry(name, order, stop_at=None):
    clock = itertools.count(1)

    def side(label, rounds=None):
        def measure():
            now = next(clock)
            if now == stop_at:
                raise KeyboardInterrupt
            order.append(label)
            return float(now)

        return Side(label, measure, rounds)

    return Entry(name, "counts", "s", "A", lambda _: [side("A"), side("B"), side("slow", 1)])


def test_sides_take_turns_and_ratios_are_taken_within_a_round():
    order: list[str] = []
    entry = _entry("one", order)
    assert list(entry.rounds(2)) == [1, 2]
    assert order == ["A", "B", "slow", "A", "B"]
    ratios = entry.ratios()
    assert ratios["B"] == {"median": (2 + 5 / 4) / 2, "min": 5 / 4, "max": 2.0}
    assert ratios["slow"]["median"] == 3.0


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    entries = [_entry("one", []), _entry("two", [], stop_at=2)]
    monkeypatch.setattr(bench, "_chosen", lambda only, quick: entries)
    file = tmp_path / "bench.json"
    assert bench.main(["--repeats", "2", "--output", str(file)]) == 130
    record = json.loads(file.read_text())
    assert not record["finished"]
    assert [len(e["sides"]) for e in record["benchmarks"]] == [3, 1]
    assert "interrupted; what was measured is in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "swep"], "unknown benchmark 'swep'"),
        (["--repeats", "0"], "repeats is 0: expected at least 1"),
        (["--repeats", "two"], "--repeats"),
        (["--output", "/dev/null/bench.json"], "cannot write /dev/null/bench.json"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert bench.main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_peers_compute_what_our_networks_do():
    """Ours, on `jax.lax` and in torch: the same scores from the same weights."""
    import jax
    import numpy as np

    from optjax.colourisation.networks import MODELS
    from optjax.experiments.bench import nets

    try:
        import torch

        from optjax.experiments.bench.torch_nets import NETS
    except ModuleNotFoundError:
        torch, NETS = None, {}
    x = np.random.default_rng(0).uniform(size=(3, 8, 8, 1))
    for name, kind in MODELS.items():
        net = kind(filters=2, colours=3)
        variables = jax.jit(net.init)(jax.random.key(1), x)

        def scores(variables, x, net=net):
            return net.apply(variables, x, train=True, mutable=["batch_stats"])[0]

        ours = jax.jit(scores)(variables, x)
        with nets._lax_convolutions():
            # Another function, or the program above would answer from jit's cache.
            program = jax.jit(lambda variables, x, scores=scores: scores(variables, x))
            assert "conv_general_dilated" in str(jax.make_jaxpr(program)(variables, x))
            lax = program(variables, x)
        np.testing.assert_allclose(lax, ours, atol=1e-12)
        if torch is None:
            continue
        theirs = NETS[name](2, 3).double().train()
        layers = variables["params"]
        counts = {"Conv": 0, "ConvTranspose": 0, "BatchNorm": 0}
        with torch.no_grad():
            for module in theirs.modules():
                own = type(module).__name__.removesuffix("2d")
                if own not in counts:
                    continue
                layer = layers[f"{own}_{counts[own]}"]
                counts[own] += 1
                if own == "BatchNorm":
                    continue
                # Conv: HWIO to OIHW. Transposed: (k, k, out, in) to (in, out, k, k).
                weight = np.transpose(np.asarray(layer["kernel"]), (3, 2, 0, 1))
                module.weight.copy_(torch.from_numpy(weight.copy()))
                module.bias.copy_(torch.from_numpy(np.array(layer["bias"])))
            found = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        np.testing.assert_allclose(found.numpy().transpose(0, 2, 3, 1), ours, atol=1e-10)


def test_a_bench_heads_its_own_page(tmp_path, monkeypatch, capsys):
    from optjax.experiments.bench import measurements

    monkeypatch.chdir(tmp_path)
    entry = _entry("one", [])
    list(entry.rounds(2))
    made = bench.Bench([entry], 2, True, measurements.BENCH)
    made.save()
    assert measurements.main() == 0
    text = Path("results/measurements.md").read_text()
    assert "| one | A | 2.5 (1 to 4) | s |  |" in text
    assert "| one | B | 3.5 (2 to 5) | s | 1.62 (1.25 to 2) |" in text
    assert text.index("Your own bench") < text.index("The whole project")
    assert "Your own bench" not in Path("MEASUREMENTS.md").read_text()
    measurements.BENCH.write_text('{"benchmarks": 3}')
    assert measurements.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
