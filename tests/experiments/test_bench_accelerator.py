"""The accelerator's benchmarks run at tiny sizes, keep to their time, and say what is missing."""

import json
import subprocess
import sys
import time

import pytest

from optjax.experiments.bench import accelerator, trainings
from optjax.experiments.bench.benchmark import Bench
from optjax.experiments.bench.measure import Entry, Side


def _quick(file, *words):
    # A process of its own: the suite's float64 and strict promotion are not what is timed.
    command = [sys.executable, "-m", "optjax.experiments.bench.accelerator", "--quick", *words]
    done = subprocess.run([*command, "--output", file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["finished"]
    return record, {entry["name"]: entry for entry in record["benchmarks"]}, done.stdout


def _check_training(entry, seeds):
    facts = entry["facts"]
    assert facts["seeds"] == seeds
    assert facts["pictures"] == seeds * 2 * 2 * 4  # epochs, batches, pictures of a batch
    taken = entry["sides"]["oj.sweep"]["median"]
    assert facts["pictures_a_second"] == pytest.approx(facts["pictures"] / taken)
    assert facts["trainings_a_second"] == pytest.approx(seeds / taken)
    assert facts["seconds_to_compile"] > 0
    assert facts["layout"]
    for part in ("of_matrix_peak", "of_copy_bandwidth"):
        assert 0 < facts[part] < 1


@pytest.mark.slow
def test_a_training_is_measured_against_the_limits_of_the_device(tmp_path):
    record, entries, shown = _quick(
        tmp_path / "a.json", "--only", "limits", "--only", "train/conv-transpose/2"
    )
    assert entries.keys() >= {"limits/copy", "limits/matrix", "train/conv-transpose/2"}
    assert entries["limits/matrix"]["sides"].keys() >= {"float32", "bfloat16"}
    _check_training(entries["train/conv-transpose/2"], 2)
    assert record["pictures"] == "8 pictures of noise"
    assert {"machine", "versions", "commit", "minutes", "protocol"} <= record.keys()
    assert record["target"] == [
        "64 trainings of 25 epochs: not run on this device (target 6 s on an H100 or H200)"
    ]
    assert record["target"][0] in shown


@pytest.mark.slow
def test_all_of_it_leaves_a_whole_record(tmp_path):
    record, entries, _ = _quick(tmp_path / "all.json")
    for name in trainings.NAMES:
        _check_training(entries[f"train/{name}/2"], 2)
    assert {"oj.sweep", "jit(vmap(run))"} == entries["least-squares"]["sides"].keys()
    assert {"bare run", "forward", "reverse"} <= entries["hypergradient/40"]["sides"].keys()
    if record["versions"]["torch"] == "absent":
        assert "torch is not installed" in entries["torch/conv-transpose/eager"]["missing"]
    else:
        assert entries["torch/conv-transpose/eager"]["facts"]["pictures_a_second"] > 0


class Clock:
    """A clock that only the sides move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def entry(self, name, takes, cost=0.0):
        def measure():
            self.now += takes
            return takes

        sides = [Side("A", measure)]
        return Entry(name, "counts", "s", None, lambda _: sides, cost=lambda: cost)


def test_what_does_not_fit_is_not_run_and_said_so(tmp_path, capsys):
    clock = Clock()
    entries = [clock.entry("a", 40), clock.entry("b", 30, cost=61), clock.entry("c", 10, cost=5)]
    bench = Bench(entries, 2, True, tmp_path / "b.json", seconds=100, clock=clock)
    bench.facts["protocol"] = ""
    bench.run()
    accelerator.show(bench)
    a, b, c = json.loads(bench.output.read_text())["benchmarks"]
    assert a["sides"]["A"]["values"] == [40, 40]
    assert b["missing"] == "not run: out of time (it takes about 61 s, 20 s are left)"
    assert not b["sides"]
    assert c["sides"]["A"]["values"] == [10]
    assert c["notes"] == ["c: 1 of 2 rounds fitted"]
    said = capsys.readouterr()
    assert b["missing"] in said.err
    assert "not run: out of" in said.out
    assert bench.facts["finished"]


def test_what_takes_too_long_is_broken_off_and_what_fails_does_not_end_the_rest(tmp_path):
    def fail():
        raise RuntimeError("no memory\nand a long dump")

    def entry(name, measure):
        return Entry(name, "counts", "s", None, lambda _: [Side("A", measure)])

    entries = [entry("a", fail), entry("b", lambda: 1.0), entry("c", lambda: time.sleep(60) or 1.0)]
    bench = Bench(entries, 1, True, tmp_path / "c.json", seconds=0.5)
    bench.run()
    assert bench.failed == ["a"]
    a, b, c = json.loads(bench.output.read_text())["benchmarks"]
    assert a["missing"] == "failed: RuntimeError: no memory"
    assert b["sides"]["A"]["values"] == [1.0]
    assert c["missing"] == "broken off: out of time"


def test_a_training_is_predicted_from_those_before():
    def training(name, seeds, earlier=()):
        return trainings.Training(
            name, seeds, "float32", trainings.QUICK, None, lambda _: None, list(earlier)
        )

    one, eight = training("unet", 1), training("unet", 8)
    assert one.cost() == 0
    one.preparing, one.seconds = 10.0, [3.0, 1.0, 2.0]
    assert training("unet", 8, [one, eight]).cost() == 10 + 2 * 2 * 8
    eight.preparing, eight.seconds = 20.0, [4.0]
    assert training("unet", 64, [one, eight]).cost() == 20 + 2 * 4 * 8
    assert training("conv-transpose", 1, [one, eight]).cost() == 10 + 2 * 2


def test_the_target_is_judged_on_the_whole_protocol_only(tmp_path):
    entry = Entry("train/unet/64", "", "s", None, lambda _: [])
    entry.facts["seeds"], entry.values["oj.sweep"] = 64, [5.0, 7.0, 5.5]
    bench = Bench([entry], 1, False, tmp_path / "d.json")
    bench.facts["protocol"] = str(trainings.TrainingSizes())
    assert accelerator.verdicts(bench)[0].endswith("5.5 s (target 6 s on an H100 or H200): met")
    entry.values["oj.sweep"] = [6.5]
    assert accelerator.verdicts(bench)[0].endswith("missed")
    entry.values.clear()  # broken off
    assert "not run" in accelerator.verdicts(bench)[0]
    entry.values["oj.sweep"] = [6.5]
    bench.facts["protocol"] = str(trainings.TrainingSizes(epochs=1))
    assert "not run" in accelerator.verdicts(bench)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,1"], "--seeds"),
        (["--epochs", "0"], "epochs is 0"),
        (["--minutes", "0"], "minutes is 0.0"),
        (["--only", "trian"], "unknown benchmark 'trian'"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert accelerator.main(["--quick", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
