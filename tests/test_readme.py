"""README and pages for users: their blocks run, their commands, links and figures are right."""

import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from optjax.cli.main import COMMANDS
from optjax.report.catalogue import find

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NAMES = [page.stem for page in ALL]

QUICK = {"list", "sweep", "account", "padding", "convolutions"}
"""Commands that are run as printed; the options of the others are looked up in their help."""


def _blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def _commands(page):
    """Split the page's shell blocks into the words of each command, without comments."""
    lines = "\n".join(_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _started(words, folder, **env):
    """Start Python in a folder, as a user would."""
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=os.environ | env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _ended(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    head = text[: text.rindex("\n## ")]
    assert len(head.split()) <= 700
    assert len(_blocks(README, "python")[0].strip().splitlines()) <= 22


# A page takes 8 to 20 s, mostly to compile; the README runs every time.
ALWAYS = ("README",)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.stem in ALWAYS else pytest.mark.slow, id=page.stem)
        for page in PAGES
    ],
)
def test_blocks_run_as_printed(page, tmp_path):
    """A block that begins with a file's name is that file; the others are one script."""
    script = []
    for block in _blocks(page, "python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / named[1]).write_text(block, encoding="utf-8")
        else:
            script.append(block)
    # Commands follow in the same process, which has imported jax.
    quick = [words[1:] for words in _commands(page) if words[0] == "optjax" and words[1] in QUICK]
    # A process joins others before it has used JAX: tests/faults/test_processes.py has it.
    quick = [words for words in quick if "--distributed" not in words]
    script += ["from optjax.cli.main import main", *(f"assert main({w!r}) == 0" for w in quick)]
    (tmp_path / "page.py").write_text("\n".join(script), encoding="utf-8")
    # The README's runs take longer than their compilation, which conftest.py makes short.
    out, err = _ended(
        _started(["page.py"], tmp_path, **({"XLA_FLAGS": ""} if page == README else {}))
    )
    if page == README:
        assert "COMPLETED" in out
        assert "batch_size" in out
    if page.stem == "hypergradients":
        assert "hypergrad: reverse" in err
        assert (tmp_path / "tuned.png").is_file()
    _run_scripts(page, tmp_path)


def _run_scripts(page, folder):
    """Run the page's scripts; those that name an address meet there, at a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        _started([re.sub(r"localhost:\d+", f"localhost:{port}", word) for word in words], folder)
        for words in ([w for w in words if w != "&"][1:] for words in _commands(page)
                      if words[0] == "python" and words[1] != "-m")
    ]  # fmt: skip
    for process in started:
        _ended(process)


@pytest.mark.parametrize("page", ALL, ids=NAMES)
def test_commands_exist(page, capsys):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in _commands(page):
        program, rest = words[0], words[1:]
        if program == "make":
            assert all(word in targets for word in rest if "=" not in word), words
        elif program == "optjax":
            _options_exist(rest, capsys)
        elif program.endswith("python") and rest[:1] == ["-m"]:
            assert importlib.util.find_spec(rest[1]), words
            assert all((ROOT / w).exists() for w in rest[2:] if "/" in w), words
        else:
            assert program in {"pip", "python", ".venv/bin/pre-commit"}, f"{words}: unknown"


def _options_exist(words, capsys):
    from optjax.cli.main import main

    assert words[0] in COMMANDS, words
    if words[0] in QUICK:
        return
    named = words[1:2] if words[0] == "run" else []
    assert all(find(name) for name in named)
    assert main([words[0], *named, "--help"]) == 0
    known = capsys.readouterr().out
    for option in words[1:]:
        if option.startswith("--"):
            assert option in known, f"{option} of {words}"


@pytest.mark.parametrize("page", ALL, ids=NAMES)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert ":" not in target, f"{target}: pages link to files of the checkout alone"
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), target


def _anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_headline_figures_are_those_of_the_results():
    results = ROOT / "RESULTS.md"
    if not results.is_file():
        pytest.skip("RESULTS.md is not there: the command that writes it has not been run")
    rows = re.findall(
        r"^\| `([\w/-]+)` \|(.*)\|$", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) == 5
    lines = results.read_text(encoding="utf-8").replace("−", "-").splitlines()
    for claim, cells in rows:
        *_, measured, verdict = (cell.strip().replace("−", "-") for cell in cells.split("|"))
        (line,) = [line for line in lines if line.startswith(f"| `{claim}` |")]
        for number in re.findall(r"\d(?:[\d.,]*\d)?(?:e-?\d+)?", measured):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d)", line), f"{number}: {line}"
        assert verdict in line
