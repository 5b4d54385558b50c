"""The page shows values of every kind."""

import pytest

from optjax.report.page import write_page

RECORD = {
    "name": "tiny",
    "title": "Why?",
    "demo": False,
    "figures": [],
    "claims": [],
    "command": "optjax run tiny",
    "seconds": 150.0,
    "commit": "abc",
    "date": "today",
}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, '<span class="none">–</span>'),
        (True, "yes"),
        (-1234.5678, "−1234.57"),
        ("1 < 2", "1 &lt; 2"),
        ([1, 2.5, "a"], "1, 2.5, a"),
        ([[1, 2], [3]], "[1, 2]; [3]"),
        ([1, [2, 3]], "1, 2, 3"),
        ([], ""),
        ({"x": None, "x_text": "nan"}, "<dl><dt>x_text</dt><dd>nan</dd></dl>"),
        ({"a": {"<b>": 1}}, "<dl><dt>a</dt><dd><dl><dt>&lt;b&gt;</dt><dd>1</dd></dl></dd></dl>"),
    ],
)
def test_a_value_is_shown(value, shown, tmp_path):
    page = write_page(tmp_path, [{**RECORD, "config": {"key": value}}]).read_text()
    assert f"<code>key</code></th><td>{shown}</td>" in page
    assert "2.5 min" in page


FIGURE = {"name": "line", "caption": "It falls. Dots: runs.", "files": [], "wide": True}
CLAIM = {
    "statement": "s", "source": 1, "measured": {"x": 2}, "tolerance": None, "n_runs": 1,
    "interval": None, "evidence": "tiny/line", "config": {},
}  # fmt: skip


def test_the_head_names_what_was_refuted_and_what_waits(tmp_path):
    (tmp_path / "figures/tiny").mkdir(parents=True)
    (tmp_path / "figures/tiny/line.svg").write_text("<svg/>")
    claims = [
        {**CLAIM, "id": "x/good", "verdict": "holds"},
        {**CLAIM, "id": "min-norm/bad", "verdict": "refuted", "plain_words": "It is so"},
        {**CLAIM, "id": "x/open", "verdict": "not run", "needs": "pictures: optjax data"},
    ]
    record = {**RECORD, "config": {}, "claims": claims, "figures": [FIGURE]}
    page = write_page(tmp_path, [record], ["later"]).read_text()
    head = page[: page.index("<main>")]
    assert '1 refuted</span>: <a href="#claim-min-norm-bad">min-norm/bad</a>' in head
    assert "x/good" not in head
    assert "1 not run</span>." in head
    assert "Not run yet: later." in head
    assert page.index("<h2>1 Optimisation</h2>") < page.index("<h2>Beyond the source</h2>")
    assert '<a href="#claim-min-norm-bad">It is so</a>' in page
    assert '<span data-head="needs">pictures: optjax data</span>' in page
    assert "<b>It falls. </b>Dots: runs." in page
