"""Which experiments there are, found without importing them."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optjax.report.claims import SECTIONS, section_of
from optjax.support.errors import UserError, nearest

_DEFAULT_PACKAGE = "optjax.experiments"
_TOPIC = re.compile(f'"({"|".join(topic for topics in SECTIONS.values() for topic in topics)})/')


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What can be known of an experiment without importing it.

    Args:
        name: of the file NAME.py, or of the folder NAME with its run.py.
        folder: where the experiments lie.
        module: its module's name below the folder.
        title: the first line of the module's docstring.
        doc: the docstring of its Config.
        cost: what the Config's docstring says after "Cost:", or "".
        topics: of its claims, the part of an id before the stroke.
    """

    name: str
    folder: Path
    module: str
    title: str
    doc: str
    cost: str
    topics: frozenset[str] = frozenset()

    @property
    def sections(self) -> set[str]:
        """The sections of the source that its claims belong to, by number or first word.

        >>> sorted(Experiment("a", Path(), "a", "", "", "", frozenset({"padding"})).sections)
        ['4', '4-5', '5']
        """
        found: set[str] = set()
        for topic in self.topics:
            first = section_of(topic).split()[0].lower().replace("–", "-")
            found |= {first, *first.split("-")}
        return found

    @property
    def seconds(self) -> float:
        """The cost in seconds where it can be read so, else infinity.

        >>> Experiment("a", Path(), "a", "", "", "2 min on two cores").seconds
        120.0
        """
        match = re.search(r"([\d.]+)\s*(s|sec|seconds?|min|minutes?|h|hours?)\b", self.cost)
        if not match:
            return float("inf")
        return float(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2][0]]


def experiments_folder() -> Path:
    """Find the folder that holds the experiments, in a checkout or installed."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the experiments are not installed; install optjax from its checkout")
    return Path(next(iter(spec.submodule_search_locations)))


def discover(folder: Path | None = None) -> dict[str, Experiment]:
    """Find a folder's experiments by name: NAME.py or NAME/run.py, with `Config` and `run`.

    Nothing is imported, so this is quick and cannot fail on an experiment's dependencies.
    """
    found = {}
    folder = folder or experiments_folder()
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/run.py")]):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except SyntaxError:
            continue
        body = {getattr(node, "name", ""): node for node in tree.body}
        config = body.get("Config")
        if not isinstance(config, ast.ClassDef) or not isinstance(body.get("run"), ast.FunctionDef):
            continue
        doc = ast.get_docstring(config) or ""
        cost = re.search(r"Cost:\s*(.+?)\s*(?:\n\s*\n|Expect:|$)", doc, re.DOTALL)
        module = ".".join(file.relative_to(folder).with_suffix("").parts)
        name = module.removesuffix(".run")
        title = (ast.get_docstring(tree) or name).splitlines()[0]
        said = " ".join(cost[1].split()).rstrip(".") if cost else ""
        files = file.parent.glob("*.py") if file.name == "run.py" else [file]
        ids = (_TOPIC.findall(each.read_text(encoding="utf-8")) for each in files)
        topics = frozenset(topic for each in ids for topic in each)
        found[name] = Experiment(name, folder, module, title, doc, said, topics)
    return found


def find(name: str, folder: Path | None = None) -> Experiment:
    """Find an experiment by its name; hyphens and underscores are the same."""
    known = discover(folder)
    wanted = name.replace("-", "_")
    if wanted not in known:
        raise UserError(f"unknown experiment {name!r}; {nearest(wanted, known)}")
    return known[wanted]


def choose(words: Sequence[str], folder: Path | None = None) -> dict[str, Experiment]:
    """Find the experiments of these names, or of these sections ("2", "4-5", "beyond").

    Raises:
      UserError: a word is neither.
    """
    known = discover(folder)
    sections = {word for e in known.values() for word in e.sections}
    found = {}
    for word in words:
        name = word.replace("-", "_")
        section = word.lower().replace("–", "-")
        if name not in known and section not in sections:
            raise UserError(
                f"unknown experiment {word!r}, and no section ({', '.join(sorted(sections))}); "
                f"{nearest(name, known)}"
            )
        found |= {n: e for n, e in known.items() if n == name}
        if name not in known:
            found |= {n: e for n, e in known.items() if section in e.sections}
    return found


def full_sizes(module: types.ModuleType) -> dict[str, Any]:
    """Return the fields of an experiment's Config at full size: its ``FULL``, where it has one."""
    return dict(getattr(module, "FULL", {}))


def load(experiment: Experiment) -> types.ModuleType:
    """Import an experiment afresh, whichever folder it lies in."""
    folder, package = experiment.folder, _DEFAULT_PACKAGE
    if folder.resolve() != experiments_folder().resolve():
        package = f"_optjax_experiments_{abs(hash(folder))}"
        parent = types.ModuleType(package)
        parent.__path__ = [str(folder)]
        sys.modules[package] = parent
    # Afresh, since an experiment may set JAX's options as it is imported.
    sys.modules.pop(f"{package}.{experiment.module}", None)
    importlib.invalidate_caches()
    return importlib.import_module(f"{package}.{experiment.module}")
