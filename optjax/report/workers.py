"""Several experiments at once, each in a process of its own."""

import multiprocessing
import os
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from optjax.support.console import Console
from optjax.support.machine import cores

A = TypeVar("A")

_SECONDS = 0.2
"""Between two looks at what the workers say."""


class _Sender(Console):
    """A console that hands lines and progress to the first process."""

    def __init__(self, messages: Any) -> None:
        super().__init__(quiet=True)
        self.messages = messages

    def line(self, text: str) -> None:
        self.messages.put(("", text, 0.0))

    @contextmanager
    def progress(self, name: str) -> Iterator[Callable[[str, float], None]]:
        last = 0.0

        def show(text: str, fraction: float) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS:
                last = time.monotonic()
                self.messages.put((name, text, fraction))

        try:
            yield show
        finally:
            self.messages.put((name, "", -1.0))


_console: Console | None = None


def _begin(messages: Any, places: Any, share: int) -> None:
    """Prepare a worker: its console, its cores, and its end should the first process be killed."""
    global _console
    _console = console = _Sender(messages)
    warnings.showwarning = lambda message, *_, **__: console.line(str(message))
    if hasattr(os, "sched_setaffinity"):
        # Threads of two workers on one core would wait for each other.
        own = sorted(os.sched_getaffinity(0))
        at = places.get() * share
        os.sched_setaffinity(0, own[at : at + share])
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def _call(function: Callable[[A, Console], Any], item: A) -> Any:
    assert _console is not None
    return function(item, _console)


def carry_out(
    function: Callable[[A, Console], Any], items: Sequence[A], jobs: int, console: Console
) -> Iterator[Any]:
    """Call ``function(item, console)`` on every item, `jobs` at a time; yield results as they come.

    One job runs in this process; more run in processes of their own, whose lines and progress the
    console shows. One of them takes the first half of the items from the front, all else is taken
    from the back: of items sorted by cost, some are soon there and the dear ones do not come last.

    What a call raises, and Ctrl-C, is raised here; the other calls under way are then ended.
    """
    jobs = min(jobs, len(items), cores())
    if jobs <= 1:
        yield from (function(item, console) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    messages, places, left = context.Queue(), context.Queue(), deque(items)
    cheap = len(items) // 2
    for place in range(jobs):
        places.put(place)
    under_way: dict[Future[Any], bool] = {}  # → whether its item is from the front
    bars: dict[str, tuple[ExitStack, Callable[[str, float], None]]] = {}
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(jobs, context, _begin, (messages, places, cores() // jobs))
        stack.callback(pool.shutdown)
        stack.callback(_end, under_way)
        stack.callback(lambda: [bar.close() for bar, _ in bars.values()])
        while left or under_way:
            # No more than can begin: what waits in the pool could not be taken back.
            while left and len(under_way) < jobs:
                front = cheap > 0 and True not in under_way.values()
                cheap -= front
                item = left.popleft() if front else left.pop()
                under_way[pool.submit(_call, function, item)] = front
            _show(messages, bars, console)
            for future in [future for future in under_way if future.done()]:
                del under_way[future]
                yield future.result()


def _end(under_way: dict[Future[Any], bool]) -> None:
    """End the workers where an error or Ctrl-C left some at work.

    A sweep takes SIGTERM for a wish, and its worker would then wait for the next item.
    """
    if under_way:
        for worker in multiprocessing.active_children():
            worker.kill()


def _show(messages: Any, bars: dict[str, Any], console: Console) -> None:
    """Show what the workers have said, and wait a little for more."""
    try:
        name, text, fraction = messages.get(timeout=_SECONDS)
    except queue.Empty:
        return
    if not name:
        console.line(text)
    elif fraction < 0:
        if name in bars:
            bars.pop(name)[0].close()
    else:
        if name not in bars:
            bar = ExitStack()
            bars[name] = bar, bar.enter_context(console.progress(name))
        bars[name][1](text, fraction)
