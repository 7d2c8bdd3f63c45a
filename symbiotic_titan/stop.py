"""Stopping on SIGTERM and SIGINT: the flag that the trainer reads at the end of a step."""

import signal
from types import FrameType


class StopRequest:
    """Remembers the first stop signal. A second SIGINT interrupts at once, as a user who presses Ctrl-C twice expects."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Handle SIGTERM and SIGINT in this process (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
