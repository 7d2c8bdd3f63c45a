"""The data of a step, which are read before the step begins: an error in them, on any rank, then costs no work.

Reading comes before the ranks agree whether to take another step. That needs one all-reduce in any case, for stop signals; so errors in
the data add neither a collective nor a wait for the device. If the step is not taken, its batches are put back, and the checkpoint that
is saved goes on with them.
"""

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torchtitan.tools.logging import logger

from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.parallel.ranks import DataRanks, gather_over_ranks
from symbiotic_titan.process import raised_by_us
from symbiotic_titan.sequence.batch import PackedBatch


@dataclass(frozen=True)
class Stop:
    """Why the run ends before its last step; ``error``: that in the data, in one line, where it is the reason."""

    reason: str
    error: str | None = None


class StepData(Iterator[list[PackedBatch]]):
    """The micro-batches of one step after another.

    error:  what made reading the next step fail.
    """

    def __init__(
        self,
        loader: PackedLoader,
        num_micro_batches: int,
        ranks: DataRanks,
        loading_times: list[float],
    ) -> None:
        """``loading_times``: takes the seconds that each step waited for its batches."""
        self._loader = loader
        self._micro_batches = iter(loader)
        self._num_micro_batches = num_micro_batches
        self._ranks = ranks
        self._loading_times = loading_times
        self._ended: list[str] = []
        self._position = loader.position
        self._step: list[PackedBatch] | None = None
        self.error: Exception | None = None

    def read(self) -> None:
        """Read the next step's micro-batches. An exception, a user's layout may raise any, is kept in ``error``."""
        start = time.perf_counter()
        self._position, self._ended = self._loader.position, self._loader.ended_sources
        try:
            self._step = [next(self._micro_batches) for _ in range(self._num_micro_batches)]
        except Exception as error:  # noqa: BLE001
            self.error = error
        self._loading_times.append(time.perf_counter() - start)

    def reason_to_stop(self, signal_name: str | None) -> Stop | None:
        """Why the step that was read is not to be taken, the same on all ranks. ``signal_name``: of a stop signal to this rank."""
        own = [
            signal_name is not None,
            # Ranks reach the end at different steps; all go on, some with padding, until none has a row left.
            not (self._loader.can_end and self._ended),
            self.error is not None,
            *self._loader.skip_counts,
        ]
        values = torch.tensor(own, dtype=torch.int64, device=self._ranks.device)
        signals, rows_left, errors, *skip_counts = self._ranks.sum(values).tolist()  # device sync
        error = error_of_ranks(self.error) if errors else self._too_many_bad(skip_counts)
        if error is not None:
            return Stop("error in the data", error)
        if signals:
            return Stop(signal_name or "a stop signal on another rank")
        if not rows_left:
            return Stop(f"data ended, all samples of {', '.join(self._ended)} were read")
        return None

    def _too_many_bad(self, skip_counts: list[int]) -> str | None:
        try:
            self._loader.check_skip_counts(skip_counts)
        except ValueError as error:
            return str(error)
        return None

    def put_back(self) -> None:
        """Set the loader back to before the last ``read``. For the end of a run: this object reads nothing more."""
        self._loader.position = self._position
        self._step = None

    def __next__(self) -> list[PackedBatch]:
        """The batches that were read, or where none were, those of the next step."""
        if self._step is None and self.error is None:
            self.read()
        if self._step is None:
            assert self.error is not None
            raise self.error
        batches, self._step = self._step, None
        return batches


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
