"""Runs that a reliability campaign starts, watches and hurts: their processes, what they print, and what they leave on the disk."""

import os
import re
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from symbiotic_titan.process import process_fields

CHECKPOINTS = "checkpoint"
STARTS = re.compile(r"Training starts at step (\d+)")
STEP = re.compile(r"step: *(\d+) ")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
POLL_SECONDS = 0.01
VARIABLE = "SYMBIOTIC_RELIABILITY"  # of the environment


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes. ``processes``: of its starts, in turn; ``options``: of all of them."""

    name: str
    processes: tuple[int, ...]
    options: tuple[str, ...] = ()
    has_workers: bool = False


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("one process", (1,)),
        Layout("one worker", (1,), ("--training.dataloader.num_workers", "1"), True),
        Layout(
            "two workers, async saves",
            (1,),
            ("--training.dataloader.num_workers", "2", "--checkpoint.async_mode", "async"),
            True,
        ),
        Layout("FSDP2", (2,)),
        Layout("expert parallel", (2,), ("--parallelism.expert_parallel_degree", "2")),
        Layout("2 and 1 processes in turn", (2, 1)),
    )
}


class Started:
    """A training command in a session of its own, which prints into ``log``. Its processes are known by a variable in their environment,
    since a launcher gives each rank another session."""

    def __init__(self, command: list[str], processes: int, log: Path) -> None:
        self.log, self.num_processes = log, processes
        self._setting = f"{VARIABLE}={uuid4().hex}"
        self._own: dict[tuple[int, int], bool] = {}
        environment = os.environ | {"NGPU": str(processes), "OMP_NUM_THREADS": "1"}
        environment[VARIABLE] = self._setting.partition("=")[2]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return COLOURS.sub("", self.log.read_text(errors="replace"))

    def first_step(self) -> int | None:
        """That training starts with; None before."""
        found = STARTS.search(self.text())
        return int(found.group(1)) if found else None

    def last_step(self) -> int:
        """The last step that was taken; 0 if none was."""
        return max(map(int, STEP.findall(self.text())), default=0)

    def is_running(self) -> bool:
        """Whether any of its processes is. All of the machine are looked at only once the first has ended, since that takes long."""
        return self.process.poll() is None or bool(self.alive())

    def alive(self) -> list[int]:
        """Its processes, whoever their parent is by now."""
        self.process.poll()
        return [p.pid for p in processes() if p.state != "Z" and self._is_own(p)]

    def _is_own(self, process: "Process") -> bool:
        key = process.pid, process.start
        if key not in self._own:
            try:
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except OSError:
                return False
            self._own[key] = self._setting.encode() in environment
        return self._own[key]

    def end(self) -> int:
        """Kill what is left. Returns the status of the command."""
        for pid in self.alive():
            send(pid, signal.SIGKILL)
        return self.process.wait()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` came to hold within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(POLL_SECONDS)
    return condition()


# ---- processes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    pid: int
    state: str
    parent: int
    start: int
    """Clock ticks since the machine was started: with it a number is told from its later uses."""


def processes() -> Iterator[Process]:
    """All of this machine, from /proc."""
    for folder in Path("/proc").iterdir():
        fields = process_fields(int(folder.name)) if folder.name.isdigit() else []
        if fields:  # else it has ended
            yield Process(int(folder.name), fields[0], int(fields[1]), int(fields[19]))


def launchers_of(started: Started) -> list[int]:
    """torchrun's processes, where there are several ranks."""
    return [pid for pid in started.alive() if "tools/launch.py" in _command_line(pid)]


def ranks_of(started: Started) -> list[int]:
    """Processes that train."""
    if started.num_processes == 1:
        return [started.pid]
    return children_of(launchers_of(started))


def workers_of(started: Started) -> list[int]:
    """Processes that read data for the ranks."""
    return children_of(ranks_of(started))


def children_of(parents: list[int]) -> list[int]:
    return sorted(p.pid for p in processes() if p.parent in parents and p.state != "Z")


def _command_line(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""  # it has ended


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended by itself


# ---- checkpoints ----------------------------------------------------------------------------------------------------------


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    from symbiotic_titan.checkpoint.history import folders_of
    from symbiotic_titan.weights.damage import damage_of, step_of

    whole = (p for p in folders_of(folder / CHECKPOINTS, "step") if damage_of(p) is None)
    return [step for path in whole if (step := step_of(path))]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: weights, and the state of the optimizer."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from symbiotic_titan.checkpoint.load import load
    from symbiotic_titan.checkpoint.start import entries_of
    from symbiotic_titan.weights.damage import read_metadata

    metadata, damage = read_metadata(folder)
    if metadata is None or damage is not None:
        raise ValueError(f"checkpoint {folder}: {damage}")
    stored = metadata.state_dict_metadata.items()
    tensors = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in stored
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(tensors), folder, entries_of(metadata), metadata)
    return tensors


def largest_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Over all tensors; infinite where one has a tensor that the other lacks, or a value that is not a number."""
    if left.keys() != right.keys():
        return float("inf")
    worst = 0.0
    for name, tensor in left.items():
        other = right[name]
        if tensor.shape != other.shape:
            return float("inf")
        if not torch.equal(tensor, other):
            difference = float((tensor.double() - other.double()).abs().max())
            worst = max(worst, difference) if difference == difference else float("inf")
    return worst
