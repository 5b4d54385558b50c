"""The page of Markdown has every claim, in cells that a reader can take in."""

import re

import pytest

from optjax.cli import main as cli
from optjax.report.claims import LENGTHS, ORDER, Claim, write_claims
from optjax.report.markdown import CELL, markdown

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "memory_gib": 8.0,
    "system": "Linux x86_64",
    "backend": "cpu",
    "device": "cpu",
}


def claim(name, commit="abc", **fields):
    origin = {
        "command": "optjax run x --widths " + "8 " * 60,
        "commit": commit,
        "date": "2025-01-02T",
    }
    origin |= {"versions": {"jax": "1"}, "machine": MACHINE}
    texts = {"statement": "|w*| < _t_ " * 20, "source": "a | b" * 40, "measured": {"x": "9" * 300}}
    rest = {"tolerance": None, "n_runs": 1, "interval": None, "verdict": "holds", "evidence": ""}
    return Claim(name, **texts, **rest | fields, seconds=3.4, provenance=origin)


@pytest.fixture
def claims():
    return [
        *(claim(name) for name in ORDER),
        claim("new/refuted", verdict="refuted"),
        claim("new/waits", verdict="not run", needs="pictures: " + "optjax data cifar10 " * 9),
    ]


def test_each_claim_has_one_row_of_short_cells(claims):
    rows = [line for line in markdown(claims).splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert [row[0].strip(" `") for row in cells] == [c.id for c in claims]
    assert {len(row) for row in cells} == {7}
    assert max(len(cell.strip()) for row in cells for cell in row) <= CELL


def test_the_head_says_where_the_claims_come_from(claims):
    text = markdown(claims)
    assert "- Machine: a processor, 2 cores, Linux x86\\_64, 8 GiB\n" in text
    assert "- Commit: abc\n" in text
    assert "1 refuted (`new/refuted`)" in text
    assert "several commits" not in text
    more = markdown([*claims, claim("new/later", "def")])
    assert f"- Commit: abc ({len(claims)} claims); def (1 claims)\n" in more
    assert "several commits" in more


def test_the_command_writes_the_file(claims, tmp_path, capsys):
    results, file = str(tmp_path / "results"), tmp_path / "RESULTS.md"
    assert cli.main(["report", "--markdown", str(file), "--results", results]) == 2
    assert "run 'optjax reproduce' first" in capsys.readouterr().err
    write_claims(claims, tmp_path / "results/claims.json")
    assert cli.main(["report", "--markdown", str(file), "--results", results]) == 0
    assert file.read_text(encoding="utf-8") == markdown(claims)
    assert cli.main(["report", "--markdown", str(tmp_path), "--results", results]) == 2


def test_what_a_reader_sees_on_one_line_is_short(claims):
    for one in claims:
        for name, most in LENGTHS.items():
            assert 0 < len(getattr(one, name)) <= most
        assert len(one.outcome) <= LENGTHS["measured_short"]
    assert claims[-1].outcome.startswith("pictures: ")
    assert claim("a/b", needs="more").needs == ""
