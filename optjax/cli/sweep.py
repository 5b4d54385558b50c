"""optjax sweep: a grid of runs from the command line, kept in a folder."""

import contextlib
import inspect
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optjax.cli import named_problems
from optjax.cli.words import flag, grouped, interrupted, number, one, switch, typed, whole
from optjax.support.errors import UserError, nearest

USAGE = """\
usage: optjax sweep PROBLEM --optimizer adam --learning-rate 1e-4:1e-1:log:8 --batch-size 8,32
                    --seeds 16 --steps 2000 --out DIR
       optjax sweep --resume DIR        resume it, with the words it was called by; code of your
                                        own is named again: optjax sweep mine:make --resume DIR
       optjax sweep --show DIR          its best points and figures, finished or not

PROBLEM        least-squares, quadratic, pool-upsample, conv-transpose, unet; or
               package.module:function, which gives a Problem (or a Run: then no --optimizer)
--optimizer    of optax, or package.module:function; several, by commas, are an axis
--NAME VALUES  a hyperparameter of the optimiser (--learning-rate), --batch-size, --l2, --steps;
               or an argument of the problem (--n, --d; --data, --filters; your function's own):
               several values of one, by commas, are an axis (--filters 4,8)

VALUES         0.1,0.2,0.5       these
               1e-4:1e-1:log:8   eight from 1e-4 to 1e-1, evenly on a log scale (or lin)
               1e-4:1e-1:log     a range to draw from, with --draw

--zip          the values of the axes pair by pair, not all combinations
--draw N       N points from the ranges: --method sobol (the default) or random, --draw-seed 0
--seeds        how many (1), or which: 0,3,7
--sampler      replacement (the default), epochs, shuffle_once or full
--record-every steps from record to record; by default about a hundred records
--stop         target:0.1, target:METRIC:0.1, plateau:500, halving:100; several by commas
--keep-diverged  advance runs that diverged, too
--metric NAME  what the points are ranked by (final_loss; validation_accuracy), with
               --best min or max; also with --show
--out DIR      keeps the sweep: the same words again resume it, or add points and seeds
--overwrite    drops what DIR holds
--layout       auto, vmap, map or loop; --vmap-chunk N runs vmapped together
--batching     auto, static or masked
--chunk-seconds, --checkpoint-seconds   (1, 30)
--float64      double precision

--distributed  this is one of several processes, all given the same words and one DIR: by itself
               under Slurm, Open MPI, Kubernetes and on TPU pods; elsewhere with
--coordinator HOST:PORT --processes N --process I
               of the first process; how many there are; which this is, from 0 (or
               JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)
"""

_OWN = re.findall(r"--([a-z0-9-]+)", USAGE)


def sweep(words: list[str]) -> int:
    """Run, resume or show a sweep."""
    named = words[:1] if words and not words[0].startswith("--") else []
    groups = grouped(words[len(named) :])
    with _joined(groups):
        return _chosen(named, groups, words)


def _chosen(named: list[str], groups: dict[str, list[str]], words: list[str]) -> int:
    """Do what the words ask for."""
    for name in ("resume", "show"):
        if name in groups:
            folder = one(groups, name)
            given = {key: groups.pop(key) for key in ("metric", "best") if key in groups}
            if name == "resume":
                named += ",".join(groups.pop("optimizer", [])).split(",")
            elif named:
                raise UserError(f"--show takes a folder alone; {named[0]!r} is too much")
            for other in groups:
                raise UserError(
                    f"--{name} takes a folder, --metric and --best; --{flag(other)} is too much"
                )
            return _show(folder, given) if name == "show" else _resume(folder, given, named)
    if named:
        return _sweep(named[0], groups, words)
    raise UserError("sweep needs a PROBLEM, --resume DIR or --show DIR; --help shows examples")


_JOINING = ("coordinator", "processes", "process")
_OF_A_CALL = ("out", "overwrite", "distributed", *_JOINING)


@contextlib.contextmanager
def _joined(groups: dict[str, list[str]]) -> Iterator[None]:
    """Join other processes, where that is asked for."""
    asked = switch(groups, "distributed")
    told = {name: one(groups, name) for name in _JOINING if name in groups}
    if told and not asked:
        raise UserError(f"--{next(iter(told))} goes with --distributed: add it")
    if not asked:
        yield
        return
    counts = {name: whole(name, told[name]) for name in _JOINING[1:] if name in told}
    ended = _explained()
    from jax.errors import JaxRuntimeError

    from optjax.sweeps import processes

    try:
        processes.join(told.get("coordinator"), **counts)
        yield
    except JaxRuntimeError as error:  # a collective without one of its members
        print(f"optjax: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException:
        ended()
        raise
    ended()


def _explained() -> Callable[[], None]:
    """Explain the end of this process, unless what is returned has been called before.

    Where another process dies, JAX's runtime aborts this one: only a third can say what to do.
    """
    alive, end = os.pipe()
    if os.fork():
        os.close(alive)
        return lambda: _say_all_is_well(end)
    os.close(end)
    for asking in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asking, signal.SIG_IGN)
    if not os.read(alive, 1):
        text = "this process was killed, or another one died or never came: start all of them again"
        os.write(2, f"optjax: {text}\n".encode())
    os._exit(0)


def _say_all_is_well(end: int) -> None:
    with contextlib.suppress(OSError), os.fdopen(end, "wb") as pipe:
        pipe.write(b".")


Judged = tuple[str | None, str]
"""The metric by which points are ranked, and "min" or "max"."""


def _judged(groups: dict[str, list[str]]) -> Judged:
    metric, best = one(groups, "metric") if "metric" in groups else None, one(groups, "best", "min")
    if best not in ("min", "max"):
        raise UserError(f"--best is {best!r}: expected min or max")
    return metric and metric.replace("-", "_"), best


def _resume(folder: str, given: dict[str, list[str]], named: list[str]) -> int:
    """Resume a sweep.

    Args:
      named: code that may be imported: a folder, whoever made it, must not choose that.
    """
    from optjax.sweeps.store import read_spec

    about = read_spec(folder).get("about")
    words = about.get("command") if isinstance(about, dict) else None
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or not words:
        raise UserError(
            f"the sweep in {folder!r} was not made by this command: call oj.sweep(…, "
            f"out={folder!r}) again as you did"
        )
    groups = grouped(words[1:])
    if unnamed := [w for w in _code(words) if w not in named]:
        raise UserError(
            f"the sweep in {folder!r} imports and runs {unnamed[0]!r}: if you trust that code, "
            f"name it: {_resuming(folder, words)}"
        )
    groups["out"] = [folder]  # it may have been moved
    groups.pop("overwrite", None)
    groups |= given
    return _sweep(words[0], groups, words)


def _code(words: list[str]) -> list[str]:
    """List the words of a call that name code of the user's own."""
    optimizers = ",".join(grouped(words[1:]).get("optimizer", [])).split(",")
    return [word for word in (words[0], *optimizers) if ":" in word]


def _resuming(folder: str, words: list[str]) -> str:
    """Write the command that resumes a sweep."""
    code = _code(words)
    others = ",".join(word for word in code if word != words[0])
    parts = ["optjax", "sweep", *code[: words[0] in code], "--resume", folder]
    return shlex.join(parts + ["--optimizer", others] * bool(others))


def _show(folder: str, given: dict[str, list[str]]) -> int:
    from optjax.sweeps import load_sweep

    judged = _judged(given)
    return _shown(load_sweep(folder), Path(folder), judged)


def _sweep(name: str, groups: dict[str, list[str]], words: list[str]) -> int:
    out = one(groups, "out") if "out" in groups else None
    if not out:
        raise UserError("sweep needs --out DIR, the folder that keeps it")
    if switch(groups, "float64"):
        import jax

        jax.config.update("jax_enable_x64", True)
    from optjax.sweeps import sweep

    judged, how = _judged(groups), _how(groups)
    run, grid = _built(name, groups)
    try:
        dataset = sweep(run, grid, out=out, about={"command": _without_out(words)}, **how)
    except KeyboardInterrupt as error:
        print(f"optjax: interrupted; resume with: {_resuming(out, words)}", file=sys.stderr)
        return interrupted(error)
    import jax

    return 0 if jax.process_index() else _shown(dataset, Path(out), judged)


def _without_out(words: list[str]) -> list[str]:
    """Drop from the words what the next call may give otherwise: the folder, the processes."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = word.split("=")[0][2:].replace("-", "_") in _OF_A_CALL
        if not skip:
            kept.append(word)
    return kept


def _how(groups: dict[str, list[str]]) -> dict[str, Any]:
    """Parse the options of `optjax.sweep` itself."""
    how: dict[str, Any] = {}
    word = one(groups, "seeds", "1")
    how["seeds"] = (
        typed("seeds", tuple[int, ...], [word]) if "," in word else typed("seeds", int, [word])
    )
    for name in ("layout", "batching"):
        if name in groups:
            how[name] = one(groups, name)
    if "vmap_chunk" in groups:
        how["vmap_chunk"] = number(groups, "vmap_chunk")
    for name in ("chunk_seconds", "checkpoint_seconds"):
        if name in groups:
            how[name] = typed(name, float, [one(groups, name)])
    if "stop" in groups:
        how["stop"] = [_rule(text) for text in one(groups, "stop").split(",")]
    how["keep_diverged"] = switch(groups, "keep_diverged")
    how["overwrite"] = switch(groups, "overwrite")
    return how


def _rule(text: str) -> Any:
    from optjax.sweeps.stop_rules import Halving, Plateau, Target

    kind, *rest = text.split(":")
    metric, value = (rest if len(rest) == 2 else ["loss", *rest])[:2] if rest else ("loss", "")
    rules = {"target": (Target, float), "plateau": (Plateau, int), "halving": (Halving, int)}
    if kind not in rules or len(rest) not in (1, 2):
        hint = nearest(kind, rules)
        raise UserError(f"--stop {text!r}: expected target:0.1, plateau:500 or halving:100; {hint}")
    rule, type_ = rules[kind]
    return rule(typed("stop", type_, [value]), metric=metric)


def _built(name: str, groups: dict[str, list[str]]) -> tuple[Any, Any]:
    """Build the run and the grid from the words that are left."""
    from optjax.run import optimizers
    from optjax.run.problems import Problem
    from optjax.run.trajectory import Run

    make = named_problems.find_problem(name)
    own = named_problems.arguments(make, groups)
    for argument in own:
        del groups[argument]
    several = {argument: values for argument, values in own.items() if len(values) > 1}
    made = named_problems.made(name, make, {a: values[0] for a, values in own.items()})
    if not isinstance(made, Problem | Run):
        raise UserError(
            f"PROBLEM {name!r} gives a {type(made).__name__}: expected a Problem or a Run"
        )
    factories: list[Callable[..., Any]] = []
    if isinstance(made, Problem):
        word = one(groups, "optimizer") if "optimizer" in groups else ""
        if not word:
            raise UserError("sweep needs --optimizer, for instance --optimizer adam")
        factories = [named_problems.find_optimizer(part) for part in word.split(",")]
    else:
        factories = [made.plan.optimizer]
    draw = {key: one(groups, key) for key in ("draw", "method", "draw_seed") if key in groups}
    zipped = switch(groups, "zip")
    run_options = {key: one(groups, key) for key in ("sampler", "record_every") if key in groups}
    problem = made if isinstance(made, Problem) else made.problem
    known = {"l2", "batch_size", "steps"} | problem.hparams
    for factory in factories:
        known |= optimizers.keywords(factory)
    axes: dict[str, Any] = {}
    for key, given in groups.items():
        if key not in known:
            names = [*map(flag, known), *map(flag, inspect.signature(make).parameters), *_OWN]
            raise UserError(f"unknown option '--{flag(key)}'; {nearest(flag(key), names)}")
        axes[key] = _values(key, given, drawn="draw" in draw)
    if isinstance(made, Run) and several:
        raise UserError(
            f"--{flag(next(iter(several)))} has several values: let the PROBLEM give a "
            "Problem, not a Run, and its networks are an axis"
        )
    if isinstance(made, Run):
        for key in run_options:
            raise UserError(f"--{flag(key)}: the PROBLEM makes its run itself; set it there")
        return made, _grid(axes, draw, zipped)
    if not isinstance(axes.get("steps"), list):
        raise UserError("sweep needs --steps, for instance --steps 2000 or 500,2000")
    run = _runner(made, axes, run_options)
    if len(factories) > 1:
        several = {"optimizer": factories, **several}
    if not several:
        return run(made, factories[0]), _grid(axes, draw, zipped)
    fixed = {argument: values[0] for argument, values in own.items() if argument not in several}

    def each(optimizer: Callable[..., Any] = factories[0], **chosen: Any) -> Run:
        problem = named_problems.made(name, make, {**fixed, **chosen}) if chosen else made
        return run(problem, optimizer)

    taken = [inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY) for argument in several]
    each.__signature__ = inspect.Signature(taken)  # pyright: ignore[reportFunctionMemberAccess]
    return each, _grid({**several, **axes}, draw, zipped)


def _runner(problem: Any, axes: dict[str, Any], options: dict[str, str]) -> Callable[..., Any]:
    """Return a function of a problem and an optimiser that makes the run."""
    from optjax.run.trajectory import make_run
    from optjax.sweeps.grid import Uniform

    steps = [int(s) for s in axes["steps"]]
    sizes = axes.get("batch_size")
    if sizes is None or not problem.n:
        limit = None
    else:
        least, limit = (
            (sizes.low, sizes.high) if isinstance(sizes, Uniform) else (min(sizes), max(sizes))
        )
        for size in (least, limit):
            if not 1 <= size <= problem.n:
                raise UserError(f"batch_size is {size:g}: expected 1 to {problem.n}, the examples")
    if "record_every" in options:
        every = number({"record_every": [options["record_every"]]}, "record_every")
    else:
        every = max(1, math.gcd(*steps) // 100)
        while math.gcd(*steps) % every:
            every -= 1
    how: dict[str, Any] = {"record_every": every}
    if "sampler" in options:
        how["sampler"] = options["sampler"]
    if limit is not None and options.get("sampler") != "full":
        how["max_batch_size"] = int(limit)
    last = max(steps)
    if len(steps) == 1:
        del axes["steps"]
    return lambda problem, optimizer: make_run(problem, optimizer, last, **how)


def _grid(axes: dict[str, Any], draw: dict[str, str], zipped: bool) -> Any:
    from optjax.sweeps.grid import Uniform, product, sample, zip_grid

    if not draw:
        return zip_grid(axes) if zipped else product(axes)
    if "draw" not in draw:
        raise UserError(f"--{flag(next(iter(draw)))} goes with --draw N")
    if zipped:
        raise UserError("--zip and --draw exclude each other: leave out one")
    if not any(isinstance(values, Uniform) for values in axes.values()):
        raise UserError("--draw needs a range to draw from, as --learning-rate 1e-4:1e-1:log")
    count = number({"draw": [draw["draw"]]}, "draw")
    seed = number({"draw_seed": [draw.get("draw_seed", "0")]}, "draw_seed")
    return sample(count, axes, method=draw.get("method", "sobol"), seed=seed)  # pyright: ignore[reportArgumentType]


_WHOLE = ("batch_size", "steps")


def _values(name: str, words: list[str], drawn: bool) -> Any:
    """Parse a list, a geometric or even progression, or a range to draw from.

    >>> _values("learning_rate", ["1e-3:1e-1:log:3"], drawn=False)
    [0.001, 0.01, 0.1]
    >>> _values("batch_size", ["8,32"], drawn=False)
    [8, 32]
    """
    import numpy as np

    from optjax.sweeps.grid import loguniform, uniform

    text = one({flag(name): [",".join(words)]}, flag(name))
    if ":" not in text:
        return list(typed(name, tuple[(int if name in _WHOLE else float), ...], [text + ","]))
    parts = text.split(":")
    if len(parts) not in (3, 4) or parts[2] not in ("log", "lin"):
        raise UserError(f"--{flag(name)} got {text!r}, expected FROM:TO:log:COUNT (or lin)")
    low, high = (typed(name, float, [part]) for part in parts[:2])
    log = parts[2] == "log"
    if len(parts) == 3:
        if not drawn:
            raise UserError(
                f"--{flag(name)} got {text!r}: how many? {text}:8; or --draw N points from it"
            )
        make = loguniform if log else uniform
        return make(low, high, whole=name in _WHOLE)
    count = number({name: [parts[3]]}, name)
    if not 1 <= count <= 1_000_000 or (log and not (low > 0 and high > 0)):
        raise UserError(
            f"--{flag(name)} got {text!r}: expected ends above 0 and a count of 1 or more"
        )
    values = np.geomspace(low, high, count) if log else np.linspace(low, high, count)
    if name in _WHOLE:
        return sorted({int(v) for v in np.rint(values)})
    return [float(f"{v:.12g}") for v in values]


def _shown(dataset: Any, folder: Path, judged: Judged) -> int:
    """Print the best points; write the figures and the page into the folder."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from optjax.report import sweep_page

    dataset, counts = sweep_page.ranked(dataset, *judged), sweep_page.summary(dataset)
    rows = sweep_page.points(dataset)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in sweep_page.heads(dataset, rows):
        table.add_column(escape(heading.replace("_", " ")), justify="right")
    for row in rows[:10]:
        table.add_row(*map(escape, sweep_page.cells(row)))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(", ".join(f"{n:,} {name}" for name, n in counts.items() if n))
    console.print(table)
    try:
        page = sweep_page.write(dataset, folder, f"Sweep {folder.resolve().name}")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot write the page in {str(folder)!r} ({reason})") from None
    print(page)
    return 0
