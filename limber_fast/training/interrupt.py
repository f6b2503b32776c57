"""Ctrl-C that lets the running step finish, so that the checkpoint on disk is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, what a shell expects of an interrupted command


class InterruptGuard:
    """While entered, the first SIGINT only sets `requested`; the second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous = None

    def __enter__(self) -> InterruptGuard:
        # Handlers can only be set on the main thread; elsewhere nobody presses Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
