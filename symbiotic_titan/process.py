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

# The checkout of the repository; of a package that was installed from a wheel, the folder that it lies in.
ROOT = Path(__file__).resolve().parents[1]

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


def shows_colors() -> bool:
    """Whether standard output is a terminal, and the user has not set NO_COLOR."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min`` or ``2 d 4 h``."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class ProgressLine:
    """How far a command is, on the standard error of the first process: on a terminal one line that is overwritten. Elsewhere, as in a
    log, lines of their own: the first after ``FIRST_LINE_S`` seconds, one every ``EVERY_S`` seconds, and the last if there was any."""

    FIRST_LINE_S, EVERY_S = 5.0, 30.0

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._next = self._start + self.FIRST_LINE_S
        self._is_begun, self._width = False, 0

    def left(self, done: float, total: float) -> str:
        """The time left at the mean speed so far, as ``12 min left``."""
        passed = time.monotonic() - self._start
        return f"{duration(passed / max(done, 1) * (total - done))} left"

    def show(self, line: str, *, is_last: bool = False) -> None:
        if not is_first_process():
            return
        if sys.stderr.isatty():
            self._width = max(self._width, len(line))  # what it overwrites may be longer
            end = "\n" if is_last else ""
            print(f"\r{line:{self._width}}", end=end, file=sys.stderr, flush=True)
        elif time.monotonic() >= self._next or (is_last and self._is_begun):
            self._is_begun, self._next = True, time.monotonic() + self.EVERY_S
            print(line, file=sys.stderr, flush=True)


class Counter:
    """A progress callback: ``advance = Counter("answers", 40); advance(8)`` shows ``answers: 8/40, 12 s left``."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._line = ProgressLine()

    def __call__(self, count: int = 1) -> None:
        self.done += count
        left = self._line.left(self.done, self.total)
        line = f"{self.what}: {self.done}/{self.total}, {left}"
        self._line.show(line, is_last=self.done >= self.total)

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


def check_checkout(root: Path, file: str) -> None:
    """Pass if ``root`` has a file or folder of the repository that is not in a wheel.

    Raises:
        ValueError: it has not.
    """
    if not (root / file).exists():
        raise ValueError(
            f"this command needs {file} of the repository, which {root} does not have: a package that was installed without its "
            "repository has no such files; clone the repository, run tools/setup_env.sh there, and use the command of its .venv"
        )


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
