"""Imports go down the list of layers and never up (the architecture of the package)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = [
    {"support"},
    {"run"},
    {"theory", "convnets"},
    {"accounting", "batch_size", "hypergradients", "scaling"},
    {"colourisation"},
    {"sweeps"},
    {"report"},
    {"tuning"},
    {"experiments"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def _room(path: Path) -> str:
    if path.is_relative_to(ROOT / "experiments"):
        return "experiments"
    return path.relative_to(ROOT / "optjax").parts[0].removesuffix(".py")


def _imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "optjax":
                yield from (f"optjax.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_import_goes_up():
    files = [*(ROOT / "optjax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    seen = 0
    for path in files:
        room = _room(path)
        if room in ("__init__", "__main__"):
            continue
        assert room in LEVEL, f"{path} is in no layer: add its room to the list"
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "optjax" or len(parts) < 2 or parts[1] not in LEVEL:
                continue
            seen += 1
            assert LEVEL[parts[1]] <= LEVEL[room], f"{path} imports {name}, a layer above it"
    assert seen > 20
