"""What a reliability campaign does to a run, and what must become of it.

``reliability.campaign`` draws the moment: during start-up, in a step, or while a checkpoint is written.
"""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from symbiotic_titan.process import ROOT
from symbiotic_titan.reliability.runs import (
    Started,
    launchers_of,
    ranks_of,
    send,
    wait_until,
    workers_of,
)
from symbiotic_titan.signals import STOP_SIGNALS

STOPPED = 0


@dataclass
class Fault:
    """What was done to a run.

    kind:     its row of the table.
    what:     in words.
    saves:    whether the run must save the last step that it took.
    statuses: that the run may end with; None where it was killed.
    """

    kind: str
    what: str
    saves: bool = False
    statuses: tuple[int, ...] | None = None


# ---- faults of a running process ------------------------------------------------------------------------------------------


def kill(started: Started, chance: random.Random) -> Fault:
    """SIGKILL to all processes, as a machine that is lost; or to one rank, or to the launcher alone."""
    ranks, launchers = ranks_of(started), launchers_of(started)
    what = chance.choice(("everything", "a rank", "the launcher") if launchers else ("everything",))
    if what == "a rank" and ranks:
        send(chance.choice(ranks), signal.SIGKILL)
    elif what == "the launcher":
        send(launchers[0], signal.SIGKILL)
    else:
        for pid in started.alive():
            send(pid, signal.SIGKILL)
    return Fault("kill", f"SIGKILL to {what}")


def stop_signal(started: Started, chance: random.Random) -> Fault:
    """One of the signals that stop a run, to the process that a user or a queue knows."""
    number = signal.Signals[chance.choice(STOP_SIGNALS)]
    send(started.pid, number)
    return Fault("signal", number.name, saves=True, statuses=(STOPPED,))


def stuck_read(started: Started, chance: random.Random) -> Fault:
    """The processes that read data stop as if their disk hung; a second later the run is told to stop."""
    for pid in workers_of(started):
        send(pid, signal.SIGSTOP)
    wait_until(lambda: started.process.poll() is not None, chance.uniform(0.2, 1.5))
    send(started.pid, signal.SIGTERM)
    what = "SIGSTOP to the workers, then SIGTERM"
    return Fault("stuck read", what, saves=True, statuses=(STOPPED,))


RUNNING: dict[str, Callable[[Started, random.Random], Fault]] = {
    "kill": kill,
    "signal": stop_signal,
    "stuck read": stuck_read,
}


# ---- damage of a checkpoint -----------------------------------------------------------------------------------------------


def _flip(path: Path, chance: random.Random) -> None:
    at = chance.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def _zero(path: Path, chance: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _garbage(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(path.stat().st_size))


def _zero_page(path: Path, chance: random.Random) -> None:
    size = path.stat().st_size
    at = chance.randrange(max(size - 4096, 1))
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(min(4096, size - at)))


def _truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _remove(path: Path, chance: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit flipped": _flip,
    "a page of zeros": _zero_page,
    "zeros": _zero,
    "garbage": _garbage,
    "truncated": _truncate,
    "missing": _remove,
}


def damage(checkpoint: Path, chance: random.Random) -> str:
    """Damage a file of ``checkpoint`` that has its state or proves it. Returns what was done."""
    from symbiotic_titan.checkpoint.history import LINEAGE  # loads torchtitan

    files = sorted(path for path in checkpoint.iterdir() if path.name != LINEAGE)
    shards = [path for path in files if path.suffix == ".distcp"]
    path = chance.choice(shards if chance.random() < 0.7 else files)
    # Without the file that proves it, a checkpoint is one of an older version.
    needed = path in shards or path.name == ".metadata"
    how = chance.choice([name for name in DAMAGES if needed or name != "missing"])
    before = path.read_bytes()
    while path.exists() and path.read_bytes() == before:  # zeros may have been zeros
        DAMAGES[how](path, chance)
        how = "a bit flipped" if path.exists() and path.read_bytes() == before else how
    return f"{checkpoint.name}/{path.name}: {how}"


# ---- a small disk ---------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system in memory, in a namespace that needs no privileges; it is gone with this process.

    prefix: of commands that are to see it, at ``folder``. seen: where this process sees it.
    """

    def __init__(self, folder: Path, megabytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mount = f'mount -t tmpfs -o size={megabytes}m none "$0" && echo mounted && exec cat'
        self._holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)],
            stdin=subprocess.PIPE,  # closed with this process, which ends cat
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            raise OSError(self._holder.communicate()[1].decode().strip())
        pid = self._holder.pid
        enter = ["nsenter", "--preserve-credentials", "--user", "--mount", f"--wd={ROOT}"]
        self.prefix = [*enter, "--target", str(pid), "--"]
        self.seen = Path(f"/proc/{pid}/root{folder}")

    def fill(self) -> None:
        """Until nothing more can be written."""
        with (self.seen / "filler").open("wb", buffering=0) as filler:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        filler.write(bytes(size))

    def empty(self) -> None:
        (self.seen / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        self._holder.communicate()


def small_disk(folder: Path, megabytes: int) -> SmallDisk | None:
    """None where the machine allows no namespaces."""
    try:
        return SmallDisk(folder, megabytes)
    except OSError:
        return None
