"""The data loader: streams divided among ranks and worker processes, with a state that is independent of their numbers.

    rank k of N                streams [k L/N, (k+1) L/N) of the L streams
    worker w of W on a rank    every W-th of the rank's streams; a rank starts no more workers than it has streams
    main process               restores the order: the next row is that of the stream with the fewest rows, ties to the lowest

So rows come round robin over the streams for any N and W, also after a resume in the middle of a round. The state covers the rows
that the trainer has received, for every stream of every rank; rows that workers made ahead are made again after a resume.
"""

import atexit
import copy
import json
import logging
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchtitan.components.dataloader import BaseDataLoader

from symbiotic_titan.data.fingerprint import (
    check_fingerprint,
    check_stages,
    fingerprint_of,
    mixture_changes,
    sorts_all_shards,
    with_absent,
)
from symbiotic_titan.data.stream_state import (
    PipelineSpec,
    StreamState,
    advice_on_filling,
    check_skip_counts,
    check_skipped,
    count_reasons,
    ended_sources,
    new_state,
    num_skipped,
    resumed,
    saved_form,
    skip_counts,
)
from symbiotic_titan.data.streams import OpenSource, ReadLog, Stream, open_mixture
from symbiotic_titan.process import raised_by_us
from symbiotic_titan.sequence.batch import PackedBatch, stack_rows
from symbiotic_titan.signals import end_with_parent, ignore_stop_signals, parent_pid


@dataclass(frozen=True)
class SerializedRow:
    """A row serialized for transfer from a worker process, as one tensor instead of one per field.

    Every tensor sent between processes holds a file descriptor on both sides while it lives. With a dozen per row, prefetching would
    exceed the usual limit of 1024.
    """

    buffer: torch.Tensor
    layout: list[tuple[str, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, row: PackedBatch) -> "SerializedRow":
        values = row.tensors()
        # Widest elements first, so that every field starts at a multiple of its element size, as view(dtype) demands.
        names = sorted(values, key=lambda name: -values[name].element_size())
        buffer = torch.cat([values[name].reshape(-1).view(torch.uint8) for name in names])
        return cls(buffer, [(n, values[n].dtype, tuple(values[n].shape)) for n in names])

    def row(self) -> PackedBatch:
        """The deserialized row; its fields are views of ``buffer``."""
        values: dict[str, Any] = {}
        start = 0
        for name, dtype, shape in self.layout:
            size = dtype.itemsize * torch.Size(shape).numel()
            values[name] = self.buffer[start : start + size].view(dtype).reshape(shape)
            start += size
        return PackedBatch(**values)


# Stream number -> state; and what a stream yields: its number, a row, and the state after that row. In place of a row: an error, or
# None for a turn of a worker that has one stream fewer than the first worker.
States = dict[int, StreamState]
StreamRow = tuple[int, PackedBatch, StreamState]
# All-gather of ``States`` over the data ranks.
Gather = Callable[[States], list[States]]


def streams_of_rank(num_streams: int, rank: int, num_ranks: int) -> range:
    """The streams that data rank ``rank`` of ``num_ranks`` reads, the same number on every rank.

    Raises:
        ValueError: the streams cannot be shared evenly.
    """
    # Consecutive streams, as the trainer numbers the rows of a global batch: with one stream per row, a row keeps its noise, which is
    # seeded by that number, on any number of ranks.
    per_rank, rest = divmod(num_streams, num_ranks)
    if rest or not per_rank:
        nearest = num_ranks * max(1, round(num_streams / num_ranks))
        raise ValueError(
            f"data.num_lanes: {num_streams} streams cannot be shared evenly by {num_ranks} data "
            f"ranks; set it to {nearest} (it is fixed for the life of a run), or use a number of "
            f"ranks that divides it"
        )
    return range(rank * per_rank, (rank + 1) * per_rank)


class PackedLoader(BaseDataLoader):
    """Endless batches of this rank's rows. A new iterator continues after the last batch that was yielded.

    After a source that stops the run has ended here (``ended_sources``), batches are padding only: other ranks may still have rows,
    and every rank must take part in their collectives.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        streams: range,
        local_batch_size: int,
        *,
        num_workers: int,
        pin_memory: bool,
        prefetch_factor: int | None,
        gather: Gather,
    ) -> None:
        self._spec = spec
        self._states: States = {stream: new_state(spec) for stream in streams}
        # (steps, rows) of the run when this loader goes on; rows of all streams.
        self._begin = (0, 0)
        self._saved: dict[str, Any] | None = None  # fingerprint of the state that was loaded
        self._local_batch_size = local_batch_size
        self._num_workers = min(num_workers, len(streams))
        self._pin_memory = pin_memory
        self._prefetch_factor = prefetch_factor
        self._gather = gather
        self._log = ReadLog(self._num_workers)

    def ahead(self) -> "PackedLoader":
        """A loader that stands where this one stands, for another thread: reading it does not move this one."""
        other = copy.copy(self)
        other.position = self.position
        return other

    def check_reads(self, waited: float, limit: float) -> None:
        """Raise ValueError, which names source and file, if a read takes longer than ``limit`` seconds; the caller has ``waited``."""
        self._log.check(self._spec, waited, limit)

    @property
    def spec(self) -> PipelineSpec:
        """Everything that determines the rows, except this rank's choice of streams."""
        return self._spec

    @property
    def streams(self) -> list[int]:
        """Numbers of this rank's streams."""
        return list(self._states)

    @property
    def num_skipped(self) -> int:
        """Bad samples that this rank's streams have skipped since the start of the run."""
        return sum(num_skipped(self._spec, list(self._states.values())))

    @property
    def skip_reasons(self) -> dict[str, int]:
        """Samples that this rank's streams have skipped, by reason, and ``truncated``; always with all keys."""
        return count_reasons(list(self._states.values()))

    @property
    def skip_counts(self) -> list[int]:
        """Samples that this rank's streams have read, and bad ones that they skipped of each source. To be summed over ranks."""
        return skip_counts(self._spec, list(self._states.values()))

    def check_skip_counts(self, counts: list[int]) -> None:
        """Raise ValueError if ``counts``, the sum of ``skip_counts`` over all ranks, are more than the run tolerates."""
        check_skip_counts(self._spec, counts)

    def check_skipped(self) -> None:
        """Raise ValueError if all ranks together skipped more bad samples than is tolerated. A collective if there are several ranks."""
        check_skipped(self._spec, list(self._all_states().values()))

    @property
    def advice_on_filling(self) -> str | None:
        """A line for the log where the first rows of this rank's streams are not full enough."""
        return advice_on_filling(self._spec, list(self._states.values()))

    @property
    def position(self) -> States:
        """Where this rank's streams are, after the last batch that was yielded. Set, it is where the next iterator continues."""
        return dict(self._states)

    @position.setter
    def position(self, states: States) -> None:
        self._states = dict(states)

    @property
    def can_end(self) -> bool:
        """Whether the end of a source stops the run; the same on every rank."""
        config = self._spec.config
        return any(source.at_end_of(config) == "stop" for source in self._spec.sources)

    @property
    def ended_sources(self) -> list[str]:
        """Sources whose end this rank's streams have reached; empty while any stream has a row left."""
        return ended_sources(self._spec, list(self._states.values()))

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]
        rows = self._rows()
        while True:
            taken = [next(rows) for _ in range(self._local_batch_size)]
            # The state advances with the rows that are yielded, not with those that workers made ahead.
            for stream, _, state in taken:
                self._states[stream] = state
            check_skipped(self._spec, list(self._states.values()))
            batch = stack_rows([row for _, row, _ in taken])
            yield batch.pin_memory() if self._pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """All streams of all ranks, and the fingerprint; the same on every rank. A collective if there are several ranks."""
        states = self._all_states()
        assert sorted(states) == list(range(self._spec.num_streams))
        # One string, because a distributed checkpoint stores a nested dict leaf by leaf. The keys are kept for old checkpoints.
        lanes = {n: saved_form(self._spec, state) for n, state in states.items()}
        saved = {"identity": self._fingerprint(), "lanes": lanes}
        return {"state": json.dumps(saved, sort_keys=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, which may come from other numbers of ranks and workers.

        Raises:
            ValueError: it was saved with other data or settings; the message says which.
        """
        saved = json.loads(state_dict["state"])
        self._saved, lanes = saved["identity"], saved["lanes"]
        check_fingerprint(self._saved, fingerprint_of(self._spec))
        self._spec = replace(self._spec, sorts_all_shards=sorts_all_shards(self._saved))
        before = self._saved["sources"], self._saved["weights"]
        self._states = {n: resumed(self._spec, lanes[str(n)], *before) for n in self._states}
        self._begin = self._begin[0], sum(lane["rows"] for lane in lanes.values())

    def start_at(self, step: int) -> None:
        """Make the rows that follow ``step`` trained steps. Call after ``load_state_dict`` and before iterating; without it, 0.

        Raises:
            ValueError: a stage before that step is not what the run that saved the state did.
        """
        self._begin = step, self._begin[1]
        if self._saved is None:
            return
        check_stages(self._saved, self._spec.config, step)
        state = next(iter(self._states.values()))
        for line in mixture_changes(self._spec, self._saved, state, step):
            logging.getLogger(__name__).info(line)

    def _all_states(self) -> States:
        # Once by number: several ranks may read the same streams.
        return {n: state for part in self._gather(self._states) for n, state in part.items()}

    def _fingerprint(self) -> dict[str, Any]:
        current = fingerprint_of(self._spec)
        return current if self._saved is None else with_absent(current, self._saved)

    def _rows(self) -> Iterator[StreamRow]:
        dataset = StreamDataset(self._spec, self._states, *self._begin, self._log)
        if not self._num_workers:
            return _checked(iter(dataset))
        return _in_stream_order(_checked(self._worker_rows(dataset)), self._states)

    def _worker_rows(self, dataset: "StreamDataset") -> Iterator["StreamRow | WorkerError | None"]:
        """Rows of the workers in turn. The workers exit with this generator or with the interpreter."""
        running = [
            iter(
                DataLoader(
                    dataset,
                    batch_size=None,
                    collate_fn=_serialized,
                    num_workers=self._num_workers,
                    prefetch_factor=(self._prefetch_factor or 2) * self._local_batch_size,
                    worker_init_fn=_begin_worker,
                    # DataLoader draws a base seed; its own generator keeps the global random state independent of num_workers.
                    generator=torch.Generator(),
                )
            )
        ]
        # At exit Python sends SIGTERM to child processes and waits for them. Workers ignore it, so they must have exited before.
        atexit.register(running.clear)
        try:
            while True:
                item = next(running[0])
                is_row = not (item is None or isinstance(item, WorkerError))
                yield (item[0], item[1].row(), item[2]) if is_row else item
        finally:
            running.clear()
            atexit.unregister(running.clear)


class WorkerError:
    """Message of a ValueError in a worker. Sent as a value: DataLoader would wrap an exception in the worker's traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class StreamDataset(IterableDataset):
    """Rows of the streams in ``states``, of a run that had made ``rows`` rows after ``step`` steps; in a worker, of its share of them."""

    def __init__(
        self,
        spec: PipelineSpec,
        states: States,
        step: int = 0,
        rows: int = 0,
        log: ReadLog | None = None,
    ) -> None:
        self._spec = spec
        self._states = states
        self._begin = step, rows
        self._log = log

    def __iter__(self) -> Iterator[StreamRow | WorkerError | None]:
        numbers, idle = sorted(self._states), False
        worker = get_worker_info()
        if worker is not None:
            most, numbers = numbers[:: worker.num_workers], numbers[worker.id :: worker.num_workers]
            idle = len(numbers) < len(most)
        spec, mixture = self._spec, open_mixture(self._spec, *self._begin)
        # Files are opened here, in the worker: processes that inherit an open file share its position.
        own = self._log, worker.id if worker is not None else 0
        sources = [OpenSource(spec, i, *own) for i in range(len(spec.sources))]
        try:
            streams = {n: Stream(spec, sources, mixture, n, self._states[n]) for n in numbers}
            rows = {n: self._states[n]["rows"] for n in numbers}
            if idle:
                # DataLoader polls all workers equally often. Without turns in which it has nothing to give, this worker's streams
                # would run ahead of the others and fill the buffer that restores the order.
                rows[spec.num_streams] = min(rows.values())
            for n in _round_robin(rows):
                yield (n, streams[n].next_row(), streams[n].state()) if n in streams else None
        except ValueError as error:
            if not raised_by_us(error):
                raise  # by a user's layout or packing, whose author needs the traceback
            yield WorkerError(str(error))


def _round_robin(rows: dict[int, int]) -> Iterator[int]:
    """Streams in the order of their rows: always the one with the fewest rows, ties to the lowest number."""
    rows = dict(rows)
    while True:
        stream = min(rows, key=lambda n: (rows[n], n))
        rows[stream] += 1
        yield stream


def _checked(rows: Iterator[StreamRow | WorkerError | None]) -> Iterator[StreamRow]:
    for row in rows:
        if isinstance(row, WorkerError):
            raise ValueError(row.message)
        if row is not None:
            yield row


def _in_stream_order(rows: Iterator[StreamRow], states: States) -> Iterator[StreamRow]:
    """``rows``, which are in order within each stream, reordered to ``_round_robin`` over all streams.

    DataLoader polls its workers in turn, starting with the first. That is already the right order, except after a resume in the
    middle of a round, where a few rows per worker are buffered.
    """
    early: dict[int, deque[StreamRow]] = {stream: deque() for stream in states}
    for stream in _round_robin({n: state["rows"] for n, state in states.items()}):
        while not early[stream]:
            row = next(rows)
            early[row[0]].append(row)
        yield early[stream].popleft()


def _serialized(item: Any) -> Any:
    """Runs in the worker."""
    is_row = not (item is None or isinstance(item, WorkerError))
    return (item[0], SerializedRow.of(item[1]), item[2]) if is_row else item


def _begin_worker(worker: int) -> None:
    """A signal to the process group is meant for the trainer, which still needs rows to finish its step, and without which no worker
    is needed, also where it was killed."""
    ignore_stop_signals()
    signal.set_wakeup_fd(-1)  # the trainer's
    end_with_parent(parent_pid())
