"""What a call costs: peak memory and seconds of a process that does nothing else."""

import ctypes
import gc
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Bytes that a process may have; a call that needs more fails there, and not for the whole machine.
CEILING = 6 * 2**30


@dataclass(frozen=True)
class Cost:
    """result: of the call. peak: bytes of memory beyond those that the process had before. seconds: of its CPU."""

    result: Any
    peak: int
    seconds: float


def cost_of(
    function: Callable[..., Any],
    *args: Any,
    seconds: float = 60,
    before: Callable[[], object] = lambda: None,
) -> Cost:
    """The cost of ``function(*args)`` in a forked process. Raises AssertionError where it dies or does not end in time. ``before`` is
    called first there, and does not count: it can load the code that the call runs."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, before, function, args))
    process.start()
    theirs.close()
    try:
        assert ours.poll(seconds), f"no result after {seconds} seconds"
        return Cost(*ours.recv())
    except EOFError:
        process.join()
        raise AssertionError(f"the process died with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _measure(
    pipe: Any,
    before_call: Callable[[], object],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    before_call()
    # What the parent has freed but kept would be used first and not be counted.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # The peak that the parent had reached is inherited; the kernel forgets it when 5 is written there.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + CEILING, resource.RLIM_INFINITY))
    before, start = _status("VmRSS"), time.process_time()
    result = function(*args)
    pipe.send((result, _status("VmHWM") - before, time.process_time() - start))


def _status(key: str) -> int:
    """Bytes, of a line of the process's status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
