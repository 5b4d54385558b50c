"""Several experiments at once, each in a process of its own."""

import multiprocessing
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from optjax.support.console import Console

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
        parent, last = multiprocessing.parent_process(), 0.0

        def show(text: str, fraction: float) -> None:
            nonlocal last
            if parent is not None and not parent.is_alive():
                raise KeyboardInterrupt  # nobody waits for the result
            if time.monotonic() - last >= _SECONDS:
                last = time.monotonic()
                self.messages.put((name, text, fraction))

        yield show
        self.messages.put((name, "", -1.0))


_console: Console | None = None


def _begin(messages: Any) -> None:
    global _console
    _console = _Sender(messages)


def _call(function: Callable[[A, Console], Any], item: A) -> Any:
    assert _console is not None
    return function(item, _console)


def carry_out(
    function: Callable[[A, Console], Any], items: Sequence[A], jobs: int, console: Console
) -> Iterator[Any]:
    """Call ``function(item, console)`` on every item, `jobs` at a time; yield results as they come.

    One job runs in this process; more run in processes of their own, whose lines and progress the
    console shows. One of them takes the items from the front, the others from the back: of items
    sorted by cost, some are soon there and the dear ones are not left to the end.

    Raises:
      KeyboardInterrupt: once the calls under way have ended; the others are dropped.
    """
    if min(jobs, len(items)) <= 1:
        yield from (function(item, console) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    messages, left = context.Queue(), deque(items)
    under_way: dict[Future[Any], bool] = {}  # → whether its item is from the front
    bars: dict[str, tuple[ExitStack, Callable[[str, float], None]]] = {}
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(jobs, context, _begin, (messages,))
        stack.callback(lambda: [bar.close() for bar, _ in bars.values()])
        stack.callback(pool.shutdown)
        while left or under_way:
            # No more than can begin: what waits in the pool could not be taken back.
            while left and len(under_way) < jobs:
                front = True not in under_way.values()
                item = left.popleft() if front else left.pop()
                under_way[pool.submit(_call, function, item)] = front
            _show(messages, bars, console)
            for future in [future for future in under_way if future.done()]:
                del under_way[future]
                yield future.result()


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
