"""Processes forked from one that has imported the trainer: most runs of the tests are shorter than that import.

A run is a process of its own all the same, with its own environment, output, signals and exit status. What only a started program
shows (the command line of the interpreter, torchrun) is tested by ``test_entry_points.py``, by the reference run of ``conftest.py``
and by .ci/run.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
_SERVER_ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    **{"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
}
_PRELOADED = [
    *(f"symbiotic_titan.training.{name}" for name in ("checks", "train_spec", "trainer")),
    "symbiotic_titan.data.pipeline",
    # Of runs that log heat maps of routing, and of those that compile: a program imports them only then.
    "symbiotic_titan.plots.expert_maps",
    *("torch._functorch.aot_autograd", "torch._inductor.pattern_matcher", "torch._inductor.debug"),
]
_CONTEXT = multiprocessing.get_context("forkserver")


def ensure_server() -> None:
    """Start the process that others are forked from, once in this process; it keeps the environment of this moment."""
    forkserver.set_forkserver_preload(_PRELOADED)
    with mock.patch.dict(os.environ, _SERVER_ENVIRONMENT):
        forkserver.ensure_running()


def start(function: Callable[..., Any], *args: Any) -> Any:
    """A started process that calls ``function``, which must be importable by name."""
    ensure_server()
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def train_here(arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """``python -m symbiotic_titan.train ARGUMENTS`` in this process, which writes to the file ``log``."""
    _begin_as_program(log)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # The paths that a program started with this PYTHONPATH would search before the installed packages.
    sys.path[:0] = [path for path in environment["PYTHONPATH"].split(":") if path not in sys.path]
    sys.argv = ["symbiotic_titan/train.py", *arguments]
    from symbiotic_titan import train

    _wait_for_no_rank(environment)
    train.leave(train.main(list(arguments)))


def launcher_here(
    arguments: Sequence[str], environments: Sequence[Mapping[str, str]], logs: Sequence[str]
) -> None:
    """The ranks of one run as children of this process, which waits for them. It starts no other program, so that this takes no time."""
    ranks = []
    for environment, log in zip(environments, logs, strict=True):
        ranks.append(os.fork())
        if not ranks[-1]:
            train_here(arguments, environment | {"TORCHELASTIC_RUN_ID": "test"}, log)
        Path(f"{log}.pid").write_text(str(ranks[-1]))
    for rank in ranks:
        os.waitpid(rank, 0)


def script_here(
    path: str,
    arguments: Sequence[str],
    folder: str,
    log: str,
    environment: Mapping[str, str] | None = None,
) -> None:
    """``python PATH ARGUMENTS`` in this process, started in ``folder``, which writes to the file ``log``. ``environment``: variables
    besides; a benchmark that finds those it needs does not start itself again."""
    _begin_as_program(log)
    os.environ.update(environment or {})
    os.chdir(folder)
    # What a program started elsewhere does not find: the root, and what was imported from it before the fork.
    sys.path[:] = [str(Path(path).parent), *(p for p in sys.path if p not in ("", str(ROOT)))]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", "tools", "docs")]:
        del sys.modules[name]
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def commands_here(requests: Connection, environment: Mapping[str, str], folder: str) -> None:
    """``symbiotic ARGUMENTS`` for every (arguments, log) that comes, in this process and in ``folder``; answers with exit statuses."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [folder]
    from symbiotic_titan import cli

    _wait_for_no_rank(environment)
    while (request := requests.recv()) is not None:
        arguments, log = request
        _begin_as_program(log)
        try:
            status = cli.main(arguments)
        except SystemExit as end:
            status = end.code
        except BaseException:  # noqa: BLE001 - the traceback of a command belongs into its log
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        requests.send(status)


class Commands:
    """A process in ``folder`` that runs one command after the other, since starting takes longer than most of them."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._requests, theirs = _CONTEXT.Pipe()
        self._process = start(commands_here, theirs, dict(environment), str(folder))

    def begin(self, arguments: Sequence[str], log: Path) -> None:
        self._requests.send((list(arguments), str(log)))

    def status(self, seconds: float) -> int:
        """Of the command that was begun; 1 where it does not end in time. One of several ranks ends with its process."""
        try:
            return self._requests.recv() if self._requests.poll(seconds) else 1
        except EOFError:
            self._process.join(5)
            return self._process.exitcode

    def close(self) -> None:
        if self._process.is_alive():
            self._requests.send(None)
            self._process.join(5)
        self._process.kill()


def _wait_for_no_rank(environment: Mapping[str, str]) -> None:
    """torchtitan's trainer ends with two seconds of sleep, for the other ranks: none where there are no others."""
    from torchtitan import train as upstream

    if environment.get("WORLD_SIZE", "1") == "1":
        upstream.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)


def _begin_as_program(log: str) -> None:
    gc.freeze()  # as process.loading does for a program that has imported all this itself
    # A child of a fork server would start its own children, such as the loader's workers, from another server, which outlives it.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


class Ranks:
    """The processes of one run, and what they print."""

    def __init__(
        self, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path
    ) -> None:
        self.logs = [
            folder / f"output-{time.monotonic_ns()}-{i}.log" for i in range(len(environments))
        ]
        for log in self.logs:
            log.touch()
        self.processes = [
            start(train_here, arguments, dict(environment), str(log))
            for environment, log in zip(environments, self.logs, strict=True)
        ]

    def texts(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def wait_for(self, words: str, rank: int = 0, seconds: int = 120) -> str:
        """The output of ``rank`` once it holds ``words``."""
        for _ in range(10 * seconds):
            text = self.logs[rank].read_text()
            if words in text or not self.processes[rank].is_alive():
                break
            time.sleep(0.1)
        text = self.logs[rank].read_text()
        assert words in text, text[-3000:]
        return text

    def send(self, signal: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, signal)

    def wait(self, timeout: float) -> list[int]:
        """Exit statuses. Where a rank fails the others are ended, as torchrun does."""
        end = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in self.processes):
                assert time.monotonic() < end, "\n".join(self.texts())[-6000:]
                if any(process.exitcode for process in self.processes):
                    end = min(end, time.monotonic() + 20)
                    if time.monotonic() > end - 0.2:
                        break
                time.sleep(0.05)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]
