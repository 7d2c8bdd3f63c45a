"""Time several things side by side: warm-up, interleaved repeats, median and spread, one JSON line.

Other work on the machine slows everything for a while. Contenders therefore take turns, and a ratio is the median over the
rounds of the ratio within a round, never a quotient of two separate medians.

Clocks: a GPU is timed by its own events, which neither wait for the host nor make it wait; a CPU by the host's clock. On a GPU every
timed call comes after one that overwrites twice the size of its L2 cache, outside the time, so that no contender reads operands
which the last one left there. Calls of the warm-up rounds (two unless stated) compile kernels and fill caches, and are not counted.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# As run_train.sh sets them: threads that wait spin for a few microseconds, then sleep.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def restart_with(settings: Mapping[str, str]) -> None:
    """Start this program again with environment variables that libraries read when they are loaded.

    What the user has set already is kept. Returns at once where nothing is missing.
    """
    missing = {key: value for key, value in settings.items() if key not in os.environ}
    if missing:
        os.environ.update(missing)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def default_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """``--device``: the accelerator if there is one."""

    def device(name: str) -> str:
        if name not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {name}")
        if name == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("there is no CUDA device; choose cpu")
        return name

    parser.add_argument(
        "--device",
        type=device,
        default=default_device(),
        metavar="NAME",
        help="cpu or cuda (default: cuda where there is a GPU)",
    )


def use_device(name: str) -> None:
    """To measure the CPU of a machine that has a GPU, start this program again without the GPU: what it times asks torch for one."""
    if name == "cpu" and torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.execv(sys.executable, [sys.executable, *sys.argv])


Moment = torch.cuda.Event | float


class Clock:
    """Moments in the work of a device: events on a GPU, seconds of the host's clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._cold: torch.Tensor | None = None
        if device == "cuda":
            size = 2 * torch.cuda.get_device_properties().L2_cache_size
            self._cold = torch.empty(size, dtype=torch.int8, device=device)

    def now(self) -> Moment:
        """The moment at which the device reaches this point; the host does not wait for it."""
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def seconds(self, begin: Moment, end: Moment) -> float:
        """Between two moments; waits until the device has passed the second."""
        if isinstance(begin, float) or isinstance(end, float):
            assert isinstance(begin, float) and isinstance(end, float)
            return end - begin
        end.synchronize()  # device sync
        return begin.elapsed_time(end) / 1e3

    def empty_cache(self) -> None:
        """Overwrite a GPU's L2 cache; a CPU's caches are left alone."""
        if self._cold is not None:
            self._cold.zero_()


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender in each of ``repeats`` rounds; a round runs all of them in turn."""
    clock = Clock(default_device())
    moments: dict[str, list[tuple[Moment, Moment]]] = {name: [] for name in contenders}
    for round_number in range(-warmup, repeats):
        for name, run in contenders.items():
            clock.empty_cache()
            begin = clock.now()
            run()
            end = clock.now()
            if round_number >= 0:
                moments[name].append((begin, end))
    return {name: [clock.seconds(*pair) for pair in pairs] for name, pairs in moments.items()}


def ratio(times: Mapping[str, list[float]], over: str, under: str) -> float:
    """Median over the rounds of seconds(``over``) / seconds(``under``)."""
    pairs = zip(times[over], times[under], strict=True)
    return statistics.median(a / b for a, b in pairs)


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, and the quartiles as spread."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median_ms": round(1e3 * median, 2),
        "quartile_1_ms": round(1e3 * low, 2),
        "quartile_3_ms": round(1e3 * high, 2),
    }


def _commit() -> str:
    """Short hash of the checkout this file is in, marked when files differ from it; ``unknown`` outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "-s") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"


def machine() -> dict[str, Any]:
    """What a number depends on: torch, threads, device, commit."""
    if default_device() == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": name,
        "commit": _commit(),
    }
