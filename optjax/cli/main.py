"""The command line: one function a command, and what every command shares.

A user's mistake is one line on stderr and exit status 2. Everything heavy is imported late, so
that help and the list answer at once.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from optjax.cli.words import flag, grouped, interrupted, one, switch, typed, whole
from optjax.support.errors import UserError, nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the words after `optjax`; those of the process if None.

    Returns:
        0 if all went well, 1 if an experiment broke, 2 for a user's mistake; 130 if
        interrupted, 143 if a sweep was ended by SIGTERM, 129 by SIGHUP.

    >>> main(["rnu"])
    2
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"optjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("optjax: interrupted; what was finished stays in the results folder", file=sys.stderr)
        return interrupted(error)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has left; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as one line, without the place in our code."""
    print(f"optjax: {' '.join(str(message).split())}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        _parser().print_help()
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"optjax {version('optjax')}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    return COMMANDS[name][1](rest)


class _Parser(argparse.ArgumentParser):
    """Argparse that raises our one-line error instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ('{self.prog} --help' shows the options)")


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items())
    return argparse.ArgumentParser(
        prog="optjax",
        usage="optjax COMMAND [options]",
        description="A training run as a pure function of its hyperparameters and its seed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{commands}\n\n'optjax COMMAND --help' shows the options of a command.",
    )


def _options(name: str) -> _Parser:
    parser = _Parser(prog=f"optjax {name}", description=COMMANDS[name][0], allow_abbrev=False)
    if name != "list":
        parser.add_argument("--results", default="results", metavar="DIR", help="(results)")
    return parser


def _parse(parser: _Parser, words: list[str]) -> argparse.Namespace | None:
    """Parse the options; None where help was asked for and printed."""
    if "-h" in words or "--help" in words:
        parser.print_help()
        return None
    words = [_hyphens(word) for word in words]
    known = [option for action in parser._actions for option in action.option_strings]
    for given in (word.split("=", 1)[0] for word in words if word.startswith("--")):
        if given not in known:
            raise UserError(f"unknown option {given!r} of {parser.prog!r}; {nearest(given, known)}")
    return parser.parse_args(words)


def _hyphens(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _list(words: list[str]) -> int:
    from optjax.report import catalogue

    parser = _options("list")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    options = _parse(parser, words)
    if options is None:
        return 0
    experiments = catalogue.discover().values()
    if options.json:
        known = ("name", "title", "doc", "cost")
        print(json.dumps([{k: getattr(e, k) for k in known} for e in experiments], indent=1))
        return 0
    width = max((len(e.name) for e in experiments), default=0)
    for experiment in experiments:
        cost = f"  [{experiment.cost}]" if experiment.cost else ""
        print(f"{experiment.name:<{width}}  {experiment.title}{cost}")
    return 0


def _reproduce(words: list[str]) -> int:
    parser = _options("reproduce")
    parser.add_argument("--data", metavar="PATH", help="pictures for the experiments that use any")
    parser.add_argument("--palette", metavar="PATH", help="the colours that pictures are drawn in")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help="these experiments, or those of a section of the source: 1, 2, 3, 4-5, beyond",
    )  # fmt: skip
    parser.add_argument("--full", action="store_true", help="the larger sizes, 11 minutes")
    parser.add_argument("--jobs", metavar="N", help="experiments at a time (on a CPU, a core each)")
    parser.add_argument("--force", action="store_true", help="run again what has been run")
    options = _parse(parser, words)
    if options is None:
        return 0
    for name in ("data", "palette"):
        if getattr(options, name) == "":
            raise UserError(f"--{name} is empty; give a path, or leave the option out")
    from optjax.report import runner

    broken = runner.reproduce(
        options.data, options.results, options.force,
        palette=options.palette, only=options.only, full=options.full, jobs=_jobs(options.jobs),
    )  # fmt: skip
    _verdicts(options.results)
    if broken:
        print(f"optjax: {len(broken)} broke: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def _jobs(given: str | None) -> int:
    """Return how many experiments run at a time: on an accelerator, one has it all."""
    if given is not None:
        return max(1, whole("jobs", given))
    import jax

    from optjax.support.machine import cores

    return min(cores(), 4) if jax.default_backend() == "cpu" else 1


def _verdicts(results: str) -> None:
    """Print the table of all verdicts, and the path of the report."""
    from rich.console import Console

    from optjax.report.claims import read_claims
    from optjax.report.runner import verdict_table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(verdict_table(read_claims(f"{results}/claims.json")))
    print(f"{results}/report/index.html")


def _report(words: list[str]) -> int:
    parser = _options("report")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write only a table of the claims, from claims.json"
    )
    options = _parse(parser, words)
    if options is None:
        return 0
    if options.markdown is not None:
        from pathlib import Path

        from optjax.report import markdown

        markdown.write_markdown(Path(options.results), Path(options.markdown))
        print(options.markdown)
        return 0
    from optjax.report import runner

    print(runner.redraw(options.results))
    return 0


def _run(words: list[str]) -> int:
    from optjax.report import catalogue, runner

    if not words or words[0] in ("-h", "--help"):
        text = (
            "usage: optjax run NAME [--FIELD VALUE ...] [--full] [--results DIR] [--force] [--json]"
        )
        if not words:
            raise UserError(f"run needs an experiment's name; {nearest('', catalogue.discover())}")
        print(
            f"{text}\n\n'optjax list' names the experiments; 'optjax run NAME --help' the fields."
        )
        return 0
    if words[0].startswith("-"):
        raise UserError(f"run needs the experiment's name first, before {words[0]!r}")
    experiment = catalogue.find(words[0])
    module = catalogue.load(experiment)
    if "-h" in words or "--help" in words:
        return _run_help(experiment.name, module.Config)
    groups = grouped(words[1:])
    results = one(groups, "results", "results")
    force, full, as_json = (switch(groups, name) for name in ("force", "full", "json"))
    config = config_from(module.Config, groups, catalogue.full_sizes(module) if full else {})
    found = runner.run_experiment(experiment.name, config, results, force, module=module)
    page = runner.rebuild(runner.Path(results))
    if as_json:
        print(json.dumps(runner.record_of(found), indent=1, ensure_ascii=False))
    else:
        print(page)
    return 0


def _late(module: str, call: str = "", usage: str = "USAGE") -> Callable[[list[str]], int]:
    """Make a command of the function in a file of its own, imported when it is called."""

    def command(words: list[str]) -> int:
        found = importlib.import_module(f"optjax.cli.{module}")
        if "-h" in words or "--help" in words:
            print(getattr(found, usage), end="")
            return 0
        return getattr(found, call or module)(words)

    return command


def _run_help(name: str, config: type) -> int:
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(config, args=["--help"], prog=f"optjax run {name}")
    print("also: --results DIR (results), --force (run again what has been run),")
    print("      --full (the sizes of RESULTS.md for the fields that are not given)")
    print("      --json (print the claims and the files as JSON, and nothing else)")
    return 0


def config_from(
    config: type, groups: dict[str, list[str]], others: Mapping[str, Any] | None = None
) -> Any:
    """Build a Config from the words given for each of its fields.

    Args:
        config: a dataclass.
        groups: for each field its words; {"no_FIELD": []} turns a bool off.
        others: values of fields that have no words.

    Raises:
        UserError: a field that the Config lacks, or words that are not of the field's type.

    >>> Config = dataclasses.make_dataclass("Config", [("seed", int, 0), ("quick", bool, False)])
    >>> config_from(Config, {"seed": ["3"], "quick": []})
    Config(seed=3, quick=True)
    """
    hints = typing.get_type_hints(config)
    fields = [field.name for field in dataclasses.fields(config)]
    values = dict(others or {})
    for name, words in groups.items():
        if name not in fields and name.startswith("no_") and hints.get(name[3:]) is bool:
            if words:
                raise UserError(f"--{flag(name)} takes no value")
            values[name[3:]] = False
        elif name not in fields:
            known = [flag(field) for field in (*fields, "results", "full", "force", "json")]
            raise UserError(f"unknown field '--{flag(name)}'; {nearest(flag(name), known)}")
        else:
            values[name] = typed(name, hints[name], words)
    return config(**values)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "list": ("the experiments, what each asks and what it costs", _list),
    "run": ("run one experiment: optjax run NAME [--FIELD VALUE ...]", _run),
    "reproduce": ("run every experiment; write claims.json and the report", _reproduce),
    "sweep": ("a grid of runs at once, kept in a folder: sweep, resume, show", _late("sweep")),
    "scaling": (
        "fit a scaling law to runs, or spend a budget by the published ones",
        _late("scaling"),
    ),
    "which-solution": ("which solution each optimiser picks", _late("which_solution")),
    "account": (
        "weights, outputs, connections and memory of a network, by layer",
        _late("account"),
    ),
    "padding": ("the paddings that take one size to another", _late("padding")),
    "convolutions": (
        "how convolutions of many runs were timed on your devices",
        _late("convolutions"),
    ),
    "colourise": ("colour photographs with a trained network", _late("colourise")),
    "train-colouriser": (
        "train that network, on your pictures or as a demo",
        _late("colourise", "train", "TRAIN_USAGE"),
    ),
    "data": ("what data the claims need: make, fetch or check them", _late("data")),
    "report": ("draw the figures and the report again from saved results", _report),
}


if __name__ == "__main__":
    sys.exit(main())
