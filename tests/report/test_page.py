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


def test_a_long_mapping_folds(tmp_path):
    value = {f"key {i}": i for i in range(9)}
    page = write_page(tmp_path, [{**RECORD, "config": {"all": value}}]).read_text()
    more = "<details><summary>2 more</summary><dl><dt>key 7</dt><dd>7</dd>"
    assert f"<dt>key 6</dt><dd>6</dd></dl>{more}" in page
