"""The way in which many runs are convolved: measured once, remembered, shown, never required."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from optjax.cli.main import main
from optjax.convnets import choice
from optjax.convnets.conv import conv
from optjax.convnets.window import Window

WINDOW = Window((4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)))
RUNS = choice.ConvolutionOfRuns(
    "conv", WINDOW, ((3, 2, 4, 4, 1), (3, 3, 3, 1, 2)), np.dtype("float32")
)


@pytest.fixture
def measuring(monkeypatch):
    """Measure whatever the size, in single calls; a list of all that was measured."""
    found, measure = [], choice._measure

    def noted(runs, device):
        found.append(runs)
        return measure(runs, device)

    monkeypatch.setattr(choice, "_WORTH_MEASURING", 0)
    monkeypatch.setattr(choice, "_SECONDS", 0.0)
    monkeypatch.setattr(choice, "_measure", noted)
    return found


def test_the_first_program_on_a_device_measures_and_later_ones_remember(as_a_device, measuring):
    """Also where the runs are laid over devices, inside a scan: the midst of several traces."""
    mesh = jax.make_mesh((1,), ("run",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 2, 4, 4, 1)), rng.normal(size=(3, 3, 3, 1, 2))

    def steps(x, w):
        one = jax.vmap(jax.grad(lambda w, x: jnp.sum(conv(x, w, WINDOW) ** 2)))
        return jax.lax.scan(lambda w, _: (w - 0.01 * one(w, x), None), w, length=2)[0]

    over = PartitionSpec("run")
    laid = jax.shard_map(steps, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    first = jax.jit(laid)(x, w)
    assert {runs.name for runs in measuring} == {"conv", "conv_to_kernel"}
    assert all(runs.dtype == np.float64 for runs in measuring)
    for row in choice.measured():
        assert set(row.ms) == set(choice.WAYS)
        assert row.way == min(row.ms, key=row.ms.__getitem__)
        assert row.runs == 3
    measuring.clear()
    jax.clear_caches()
    np.testing.assert_array_equal(jax.jit(laid)(x, w), first)
    assert measuring == []


def test_each_device_size_and_number_of_runs_is_measured_for_itself(measuring):
    more = RUNS._replace(shapes=((8, *RUNS.shapes[0][1:]), (8, *RUNS.shapes[1][1:])))
    for runs in (RUNS, more, RUNS._replace(dtype=np.dtype(jnp.bfloat16))):
        assert choice.way(runs, ("cpu",)) in choice.WAYS
    assert len(measuring) == len(choice.measured()) == 3
    assert choice.way(more, ("cpu",)) == choice.measured()[1].way


@pytest.mark.parametrize(
    ("platforms", "way"),
    [(("cuda",), "product"), (("tpu",), "grouped"), (("cpu", "cuda"), "product")],
)
def test_what_is_not_there_is_not_measured(measuring, platforms, way):
    assert choice.way(RUNS, platforms) == way
    assert measuring == []


def test_several_processes_and_small_work_take_the_default(measuring, monkeypatch):
    monkeypatch.setattr(choice, "_WORTH_MEASURING", RUNS.multiply_adds + 1)
    assert choice.way(RUNS, ("cpu",)) == choice.default(("cpu",))
    monkeypatch.setattr(choice, "_WORTH_MEASURING", 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert choice.way(RUNS, ("cpu",)) == choice.default(("cpu",))
    assert measuring == []


def test_a_way_that_fails_is_not_taken(measuring, monkeypatch):
    of_runs, failing = choice.of_runs, {"product"}

    def no_room(name, way, window):
        def fail(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

        return fail if way in failing else of_runs(name, way, window)

    monkeypatch.setattr(choice, "of_runs", no_room)
    assert choice.way(RUNS, ("cpu",)) in ("one by one", "grouped")
    failing.update(choice.WAYS)
    other = RUNS._replace(dtype=np.dtype(np.float16))
    assert choice.way(other, ("cpu",)) == choice.default(("cpu",))
    assert len(choice.measured()) == 1


def test_the_multiply_adds_of_each_primitive_are_counted():
    x, w, y = (3, 2, 4, 4, 1), (3, 3, 3, 1, 5), (3, 2, 4, 4, 5)
    for name, shapes in (
        ("conv", (x, w)),
        ("conv_to_input", (y, w)),
        ("conv_to_kernel", (x, y)),
    ):
        runs = RUNS._replace(name=name, shapes=shapes)
        assert runs.multiply_adds == 3 * 2 * 16 * 9 * 1 * 5


@pytest.mark.parametrize("text", ["{not json", "[1]", '{"a": 3, "b": {"way": []}}', "[" * 10_000])
def test_a_damaged_file_counts_as_empty(measuring, text, capsys):
    choice.MEASURED.file.parent.mkdir(parents=True, exist_ok=True)
    choice.MEASURED.file.write_text(text)
    assert main(["convolutions"]) == 0
    assert "nothing measured yet" in capsys.readouterr().out
    assert choice.way(RUNS, ("cpu",)) in choice.WAYS
    assert len(choice.measured()) == 1


def test_a_file_that_cannot_be_written_is_remembered_by_the_process(measuring, monkeypatch):
    monkeypatch.setenv("OPTJAX_CACHE", "/dev/null/nowhere")
    assert choice.way(RUNS, ("cpu",)) == choice.way(RUNS, ("cpu",))
    assert len(measuring) == 1


def test_the_table_is_shown(measuring, capsys):
    choice.way(RUNS, ("cpu",))
    assert main(["convolutions"]) == 0
    shown = capsys.readouterr().out
    assert "taken" in shown
    assert "milliseconds" in shown
    assert main(["convolutions", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["convolution"] == "conv 3x3 of 4x4, stride 1: 2x4x4x1 by 3x3x1x2 float32"
    assert main(["convolutions", "--jsn"]) == 2
