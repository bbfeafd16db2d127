"""Signals that ask training to stop, which it does after the step that it is in."""

from __future__ import annotations

import signal
from typing import Any


class Interrupt:
    """While it is entered, a first Ctrl-C, SIGTERM or SIGHUP only sets `asked`; a second one interrupts.

    On another machine mlx.launch passes Ctrl-C on as SIGHUP, through ssh. Where nohup ignores SIGHUP, so does this.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> None:
        signals = [signal.SIGINT, signal.SIGTERM]
        signals += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        self._handlers = {s: signal.signal(s, self._ask) for s in signals}

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
