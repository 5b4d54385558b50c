"""The work of a sweep: what is computed, and how it is carried out."""

import dataclasses
from collections.abc import Callable
from typing import Any

from optjax.sweeps import layouts
from optjax.sweeps.groups import Group
from optjax.sweeps.recording import OnRecords
from optjax.sweeps.results import Results
from optjax.sweeps.stop_rules import Halving


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a sweep is carried out; changes no result beyond rounding."""

    devices: list[Any]
    layout: layouts.Arrangement = "auto"
    vmap_chunk: int | None = None
    chunk_steps: int | None = None
    chunk_seconds: float = 1.0
    checkpoint_seconds: float = 30.0
    memory: float | None = None


@dataclasses.dataclass
class Work:
    """What is to be carried out: groups of computations, and where their results go."""

    results: Results
    groups: list[Group]
    facts: Callable[[], dict[str, Any]]  # what makes it this sweep and no other
    rules: tuple[Any, ...] = ()  # see `stop_rules.checked`
    halving: Halving | None = None
    drop_diverged: bool = True  # whether a run leaves once it has diverged
    weighted: bool = False  # whether batches may be taken as counts
    bytes: int = 0  # of one run: its records, and the arrays kept at its end
    attrs: Callable[[], dict[str, Any]] = dict  # of the dataset
    keep_states: bool = False  # of runs that ended, so that they can be given more steps
    on_records: OnRecords | None = None
    describe: Callable[[], str] | None = None  # progress in words; by default the runs that ended
