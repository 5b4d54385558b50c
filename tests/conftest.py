"""Every test runs in float64, with strict dtype promotion and rank promotion an error."""

import os
from importlib import metadata
from pathlib import Path

# Most of a test's time is compilation: the programs run briefly, and need no optimised code. Set
# before jax is imported; a test that wants other flags gives them to a process of its own.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    # The emitters of fusions take half of the time; newer versions have no others.
    + (
        "--xla_cpu_use_fusion_emitters=false"
        if metadata.version("jax").startswith("0.10.")
        else "--xla_disable_hlo_passes=cpu-instruction-fusion"
    ),
)

import tempfile

import jax
import pytest
import tyro  # noqa: F401 - it hashes all builtins as it is imported, among them a doctest's last `_`

# Tests compile many programs more than once. A folder a process: two might read what one writes.
_PROGRAMS = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Layouts of sweeps are remembered for a test alone, never in the user's cache."""
    monkeypatch.setenv("OPTJAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def data_folder() -> Path:
    """The folder that OPTJAX_DATA names, or a skip that says why."""
    folder = os.environ.get("OPTJAX_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("OPTJAX_DATA does not name a folder with the pictures")
    return Path(folder)


@pytest.fixture
def as_a_device(monkeypatch):
    """Lower the convolutions for the CPU as for any other platform; a function fixes the way."""
    from jax.interpreters import mlir

    from optjax.convnets import choice
    from optjax.convnets import conv as primitives

    rules = mlir._platform_specific_lowerings["cpu"]
    for primitive in (primitives._conv, primitives._to_input, primitives._to_kernel):
        monkeypatch.delitem(rules, primitive)
    jax.clear_caches()

    def fix(way):
        monkeypatch.setattr(choice, "way", lambda runs, platforms: way)

    yield fix
    jax.clear_caches()


@pytest.fixture
def float32():
    """As a user runs it: no float64."""
    with jax.enable_x64(False):
        yield
