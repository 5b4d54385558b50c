"""optjax sweep as it is typed: run, resumed, shown, and refused in one line."""

import json
import sys

import numpy as np
import pytest

import optjax as oj
from optjax.cli.main import main
from optjax.cli.sweep import _values

WORDS = "sweep least-squares --n 12 --d 4 --optimizer adam --learning-rate 1e-2:1e-1:log:2"
WORDS += " --batch-size 2,12 --seeds 2 --steps 20"


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "kept")


def test_a_sweep_is_run_shown_and_resumed(out, tmp_path, capsys):
    assert main([*WORDS.split(), "--out", out]) == 0
    said = capsys.readouterr().out
    assert "8 runs, 8 ended" in said
    assert "learning rate" in said
    assert said.splitlines()[-1].endswith("kept/index.html")
    found = oj.load_sweep(out)
    assert dict(found.sizes) == {"learning_rate": 2, "batch_size": 2, "seed": 2, "step": 20}
    page = (tmp_path / "kept" / "index.html").read_text()
    assert page.count("<figure>") == 2
    assert "http" not in page.replace("http://www.w3.org", "")
    for again in (["--resume", out], ["--show", out]):
        assert main(["sweep", *again]) == 0
        assert "8 runs, 8 ended" in capsys.readouterr().out
    (tmp_path / "kept").rename(tmp_path / "moved")
    assert main(["sweep", "--resume", str(tmp_path / "moved")]) == 0
    more = WORDS.replace("--seeds 2", "--seeds 3").split()
    assert main([*more, "--out", str(tmp_path / "moved")]) == 0
    assert "12 runs, 12 ended" in capsys.readouterr().out


def test_what_was_computed_so_far_is_shown(out, tmp_path, capsys, monkeypatch):
    import optax

    def killed(text, fraction):
        if fraction > 0.3:
            raise RuntimeError("killed")

    run = oj.make_run(oj.least_squares(np.eye(3), np.ones(3)), optax.sgd, 40)
    with pytest.raises(RuntimeError, match="killed"):
        oj.sweep(run, {"learning_rate": [0.1, 0.2]}, 2, out=out, chunk_steps=8, progress=killed)
    assert main(["sweep", "--show", out]) == 0
    said = capsys.readouterr().out
    assert "4 runs" in said
    assert "last loss" in said  # what ranks points that have not ended
    partial = oj.load_sweep(out)
    assert partial.loss.isel(step=7).notnull().all()
    assert partial.loss.isel(step=-1).isnull().all()
    assert main(["sweep", "--resume", out]) == 2
    assert "was not made by this command" in capsys.readouterr().err


OWN = """
import optax, optjax as oj
print("imported")
problem = lambda: oj.least_squares([[1.0, 2.0]], [1.0])
slow = lambda learning_rate: optax.sgd(learning_rate / 2)
"""


@pytest.mark.parametrize(
    ("problem", "optimizer", "again"),
    [
        ("mine:problem", "sgd", ("mine:problem", "")),
        ("least-squares", "mine:slow", ("", "--optimizer mine:slow")),
        ("mine:problem", "adam,mine:slow", ("mine:problem", "--optimizer mine:slow")),
    ],
)
def test_code_that_a_folder_names_is_named_again_to_resume(
    out, tmp_path, capsys, monkeypatch, problem, optimizer, again
):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    words = f"sweep {problem} --optimizer {optimizer} --learning-rate 0.1 --seeds 2 --steps 4"
    assert main([*words.split(), "--out", out]) == 0
    capsys.readouterr()
    sys.modules.pop("mine")
    named = [" ".join(part for part in (again[0], f"--resume {out}", again[1]) if part)]
    assert main(["sweep", "--resume", out]) == 2
    said = capsys.readouterr()
    assert "imported" not in said.out
    assert said.err.endswith(f"name it: optjax sweep {named[0]}\n")
    assert main(["sweep", *named[0].split()]) == 0
    sys.modules.pop("mine")


def test_networks_are_an_axis_and_any_metric_ranks(out, capsys):
    words = "sweep least-squares --n 32 --d 2,4 --optimizer sgd,adam --learning-rate 0.01,0.1"
    assert main([*words.split(), "--steps", "20", "--out", out, "--metric", "loss"]) == 0
    capsys.readouterr()
    found = oj.load_sweep(out)
    assert dict(found.sizes) == {
        "optimizer": 2, "d": 2, "learning_rate": 2, "seed": 1, "step": 20
    }  # fmt: skip
    for mode, best in (("min", found.loss[..., -1].min()), ("max", found.loss[..., -1].max())):
        assert main(["sweep", "--show", out, "--metric", "loss", "--best", mode]) == 0
        first = capsys.readouterr().out.splitlines()[4].split()
        assert first[3] == f"{float(best):.4g}"


def test_an_interrupt_says_how_to_go_on(out, capsys, monkeypatch, request):
    import signal

    from optjax.sweeps.progress import Meter

    # A shell in the background has it ignored, which a sweep respects.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    show, asked = Meter.show, []

    def interrupting(self, over):
        show(self, over)
        if not asked:
            asked.append(True)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Meter, "show", interrupting)
    assert main([*WORDS.split(), "--out", out, "--chunk-seconds", "0.001"]) == 130
    assert f"resume with: optjax sweep --resume {out}" in capsys.readouterr().err
    monkeypatch.setattr(Meter, "show", show)
    assert main(["sweep", "--resume", out]) == 0


def test_optimizers_draws_rules_and_a_users_own_problem(out, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine_problem.py").write_text(
        "import numpy as np, optax, optjax as oj\n"
        "def line(points: int = 8):\n"
        "    x = np.linspace(0, 1, points)\n"
        "    return oj.least_squares(np.stack([x, x**0], 1), 2 * x)\n"
        "def whole():\n"
        "    return oj.make_run(line(), optax.sgd, 12)\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["sweep", "mine_problem:line", "--points", "6", "--optimizer", "sgd,adam"]
    words += ["--learning-rate", "1e-3:1:log", "--draw", "3", "--steps", "60", "--seeds", "0,4"]
    assert main([*words, "--stop", "target:0.05,plateau:30", "--out", out]) == 0
    found = oj.load_sweep(out)
    assert dict(found.sizes) == {"point": 3, "seed": 2, "step": 60}
    assert set(found.optimizer.values) <= {"sgd", "adam"}
    assert main(["sweep", "mine_problem:whole", "--learning-rate", "0.1", "--out", out + "2"]) == 0
    assert main(["sweep", "mine_problem:wrong", "--out", out + "3"]) == 2
    assert "gives a int: expected a Problem or a Run" in capsys.readouterr().err
    sys.modules.pop("mine_problem", None)


def test_text_in_a_store_is_text_in_the_page(out, tmp_path, capsys):
    assert main([*WORDS.split(), "--out", out]) == 0
    (tmp_path / "kept" / "result.nc").unlink()
    file = tmp_path / "kept" / "sweep.json"
    spec = json.loads(file.read_text())
    spec["columns"]["batch_size"] = ["<script>alert(1)</script>", "b"] * 2
    file.write_text(json.dumps(spec))
    assert main(["sweep", "--show", out]) == 0
    assert "<script>" not in (tmp_path / "kept" / "index.html").read_text()


def test_values():
    assert _values("batch_size", ["1:64:log:7"], drawn=False) == [1, 2, 4, 8, 16, 32, 64]
    assert _values("momentum", ["0.5:0.9:lin:3"], drawn=False) == [0.5, 0.7, 0.9]
    assert _values("l2", ["0.1", "0.2"], drawn=False) == [0.1, 0.2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sweep", "sweep needs a PROBLEM"),
        ("sweep least-squares", "sweep needs --out DIR"),
        ("sweep least-square --out x", "did you mean 'least-squares'?"),
        ("sweep least-squares --out x", "sweep needs --optimizer"),
        ("sweep least-squares --optimizer adm --out x", "did you mean"),
        ("sweep least-squares --optimizer sgd --learning-rate 1 --out x", "sweep needs --steps"),
        ("sweep least-squares --n 0 --optimizer sgd --out x", "n is 0: expected at least 1"),
        (WORDS + " --eps_rot 0.9 --out x", "did you mean 'eps-root'"),
        (WORDS + " --batch-siz 3 --out x", "did you mean 'batch-size'"),
        (WORDS.replace("2,12", "2,13") + " --out x", "batch_size is 13: expected 1 to 12"),
        (WORDS.replace("log:2", "log") + " --out x", "how many? 1e-2:1e-1:log:8"),
        (WORDS.replace("log:2", "geo:2") + " --out x", "expected FROM:TO:log:COUNT"),
        (WORDS + " --stop targt:3 --out x", "did you mean 'target'?"),
        (WORDS + " --stop target:low --out x", "--stop got 'low'"),
        (WORDS + " --method sobol --out x", "--method goes with --draw N"),
        (WORDS + " --record-every 3 --out x", "record_every is 3: expected a divisor"),
        (WORDS + " --sampler epoch --out x", "did you mean 'epochs'"),
        (WORDS + " --layout all --out x", "unknown layout 'all'"),
        ("sweep --show nowhere", "no sweep in 'nowhere'"),
        ("sweep --resume nowhere", "no sweep in 'nowhere'"),
        ("sweep --show nowhere --seeds 3", "takes a folder, --metric and --best; --seeds is too"),
        ("sweep no_such_module:f --out x", "no_such_module does not import"),
        ("sweep json:f --out x", "no function 'f'"),
    ],
)
def test_a_mistake_is_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("optjax: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_help(capsys):
    assert main(["sweep", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: optjax sweep PROBLEM")
