"""One run at a time writes into a folder of checkpoints.

Two runs of one folder overwrite each other's checkpoints, and both end with status 0. It happens by itself where a queue starts a job
again whose processes still live. So the first process of a run locks a file beside the folder, from before it reads anything until it ends:

- The operating system's lock goes with the process, however that ends. A file that is left over blocks no run.
- Some network file systems keep such locks to one machine, or have none. So the file says who holds it, and a thread of the holder touches
  it every ``HEARTBEAT`` seconds. On the holder's machine its process is looked up. On others it counts as ended after ``SILENCE`` seconds
  without a touch, counted by the one that waits: clocks of machines differ.
"""

import fcntl
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.process import is_first_process, is_running, machine, process_start

HEARTBEAT = 10.0
SILENCE = 30.0
# A file that was last touched so long ago is not watched first; machines' clocks differ by less.
LONG_AGO = 600.0
_POLL = 0.2
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. ``machine`` and ``start`` tell a process from later ones that have its number."""

    token: str
    host: str
    pid: int
    start: str
    machine: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """The lock on ``folder``, which need not exist; the folder it is in must."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder.with_name(f"{folder.name}.lock")
        self._own = Holder(
            uuid4().hex,
            socket.gethostname(),
            os.getpid(),
            process_start(os.getpid()),
            machine(),
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        )
        self._file = -1
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="lock heartbeat")

    def acquire(self, seconds: float) -> None:
        """Hold the lock. Waits ``seconds`` for another run to end, and up to ``SILENCE`` to see whether one elsewhere still lives.

        Raises:
            ValueError: another run has the lock. Names its process.
            OSError: the file cannot be written.
        """
        began, watch, said = time.monotonic(), _Watch(), False
        while True:
            self._file = os.open(self.path, _OPEN, 0o666)
            # A lock of the operating system is proof of life.
            is_locked, holder = _lock(self._file) is False, self._read()
            lives = True if is_locked else watch.lives(holder, self._file)
            if lives is False and self._take():
                break
            os.close(self._file)  # and with it the operating system's lock
            if lives and time.monotonic() - began >= seconds:
                raise ValueError(self._refusal(holder, seconds))
            if not said:
                logger.warning(
                    f"{_writes(holder, self.folder)}, or did lately: waiting up to {max(seconds, SILENCE):.0f} s for its end"
                )
            said = True
            time.sleep(_POLL)
        self._heart.start()

    def check(self) -> None:
        """Pass if the lock is still held; asked before a save.

        Raises:
            ValueError: this process was taken for dead, and another run has taken the lock.
        """
        if self._is_own() or self._renew():
            return
        raise ValueError(
            f"{_writes(None, self.folder)}: it has taken {self.path} while this one did not respond; this one ends without a save, "
            "so that they do not overwrite each other's checkpoints"
        )

    def release(self) -> None:
        """Let others hold it; the file is removed."""
        self._ended.set()
        self._heart.join(_POLL)  # not for ever: the disk may not answer
        with suppress(OSError):
            if self._is_own():
                self.path.unlink()
        os.close(self._file)

    def _take(self) -> bool:
        """Write this process into the file. False if another one was faster, or has removed the file."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(asdict(self._own)).encode(), 0)
        os.fsync(self._file)
        if _lock(self._file) is None:  # of two that write at the same time the later one wins
            time.sleep(5 * _POLL)
        return self._is_own()

    def _renew(self) -> bool:
        """Write the file again where it was removed, as by a clean-up; False where another run has written it."""
        try:
            file = os.open(self.path, _OPEN | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        os.close(self._file)
        self._file = file
        return _lock(file) is not False and self._take()

    def _is_own(self) -> bool:
        try:
            is_same = os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False
        return is_same and self._read() == self._own

    def _read(self) -> Holder | None:
        # Never by opening the path again: closing any descriptor of a file drops the process's locks on it.
        try:
            values: Any = json.loads(os.pread(self._file, 4096, 0))
            return Holder(**values)
        except (ValueError, TypeError):  # empty, or in the middle of being written
            return None

    def _refusal(self, holder: Holder | None, seconds: float) -> str:
        waited = f" and did not end within {seconds:.0f} s (checkpoint.lock_timeout)"
        return (
            f"job.dump_folder: {_writes(holder, self.folder)}{waited if seconds else ''}; stop that run or wait for its end, or choose "
            "another job.dump_folder"
        )

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with suppress(OSError):  # a disk that does not answer for a while
                os.utime(self._file)


class _Watch:
    """Whether the holder of a lock lives, by its process or its heartbeat."""

    def __init__(self) -> None:
        self._seen: tuple[str, int] | None = (
            None  # the holder's token, and when it touched the file
        )
        self._since = 0.0

    def lives(self, holder: Holder | None, file: int) -> bool | None:
        """None while that is not known."""
        if holder is None:
            return False
        if holder.machine == machine():
            return is_running(holder.pid, holder.start)
        seen, now = (holder.token, os.fstat(file).st_mtime_ns), time.monotonic()
        if seen != self._seen:
            is_new = self._seen is None or self._seen[0] != holder.token
            self._seen, self._since = seen, now
            if not is_new:
                return True
            return False if time.time() - seen[1] / 1e9 > LONG_AGO else None
        return False if now - self._since > SILENCE else None


def _writes(holder: Holder | None, folder: Path) -> str:
    return (
        f"another run writes into {folder} ({holder})"
        if holder
        else f"another run writes into {folder}"
    )


def _lock(file: int) -> bool | None:
    """Whether the operating system's lock on ``file`` is ours now; None where there are no such locks. Unlike ``flock`` it is not
    inherited by the loader's worker processes, which may outlive the run for a while."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


_HELD: list[FolderLock] = []


@contextmanager
def holding_folder(config: JobConfig) -> Iterator[None]:
    """Hold the folder of the run's checkpoints while the block runs. Only the first process does, of a run that may save.

    Raises:
        ValueError: another run has it, or its lock cannot be written.
    """
    options = config.checkpoint
    if not options.enable or options.load_only or not is_first_process():
        yield
        return
    lock = FolderLock(Path(config.job.dump_folder) / options.folder)
    try:
        made = [path for path in lock.path.parents if not path.exists()]
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(min(options.lock_timeout, _others_wait(config)))
    except OSError as error:
        raise ValueError(
            f"job.dump_folder: {lock.path} cannot be written ({error.strerror or error}); name a folder that can be written to"
        ) from None
    _HELD.append(lock)
    try:
        yield
    finally:
        _HELD.remove(lock)
        lock.release()
        with suppress(OSError):  # they are empty if the run was refused
            for path in made:
                path.rmdir()


def _others_wait(config: JobConfig) -> float:
    """Seconds that the other ranks wait for the first one, but for those that it needs to connect."""
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return math.inf if is_alone else max(0, config.comm.init_timeout_seconds - 30)


def check_held(folder: Path) -> None:
    """Pass if the lock on ``folder``, where this process has taken it, is still held.

    Raises:
        ValueError: another run has taken it.
    """
    for lock in _HELD:
        if lock.folder == folder:
            lock.check()
