"""Whole experts on parallel CPU threads.

An expert's matmuls are small: splitting each over the threads costs a wake-up and a barrier every 50 microseconds. Giving
every thread whole experts costs one start and one join per bank, and an expert's intermediates stay in one core's cache.
Measured on 2 cores, T=4096, D=F=512, E=128, K=8, bf16: the matmuls of one pass 16 ms against 21 ms.

Which thread computes an expert changes nothing in its numbers: each matmul runs on one thread in any case.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Below this many multiply-adds another thread costs more (50 to 100 us) than it saves.
_MIN_WORK_PER_THREAD = 1 << 26


def _ranges(costs: list[int], num_ranges: int) -> list[tuple[int, int]]:
    """Consecutive pieces, cut where the costs reach each next share of the total."""
    total, seen, first = sum(costs), 0, 0
    ranges: list[tuple[int, int]] = []
    for piece, cost in enumerate(costs):
        seen += cost
        if seen * num_ranges >= total * (len(ranges) + 1) and len(ranges) < num_ranges - 1:
            ranges.append((first, piece + 1))
            first = piece + 1
    return [*ranges, (first, len(costs))]


def in_threads(work: Callable[[int, int], None], costs: list[int], device: torch.device) -> None:
    """Call ``work(first, last)`` for ranges of pieces that cover all of ``costs`` (multiply-adds of each piece) once.

    On a CPU the ranges run at the same time, on as many threads as torch may use, and torch uses one thread inside each.
    ``work`` must not record gradients. An exception in any range is raised here, after all ranges have ended.
    """
    if device.type != "cpu":
        return work(0, len(costs))
    threads = torch.get_num_threads()
    here, *elsewhere = _ranges(costs, min(threads, 1 + sum(costs) // _MIN_WORK_PER_THREAD))
    inference = torch.is_inference_mode_enabled()

    def run(first: int, last: int) -> None:
        # Both modes belong to a thread, and a new thread starts with gradients on.
        with torch.inference_mode(inference), torch.no_grad():
            work(first, last)

    torch.set_num_threads(1)  # for this thread and for those that start now
    try:
        with ThreadPoolExecutor(max_workers=max(1, len(elsewhere))) as pool:
            futures = [pool.submit(run, *bounds) for bounds in elsewhere]
            run(*here)
        for future in futures:
            future.result()
    finally:
        torch.set_num_threads(threads)
