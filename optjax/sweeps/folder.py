"""A sweep's folder: opened to start or resume a sweep, or read."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optjax.support.errors import UserError
from optjax.support.fingerprint import difference
from optjax.support.machine import free_memory
from optjax.sweeps.checks import bytes_of_a_run, fits
from optjax.sweeps.processes import agreed
from optjax.sweeps.results import Results
from optjax.sweeps.store import Store, read_spec

if TYPE_CHECKING:
    import xarray


def opened(
    out: str | os.PathLike[str],
    spec: dict[str, Any],
    results: Results,
    each: int,
    halving: Any,
    overwrite: bool,
) -> Store:
    """Open the store of the sweep, in every process; it has a `dataset` where all is computed.

    Raises:
      UserError: as `sweep` says, in every process.
    """
    store, error, complete = None, None, False
    if jax.process_index() == 0:
        try:
            store = Store(out, overwrite=overwrite)
            complete = _continued(store, results, spec, halving is not None, overwrite)
            if not complete:
                fits(len(results), each, store.free(), "disk", ", or give another folder")
        except UserError as refused:
            error = refused
            if store is not None:
                store.close()
    failed, complete = agreed(error is not None, complete)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"the sweep in {str(out)!r} was refused: the first process says why")
    store = Store(out, writer=False) if store is None else store
    if complete and store.dataset is None:
        store.dataset = store.read_result()
    return store


def _continued(
    store: Store, results: Results, spec: dict[str, Any], compares: bool, overwrite: bool
) -> bool:
    """Take over what the folder holds; whether there is nothing left to compute."""
    old = store.spec
    if old is None or overwrite:
        store.begin(spec, overwrite=True)
        return False
    where = f"the folder {str(store.folder)!r} holds another {spec['kind']}"
    if old.get("kind") != spec["kind"]:
        raise UserError(
            f"the folder {str(store.folder)!r} holds a {old.get('kind')}, and this is a "
            f"{spec['kind']}: give another folder"
        )
    try:
        told = difference(old["identity"], spec["identity"])
        before = _ids_of(old)
        same = all(old[name] == spec[name] for name in ("axes", "columns", "seeds", "ids"))
        same &= all(a >= b for a, b in zip(old["steps"], spec["steps"], strict=False))
    except _DAMAGE as error:
        raise UserError(
            f"the sweep in {str(store.folder)!r} is damaged ({error!r}): start over "
            "(overwrite=True, --overwrite)"
        ) from None
    if told is not None:
        raise UserError(
            f"{where}: {told}; give another folder, or start over (overwrite=True, --overwrite)"
        )
    lost = before[results.find(before) < 0]
    if len(lost):
        raise UserError(
            f"{where}: {len(lost)} of its {len(before)} runs are not in this grid; add points or "
            "seeds to it, give another folder, or start over (overwrite=True, --overwrite)"
        )
    if len(before) < len(results) and compares:
        raise UserError(
            f"{where} with fewer runs, and Halving compares runs with each other: give another "
            "folder, or start over (overwrite=True, --overwrite)"
        )
    had = np.repeat(old["steps"], len(old["seeds"]))
    if spec["kind"] == "sweep" and np.any(had > results.steps[results.find(before)]):
        raise UserError(f"{where}: its runs have {had.max()} steps; ask for at least as many")
    store.dataset = store.read_result() if same else None
    if store.dataset is not None:
        return True
    store.begin(spec, overwrite=False)
    return False


def load_sweep(folder: str | os.PathLike[str]) -> "xarray.Dataset":
    """Load a sweep's folder: the result, or as much as was computed so far.

    Raises:
      UserError: no sweep is there, or it is damaged.
    """
    store = Store(folder, writer=False)
    if (whole := store.read_result()) is not None:
        return whole
    spec = store.spec or read_spec(folder)
    try:
        runs = int(np.prod([int(n) for n in spec["axes"].values()])) * len(spec["seeds"])
        every, steps = int(spec["record_every"]), [int(t) for t in spec["steps"]]
        fits(runs, bytes_of_a_run(max(steps) // every), free_memory(), "memory")
        if (
            len(steps) * len(spec["seeds"]) != runs
            or len(spec["ids"]) != runs
            or every < 1
            or min(steps) < 1
        ):
            raise ValueError("lengths that do not fit")
        results = Results(
            spec["axes"], spec["columns"], spec["seeds"], steps, every, _ids_of(spec),
            spec["rules"], spec["inner"], spec["kind"],
        )  # fmt: skip
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"the sweep in {str(folder)!r} is damaged ({error!r})") from None
    restore(store, results)
    results.reopen()
    return results.dataset()


_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def restore(store: Store, results: Results) -> None:
    """Read into the results what the log says.

    Raises:
      UserError: a frame that is whole and yet makes no sense.
    """
    for facts, arrays in store.frames():
        try:
            results.restore(facts, arrays)
        except _DAMAGE as error:
            raise UserError(
                f"the log in {str(store.folder)!r} is damaged ({error!r}): start over "
                "(overwrite=True, --overwrite)"
            ) from None


def _ids_of(spec: Mapping[str, Any]) -> np.ndarray:
    return np.array([int(name) for name in spec["ids"]], np.uint64)
