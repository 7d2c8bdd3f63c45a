"""A queue of commands, several at once, each as soon as those that it needs are done; stages whose result is there are passed over.

Stopped at any moment and run again, it goes on: a stage is done when its result exists, so a command must write that last.
"""

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import Protocol

from symbiotic_titan.process import ProgressLine

POLL_SECONDS = 0.2
# Seconds in which a process that is told to end may save; then it is killed.
GRACE = 60.0
TAIL_LINES = 15
# What every stage imports.
PRELOADED = ["symbiotic_titan.training.trainer", "symbiotic_titan.data.pipeline"]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STEP = re.compile(rb"step: *(\d+) ")
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Stage:
    """One command. Without one, ``finish`` alone is the stage.

    result:  the file that says that it is done.
    log:     what the command prints is added to it.
    seconds: that it takes on one core, roughly: the unit of the progress shown.
    needs:   names of stages that must be done before.
    steps:   of a training command: how far it is is read from its log.
    finish:  called in this process after the command has ended well. It must be possible to repeat it.
    """

    name: str
    result: Path
    log: Path
    command: Sequence[str] = ()
    seconds: float = 1.0
    needs: tuple[str, ...] = ()
    steps: int = 0
    finish: Callable[[], None] | None = None

    def is_done(self) -> bool:
        return self.result.exists()

    def share(self) -> float:
        """Of its work that is done while it runs, as far as its log tells."""
        return min(1.0, self.last_step() / self.steps) if self.steps else 0.0

    def last_step(self) -> int:
        """The last step that the end of the log names; 0 if it names none."""
        found = _STEP.findall(_end_of(self.log))
        return int(found[-1]) if found else 0


def _end_of(log: Path, size: int = _TAIL_BYTES) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read()
    except OSError:
        return b""


@dataclass
class Progress:
    """What was done of all stages, in seconds on one core, and when the rest will be."""

    stages: Sequence[Stage]
    at_once: int
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.before = sum(stage.seconds for stage in self.stages if stage.is_done())
        self.total = sum(stage.seconds for stage in self.stages)

    def line(self, done: set[str], running: Sequence[Stage]) -> str:
        """Stages, share, minutes left, and what runs."""
        work = sum(stage.seconds for stage in self.stages if stage.name in done)
        work += sum(stage.seconds * stage.share() for stage in running)
        shown = ", ".join(_label(stage) for stage in running)
        left = f"{self.seconds_left(work) / 60:.0f} min left"
        share = work / self.total if self.total else 1.0
        return f"{len(done)}/{len(self.stages)} stages, {share:.0%}, {left}{': ' if shown else ''}{shown}"

    def seconds_left(self, work: float) -> float:
        """At the speed so far. The estimates of the stages count for the first minute, in which hardly any has ended."""
        passed = time.monotonic() - self.start
        speed = (work - self.before + 60.0 * self.at_once) / (passed + 60.0)
        return (self.total - work) / speed


def _label(stage: Stage) -> str:
    return f"{stage.name} {stage.last_step()}/{stage.steps}" if stage.steps else stage.name


# ---- processes ------------------------------------------------------------------------------------------------------------


class Started(Protocol):
    """A process in a session of its own: Ctrl-C reaches it once, from here."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its status; None while it runs."""


class Forked:
    """``python -m MODULE ARGUMENT ...`` as a fork of a process that has imported torch and the trainer, which takes as long as many a
    stage. It has its own output, environment and session all the same."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        _start_server(environment)
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run_module, args=(list(words), str(log), dict(environment))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode


def _start_server(environment: Mapping[str, str]) -> None:
    """Unless it runs. It reads how many threads there are, and how output is buffered, when it starts."""
    forkserver.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_module(words: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    for path, flags, numbers in (
        (os.devnull, os.O_RDONLY, (0,)),
        (log, os.O_WRONLY | os.O_APPEND, (1, 2)),
    ):
        opened = os.open(path, flags)
        for number in numbers:
            os.dup2(opened, number)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Started:
    """Start ``command``, whose output is added to ``log``."""
    if list(command[:2]) == [sys.executable, "-m"]:
        return Forked(command[2:], log, environment)
    with log.open("ab") as out:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )


def longest_first(stages: Iterable[Stage]) -> list[Stage]:
    """``stages``, those first that the most seconds of others wait for: in any other order a long chain may begin last, and run alone.
    None of them may need itself, by whatever way."""
    stages = list(stages)
    waiting: dict[str, list[Stage]] = {}
    for stage in stages:
        for need in stage.needs:
            waiting.setdefault(need, []).append(stage)

    @cache
    def seconds_of(stage: Stage) -> float:
        """Of the longest chain that begins with ``stage``."""
        return stage.seconds + max(map(seconds_of, waiting.get(stage.name, ())), default=0.0)

    return sorted(stages, key=seconds_of, reverse=True)


class Queue:
    """Runs ``stages``, at most ``at_once`` of them at a time: of those whose needs are done, the one that the longest chain waits for.

    Raises:
        ValueError: a stage needs one that does not exist, or two need each other.
    """

    def __init__(
        self, stages: Sequence[Stage], at_once: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.stages, self.at_once = list(stages), at_once
        self._check_needs()
        self.stages = longest_first(self.stages)
        self.environment = {**os.environ, **(environment or {})}
        self.running: dict[str, tuple[Stage, Started, float]] = {}
        self.done: set[str] = set()
        self.num_stops, self._line = 0, ProgressLine()

    def _check_needs(self) -> None:
        names = {stage.name for stage in self.stages}
        known: set[str] = set()
        waiting = list(self.stages)
        while ready := [stage for stage in waiting if known.issuperset(stage.needs)]:
            known |= {stage.name for stage in ready}
            waiting = [stage for stage in waiting if stage.name not in known]
        for stage in waiting:
            missing = sorted(set(stage.needs) - names)
            reason = (
                f"{missing[0]}, which is no stage" if missing else "stages that need each other"
            )
            raise ValueError(f"stage {stage.name} needs {reason}")

    def run(self) -> None:
        """Until all are done.

        Raises:
            RuntimeError: a stage failed, with the end of its log; the others that ran were ended.
            KeyboardInterrupt: Ctrl-C, or a signal that asks this process to end; those that ran were ended.
        """
        self.done = {stage.name for stage in self.stages if stage.is_done()}
        progress = Progress(self.stages, self.at_once)
        with self._stop_signals():
            try:
                while len(self.done) < len(self.stages):
                    self._start_what_is_ready()
                    for stage in self._ended():
                        self._conclude(stage)
                        self._report(progress, stage)
                    self._show(progress)
                    if self.num_stops:
                        raise KeyboardInterrupt
                    if self.running:
                        time.sleep(POLL_SECONDS)
            finally:
                self._end_all()

    def _start_what_is_ready(self) -> None:
        for stage in self.stages:
            if len(self.running) >= self.at_once:
                return
            if stage.name in self.done or stage.name in self.running:
                continue
            if self.done.issuperset(stage.needs):
                self._start(stage)

    def _start(self, stage: Stage) -> None:
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        if not stage.command:
            self._conclude(stage)
            return
        with stage.log.open("ab") as log:
            log.write(f"$ {' '.join(stage.command)}\n".encode())
        started = start(stage.command, stage.log, self.environment)
        self.running[stage.name] = stage, started, time.monotonic()

    def _ended(self) -> list[Stage]:
        """Those that have ended well since the last call."""
        ended = [entry for entry in self.running.values() if entry[1].poll() is not None]
        for stage, process, _ in ended:
            if process.poll() != 0:
                raise RuntimeError(_failure(stage, f"ended with status {process.poll()}"))
        return [stage for stage, _, _ in ended]

    def _conclude(self, stage: Stage) -> None:
        if stage.finish is not None:
            stage.finish()
        if not stage.is_done():
            # A training run that is told to stop saves and ends with status 0.
            raise RuntimeError(_failure(stage, f"ended without its result, {stage.result}"))
        self.done.add(stage.name)

    def _report(self, progress: Progress, stage: Stage) -> None:
        """A line for a stage that has ended, where no line is overwritten."""
        _, _, start = self.running.pop(stage.name)
        if not sys.stderr.isatty():
            line = f"{stage.name}: {time.monotonic() - start:.0f} s; {progress.line(self.done, ())}"
            print(line, file=sys.stderr, flush=True)

    def _show(self, progress: Progress) -> None:
        running = [stage for stage, _, _ in self.running.values()]
        is_last = len(self.done) == len(self.stages)
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            line = progress.line(self.done, running)[:width]
            self._line.show(line, is_last=is_last)

    def _end_all(self) -> None:
        """Ask all that run to end, and kill those that do not within ``GRACE``, or when they are asked to stop once more."""
        processes = [process for _, process, _ in self.running.values()]
        for process in processes:
            _send(process, signal.SIGTERM)
        end, stops = time.monotonic() + GRACE, self.num_stops
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or self.num_stops > max(1, stops):
                for process in processes:
                    _send(process, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        self.running.clear()

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Count the signals that ask this process to end, instead of raising an error in whatever it does: it may be starting a
        process, which would then go on alone. Not in another thread than the main one, which gets none."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.num_stops += 1

        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, stop) for number in STOPS if is_main}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _failure(stage: Stage, what: str) -> str:
    """One line, then the end of the log."""
    lines = _end_of(stage.log).decode(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"{stage.name} {what}; the end of {stage.log}:", *lines])


def _send(process: Started, number: int) -> None:
    """To the process and all that it has started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        with suppress(
            ProcessLookupError
        ):  # it has ended by itself, or has no session of its own yet
            os.kill(process.pid, number)
