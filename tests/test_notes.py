"""What the build notes name is there, and the page of measurements is that of its data."""

import pkgutil
import re
from pathlib import Path

from optjax.experiments.bench.measurements import noted, page

ROOT = Path(__file__).parent.parent
NOTES = (ROOT / "BUILD_NOTES.md").read_text(encoding="utf-8")


def test_the_notes_name_what_is_there():
    spans = re.findall(r"`([^`]+)`", NOTES)
    paths = [word for word in spans if "/" in word and " " not in word]
    names = re.findall(r"\boptjax(?:\.\w+)+", " ".join(spans))
    assert len(paths) > 10
    assert len(names) > 3
    for path in paths:
        assert any((ROOT / folder / path).exists() for folder in ("", "optjax")), path
    for name in names:
        pkgutil.resolve_name(name)


def test_the_notes_are_short():
    assert len(NOTES.split()) <= 3000


def test_the_page_of_measurements_is_that_of_its_data():
    written = (ROOT / "MEASUREMENTS.md").read_text(encoding="utf-8")
    assert written == page(noted()), "run make measurements"


def test_a_measurement_is_whole():
    fields = {"room", "name", "what", "command", "machine", "versions", "commit", "date"}
    for entry in noted()["measurement"]:
        assert {"room", "name", "date", "columns", "rows"} <= entry.keys()
        assert entry.keys() <= fields | {"columns", "rows", "notes"}
        assert {len(row) for row in entry["rows"]} == {len(entry["columns"])}
