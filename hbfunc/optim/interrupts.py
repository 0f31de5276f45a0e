"""Postponing Ctrl-C while a step writes: between two writes it would leave the step half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Waiting:
    """Handler that remembers a SIGINT instead of raising KeyboardInterrupt."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before, self.arrived = before, list[tuple[Any, ...]]()

    def __call__(self, *arguments: Any) -> None:
        self.arrived.append(arguments)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context in which SIGINT is remembered; the handler of outside gets it at the end."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # Python handles signals in the main thread only, and this one nowhere
        return
    waiting = _Waiting(before)
    signal.signal(signal.SIGINT, waiting)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting.arrived:
            before(*waiting.arrived[0])


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT through within `uninterrupted`, for work that may take long and writes nothing."""
    waiting = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not isinstance(waiting, _Waiting):
        yield
        return
    signal.signal(signal.SIGINT, waiting.before)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, waiting)
