"""The data of a step: read ahead, counted, agreed on by all ranks, and moved to the device one micro-batch at a time.

The next step's micro-batches are read while the device is still busy with this step, and what the ranks must agree on before they take
it (stop signals, errors in the data, ends of sources, the numbers of targets) is summed by one all-reduce. The host does not wait for
it: the sums come to the host with the losses of this step. Reading and agreeing therefore add no wait for the device.

Until a step is taken, the loader stands before it. An error in its data, on any rank, so costs no work, and the checkpoint that is
saved before it goes on with it.

A thread reads, because a read may hang for ever. Whoever waits for it gives up where a stop signal came or the read takes too long.
"""

import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from symbiotic_titan.codecs.batch import ImagePlace
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.device import copy_from_host
from symbiotic_titan.parallel.ranks import DataRanks, gather_over_ranks, on_host
from symbiotic_titan.process import is_first_process, raised_by_us
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.signals import StopRequest

# Seconds between two looks for a stop signal, and for a read that takes too long, while a batch is waited for; and those that a read may
# still take after a signal.
POLL_SECONDS = 0.1
PATIENCE = 1.0
# Steps after which it is said once that their rows were not full.
FIRST_STEPS = 10


@dataclass(frozen=True)
class Stop:
    """Why the run ends before its last step.

    error:     that in the data, in one line, where it is the reason.
    is_signal: to any rank.
    """

    reason: str
    error: str | None = None
    is_signal: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on the device, and what was found out about it while it was on the host.

    logit_index_N:  the tokens whose logits the loss terms read, on the device; None: all.
    image_places:   of the target images that are still pixels; None where there are latents.
    """

    batch: PackedBatch
    logit_index_N: Tensor | None
    image_places: list[ImagePlace] | None

    def tensors(self) -> list[Tensor]:
        """All of them, on the device."""
        index = [] if self.logit_index_N is None else [self.logit_index_N]
        return [*self.batch.tensors().values(), *index]


class MovedAhead(Iterator[MicroBatch]):
    """Micro-batches on the device: while one is computed on, the next is copied, on a stream of its own where there are streams."""

    def __init__(
        self,
        batches: Iterable[PackedBatch],
        move: Callable[[PackedBatch], MicroBatch],
        stream: torch.Stream | None,
    ) -> None:
        """The copy of the first one starts at once."""
        self._left = iter(batches)
        self._move = move
        self._stream = stream
        self._coming = self._start_next()

    def _start_next(self) -> MicroBatch | None:
        batch = next(self._left, None)
        if batch is None or self._stream is None:
            return None if batch is None else self._move(batch)
        with utils.device_module.stream(self._stream):
            return self._move(batch)

    def __next__(self) -> MicroBatch:
        if self._coming is None:
            raise StopIteration
        arrived = self._coming
        if self._stream is not None:
            computing = utils.device_module.current_stream()
            computing.wait_stream(self._stream)
            for tensor in arrived.tensors():
                # Their memory belongs to the copying stream, which must not have it again before the computation is done with it.
                tensor.record_stream(computing)
        self._coming = self._start_next()
        return arrived


@dataclass(frozen=True)
class StepBatches:
    """One step.

    counts:          what ``count`` gave, summed over micro-batches and ranks, on the device.
    counts_on_host:  the same values.
    """

    micro_batches: Iterator[MicroBatch]
    counts: Tensor
    counts_on_host: Tensor


class GivenUp(Exception):
    """A stop signal came while a read did not end."""


class Reading:
    """A thread that reads batches ahead of ``loader``, some at a time.

    signals: those to this rank, which end the wait for a read that does not end by itself soon.
    limit:   seconds that the read of a sample may take.
    """

    def __init__(
        self, loader: PackedLoader, device: torch.device, signals: StopRequest, limit: float
    ) -> None:
        self.loader = loader.ahead()
        self._signals, self._limit = signals, limit
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[list[PackedBatch] | Exception] = queue.SimpleQueue()
        given = self.loader, device, self._wanted, self._found
        # A daemon, since it may hang. It is also what the loader's workers end with.
        self._thread = threading.Thread(target=_read, args=given, name="data", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._wanted.put, 0)

    def take(self, number: int) -> list[PackedBatch]:
        """The next batches.

        Raises:
            GivenUp: a stop signal came. As after the next error, there are no more batches.
            ValueError: a read takes too long.
            Exception: what reading raised.
        """
        self._signals.leave_at_once = True  # until the read has ended
        self._wanted.put(number)
        start, since = time.monotonic(), float("inf")
        while True:
            try:
                found = self._found.get(timeout=POLL_SECONDS)
            except queue.Empty:
                now = time.monotonic()
                if self._signals.signal_name is not None:
                    since = min(since, now)
                if now - since >= PATIENCE:
                    raise GivenUp from None
                self.loader.check_reads(now - start, self._limit)
                continue
            self._signals.leave_at_once = False
            if isinstance(found, Exception):
                raise found
            return found

    def close(self) -> None:
        """End the thread and the loader's workers, unless a read hangs."""
        self._wanted.put(0)
        if not self._signals.leave_at_once:
            self._thread.join()


def _read(
    loader: PackedLoader,
    device: torch.device,
    wanted: "queue.SimpleQueue[int]",
    found: "queue.SimpleQueue[list[PackedBatch] | Exception]",
) -> None:
    """Runs in the thread."""
    if device.type != "cpu":
        utils.device_module.set_device(
            device
        )  # a thread starts with the first one; memory is pinned for it
    batches = iter(loader)
    while number := wanted.get():
        try:
            found.put([next(batches) for _ in range(number)])
        except Exception as error:  # noqa: BLE001 - a user's layout may raise any
            found.put(error)
            return


class StepData(Iterator[StepBatches]):
    """The micro-batches of one step after another.

    error:  what made reading the next step fail.
    """

    def __init__(
        self,
        loader: PackedLoader,
        num_micro_batches: int,
        ranks: DataRanks,
        loading_times: list[float],
        *,
        count: Callable[[Sequence[PackedBatch]], Tensor],
        move: Callable[[PackedBatch], MicroBatch],
        signals: StopRequest,
        read_seconds: float,
    ) -> None:
        """``loading_times`` takes the seconds that each step waited for its batches. ``count``: (N,) float64 of batches on the host, of
        the same length for no batch. ``signals``: to this rank. ``read_seconds``: what the read of a sample may take."""
        self._loader = loader
        self._reading = Reading(loader, ranks.device, signals, read_seconds)
        self._num_micro_batches = num_micro_batches
        self._ranks = ranks
        self._loading_times = loading_times
        self._count, self._move, self.signals = count, move, signals
        self._stream: torch.Stream | None = None
        if ranks.device.type == "cuda":
            self._stream = utils.device_module.Stream(ranks.device)
        self._after, self._num_steps = loader.position, 0
        self._moved: MovedAhead | None = None
        self._sums: Tensor | None = None
        self._values: Tensor | None = None
        self.error: Exception | None = None

    @property
    def is_agreed(self) -> bool:
        """Whether the next step was read, and this rank knows what all ranks know of it."""
        return self._values is not None

    def read(self) -> Tensor:
        """Read the next step's micro-batches, count them, start to move the first one, and start to sum what the ranks must agree on.

        Returns the sums, on the device, to be given to ``agree`` once they are on the host. An exception, a user's layout may raise
        any, is kept in ``error``.
        """
        start = time.perf_counter()
        ended, after = self._loader.ended_sources, self._loader
        counts = self._count([])
        try:
            step = self._reading.take(self._num_micro_batches)
            after = self._reading.loader
            counts = self._count(step)
            self._moved = MovedAhead(step, self._move, self._stream)
        except GivenUp:
            pass  # the signal ends the run
        except Exception as error:  # noqa: BLE001
            self.error = error
        self._loading_times.append(time.perf_counter() - start)
        own = [
            self.signals.signal_name is not None,
            # Ranks reach the end at different steps; all go on, some with padding, until none has a row left.
            not (self._loader.can_end and ended),
            self.error is not None,
            *self._ranks.once(after.skip_counts),
        ]
        self._ended, self._after = ended, after.position
        values = torch.cat([torch.tensor(own, dtype=torch.float64), counts])
        self._num_counts = counts.numel()
        self._sums = self._ranks.sum(copy_from_host(values, self._ranks.device))
        return self._sums

    def close(self) -> None:
        """End what reads."""
        self._reading.close()

    def agree(self, values: Tensor) -> None:
        """Take the values of the sums that ``read`` returned."""
        self._values = values

    def reason_to_stop(self) -> Stop | None:
        """Why the step that was read is not to be taken, the same on all ranks."""
        assert self._values is not None
        flags = self._values[: -self._num_counts].to(torch.int64).tolist()
        signals, rows_left, errors, *skip_counts = flags
        error = error_of_ranks(self.error) if errors else self._too_many_bad(skip_counts)
        if error is not None:
            return Stop("error in the data", error)
        if signals:
            name = self.signals.signal_name or "a stop signal on another rank"
            return Stop(name, is_signal=True)
        if not rows_left:
            return Stop(f"data ended, all samples of {', '.join(self._ended)} were read")
        return None

    def _too_many_bad(self, skip_counts: list[int]) -> str | None:
        try:
            self._loader.check_skip_counts(skip_counts)
        except ValueError as error:
            return str(error)
        return None

    def count_skipped(self) -> dict[str, float]:
        """Samples that all ranks have skipped since the run began: ``skipped``, the number for each reason that occurred, and
        ``bad_share``, the share of ``skipped`` in the samples read."""
        own = {"skipped": self._loader.num_skipped, "read": self._loader.skip_counts[0]} | {
            name if name == "truncated" else f"skipped/{name}": count
            for name, count in self._loader.skip_reasons.items()
        }
        numbers = torch.tensor(self._ranks.once(list(own.values())))
        totals = self._ranks.sum(copy_from_host(numbers, self._ranks.device))
        counts: dict[str, float] = dict(zip(own, totals.tolist(), strict=True))  # device sync
        counts["bad_share"] = counts["skipped"] / max(counts.pop("read"), 1)
        always = ("skipped", "bad_share")
        return {name: count for name, count in counts.items() if count or name in always}

    def __next__(self) -> StepBatches:
        """Take the step that was read, or where none was, the next one."""
        if not self.is_agreed:
            self.agree(*on_host(self.read()))
        if self._moved is None:
            assert self.error is not None
            raise self.error
        assert self._sums is not None and self._values is not None
        step = StepBatches(
            self._moved, self._sums[-self._num_counts :], self._values[-self._num_counts :]
        )
        self._loader.position = self._after
        self._num_steps += 1
        if self._num_steps == FIRST_STEPS and is_first_process():
            if (advice := self._loader.advice_on_filling) is not None:
                logger.warning(advice)
        self._moved = self._sums = self._values = None
        return step


def read_seconds(config: JobConfig, num_ranks: int) -> float:
    """Seconds that the read of a sample may take. Other ranks wait for this one, and fail after ``comm.train_timeout_seconds``."""
    limit = config.data.read_timeout_seconds
    return limit if num_ranks == 1 else min(limit, 0.8 * config.comm.train_timeout_seconds)


def error_of_ranks(error: Exception | None) -> str | None:
    """The errors of all ranks in one line that names the ranks, the same on all; None where no rank has one. A collective.

    The traceback of an error that was not raised for the user, for instance in a layout of theirs, is logged on its rank.
    """
    own = None
    if error is not None:
        own = str(error)
        if not (isinstance(error, ValueError) and raised_by_us(error)):
            logger.error("".join(traceback.format_exception(error)))
            # The error itself is the last line also where a worker process has sent its traceback as the message.
            own = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
    lines = gather_over_ranks(own)
    failed = {rank: line for rank, line in enumerate(lines) if line is not None}
    if not failed:
        return None
    if len(lines) == 1:
        return own
    first = next(iter(failed))
    others = f" (ranks {', '.join(map(str, failed))} failed)" if len(failed) > 1 else ""
    return f"rank {first}: {failed[first]}{others}"
