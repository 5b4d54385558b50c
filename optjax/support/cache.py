"""What was measured once and holds for later processes too: small files in the user's cache."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from optjax.support import files

_ROOM = 1000
_UNWRITTEN: dict[Path, dict[str, Any]] = {}


class Remembered(NamedTuple):
    """Entries by key in the folder OPTJAX_CACHE, or in the user's cache: the newest thousand.

    A file that cannot be read counts as empty. Where it cannot be written, the entries last as
    long as the process, which costs the next one time and nothing else.
    """

    name: str  # of the file

    @property
    def file(self) -> Path:
        """Where the entries are."""
        import platformdirs

        folder = os.environ.get("OPTJAX_CACHE") or platformdirs.user_cache_dir("optjax")
        return Path(folder) / self.name

    def entries(self) -> dict[str, Any]:
        """All entries, the oldest first; whoever reads one checks that it is well formed."""
        file = self.file
        try:
            found = json.loads(file.read_text("utf-8")) if file.stat().st_size <= 1 << 20 else {}
        except (OSError, ValueError, RecursionError):
            found = {}
        return (found if isinstance(found, dict) else {}) | _UNWRITTEN.get(file, {})

    def keep(self, key: str, entry: Any) -> None:
        """Write an entry, which JSON can hold, in place of an older one of the same key."""
        entries = {k: v for k, v in self.entries().items() if k != key}
        entries = dict([*entries.items(), (key, entry)][-_ROOM:])
        try:
            files.write_text(self.file, json.dumps(entries, indent=1))
        except OSError:
            _UNWRITTEN.setdefault(self.file, {})[key] = entry
