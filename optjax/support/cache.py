"""The user's cache, and measurements kept there that later processes read again."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from optjax.support import files

_ROOM = 1000
_UNWRITTEN: dict[Path, dict[str, Any]] = {}


def folder() -> Path:
    """Return the folder of what later processes read again: OPTJAX_CACHE, or the user's cache."""
    import platformdirs

    return Path(os.environ.get("OPTJAX_CACHE") or platformdirs.user_cache_dir("optjax"))


class Remembered(NamedTuple):
    """A file of the newest thousand entries by key, in the cache's folder.

    A file that cannot be read counts as empty. If it cannot be written, the entries last as long
    as the process, and the next one measures again.
    """

    name: str  # of the file

    @property
    def file(self) -> Path:
        """The path of the file."""
        return folder() / self.name

    def entries(self) -> dict[str, Any]:
        """Read all entries, the oldest first; the caller checks that an entry is well formed."""
        file = self.file
        try:
            found = (
                files.parsed_json(file.read_text("utf-8")) if file.stat().st_size <= 1 << 20 else {}
            )
        except (OSError, ValueError):
            found = {}
        return (found if isinstance(found, dict) else {}) | _UNWRITTEN.get(file, {})

    def keep(self, key: str, entry: Any) -> None:
        """Write an entry, of JSON's types, in place of an older one of the same key."""
        entries = {k: v for k, v in self.entries().items() if k != key}
        entries = dict([*entries.items(), (key, entry)][-_ROOM:])
        try:
            files.write_text(self.file, json.dumps(entries, indent=1))
        except OSError:
            _UNWRITTEN.setdefault(self.file, {})[key] = entry
