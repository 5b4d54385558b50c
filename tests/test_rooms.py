"""Imports go down the list of layers and never up (the architecture of the package)."""

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = [
    {"support"},
    {"run"},
    {"theory", "convnets"},
    {"accounting", "batch_size", "hypergradients", "scaling"},
    {"sweeps"},
    {"colourisation"},
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


def test_no_name_stands_twice():
    """Classes by their name; modules, unless they are parts of an experiment or share a topic."""
    shared = {"__init__", "__main__", "run", "figures", "claims", "checks", "account"}
    shared |= {"one_step", "padding"}  # an experiment, and the mode or command of its topic
    classes, modules = collections.Counter(), collections.Counter()
    for path in [*(ROOT / "optjax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        modules[path.stem] += path.stem not in shared
        tree = ast.parse(path.read_text())
        classes.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    del classes["Config"]  # each experiment has its own
    twice = [name for name, count in (classes | modules).items() if count > 1]
    assert twice == [], f"{twice} stand twice: rename one"
