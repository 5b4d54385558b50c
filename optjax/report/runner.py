"""Run experiments, keep what they give, and run none twice for the same code and config."""

import dataclasses
import functools
import hashlib
import json
import shlex
import shutil
import tempfile
import time
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optjax.report.catalogue import Experiment, choose, discover, find, full_sizes, load
from optjax.report.claims import SYMBOLS, Claim, by_section, in_order, write_claims
from optjax.report.rendering import cut
from optjax.report.workers import carry_out
from optjax.support import provenance
from optjax.support.console import Console
from optjax.support.errors import UserError, whole
from optjax.support.files import plain, read_attrs, read_dataset, save_dataset, write_text
from optjax.support.keeping import keeping

if TYPE_CHECKING:
    import xarray
    from rich.table import Table

_PATH_FIELDS = ("data", "palette", "points")


@dataclasses.dataclass(frozen=True)
class ExperimentResult:
    """An experiment's dataset file, and whether the experiment ran now."""

    name: str
    path: Path
    ran: bool
    seconds: float


def run_experiment(
    name: str,
    config: Any = None,
    results: str | Path = "results",
    force: bool = False,
    console: Console | None = None,
    *,
    module: types.ModuleType | None = None,
    folder: Path | None = None,
) -> ExperimentResult:
    """Run an experiment and keep its dataset, figures and claims; or say that they are there.

    Args:
        name: the experiment.
        config: its Config; its defaults if None.
        results: the folder for NAME.nc, figures/NAME/ and claims.json.
        force: run even where the same code and config have been run.
        console: where progress is shown; the terminal if None.
        module: the experiment where it has been imported already.
        folder: where the experiments lie, if elsewhere.

    Raises:
        UserError: unknown name, a folder that cannot be written, or what the experiment raises.
    """
    console = console or Console()
    results = Path(results)
    experiment = find(name, folder)
    _check_writable(results, experiment.name)
    with _jax_options_kept():
        module = module or load(experiment)
        config = module.Config() if config is None else config
        _check_numbers(config)
        identity = _identity(experiment, config)
        path = results / f"{experiment.name}.nc"
        attrs = read_attrs(path)
        fresh = force or any(attrs.get(key) != value for key, value in identity.items())
        if fresh:
            unfinished = results / "unfinished" / experiment.name
            now = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
            if force:
                shutil.rmtree(unfinished, ignore_errors=True)
            with keeping(unfinished / now):
                dataset, seconds = _run(experiment, module, config, console)
            dataset.attrs.update(
                identity,
                title=experiment.title,
                command=command(experiment.name, config),
                commit=provenance.commit(),
                versions=json.dumps(provenance.versions()),
                machine=json.dumps(provenance.machine()),
                seconds=seconds,
                date=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            save_dataset(dataset, path)
            shutil.rmtree(unfinished, ignore_errors=True)
            console.line(f"{experiment.name}: done in {seconds:.1f} s, saved {path}")
        else:
            seconds = float(attrs.get("seconds", 0.0))
            console.line(
                f"{experiment.name}: {path} is from the same code and config; "
                "not run again (--force does)"
            )
        record = draw(experiment, results, module=module)
        for claim in in_order(Claim(**row) for row in record["claims"]):
            console.line(verdict_line(claim))
    return ExperimentResult(experiment.name, path, fresh, seconds)


def reproduce(
    data: str | None = None,
    results: str | Path = "results",
    force: bool = False,
    *,
    palette: str | None = None,
    only: Sequence[str] = (),
    full: bool = False,
    jobs: int = 1,
    console: Console | None = None,
    folder: Path | None = None,
) -> list[str]:
    """Run every experiment, and rewrite claims and report after each.

    Experiments are sorted by cost; `carry_out` says in which order they are begun.

    Args:
        only: names of experiments, or sections of the source ("2"); everything if empty.
        data: pictures for the experiments whose Config has a field `data`.
        results: the folder for all results.
        force: run again what has been run.
        palette: for the experiments whose Config has a field `palette`.
        full: take each experiment's full sizes, not its default ones.
        jobs: experiments at a time, each in a process of its own.
        console: where progress is shown; the terminal if None.
        folder: where the experiments lie, if elsewhere.

    Returns:
        The names of the experiments that broke; each left its traceback in NAME.error.txt.

    Raises:
        UserError: from an experiment that cannot use its input; what was finished stays.
    """
    console = console or Console()
    results = Path(results)
    experiments = choose(only, folder) if only else discover(folder)
    if not experiments:
        raise UserError("there are no experiments to run")
    given = {name: value for name, value in (("data", data), ("palette", palette)) if value}
    call = functools.partial(
        _one_of_several, given=given, full=full, results=results, force=force, folder=folder
    )
    broken = []
    for name in carry_out(
        call, sorted(experiments.values(), key=lambda e: (e.seconds, e.name)), jobs, console
    ):
        broken += [name] if name else []
        rebuild(results, folder)
    return broken


def _one_of_several(
    experiment: Experiment,
    console: Console,
    *,
    given: Mapping[str, str],
    full: bool,
    results: Path,
    force: bool,
    folder: Path | None,
) -> str:
    """Run an experiment of `reproduce`; return its name if it broke, else nothing.

    Raises:
        UserError: from an experiment that cannot use its input.
    """
    trace = results / f"{experiment.name}.error.txt"
    try:
        with _jax_options_kept():
            module = load(experiment)
            names = {field.name for field in dataclasses.fields(module.Config)}
            fields = full_sizes(module) if full else {}
            config = module.Config(**fields | {k: v for k, v in given.items() if k in names})
            run_experiment(
                experiment.name, config, results, force, console, module=module, folder=folder
            )
        trace.unlink(missing_ok=True)
    except UserError as error:
        raise UserError(f"{experiment.name}: {error}") from error
    except Exception as error:
        write_text(trace, traceback.format_exc())
        console.line(
            f"{experiment.name}: broke with {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]} (traceback: {trace})"
        )
        return experiment.name
    return ""


def verdict_line(claim: Claim) -> str:
    """Write a claim's verdict, the source's value and ours in a line.

    >>> verdict_line(Claim("padding/kernel-4", "", "p = 1", {"p": 1}, None, 1, None, "holds", ""))
    '  ✓ holds     padding/kernel-4: source p = 1; measured p 1'
    """
    ours = "needs" if claim.verdict == "not run" and claim.needs else "measured"
    said = f"source {claim.source_short}; {ours} {claim.outcome}"
    return cut(f"  {_marked(claim):<11} {claim.id}: {said}", 160)


def verdict_table(claims: Sequence[Claim]) -> "Table":
    """Make a table of verdicts for a terminal, the claims of each section under its name."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("verdict", no_wrap=True, min_width=11)
    for heading in ("claim", "source", "measured [95 % interval]"):
        table.add_column(heading)
    styles = {"holds": "green", "corrected": "yellow", "refuted": "red", "not run": "dim"}
    for section, these in by_section(claims).items():
        table.add_row("", Text(section, "bold"))
        for claim in these:
            cells = (claim.plain_words, claim.source_short, claim.outcome)
            table.add_row(Text(_marked(claim), styles[claim.verdict]), *map(Text, cells))
    return table


def _marked(claim: Claim) -> str:
    return f"{SYMBOLS[claim.verdict]} {claim.verdict}"


def record_of(result: ExperimentResult) -> dict[str, Any]:
    """Read the claims of an experiment, and where its dataset lies, for a program."""
    record = result.path.parent / "figures" / result.name / "record.json"
    known = json.loads(record.read_text(encoding="utf-8"))
    files = {"dataset": str(result.path), "folder": str(record.parent)}
    return {**files, "ran": result.ran, **known}


def redraw(results: str | Path = "results", folder: Path | None = None) -> Path:
    """Draw every figure and judge every claim again from the saved datasets.

    A dataset that is damaged is named, and its experiment left as it was drawn before.

    Returns:
        The page's file.

    Raises:
        UserError: there is no result yet, or the folder cannot be written.
    """
    results = Path(results)
    saved = [e for e in discover(folder).values() if (results / f"{e.name}.nc").is_file()]
    if not saved:
        raise UserError(
            f"no results in {str(results)!r}; run 'optjax reproduce' first, or give --results"
        )
    for experiment in saved:
        _check_writable(results, experiment.name)
        with _jax_options_kept():
            try:
                draw(experiment, results)
            except UserError as error:
                Console().line(f"optjax: {experiment.name} is not drawn again: {error}")
    return rebuild(results, folder)


def rebuild(results: Path, folder: Path | None = None) -> Path:
    """Write claims.json and the report's page from what the experiments have left on disk."""
    from optjax.report import page

    experiments = discover(folder)
    records = page.read_records(results, list(experiments))
    claims = [Claim(**row) for record in records for row in record["claims"]]
    write_claims(claims, results / "claims.json", merge=False)
    done = {record["name"] for record in records}
    return page.write_page(results, records, [n for n in experiments if n not in done])


def draw(
    experiment: Experiment, results: Path, *, module: types.ModuleType | None = None
) -> dict[str, Any]:
    """Draw an experiment's figures and judge its claims from its saved dataset alone."""
    from optjax.report import style

    module = module or load(experiment)
    dataset = read_dataset(results / f"{experiment.name}.nc")
    attrs = dataset.attrs
    config = json.loads(attrs["config"])
    folder = results / "figures" / experiment.name
    shown = []
    for name, fig in module.figures(dataset).items():
        files = style.save(fig, folder / name)
        caption = str(getattr(fig, "caption", ""))
        wide = fig.get_figwidth() > style.WIDTHS["single"]
        shown.append(
            {"name": name, "caption": caption, "files": [f.name for f in files], "wide": wide}
        )
    origin = {key: attrs[key] for key in ("command", "commit", "date")} | {
        key: json.loads(attrs.get(key, "null")) for key in ("versions", "machine")
    }
    seconds = float(attrs["seconds"])
    claims = [
        dataclasses.replace(claim, config=config, seconds=seconds, provenance=origin)
        for claim in module.claims(dataset)
    ]
    record = {
        "name": experiment.name,
        "title": experiment.title,
        "doc": experiment.doc,
        "demo": bool(attrs.get("demo", 0)),
        "config": config,
        "seconds": seconds,
        "figures": shown,
        "claims": [dataclasses.asdict(claim) for claim in claims],
        **origin,
    }
    write_text(folder / "record.json", json.dumps(plain(record), indent=1, ensure_ascii=False))
    kept = {"record.json"} | {file for fig in shown for file in fig["files"]}
    for old in folder.iterdir():
        if old.name not in kept and old.suffix in (".svg", ".png"):
            old.unlink()
    write_claims(claims, results / "claims.json")
    return record


def command(name: str, config: Any) -> str:
    """Write the command line that runs an experiment with that config.

    >>> command("noise", dataclasses.make_dataclass("Config", [("seed", int, 0)])(3))
    'optjax run noise --seed 3'
    """
    words = ["optjax", "run", name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, tuple | list) else (value,)
            words += [f"--{flag}", *(str(item) for item in items)]
    return shlex.join(words)


def _run(
    experiment: Experiment, module: types.ModuleType, config: Any, console: Console
) -> tuple["xarray.Dataset", float]:
    start = time.perf_counter()
    with console.progress(experiment.name) as progress:
        dataset = module.run(config, progress)
    return dataset, time.perf_counter() - start


def _identity(experiment: Experiment, config: Any) -> dict[str, str]:
    """Gather the attributes that must agree for a saved result to stand for a new run."""
    values = dataclasses.asdict(config)
    inputs = {
        key: provenance.file_hash(values[key])
        for key in _PATH_FIELDS
        if isinstance(values.get(key), str) and Path(values[key]).exists()
    }
    return {
        "experiment": experiment.name,
        "config": json.dumps(plain(values)),
        "code_hash": provenance.code_hash(experiment.folder, experiment.module),
        "inputs": json.dumps(inputs),
    }


def _check_numbers(config: Any) -> None:
    """Check a config's whole numbers: from 0 where a default is 0, as a seed's, else from 1.

    A field's metadata may give another ``least``.

    Raises:
        UserError: one is less.
    """
    for field in dataclasses.fields(config):
        default, value = (
            v if isinstance(v, tuple) else (v,)
            for v in (field.default, getattr(config, field.name))
        )
        if not default or any(type(v) is not int or v < 0 for v in default):
            continue
        least = field.metadata.get("least", 0 if 0 in default else 1)
        for item in value:
            whole(field.name, item, least)


def _check_writable(results: Path, name: str) -> None:
    for folder in (results, results / "figures" / name, results / "report"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"cannot write to the folder {str(folder)!r} ({reason}); "
                "give another with --results"
            ) from error


@contextmanager
def _jax_options_kept() -> Iterator[None]:
    """Leave JAX's options as they were, so that no experiment sees another's."""
    import jax

    names = (
        "jax_enable_x64",
        "jax_numpy_dtype_promotion",
        "jax_numpy_rank_promotion",
        "jax_default_matmul_precision",
        "jax_debug_nans",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
