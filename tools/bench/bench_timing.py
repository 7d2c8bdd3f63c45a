"""Time several things side by side: warm-up, interleaved repeats, median and spread, one JSON line.

Other work on the machine slows everything for a while. Contenders therefore take turns, and a ratio is the median over the
rounds of the ratio within a round, never a quotient of two separate medians.
"""

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


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender in each of ``repeats`` rounds; a round runs all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(-warmup, repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # device sync
            if round_number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


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
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
        "commit": _commit(),
    }
