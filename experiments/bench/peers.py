"""Peers that run in a process of their own, or cannot be measured here."""

import json
import subprocess
import sys
from typing import Any

NO_TORCH = "torch is not installed: pip install torch"


class NoPeerError(Exception):
    """The peer cannot be measured here; the message says why."""


def alone(name: str, module: str, *words: str) -> dict[str, Any]:
    """The JSON that a peer's module of this folder prints last, in a process of its own."""
    command = [sys.executable, "-m", f"{__package__}.{module}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        why = last if done.returncode > 0 else f"it was ended by signal {-done.returncode}"
        raise NoPeerError(f"{name} is left out: {why}")
    return json.loads(done.stdout.strip().splitlines()[-1])
