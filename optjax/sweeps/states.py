"""Where runs under way stand: what is saved of them, so that they go on to the bit."""

from typing import Any, NamedTuple

import numpy as np

from optjax.support.errors import UserError
from optjax.sweeps.active_runs import NONE, ActiveRuns
from optjax.sweeps.layouts import Kept
from optjax.sweeps.programs import BatchLayout
from optjax.sweeps.results import RUN, Results
from optjax.sweeps.store import Store

PLACE = "place"
_FACTS = (*BatchLayout._fields, "haste", "step")
_MOST_PLACES = 1 << 24


class Placed(NamedTuple):
    """Where a run was: in which file, program and place, at which step."""

    file: str
    kept: Kept
    step: int
    place: int


class States:
    """The newest state of every run, as it was saved.

    Attributes:
      placed: run → where it was. leaves: run → its state's arrays; none at step 0, which its key
        gives. files: name → the runs in it.
    """

    def __init__(self) -> None:
        self.placed: dict[int, Placed] = {}
        self.leaves: dict[int, list[np.ndarray]] = {}
        self.files: dict[str, list[int]] = {}

    def read(self, store: Store, results: Results) -> None:
        """Read what a folder holds.

        Raises:
          UserError: a state that cannot be.
        """
        for name, facts, arrays in store.states():
            try:
                kept, step, places, leaves = _parsed(facts, arrays, len(results))
                runs = results.find(arrays[RUN]).tolist()
            except (KeyError, ValueError) as error:
                raise UserError(
                    f"a state in {str(store.folder)!r} is damaged ({error}): remove the state-* "
                    "files to compute its runs again"
                ) from None
            for row, run in enumerate(runs):
                newer = run not in self.placed or self.placed[run].step < step
                # A state whose records were lost is of no use.
                if run != NONE and newer and step <= results.done[run]:
                    self.placed[run] = Placed(name, kept, step, int(places[row]))
                    self.leaves[run] = [leaf[row] for leaf in leaves]
            self.files[name] = self.files.get(name, []) + runs

    def formations(self, runs: list[int]) -> list[tuple[Kept, int, np.ndarray]]:
        """Put runs back into their places: programs, steps and (places,) runs or NONE."""
        together: dict[tuple[str, Kept, int], list[int]] = {}
        for run in runs:
            together.setdefault(self.placed[run][:3], []).append(run)
        found = []
        for (_, kept, step), members in sorted(together.items(), key=lambda item: -item[0][2]):
            places = [self.placed[run].place for run in members]
            at = np.full(1 + max(places), NONE, np.int64)
            at[places] = members
            found.append((kept, step, at))
        return found


def save(store: Store, active: ActiveRuns, results: Results) -> None:
    """Save where the runs stand that have not ended."""
    # A start is its key's.
    runs, leaves = active.state() if active.step else (active.in_places(), [])
    going = (runs != NONE) & ~results.judged[runs]
    arrays = {f"leaf{i}": leaf[going] for i, leaf in enumerate(leaves)}
    arrays |= {RUN: results.ids[runs[going]], PLACE: np.flatnonzero(going)}
    values = (*active.programs.layout, active.programs.haste, active.step)
    store.save_state(active.name, arrays, **dict(zip(_FACTS, map(int, values), strict=True)))


def _parsed(
    facts: dict[str, str], arrays: dict[str, np.ndarray], count: int
) -> tuple[Kept, int, np.ndarray, list[Any]]:
    """Check what is read before anything is made of it; `count` runs there are."""
    batch, chunk, counts, haste, step = (int(facts[fact]) for fact in _FACTS)
    places, leaves = arrays[PLACE], [arrays[f"leaf{i}"] for i in range(len(arrays) - 2)]
    if any(len(rows) != len(arrays[RUN]) for rows in (places, *leaves)) or step < 0:
        raise ValueError("shapes that do not fit")
    if not 1 <= chunk <= batch <= _MOST_PLACES or batch % chunk or not 0 <= haste <= 2:
        raise ValueError(f"a layout of {chunk} in {batch}")
    distinct = np.unique(places)
    if len(distinct) != len(places) or not np.isin(distinct, np.arange(count + batch)).all():
        raise ValueError("places that cannot be")
    return Kept(BatchLayout(batch, chunk, bool(counts)), haste), step, places, leaves
