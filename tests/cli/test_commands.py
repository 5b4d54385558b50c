"""The commands about networks, as they are typed."""

import json
import sys

import pytest

from optjax.cli.main import main


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "mine_nets.py").write_text(
        "import flax.linen as nn\n"
        "from flax import nnx\n"
        "class Small(nn.Module):\n"
        "    features: int\n"
        "    label: str = 'small'\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        return nn.Conv(self.features, (3, 3), strides=2)(x)\n"
        "class Line(nnx.Module):\n"
        "    def __init__(self, width=4, *, rngs):\n"
        "        self.layer = nnx.Linear(8, width, rngs=rngs)\n"
        "    def __call__(self, x):\n"
        "        return self.layer(x)\n"
        "made = Small(5)\n"
        "def helper():\n"
        "    pass\n"
    )
    (tmp_path / "broken_nets.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_nets"
    sys.modules.pop("mine_nets", None)


def test_the_symbolic_account_prints_the_sources_polynomials(capsys):
    assert main(["account", "pool-upsample", "--symbolic"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at_32 = lines[lines.index("at H = 32, W = 32") :]
    assert at_32[1].split("  ", 1)[1].strip() == "9·NC² + 9·NC·NF + 36·NF² + 9·NF·NIC"
    assert at_32[2].endswith(" 2304·NC + 2240·NF")
    assert at_32[3].endswith(" 9216·NC² + 2304·NC·NF + 1024·NC + 5760·NF² + 9216·NF·NIC + 1792·NF")
    assert any("H·W·(9·NC/4 + 35·NF/16)" in line for line in lines)
    assert lines[-1] == "for H a multiple of 4, W a multiple of 4"


def test_the_numeric_account_has_a_row_a_layer_and_totals(capsys):
    assert main(["account", "unet", "--batch", "10"]) == 0
    out = capsys.readouterr().out
    assert "ConvTranspose_1" in out
    assert "11,501,568" in out
    assert "56,856 (56,376 weights, 480 others)" in out
    assert "batch 10" in out


def test_json_is_for_machines(capsys):
    assert main(["account", "conv-transpose", "--filters", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["layers"]
    assert document["totals"]["weights"] == sum(row["weights"] for row in rows)
    assert rows[0]["output"] == [16, 16, 4]
    assert main(["account", "conv-transpose", "--symbolic", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["input"] == ["H", "W", "NIC"]
    assert document["multiples"] == {"H": 4, "W": 4}


def test_latex_and_receptive_fields(capsys):
    words = ["account", "pool-upsample", "--input", "32x32xNIC", "--filters", "NF", "--latex"]
    assert main(words) == 0
    assert "9 NF NIC" in capsys.readouterr().out
    assert main(["account", "pool-upsample", "--receptive"]) == 0
    assert "26 × 26" in capsys.readouterr().out
    assert main(["account", "pool-upsample", "--receptive", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["axes"][0]["size"] == 26


def test_a_users_own_classes(user_module, capsys):
    assert main(["account", f"{user_module}:Small", "--features", "6", "--input", "8x8x2"]) == 0
    assert "114 (108 weights, 6 others)" in capsys.readouterr().out
    assert main(["account", f"{user_module}:Small", "--features", "F", "--input", "HxWxC"]) == 0
    assert "9·C·F" in capsys.readouterr().out
    assert main(["account", f"{user_module}:Line", "--width", "3", "--input", "8"]) == 0
    assert "27 (24 weights, 3 others)" in capsys.readouterr().out
    assert main(["account", f"{user_module}:made", "--input", "8x8x2"]) == 0


def test_padding_lists_every_solution(capsys):
    words = ["padding", "--kernel", "5", "--stride", "2", "--in", "16", "--out", "32"]
    assert main([*words, "--transposed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"padding": 2, "output_padding": 1, "dilation": 1}
    ]
    assert main([*words, "--transposed", "--dilation", "all"]) == 0
    assert "kernel 5, stride 2, 16 → 32" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["account", "padding"])
def test_help_tells_the_options(command, capsys):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: optjax {command}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("account", "needs one MODEL"),
        ("account unett", "unknown MODEL 'unett'; did you mean 'unet'?"),
        ("account unet --input 32x3Hx1", "'3H' is neither a number nor a name"),
        ("account unet --input 33x32x1", "layer Conv_0: stride 2 does not divide size 33"),
        ("account unet --input", "--input takes one value, got 'none'"),
        ("account unet --symbolic 3", "--symbolic takes no value"),
        ("account unet --filter 3", "unknown option '--filter'; did you mean 'filters'?"),
        ("account unet --filters 1.5", "--filters is '1.5': expected a whole number"),
        ("account unet --filters 0", "layer Conv_0: features is 0: expected at least 1"),
        ("account unet --dtype float33", "--dtype is 'float33'"),
        ("account unet --batch many", "--batch is 'many': expected a whole number"),
        ("account unet --batch 0", "batch is 0: expected a positive whole number"),
        ("account unet --input lambdaxWx1", "'lambda' is neither a number nor a name"),
        ("account unet --symbolic --at 32x33", "W is 33: expected a positive multiple of 4"),
        ("account unet --symbolic --at 32", "expected a number for each of H, W"),
        ("account unet --symbolic --receptive", "--receptive needs numbers"),
        ("account no_such_module:Net", "no_such_module does not import (ModuleNotFoundError"),
        ("account broken_nets:Net", "broken_nets does not import (ModuleNotFoundError"),
        ("account mine_nets:Smal", "no 'Smal' there; did you mean 'Small'?"),
        ("account mine_nets:helper", "is no Flax module"),
        ("account mine_nets:Small", "Small wants arguments: features; give them by name"),
        (
            "account mine_nets:Small --features 2 --label x",
            "--label is of type str: numbers, true",
        ),
        ("account mine_nets:made --features 3", "MODEL is made already"),
        ("padding --kernel 5", "padding needs --in, --out"),
        ("padding --kernel 4 --in 8 --out 8", "change the kernel or the stride"),
        ("padding --kernel x --in 8 --out 8", "--kernel is 'x': expected a whole number"),
        ("padding --kernel 3 --in 8 --out 8 --strid 2", "did you mean 'stride'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(user_module, words, says, capsys):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("optjax: ")
    assert err.count("\n") == 1
    assert says in err
