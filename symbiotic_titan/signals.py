"""Signals that stop a run: what they do at which moment, and how the process ends.

    before the first step is done   nothing needs saving: one line, and the end with status 0
    later                           recorded; the trainer finishes the step, saves it, and ends with status 0
    a second SIGINT                 one line, and the end at once with status 130

This loads nothing that takes time, so that the handlers are there before torch is imported.
"""

import ctypes
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Literal, NoReturn, get_args

from symbiotic_titan.process import INTERRUPTED

StopSignal = Literal["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"]
# Ctrl-C; what kill and most schedulers send; a terminal that is gone; SLURM's --signal=USR1@60.
STOP_SIGNALS: tuple[StopSignal, ...] = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")

# Seconds in which a start-up must have ended after a signal; then its process is ended from a thread. Schedulers grant 30.
GRACE = 10.0
# Seconds between two SIGINTs of a user who presses Ctrl-C twice. A launcher and a terminal may both send the first one.
APART = 1.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Seconds in which a rank without a launcher can finish its step and save.
GRACE_TO_SAVE = 300.0


class Stopped(BaseException):
    """A stop signal came before the first step was done. No Exception: code that it interrupts must not take it for its own."""


class StopRequest:
    """The first stop signal that this process got.

    signal_name:     its name; None: none came.
    nothing_to_save: while it holds, a signal ends the run at once, wherever it is. Of several connected ranks, which would wait for
                     each other, each only records it; they end together where they agree on it next, or alone after ``GRACE``.
    leave_at_once:   whether a thread reads, which may hang, and processes for whose end that of the interpreter would wait.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.nothing_to_save = self.leave_at_once = False
        self._came = 0.0
        self._process = os.getpid()
        self._before: dict[str, Any] = {}
        self._wake, self._noticed = -1, ""

    def begin(self) -> None:
        """Handle all stop signals in this process, which has nothing to save so far."""
        self.nothing_to_save = True
        self.install()
        # run_train.sh holds them back until there are handlers.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.Signals[name] for name in STOP_SIGNALS])
        self._hook, sys.unraisablehook = sys.unraisablehook, _report_unless_stopped
        pipe, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        # Handlers run once the main thread is back in Python; this thread also learns of a signal while torch waits for other ranks.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(pipe,), name="signals", daemon=True).start()

    def install(self, names: Sequence[str] = STOP_SIGNALS) -> None:
        """Handle these signals in this process (main thread only), and no longer others that it handled. A SIGHUP that is ignored,
        as nohup arranges, stays ignored."""
        for name in self._before.keys() - set(names):
            signal.signal(signal.Signals[name], self._before.pop(name))
        for name in names:
            number = signal.Signals[name]
            before = signal.getsignal(number)
            if name in self._before or (name == "SIGHUP" and before == signal.SIG_IGN):
                continue
            self._before[name] = before
            signal.signal(number, self._handle)

    def request(self, reason: str) -> None:
        """Stop as after a signal, for another ``reason``."""
        self.signal_name = self.signal_name or reason

    def close(self) -> None:
        """Handle none any more."""
        self.install(())
        if self._wake >= 0:
            sys.unraisablehook = self._hook
            signal.set_wakeup_fd(-1)
            os.close(self._wake)  # the end of the thread
            self._wake = -1

    def status(self, status: int) -> int:
        """``status``, with which this process ends; here, where its end must not be orderly."""
        if self.leave_at_once:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that has just been forked, and will ignore them
        if self.signal_name is None:
            self.signal_name, self._came = signal.Signals(number).name, time.monotonic()
            # Otherwise only recorded: the step must finish, or its collectives would hang on the other ranks.
            if self.nothing_to_save and not _are_several_connected():
                raise Stopped
        elif number == signal.SIGINT and time.monotonic() - self._came >= APART:
            self.end(INTERRUPTED)

    def _watch(self, pipe: int) -> None:
        """End the process where the main thread does not: it may be in C++ code, which waits for other ranks or is computing."""
        first, end, status = 0.0, float("inf"), 0
        while True:
            left = max(0.0, end - time.monotonic())
            if not select.select([pipe], [], [], left if end < float("inf") else None)[0]:
                if status or self.nothing_to_save:
                    self.end(status)
                end = float("inf")
                continue
            if not (numbers := os.read(pipe, 64)):
                os.close(pipe)
                return
            for number in numbers:
                now = time.monotonic()
                if signal.Signals(number).name not in self._before:
                    continue
                if not first:
                    first, end = now, now + GRACE
                    self._noticed = signal.Signals(number).name
                elif number == signal.SIGINT and now - first >= APART:
                    end, status = now + APART, INTERRUPTED

    def end(self, status: int) -> NoReturn:
        """One line, and the end of this process, from any thread and whatever the others do."""
        name = self.signal_name or self._noticed or "a stop signal on another rank"
        line = f"{name}: stopped before the first step"
        if status == INTERRUPTED:
            line = "SIGINT: interrupted; what was not saved is lost"
        with suppress(OSError):  # a terminal that is gone
            os.write(2, f"{line}\n".encode())
        os._exit(status)


def follow_parent() -> None:
    """Stop this process, as a signal would, when the one that has started it is gone, whatever ended that one: it would train on beside
    the run that a queue starts in its place. It is ended hard if it has not saved within ``GRACE_TO_SAVE``, since other ranks may be gone.
    """
    parent = os.getppid()

    def follow() -> None:
        # PR_SET_PDEATHSIG of Linux would come 0.5 s earlier, but also when only a thread of the parent ends.
        while os.getppid() == parent:
            time.sleep(0.5)
        with suppress(OSError):
            os.write(
                2, f"process {parent}, which has started this one, is gone: stopping\n".encode()
            )
        chosen = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
        handled = (number for number in chosen if callable(signal.getsignal(number)))
        os.kill(os.getpid(), next(handled, signal.SIGTERM))
        time.sleep(GRACE_TO_SAVE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow_parent", daemon=True).start()


def parent_pid() -> int:
    """Of a process that multiprocessing started: the process that did, even if it has ended since."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    return parent.pid


def end_with_parent(parent: int) -> None:
    """Have this process killed when the thread that started it ends, whatever it does then, or its process ``parent`` does.

    On Linux the system does it; elsewhere a thread looks every second, which code that keeps the interpreter's lock holds up.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ignore_stop_signals() -> None:
    """For the last moments of a process, whose exit status is known, and for workers: what is meant for all is answered by the trainer."""
    for name in get_args(StopSignal):
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def _are_several_connected() -> bool:
    """Whether this process has others that would wait for it. Asked at any moment, also while torch is being imported."""
    is_initialized = getattr(sys.modules.get("torch.distributed"), "is_initialized", None)
    return (
        os.environ.get("WORLD_SIZE", "1") != "1" and is_initialized is not None and is_initialized()
    )


def _report_unless_stopped(error: Any) -> None:
    if not isinstance(error.exc_value, Stopped):
        sys.__unraisablehook__(error)
