#!/usr/bin/env python3
"""Several processes, for run_train.sh: torch's launcher with its arguments, which says in one line what it waits for and why a run ended.

torchrun waits for other machines in silence, starts a run again that ended with a user's mistake, and ends with status 1 and a page of
tables whatever has happened. Here

- a machine that is missing is one line after 15 s and then every minute, and status 75 after the ``join_timeout`` of ``--rdzv-conf``;
- ranks that crashed or were killed are started again from the newest checkpoint, at most ``--max-restarts`` times; a run that a rank
  has ended with a status of its own (a user's mistake, a full disk) is not;
- a stop signal is passed on to the ranks, which save and end well; torchrun would end them itself, within 30 s, and fail;
- the last line says which rank ended first, why, and where its output is; or it is the one line of a user's mistake.

LOGLEVEL=INFO shows torch's own messages as well.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, get_args

from symbiotic_titan.process import INTERRUPTED, MACHINES_MISSING, MISTAKE, loading
from symbiotic_titan.signals import StopSignal, follow_parent

received: list[int] = []
# Of each thread the processes that it has started.
OWN_TASKS = Path("/proc/self/task")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- signals --------------------------------------------------------------------------------------------------------------


def pass_on(number: int, frame: FrameType | None) -> None:
    """To the ranks. Where there are none yet, the launcher ends instead."""
    received.append(number)
    ranks = [
        int(pid) for tasks in OWN_TASKS.glob("*/children") for pid in tasks.read_text().split()
    ]
    for rank in ranks:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(rank, number)
    if not ranks:
        say_stopped(number)
        os._exit(0)


def say_stopped(number: int) -> None:
    say(f"{signal.Signals(number).name}: stopped before the first step")


def handle_signals() -> list[str]:
    """Pass stop signals on. Returns the arguments that make torch's launcher leave them alone."""
    if not OWN_TASKS.is_dir():  # not Linux
        return []
    for name in get_args(StopSignal):  # checkpoint.stop_signals may choose any
        # One that is ignored stays so: nohup's SIGHUP. But a script's background process ignores SIGINT, which a user may send.
        if name == "SIGINT" or signal.getsignal(signal.Signals[name]) != signal.SIG_IGN:
            signal.signal(signal.Signals[name], pass_on)
    # run_train.sh holds them back until there are handlers.
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, [signal.Signals[name] for name in get_args(StopSignal)]
    )
    return ["--signals-to-handle", "SIGQUIT"]


SIGNAL_OPTIONS = handle_signals() if __name__ == "__main__" else []  # before torch is imported

# Every attempt to connect would leave a page. The ranks do not inherit it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
with loading():
    from torch.distributed import run
    from torch.distributed.elastic import rendezvous
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
        DynamicRendezvousHandler,
        RendezvousTimeout,
    )
    from torch.distributed.launcher import api

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup

FIRST_LINE, NEXT_LINES = 15.0, 60.0  # seconds of waiting until something is said
ATTEMPT = 5  # seconds that one attempt to connect may take
RENDEZVOUS = "symbiotic"  # its name among torchrun's
CRASHED = 1  # the status of an uncaught exception


# ---- meeting the other machines -------------------------------------------------------------------------------------------


@contextmanager
def telling(what: Callable[[], str]) -> Iterator[None]:
    """Say ``what()``, unless that is nothing, after 15 s of the block, and then every minute."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        pause = FIRST_LINE
        while not done.wait(pause):
            if line := what():
                say(f"{line}; {time.monotonic() - start:.0f} s so far")
            pause = NEXT_LINES

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def answer(endpoint: str) -> str:
    """What a connection to ``HOST:PORT`` is answered with."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return "it answers"
    except OSError as error:
        return error.strerror or str(error)


def is_address(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) < 2**16


class Meeting(DynamicRendezvousHandler):
    """torchrun's rendezvous, which says how many machines it waits for."""

    endpoint = ""

    def get_backend(self) -> str:
        return RENDEZVOUS

    def next_rendezvous(self) -> "rendezvous.RendezvousInfo":
        # torch makes one store for all attempts, and gloo would find in it the addresses of the ranks that are gone.
        self._shared_tcp_store_server = self._bootstrap_store_info = None
        with telling(self.awaited):
            return super().next_rendezvous()

    def awaited(self) -> str:
        wanted = self.settings.min_nodes
        missing = wanted - len(self._state_holder.state.participants)
        where = f"machines at RDZV_ENDPOINT={self.endpoint}"
        return f"waiting for {missing} of {wanted} {where}" if missing and wanted > 1 else ""


def meet(parameters: "rendezvous.RendezvousParameters") -> Meeting:
    """The rendezvous ``symbiotic``: c10d of torchrun, where the machine that the endpoint names may be the last to start.

    Raises:
        RendezvousConnectionError: it did not answer within the ``join_timeout``.
    """
    endpoint, seconds = parameters.endpoint, float(parameters.config["join_timeout"])
    parameters.config["read_timeout"] = ATTEMPT
    deadline = time.monotonic() + seconds

    def waiting() -> str:
        return f"waiting for RDZV_ENDPOINT={endpoint}: {answer(endpoint)}; that machine must run run_train.sh as well"

    backend = None
    with telling(waiting):
        while backend is None:
            try:
                backend, store = create_backend(parameters)
            except rendezvous.RendezvousConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
    store.set_timeout(timedelta(seconds=60))
    handler = Meeting.from_backend(
        parameters.run_id,
        store,
        backend,
        parameters.min_nodes,
        parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(join=timedelta(seconds=seconds)),
    )
    handler.endpoint = endpoint  # type: ignore[attr-defined]
    return handler  # type: ignore[return-value]


# ---- ranks that ended -----------------------------------------------------------------------------------------------------


def cause(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank that ended the others. ``failures`` are in the order in which they were seen."""

    def order(rank: int) -> int:
        status = failures[rank].exitcode
        if status > CRASHED:  # the rank has said why
            return 0
        if status == CRASHED:
            return 2
        # The launcher ends the others with SIGTERM, and NCCL the ranks whose partner is gone with SIGABRT.
        return {signal.SIGABRT: 3, signal.SIGTERM: 4}.get(signal.Signals(-status), 1)

    return min(failures, key=order)


def ending(failure: ProcessFailure) -> str:
    """How a rank ended, in words."""
    if failure.exitcode < 0:
        return f"was killed by {failure.signal_name()}"
    return f"ended with status {failure.exitcode}"


def told(failure: ProcessFailure) -> tuple[str, str]:
    """(exception, traceback) that a rank has left, both empty where it left none."""
    message: Any = failure.message
    if not isinstance(message, dict):
        return "", ""
    return message["message"], message["extraInfo"].get("py_callstack", "")


class Agent(LocalElasticAgent):
    """torchrun's agent, which starts only crashed and killed ranks again, and says so."""

    def _monitor_workers(self, worker_group: "WorkerGroup") -> "RunResult":
        result = super()._monitor_workers(worker_group)
        if result.failures:
            rank, left = cause(result.failures), self._remaining_restarts
            failure, allowed = result.failures[rank], worker_group.spec.max_restarts
            if failure.exitcode > CRASHED or received:
                self._remaining_restarts = 0
            elif left:
                number = f"restart {allowed - left + 1} of {allowed}"
                say(
                    f"rank {rank} {ending(failure)}: all ranks start again from the newest checkpoint, {number}"
                )
        return result


def report(failures: Mapping[int, ProcessFailure], shown: set[str], logs: Path) -> int:
    """Say why the run ended, in the last line. ``shown``: local ranks whose output has been seen. Returns the exit status."""
    if all(-failure.exitcode in received for failure in failures.values()):
        say_stopped(received[0])  # before there was a handler
        return 0
    rank = cause(failures)
    failure = failures[rank]
    if failure.exitcode == INTERRUPTED:
        return INTERRUPTED  # the rank has said so
    exception, trace = told(failure)
    is_hidden = str(failure.local_rank) not in shown
    if failure.exitcode > CRASHED:
        if is_hidden:
            say(f"error: rank {rank}: {exception.removeprefix('ValueError: ') or ending(failure)}")
        return failure.exitcode
    if is_hidden and trace:
        say(f"\nrank {rank}: {trace}")
    files = sorted(logs.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"), key=os.path.getmtime)
    where = f"; its output: {files[-1]}" if files else ""
    why = f": {exception}" if exception else ""
    say(f"error: rank {rank} {ending(failure)}{why}{where}")
    return CRASHED


# ---- the launcher ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Exit status: 0, that of the rank that ended the others, or 75 where machines were missing."""
    os.environ.pop("TORCH_CPP_LOG_LEVEL", None)
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    rendezvous.rendezvous_handler_registry.register(RENDEZVOUS, meet)
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    if "--follow-parent" in arguments[:1]:  # of run_train.sh, which may be killed alone
        follow_parent()
        arguments = arguments[1:]
    options = run.parse_args([*SIGNAL_OPTIONS, *arguments])
    if not is_address(options.rdzv_endpoint):
        say(
            f"error: RDZV_ENDPOINT={options.rdzv_endpoint}: must be HOST:PORT with a port up to 65535, the same on every machine"
        )
        return MISTAKE
    config, command, words = run.config_from_args(options)
    logs = Path(config.logs_specs.root_log_dir)  # type: ignore[union-attr]
    where = f"RDZV_ENDPOINT={config.rdzv_endpoint}"
    status = CRASHED
    try:
        api.elastic_launch(config, command)(*words)
        status = 0
    except ChildFailedError as error:
        status = report(error.failures, set(os.environ.get("LOG_RANK", "0").split(",")), logs)
    except rendezvous.RendezvousTimeoutError:
        seconds = config.rdzv_configs["join_timeout"]
        say(f"error: not all of {config.min_nodes} machines were at {where} within {seconds} s")
        status = MACHINES_MISSING
    except rendezvous.RendezvousConnectionError:
        say(f"error: no connection to {where}: {answer(config.rdzv_endpoint)}")
        status = MACHINES_MISSING
    except rendezvous.RendezvousClosedError:
        say("error: another machine has ended the run; its output says why")
    finally:
        if status != CRASHED:
            shutil.rmtree(logs, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
