"""What a command knows of its own process: its rank, the terminal, and how it ends on a user's mistake."""

import errno
import gc
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Exit statuses; docs/running.md explains them.
MISTAKE = 2
DISK_FULL = 3
DIVERGED = 4  # a loss, a gradient or a weight is not finite: started again, the run would come to the same point
MACHINES_MISSING = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the run, try again
INTERRUPTED = 130

# What a system says of a full disk, a used up quota, and a file that may not become larger.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DiskFull(OSError):
    """A disk has no room for what is to be written. The message is a line for the user."""


class NothingToDo(Exception):
    """The run has taken all its steps. The message is a line for the user."""


def is_full(error: BaseException) -> bool:
    """Whether ``error`` says that a disk is full."""
    return isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in FULL)


def _process_group() -> Any:
    """``torch.distributed`` once it has a process group, else None. Without torch, which this does not load, there is none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def is_first_process() -> bool:
    """Whether this process is the one that writes and prints: rank 0, also before the process group exists."""
    dist = _process_group()
    if dist is not None:
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def loading() -> Iterator[None]:
    """For the imports of a program: no garbage collection meanwhile, and none of what they load later.

    Importing torch and torchtitan makes a million objects that stay. To walk them again and again takes a quarter of the time of
    these imports, and the collections after a run and at the interpreter's end would take 2 s more.
    """
    was_enabled, loaded = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > loaded:
            gc.freeze()
        if was_enabled:
            gc.enable()


def show_progress(line: str, *, is_last: bool) -> None:
    """Overwrite the current line of standard error; silent where that is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if is_last else "", file=sys.stderr, flush=True)


class Counter:
    """A progress callback: ``advance = Counter("answers", 40); advance(8)`` shows ``answers: 8/40, 12 s left``."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._start = time.monotonic()

    def __call__(self, count: int = 1) -> None:
        self.done += count
        line = f"{self.what}: {self.done}/{self.total}, {self.seconds_left():.0f} s left "
        show_progress(line, is_last=self.done >= self.total)

    def seconds_left(self) -> float:
        """At the mean speed so far."""
        passed = time.monotonic() - self._start
        return passed / max(self.done, 1) * (self.total - self.done)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; each counts once it has been used."""
        for item in items:
            yield item
            self()


def machine() -> str:
    """Names this machine since it was booted, or this container on it: where a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def process_fields(pid: int) -> list[str]:
    """What Linux says of process ``pid`` after its name: state, parent, ..., see proc_pid_stat(5). Empty where there is none."""
    try:
        # The name of the program, in parentheses, may itself have spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def process_start(pid: int) -> str:
    """When process ``pid`` of this machine was started, in ticks since boot: tells it from a later one with its number. Empty where
    there is no such process, or no /proc."""
    fields = process_fields(pid)
    # One that was killed and not yet waited for is none.
    return "" if not fields or fields[0] in ("Z", "X") else fields[19]


def is_running(pid: int, start: str = "") -> bool:
    """Whether this machine has the process ``pid``. ``start``: its ``process_start``; empty: any process of that number counts."""
    if start:
        return process_start(pid) == start
    try:
        os.kill(pid, 0)  # signal 0: does the process exist?
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it does, and belongs to another user
    return True


def exit_status(
    command: Callable[[], None],
    mistakes: tuple[type[Exception], ...] = (OSError, ValueError),
    interrupted: str = "interrupted",
) -> int:
    """Run ``command``: status 0, or one line and 2 for a user's mistake (one of ``mistakes``) or 3 for a full disk, or 130 after Ctrl-C."""
    try:
        command()
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        return DISK_FULL if is_full(error) else MISTAKE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    else:
        return 0
    finally:
        dist = _process_group()
        if dist is not None:
            dist.destroy_process_group()


def raised_by_us(error: Exception) -> bool:
    """Whether ``error`` was raised in this package: then its message is meant for the user, who needs no traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return raised_in == "symbiotic_titan" or raised_in.startswith("symbiotic_titan.")
