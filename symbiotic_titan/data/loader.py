"""The data loader: streams shared out over ranks and worker processes, and a state that fits any number of both.

    rank k of N                streams [k L/N, (k+1) L/N) of the L streams
    worker w of W on a rank    every W-th of the rank's streams
    main process               puts rows in order: always the stream with the fewest rows, of equals the lowest

So rows come round robin over the streams, whatever N and W are, also right after a resume in the middle of a round. The state
holds every stream of every rank, as of the rows that the trainer got; rows a worker made ahead of that are made again.

A row on its way from a worker process: one tensor instead of one per field.

Every tensor sent between processes occupies a file descriptor on both sides while it lives; with a dozen fields per row,
rows made ahead would exhaust the usual limit of 1024.
"""

import atexit
import json
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.tools.logging import logger

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.fingerprint import (
    check_fingerprint,
    fingerprint_of,
)
from symbiotic_titan.data.pipeline import build_spec
from symbiotic_titan.data.streams import (
    OpenSource,
    PipelineSpec,
    Stream,
    StreamState,
    check_skipped,
    count_reasons,
    ended_sources,
    new_state,
    num_skipped,
    open_mixture,
    resumed,
)
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.batch import PackedBatch, stack_rows
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.positions import RotaryLayout


@dataclass(frozen=True)
class SerializedRow:
    """The bytes of all fields behind each other, widest elements first so that each stays aligned."""

    buffer: torch.Tensor
    layout: list[tuple[str, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, row: PackedBatch) -> "SerializedRow":
        values = {f.name: getattr(row, f.name) for f in fields(row)}
        names = sorted(values, key=lambda name: -values[name].element_size())
        buffer = torch.cat([values[name].reshape(-1).view(torch.uint8) for name in names])
        return cls(buffer, [(n, values[n].dtype, tuple(values[n].shape)) for n in names])

    def row(self) -> PackedBatch:
        """The row again; its fields are views of ``buffer``."""
        values: dict[str, Any] = {}
        start = 0
        for name, dtype, shape in self.layout:
            size = dtype.itemsize * torch.Size(shape).numel()
            values[name] = self.buffer[start : start + size].view(dtype).reshape(shape)
            start += size
        return PackedBatch(**values)


States = dict[int, StreamState]
StreamItem = tuple[int, PackedBatch, StreamState]
Share = Callable[[States], list[States]]


def build_loader(
    config: Data,
    *,
    latents: Latents,
    geometry: ImageGeometry,
    rotary_layout: RotaryLayout,
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    global_batch_size: int,
    dp_rank: int = 0,
    dp_world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    share: Share | None = None,
    table: str = "[[data.sources]]",
) -> "PackedLoader":
    """The loader of data rank ``dp_rank``, with every shard indexed and every setting checked.

    ``share`` gathers a dict over the data ranks (an all-gather of objects); None where there is one rank. Each worker makes
    ``prefetch_factor`` batches' worth of rows ahead (None: 2). ``table`` is where the user wrote the sources of ``config``.

    Raises:
        ValueError: shards are missing, empty or unreadable, an image cannot fit a row, or streams, ranks and workers do not divide.
    """
    spec = build_spec(
        config, latents, geometry, rotary_layout, tokenizer, seq_len, global_batch_size, table
    )
    if global_batch_size % spec.num_streams:
        logger.warning(
            f"data.num_lanes: {spec.num_streams} does not divide the global batch size "
            f"{global_batch_size}: which rows share a global batch depends on the number of ranks"
        )
    if pin_memory and not torch.accelerator.is_available():
        logger.warning("training.dataloader.pin_memory: ignored, there is no accelerator here")
        pin_memory = False
    streams = _streams_of_rank(spec.num_streams, dp_rank, dp_world_size)
    _check_workers(num_workers, len(streams))
    assert share is not None or dp_world_size == 1
    return PackedLoader(
        spec,
        streams,
        local_batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        share=share or (lambda states: [states]),
    )


def _streams_of_rank(num_streams: int, dp_rank: int, dp_world_size: int) -> range:
    per_rank, rest = divmod(num_streams, dp_world_size)
    if rest or not per_rank:
        nearest = dp_world_size * max(1, round(num_streams / dp_world_size))
        raise ValueError(
            f"data.num_lanes: {num_streams} streams cannot be shared evenly by {dp_world_size} data "
            f"ranks; set it to {nearest} (it is fixed for the life of a run), or use a number of "
            f"ranks that divides it"
        )
    return range(dp_rank * per_rank, (dp_rank + 1) * per_rank)


def _check_workers(num_workers: int, num_streams: int) -> None:
    if num_workers and num_streams % num_workers:
        fitting = max(w for w in range(1, num_workers) if num_streams % w == 0)
        raise ValueError(
            f"training.dataloader.num_workers: {num_workers} workers cannot share the {num_streams} "
            f"streams of a rank evenly; set it to {fitting}, or data.num_lanes to a multiple of "
            f"ranks x workers"
        )


class PackedLoader(BaseDataLoader):
    """Endless batches of this rank's rows. Each new iterator goes on behind the last batch that was handed out.

    Where a source stops the run, batches are empty once ``ended_sources`` names it: other ranks may still have rows.
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
        share: Share,
    ) -> None:
        self._spec = spec
        self._states: States = {stream: new_state(spec) for stream in streams}
        self._local_batch_size = local_batch_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._prefetch_factor = prefetch_factor
        self._share = share

    @property
    def spec(self) -> PipelineSpec:
        """All that decides the rows, besides the streams of this rank."""
        return self._spec

    @property
    def streams(self) -> list[int]:
        """Streams of this rank."""
        return list(self._states)

    @property
    def num_skipped(self) -> int:
        """Bad samples that were skipped in the streams this rank owns, since the run began."""
        return sum(num_skipped(self._spec, list(self._states.values())))

    @property
    def skip_reasons(self) -> dict[str, int]:
        """Samples of the streams this rank owns that were skipped, by reason, and ``truncated`` ones; the same keys always."""
        return count_reasons(list(self._states.values()))

    @property
    def can_end(self) -> bool:
        """Whether the end of a source stops the run; the same on every rank."""
        config = self._spec.config
        return any(source.at_end_of(config) == "stop" for source in self._spec.sources)

    @property
    def ended_sources(self) -> list[str]:
        """Sources whose end this rank's streams have met; empty while one of the streams has a row left."""
        return ended_sources(self._spec, list(self._states.values()))

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]
        rows = self._rows()
        while True:
            taken = [next(rows) for _ in range(self._local_batch_size)]
            for stream, _, state in taken:
                self._states[stream] = state
            check_skipped(self._spec, list(self._states.values()))
            batch = stack_rows([row for _, row, _ in taken])
            yield batch.pin_memory() if self._pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """All streams of all ranks and what they are tied to; the same on every rank. Collective where there are several."""
        states = {
            stream: state for part in self._share(self._states) for stream, state in part.items()
        }
        assert sorted(states) == list(range(self._spec.num_streams))
        identity = fingerprint_of(self._spec)
        return {"state": json.dumps({"identity": identity, "lanes": states}, sort_keys=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, on any number of ranks and workers.

        Raises:
            ValueError: it was taken from other data or with other settings; the message says which.
        """
        saved = json.loads(state_dict["state"])
        check_fingerprint(saved["identity"], fingerprint_of(self._spec))
        self._states = {
            stream: resumed(self._spec, saved["lanes"][str(stream)]) for stream in self._states
        }

    def _rows(self) -> Iterator[StreamItem]:
        dataset = StreamDataset(self._spec, self._states)
        if not self._num_workers:
            return _checked(iter(dataset))
        return _in_stream_order(_checked(self._worker_rows(dataset)), self._states)

    def _worker_rows(self, dataset: "StreamDataset") -> Iterator["StreamItem | WorkerError"]:
        """Rows of the workers in turn. The workers end with this generator, or with the interpreter."""
        running = [
            iter(
                DataLoader(
                    dataset,
                    batch_size=None,
                    collate_fn=_flattened,
                    num_workers=self._num_workers,
                    prefetch_factor=(self._prefetch_factor or 2) * self._local_batch_size,
                    worker_init_fn=_ignore_signals,
                    # It draws a seed for the workers, which must not come from the global generator.
                    generator=torch.Generator(),
                )
            )
        ]
        # Workers ignore SIGTERM, with which Python ends what its exit finds alive: it would wait forever.
        atexit.register(running.clear)
        try:
            while True:
                item = next(running[0])
                yield item if isinstance(item, WorkerError) else (item[0], item[1].row(), item[2])
        finally:
            running.clear()
            atexit.unregister(running.clear)


class WorkerError:
    """Message of a ValueError in a worker; raised in the main process without the worker's traceback around it."""

    def __init__(self, message: str) -> None:
        self.message = message


class StreamDataset(IterableDataset):
    """Rows of some streams, or of a worker's share of them."""

    def __init__(self, spec: PipelineSpec, states: States) -> None:
        self._spec = spec
        self._states = states

    def __iter__(self) -> Iterator[StreamItem | WorkerError]:
        worker = get_worker_info()
        numbers = sorted(self._states)
        if worker is not None:
            numbers = numbers[worker.id :: worker.num_workers]
        spec, mixture = self._spec, open_mixture(self._spec)
        sources = [OpenSource(spec, i) for i in range(len(spec.sources))]
        try:
            streams = {n: Stream(spec, sources, mixture, n, self._states[n]) for n in numbers}
            for n in _round_robin({n: self._states[n]["rows"] for n in numbers}):
                yield n, streams[n].next_row(), streams[n].state()
        except ValueError as error:
            yield WorkerError(str(error))


def _round_robin(rows: dict[int, int]) -> Iterator[int]:
    """Streams in the order their rows are read: the one with the fewest rows, of equals the lowest."""
    rows = dict(rows)
    while True:
        stream = min(rows, key=lambda n: (rows[n], n))
        rows[stream] += 1
        yield stream


def _checked(rows: Iterator[StreamItem | WorkerError]) -> Iterator[StreamItem]:
    for row in rows:
        if isinstance(row, WorkerError):
            raise ValueError(row.message)
        yield row


def _in_stream_order(rows: Iterator[StreamItem], states: States) -> Iterator[StreamItem]:
    """``rows``, each stream's in order, brought into the order of ``_round_robin`` over all streams.

    At the start of a round nothing waits; after a resume in the middle of one, a few rows per worker do.
    """
    early: dict[int, deque[StreamItem]] = {stream: deque() for stream in states}
    for stream in _round_robin({stream: state["rows"] for stream, state in states.items()}):
        while not early[stream]:
            row = next(rows)
            early[row[0]].append(row)
        yield early[stream].popleft()


def _flattened(item: Any) -> Any:
    """Runs in the worker: the row becomes a single tensor."""
    return item if isinstance(item, WorkerError) else (item[0], SerializedRow.of(item[1]), item[2])


def _ignore_signals(worker: int) -> None:
    """A signal to the process group is for the trainer, which finishes its step and still needs rows for that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
