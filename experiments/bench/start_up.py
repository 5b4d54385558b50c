"""How long a user waits before anything happens: processes from start to end."""

import subprocess
import sys
from pathlib import Path

from .measure import Entry, Side, seconds


def entries() -> list[Entry]:
    """`optjax --help` beside a bare Python, and `import optjax` beside `import jax`."""
    script = Path(sys.executable).with_name("optjax")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "optjax"]
    return [
        _entry(
            "start-up/help",
            "a process that prints the help",
            {"optjax --help": [*command, "--help"], "python -c pass": _python("pass")},
        ),
        _entry(
            "start-up/import",
            "a process that imports the library",
            {
                "import optjax": _python("import optjax"),
                "import optjax, use it": _python("import optjax; optjax.make_run"),
                "import jax": _python("import jax"),
            },
        ),
    ]


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _entry(name: str, what: str, commands: dict[str, list[str]]) -> Entry:
    def prepare(_: Entry) -> list[Side]:
        for words in commands.values():
            _process(words)  # the first writes byte code and fills the disk's cache
        return [
            Side(label, lambda words=words: seconds(lambda: _process(words)))
            for label, words in commands.items()
        ]

    return Entry(name, what, "s", next(iter(commands)), prepare)


def _process(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=120)
