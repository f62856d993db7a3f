"""Ctrl-C and SIGTERM: the first one stops the run after its current step with a checkpoint, the second one kills it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop outside of its steps, where there is nothing to finish first."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class StopRequests:
    """Listens for signals inside its `with` block; the handlers that were there before come back afterwards.

    While `in_steps` is true a signal only sets `signum`, for the training loop to see at the end of its step; otherwise it
    raises `Stopped` where the program stands.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.in_steps = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        # Python delivers signals to the main thread alone; a run in another thread is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if not self.in_steps:
            raise Stopped(signum)
        # From here on the system's own answer: no Python code stands between a second Ctrl-C and the end of the process.
        # Checkpoints appear whole or not at all, so nothing is lost by it but the steps since the last one.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # A signal may arrive in the middle of a print, where another print would raise; a plain write may not.
        show_cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""
        os.write(2, show_cursor + b"\nStopping after this step, with a checkpoint. Once more to stop at once.\n")
