"""The provenance of a result: its code, its commit, its versions, its machine."""

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

LIBRARIES = ("jax", "jaxlib", "optax", "flax", "numpy")
PACKAGE = Path(__file__).resolve().parents[1]
_DRAWING = ("figures", "claims")
_EXCLUDED = (
    "optjax.report",
    "optjax.support.console",
    "optjax.support.files",
    "optjax.support.provenance",
    "optjax.cli",
    "optjax.__main__",
)


def versions() -> dict[str, str]:
    """Return the versions of Python, of optjax and of the libraries that results depend on.

    >>> sorted(versions())
    ['flax', 'jax', 'jaxlib', 'numpy', 'optax', 'optjax', 'python']
    """
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("optjax", *LIBRARIES)
    }


def commit() -> str:
    """Return the commit of the checkout that this code runs from, "-dirty" if files differ.

    It is "unknown" outside a checkout of optjax, or without git.
    """
    try:
        # A virtual environment may lie inside some other repository.
        _git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        name = _git("rev-parse", "--short", "HEAD").strip()
        return name + ("-dirty" if _git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class Machine(TypedDict):
    """A computer and its accelerator."""

    processor: str
    cores: int | None
    memory_gib: float | None
    system: str
    backend: str
    device: str


class Provenance(TypedDict):
    """Where a number comes from."""

    command: str
    commit: str
    date: str
    versions: dict[str, str] | None
    machine: Machine | None


def machine() -> Machine:
    """Describe the computer and its accelerator, without the computer's name.

    >>> sorted(machine())
    ['backend', 'cores', 'device', 'memory_gib', 'processor', 'system']
    """
    import jax  # here, since the commands that measure nothing do not need it

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def code_hash(experiments: str | Path, module: str) -> str:
    """Take a fingerprint of all the code that an experiment's numbers depend on.

    It covers the experiment, every optjax module that it imports (and those that they import),
    and the versions of `LIBRARIES`. Comments, docstrings, `optjax.report`, and the experiment's
    functions that serve only its `figures` and `claims` are left out: they change no number.

    Args:
      experiments: the folder of experiments.
      module: the experiment's name in that folder.

    Returns:
      64 hexadecimal digits (sha256).
    """
    folder = Path(experiments).resolve()
    root = folder.joinpath(*module.split(".")).with_suffix(".py")
    sources = _closure([(f"optjax.experiments.{module}", root)], folder, prune=True)
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{text}\0".encode())
    for library in LIBRARIES:
        digest.update(f"{library}=={_version(library)}\0".encode())
    return digest.hexdigest()


def source_hashes(modules: Iterable[types.ModuleType]) -> dict[str, str]:
    """Take fingerprints of the modules' sources and of every optjax module that they import.

    Comments and docstrings are left out, and so are modules without a file.

    >>> import optjax.run.batching
    >>> "optjax.run.batching" in source_hashes([optjax.run.batching])
    True
    """
    named = [(m.__name__, getattr(m, "__file__", None)) for m in modules]
    files = [(name, Path(file)) for name, file in named if file]
    sources = _closure([r for r in files if r[1].suffix == ".py"], None, prune=False)
    return {
        name: hashlib.sha256(text.encode()).hexdigest()[:16]
        for name, text in sorted(sources.items())
    }


def _closure(
    roots: list[tuple[str, Path]], experiments: Path | None, *, prune: bool
) -> dict[str, str]:
    """Read the source of the roots and of the optjax modules they load, without docstrings."""
    done: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name, file = waiting.pop()
        if name in done:
            continue
        pruned = prune and (name, file) in roots
        done[name], targets = _read(name, file, file.stat().st_mtime_ns, pruned)
        for target in targets:
            waiting.extend(_files(target, experiments or file.parent))
    return done


@functools.lru_cache(maxsize=256)
def _read(name: str, file: Path, changed: int, prune: bool) -> tuple[str, tuple[str, ...]]:
    """Read a module's source without docstrings, and the names under optjax that it may load."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    if prune:
        _prune(tree)
    _strip_docstrings(tree)
    return ast.unparse(tree), tuple(_imports(tree, name, is_package=file.name == "__init__.py"))


def file_hash(path: str | Path) -> str:
    """Take a fingerprint of a file's bytes, or of a folder's file names, sizes and times."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            stat = file.stat()
            digest.update(
                f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode()
            )
    else:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True, timeout=20
    ).stdout


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _prune(tree: ast.Module) -> None:
    """Drop `figures`, `claims`, imports of these and the functions that only they use."""
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.ImportFrom) and {a.name for a in node.names} <= {*_DRAWING})
    ]
    functions = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    kept: set[str] = set()
    used = {"run"} | _names(node for node in tree.body if node not in functions.values())
    while fresh := (used & functions.keys()) - kept - set(_DRAWING):
        kept |= fresh
        used |= _names(functions[name] for name in fresh)
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name in kept
    ]


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def _strip_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A bare string is a docstring, or an attribute's: either way it does nothing.
            node.body = [
                child
                for child in node.body
                if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))
            ] or [ast.Pass()]


def _imports(tree: ast.Module, name: str, *, is_package: bool) -> Iterator[str]:
    """Yield the dotted names under optjax that a module may load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            up = node.level - (1 if is_package else 0)
            base = parts[: len(parts) - up] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif is_package and isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A package that loads its parts on first use names them in strings.
            text = node.value.lstrip(".")
            yield text if text.startswith("optjax") else f"{name}.{text}"


def _files(target: str, experiments: Path) -> Iterator[tuple[str, Path]]:
    """Yield the modules that importing `target` loads: itself and its parent packages."""
    parts = target.split(".")
    if parts[0] != "optjax" or target.startswith(_EXCLUDED):
        return
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        if parts[1:2] == ["experiments"]:
            base = experiments.joinpath(*parts[2:length]) if length > 1 else PACKAGE
        else:
            base = PACKAGE.joinpath(*parts[1:length])
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file() and all(part.isidentifier() for part in parts[:length]):
                yield name, file
                break
