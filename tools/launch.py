#!/usr/bin/env python3
"""Several processes on one machine, for run_train.sh: torch's launcher with its arguments, but with their exit status.

torchrun ends with status 1 and a page of tracebacks whatever ended the processes. After a user's mistake (status 2) they have said in one
line what is wrong; the status is passed on, and the line is repeated only if none of the ranks that LOG_RANK shows has said it.

A stop signal is passed on to the ranks, which save and end well. torchrun would end them itself, within 30 s, and fail.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from symbiotic_titan.process import INTERRUPTED, MISTAKE, loading
from symbiotic_titan.signals import STOP_SIGNALS

received: list[int] = []
# Of each thread the processes that it has started.
OWN_TASKS = Path("/proc/self/task")


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
    name = signal.Signals(number).name
    print(f"{name}: stopped before the first step", file=sys.stderr, flush=True)


def handle_signals() -> list[str]:
    """Pass stop signals on. Returns the arguments that make torch's launcher leave them alone."""
    if not OWN_TASKS.is_dir():  # not Linux
        return []
    for name in STOP_SIGNALS:
        # One that is ignored stays so: nohup's SIGHUP. But a script's background process ignores SIGINT, which a user may send.
        if name == "SIGINT" or signal.getsignal(signal.Signals[name]) != signal.SIG_IGN:
            signal.signal(signal.Signals[name], pass_on)
    return ["--signals-to-handle", "SIGQUIT"]


def main() -> int:
    options = handle_signals()
    with loading():
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    try:
        run.main([*options, *sys.argv[1:]])
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        if INTERRUPTED in statuses:
            return INTERRUPTED  # the rank has said so
        if statuses <= {-number for number in received}:  # the interpreter did not handle it yet
            say_stopped(received[0])
            return 0
        mistaken = [r for r, failure in error.failures.items() if failure.exitcode == MISTAKE]
        # Processes that were still running have been ended by the launcher, with a signal.
        if not mistaken or any(f.exitcode not in (MISTAKE, -15) for f in error.failures.values()):
            raise
        if not {str(rank) for rank in mistaken} & set(os.environ.get("LOG_RANK", "0").split(",")):
            told = error.failures[
                mistaken[0]
            ].message  # a table where the rank has left an error file
            message = told["message"] if isinstance(told, dict) else told
            line = f"error: rank {mistaken[0]}: {message.removeprefix('ValueError: ')}"
            print(line, file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
