"""The CPU in the part of a device: the primitives without their rules for the CPU."""

import jax
import pytest
from jax.interpreters import mlir

from optjax.convnets import choice
from optjax.convnets import conv as primitives


@pytest.fixture
def as_a_device(monkeypatch):
    """Lower the convolutions for the CPU as for any other platform; a function fixes the way."""
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
