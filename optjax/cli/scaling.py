"""optjax scaling: fit a scaling law to one's own runs, or spend a budget by published ones."""

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optjax.cli.scaling_tables import contradiction_lines, print_allocations, print_fit
from optjax.cli.words import grouped, number, one, switch
from optjax.support.errors import UserError, nearest
from optjax.support.keys import make_key

if TYPE_CHECKING:
    from optjax.scaling import Allocation, Bootstrap, Fit, Sensitivity

USAGE = """\
usage: optjax scaling fit RUNS.csv [--law hoffmann] [--drop-highest 0] [--bootstraps 4000]
                                   [--columns N=NAME D=NAME loss=NAME] [--flops 1e21]
                                   [--seed 0] [--json] [--out FOLDER]
       optjax scaling allocate --flops 1e21 [--json]

fit: a scaling law fitted to runs (a CSV file with a header), with 95 % bootstrap intervals

--law           hoffmann (E + A/N^α + B/D^β), kaplan-nd, kaplan-ns, power-n, power-d, or
                power-n-floor, power-d-floor with an irreducible loss
--columns       where the parameters N, tokens D, FLOPs C, steps S and the loss are; usual names
                (params, Model Size, tokens, Training FLOP, steps, loss) are found by themselves
--drop-highest  leave so many of the highest losses out (0)
--bootstraps    refits to resampled runs, at least 2 (4000)
--flops         the budget that is allocated; by default ten times the largest run's
--seed          of the resamples (0)
--out           a folder for fit.json and fit.svg

allocate: parameters, tokens, batch, steps and loss for a budget C = 6ND, by each law

--flops         the budget, floating-point operations
--json          for machines
"""


def scaling(words: list[str]) -> int:
    """Fit a scaling law, or allocate a budget."""
    actions = {"fit": _fit, "allocate": _allocate}
    if not words or words[0] not in actions:
        what = "none" if not words else repr(words[0])
        hint = nearest(words[0] if words else "", actions)
        raise UserError(f"scaling takes fit or allocate, got {what}; {hint}")
    files = [word for word in words[1:2] if words[0] == "fit" and not word.startswith("--")]
    return actions[words[0]](files, grouped(words[1 + len(files) :]))


def _flops(groups: dict[str, list[str]]) -> float:
    word = one(groups, "flops")
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and 1e6 <= value <= 1e36):
        raise UserError(f"--flops is {word!r}: expected a number from 1e6 to 1e36, such as 1e21")
    return value


def _unknown(groups: dict[str, list[str]], action: str) -> None:
    known = re.findall(r"--([a-z-]+)", USAGE)
    for name in groups:
        name = name.replace("_", "-")
        if name in known:
            raise UserError(
                f"--{name} is no option of 'optjax scaling {action}'; --help shows them"
            )
        raise UserError(f"unknown option '--{name}'; {nearest(name, known)}")


def _allocate(files: list[str], groups: dict[str, list[str]]) -> int:
    as_json = switch(groups, "json")
    if "flops" not in groups:
        raise UserError("scaling allocate needs --flops, the budget, such as --flops 1e21")
    flops = _flops(groups)
    _unknown(groups, "allocate")
    import jax

    from optjax import scaling as laws

    with jax.enable_x64(True):
        rows = {
            "Hoffmann 2022, as printed": laws.allocate_hoffmann(laws.HOFFMANN_2022, flops),
            "Hoffmann's law, refit 2024": laws.allocate_hoffmann(laws.BESIROGLU_2024, flops),
            "Kaplan 2020, by its constants": laws.allocate_kaplan(flops),
            "Kaplan 2020, by its exponents": laws.allocate_frontier(flops),
        }
        checks = laws.contradictions()
    if as_json:
        record = {
            "flops": flops,
            "allocations": {name: _numbers(row) for name, row in rows.items()},
            "exponents": [check._asdict() for check in checks],
        }
        print(json.dumps(record, indent=1, ensure_ascii=False))
        return 0
    print(f"{flops:.3g} floating-point operations, C = 6ND; Kaplan's batch is B_crit")
    print_allocations(rows)
    for line in contradiction_lines(checks):
        print(line)
    return 0


def _numbers(row: "Allocation") -> dict[str, float | None]:
    found = {k: None if v is None else float(v) for k, v in row._asdict().items()}
    return found | {"tokens_per_parameter": float(row.D / row.N)}


def _columns(groups: dict[str, list[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    given = groups.pop("columns", None)
    if given == []:
        raise UserError("--columns takes NAME=COLUMN, such as N=params, got none")
    for word in given or []:
        for part in re.split(r",(?=\s*\w+=)", word):
            name, equals, column = part.strip().partition("=")
            if not equals or not column:
                raise UserError(
                    f"--columns got {part!r}: expected NAME=COLUMN, such as N=params loss=val_loss"
                )
            if name in found:
                raise UserError(f"--columns names {name} twice")
            found[name] = column
    return found


def _fit(files: list[str], groups: dict[str, list[str]]) -> int:
    if not files:
        raise UserError("scaling fit needs a CSV file of runs, first: optjax scaling fit RUNS.csv")
    as_json, columns = switch(groups, "json"), _columns(groups)
    law = one(groups, "law", "hoffmann")
    dropped, resamples = number(groups, "drop_highest", "0"), number(groups, "bootstraps", "4000")
    seed = number(groups, "seed", "0")
    flops = _flops(groups) if "flops" in groups else None
    out = Path(one(groups, "out")) if "out" in groups else None
    _unknown(groups, "fit")
    if not 2 <= resamples <= 10_000_000:
        raise UserError(f"--bootstraps is {resamples}: expected 2 to 10000000")
    if flops is not None and law != "hoffmann":
        raise UserError(f"--flops is given and --law is {law}: only hoffmann's law is allocated")
    if out is not None:
        _make(out)

    from optjax.scaling import bootstrap, drop_highest, fit, outliers, read_runs
    from optjax.scaling.forms import form_of
    from optjax.support.console import Console

    form = form_of(law)
    points, where = read_runs(files[0], columns, ("loss", *form.sizes))
    kept = drop_highest(points, dropped)
    with Console().late("scaling") as progress:
        found = fit(kept, law, progress=progress)
        refits = bootstrap(found, resamples, make_key(seed), progress=progress)
        most = min(max(10, dropped), len(points.loss) - form.parameters - 1)
        try:
            without = outliers(points, law, most, progress=progress)
        except UserError:  # without its highest losses the rest may not identify the law
            without = None
    record = _record(found, refits, without, flops)
    record = {"file": Path(files[0]).name, "columns": where, "dropped": dropped} | record
    record["seed"] = seed
    if out is not None:
        _write(out, record, refits, without, dropped)
    if as_json:
        print(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        print_fit(record)
        if out is not None:
            print(f"wrote {out / 'fit.json'} and {out / 'fit.svg'}")
    return 0


def _make(out: Path) -> None:
    """Create the folder before any work is done that could not be written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file: expected a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out {str(out)!r}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write into --out {str(out)!r}: give another folder")


def _record(
    found: "Fit", refits: "Bootstrap", without: "Sensitivity | None", flops: float | None
) -> dict[str, Any]:
    """Gather everything that was found, as JSON holds it."""
    from optjax import scaling as laws
    from optjax.support.files import plain

    record: dict[str, Any] = {
        "law": found.form.name,
        "runs": len(found.runs.loss),
        "parameters": {k: v._asdict() for k, v in laws.intervals(refits).items()},
        "objective": found.objective,
        "delta": found.delta,
        "converged": found.converged,
        "starts": found.starts,
        "starts_agreeing": found.agreeing,
        "bootstraps": len(refits.objective),
        "bootstraps_failed": refits.failed,
    }
    if without is not None:
        record["outliers"] = [
            {"dropped": int(k), "objective": float(value), "converged": bool(without.converged[i])}
            | {name: float(x[i]) for name, x in without.law._asdict().items()}
            for i, (k, value) in enumerate(zip(without.left_out, without.objective, strict=True))
        ]
    record["warnings"] = _doubts(found, refits)
    if found.form.name == "hoffmann":
        record["published"] = {
            name: laws.objective(found.runs, law)
            for name, law in (
                ("Hoffmann 2022, as printed", laws.HOFFMANN_2022),
                ("refit 2024", laws.BESIROGLU_2024),
            )
        }
        budget = 10 * float(found.runs.C.max()) if flops is None else flops  # pyright: ignore[reportOptionalMemberAccess]
        sound = laws.falling(refits)
        if sound is None:
            record["warnings"].append(
                "the fitted loss does not fall with N and D: no budget is allocated"
            )
        else:
            record["allocation"] = _best(found, sound, budget)
    return plain(record)


def _doubts(found: "Fit", refits: "Bootstrap") -> list[str]:
    """List what a reader of the intervals should know, a line each."""
    from optjax.scaling.fit import doubts

    lines, runs = doubts(found), found.runs
    tried = len(refits.objective) + refits.failed
    if refits.failed > 0.05 * tried:
        lines.append(
            f"{refits.failed} of {tried} resamples had no minimum: the intervals are of the others "
            "and too narrow; more runs are needed"
        )
    if runs.N is not None and runs.D is not None and runs.C is not None:
        off = float((runs.C / (6 * runs.N * runs.D)).max())
        low = float((runs.C / (6 * runs.N * runs.D)).min())
        if off > 2 or low < 0.5:
            lines.append(
                f"C is {low:.3g} to {off:.3g} times 6ND: check the units, or whether C counts more "
                "than the parameters' multiplications"
            )
    return lines


def _best(found: "Fit", refits: "Bootstrap", flops: float) -> dict[str, Any]:
    """Compute the best use of a budget by the law fitted, with intervals."""
    import jax

    from optjax.scaling import allocate_hoffmann, interval

    with jax.enable_x64(True):
        best, many = (allocate_hoffmann(law, flops) for law in (found.law, refits.law))
    names = ("N", "D", "loss")
    return {"flops": flops} | {
        name: interval(getattr(best, name), getattr(many, name).__array__())._asdict()
        for name in names
    }


def _write(
    out: Path,
    record: dict[str, Any],
    refits: "Bootstrap",
    without: "Sensitivity | None",
    dropped: int,
) -> None:
    from optjax.cli.scaling_figure import figure
    from optjax.report import style
    from optjax.support.files import write_text

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "fit.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        style.save(figure(refits, without, dropped), out / "fit")
    except OSError as error:
        raise UserError(f"cannot write into {str(out)!r}: {error.strerror or error}") from None
