"""Streams: independent, endless series of packed sequences. Row r of the run comes from stream r % num_streams.

A stream is a pure function of (config, seed, stream number): the numbers of ranks and workers do not change the training data,
and a resume is exact. It reads one sample at a time until ``data.lookahead`` documents wait:

    1. the mixture of this row names the source             counts of this stream -> source
    2. the stream's k-th sample of a source has index k * num_streams + stream in the source's endless sequence
    3. the order locates that index, the reader fetches it                  index -> shard and sample -> bytes
    4. the sample becomes documents, which wait; a bad sample is skipped or stops the run
    5. the packing chooses among the waiting documents                           documents -> packed sequence

A stream ends when step 2 goes past the first epoch of a source that stops the run (``data.at_end``). The waiting documents are
still packed; all later sequences are empty.

The state between two sequences is a few counters and the indices of the waiting documents, which a resume reads again: a checkpoint
holds no tokens or pixels, whatever the look-ahead.
"""

import functools
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from symbiotic_titan.config.data import PACKINGS
from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.formats.shard import BadSample, Reader, Sample
from symbiotic_titan.data.mixture import Mixture, StagedMixture
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.packing import Packing, check_choice
from symbiotic_titan.data.skip_list import first_numbers, is_listed
from symbiotic_titan.data.stream_state import PipelineSpec, StreamState, check_skipped
from symbiotic_titan.sequence.batch import PackedBatch


class ReadLog:
    """What each process that reads samples is at, for the one that waits for them. In shared memory where there are several."""

    def __init__(self, num_workers: int) -> None:
        """One row for each worker, or for the main process: when the last sample was begun or done, its source, shard and number (a
        source of -1: none is being read)."""
        self._rows = torch.full((max(1, num_workers), 4), -1.0, dtype=torch.float64)
        if num_workers:
            self._rows.share_memory_()

    @functools.cached_property  # not before the process that reads exists: a copy sent to another would not be shared
    def _table(self) -> np.ndarray:
        return self._rows.numpy()

    def begin(self, worker: int, source: int, shard: int, sample: int) -> None:
        self._table[worker] = (time.monotonic(), source, shard, sample)

    def done(self, worker: int) -> None:
        self._table[worker, 1] = -1.0
        self._table[worker, 0] = time.monotonic()

    def check(self, spec: PipelineSpec, waited: float, limit: float) -> None:
        """Raise ValueError if a sample has been read for longer than ``limit`` seconds, or nothing has happened in the ``waited`` ones."""
        now = time.monotonic()
        rows = self._rows.tolist()
        stuck = min((row for row in rows if row[1] >= 0), default=None)
        if stuck is not None and now - stuck[0] > limit:
            source, shard, sample = map(int, stuck[1:])
            where = f"source {spec.sources[source].name!r}, {spec.shards[source][shard].path}, sample number {sample}"
            raise ValueError(
                f"{where}: reading it takes longer than {limit:g} s; see whether the file and the files it names can be read, or raise "
                "data.read_timeout_seconds"
            )
        if stuck is None and min(waited, now - max(row[0] for row in rows)) > limit:
            raise ValueError(
                f"no sample was read for {limit:g} s, though data are needed; see what the data's workers do, or raise "
                "data.read_timeout_seconds"
            )


class OpenSource:
    """A source in the process that reads it: its order and open files, shared by all streams of the process. ``log`` learns what is read
    by ``worker``."""

    def __init__(
        self, spec: PipelineSpec, number: int, log: ReadLog | None = None, worker: int = 0
    ) -> None:
        self.config, self._number = spec.sources[number], number
        self._log, self._worker = log, worker
        self._maker = spec.maker
        sizes = [shard.num_samples for shard in spec.shards[number]]
        self._order = SourceOrder(
            spec.config.seed, self.config.name, sizes, sorts_all=spec.sorts_all_shards
        )
        self._reader = Reader(spec.shards[number])
        self._listed = spec.listed[number]
        self._first_numbers = first_numbers(spec.shards[number])
        self._stops = self.config.at_end_of(spec.config) == "stop"

    def has(self, index: int) -> bool:
        """False if ``index`` is past the end of a source that stops the run."""
        return not self._stops or index < self._order.num_samples

    def is_listed(self, index: int) -> bool:
        """Whether the source's ``skip_list`` names the sample at ``index`` in the endless sequence."""
        if not len(self._listed):
            return False
        shard, sample = self._order.locate(index)
        return is_listed(self._listed, int(self._first_numbers[shard]) + sample)

    def documents(self, index: int) -> list[Document]:
        """The documents of the sample at ``index`` in the endless sequence; raises BadSample."""
        place = self._order.locate(index)
        if self._log is not None:
            self._log.begin(self._worker, self._number, *place)
        try:
            return self._maker.make(self.config, self._reader.read(*place), index)
        finally:
            if self._log is not None:
                self._log.done(self._worker)

    def sample(self, index: int) -> Sample:
        """Raises BadSample."""
        return self._reader.read(*self._order.locate(index))


@dataclass(frozen=True)
class Waiting:
    """A document that waits to be packed, and the indices from which a resume reads it again."""

    source: int
    index: int
    part: int
    document: Document


class Stream:
    """One stream, continued from ``state``."""

    def __init__(
        self,
        spec: PipelineSpec,
        sources: list[OpenSource],
        mixture: StagedMixture,
        number: int,
        state: StreamState,
    ) -> None:
        self._spec = spec
        self._sources = sources
        self._staged = mixture
        self._mixture: Mixture | None = None
        self._number = number
        self._choose: Packing = PACKINGS[spec.config.packing]
        self._num_rows = state["rows"]
        self._scheduled = list(state["scheduled"])
        self._read = list(state["read"])
        self._skipped = [dict(reasons) for reasons in state["skipped"]]
        self._in_a_row = list(state["in_a_row"])
        self._truncated = list(state["truncated"])
        self._tokens = list(state["tokens"])
        self._ended = state["ended"]
        self._weights, self._since = state["weights"], list(state["since"])
        self._absent, self._filling = state["absent"], state["filling"]
        self._waiting = _read_again(sources, state["waiting"])

    def next_row(self) -> PackedBatch:
        """The next packed sequence; raises ValueError for a bad sample that ``data.bad_samples`` does not skip, or a wrong packing."""
        self._enter(self._staged.at(self._number, self._num_rows))
        # Refilled before every choice, so that a resumed stream chooses from the same documents.
        self._read_ahead(self._spec.config.lookahead)
        documents = [waiting.document for waiting in self._waiting]
        chosen = self._choose(documents, self._spec.size) if documents else []
        if documents:
            check_choice(self._spec.config.packing, chosen, documents, self._spec.size)
        taken = set(chosen)
        self._waiting = [w for i, w in enumerate(self._waiting) if i not in taken]
        self._num_rows += 1
        row = [documents[i] for i in chosen]
        if self._ended < 0:  # the last sequences of a stream are not full for want of documents
            rest = [waiting.document for waiting in self._waiting]
            self._filling = self._filling.after(row, rest, self._spec.size)
        # The end of a source is only found by reading. Reading now lets the state say whether this sequence was the last.
        self._read_ahead(1)
        return self._spec.builder.build(row)

    def state(self) -> StreamState:
        """``Stream(..., state)`` continues with exactly the sequences that would have come next."""
        # Copies: this stream goes on to later sequences before the trainer has received this one and its state.
        return {
            "rows": self._num_rows,
            "scheduled": list(self._scheduled),
            "read": list(self._read),
            "skipped": [dict(reasons) for reasons in self._skipped],
            "in_a_row": list(self._in_a_row),
            "truncated": list(self._truncated),
            "tokens": list(self._tokens),
            "ended": self._ended,
            "waiting": [(w.source, w.index, w.part) for w in self._waiting],
            "weights": self._weights,
            "since": list(self._since),
            "absent": self._absent,
            "filling": self._filling,
        }

    @property
    def _counted(self) -> list[int]:
        """What the mixture counts, per source."""
        return self._tokens if self._spec.config.mixture_by == "tokens" else self._scheduled

    def _enter(self, mixture: Mixture) -> None:
        """Read by ``mixture`` from now on: at a stage, or after a resume with other weights, it counts from here."""
        if mixture is self._mixture:
            return
        self._mixture = mixture
        names = [source.config.name for source in self._sources]
        weights = {n: w for n, w in zip(names, mixture.weights, strict=True) if w}
        if weights != self._weights:
            self._weights, self._since = weights, list(self._counted)
            # The end of a source that is no longer read does not end the stream.
            if self._ended >= 0 and names[self._ended] not in weights:
                self._ended = -1

    def _read_ahead(self, number: int) -> None:
        """Read until ``number`` documents wait or the stream has ended."""
        while len(self._waiting) < number and self._ended < 0:
            self._read_next()

    def _read_next(self) -> None:
        """Read one sample. A bad one is not counted, so the mixture chooses the same source again and its shares stay exact."""
        assert self._mixture is not None
        given = [count - start for count, start in zip(self._counted, self._since, strict=True)]
        source = self._mixture.next(self._number, given)
        # Interleaved: every index belongs to exactly one stream, so no sample is lost or repeated, without communication.
        index = self._read[source] * self._spec.num_streams + self._number
        # One ended source ends the stream: going on without it would change the mixture.
        if not self._sources[source].has(index):
            self._ended = source
            return
        self._read[source] += 1  # also for a bad sample: a resume must not read it again
        if self._sources[source].is_listed(index):
            self._skipped[source]["listed"] = self._skipped[source].get("listed", 0) + 1
            return
        try:
            documents = self._sources[source].documents(index)
        except BadSample as error:
            self._refuse_or_count(source, error)
            return
        self._scheduled[source] += 1
        self._tokens[source] += sum(document.num_tokens for document in documents)
        self._in_a_row[source] = 0
        self._truncated[source] += any(document.truncated for document in documents)
        self._waiting += [
            Waiting(source, index, part, document) for part, document in enumerate(documents)
        ]

    def _refuse_or_count(self, source: int, error: BadSample) -> None:
        config, data = self._sources[source].config, self._spec.config
        passed_over = error.reason == "too_long" and config.too_long_of(data) == "skip"
        if config.bad_samples_of(data) == "raise" and not passed_over:
            remedy = 'repair it, or set data.bad_samples = "skip"'
            if error.reason == "too_long":
                remedy = 'raise that limit, or set data.too_long = "skip" or "truncate"'
            raise ValueError(f"{error} (source {config.name!r}); {remedy}") from error
        count = self._skipped[source].get(error.reason, 0) + 1
        self._skipped[source][error.reason] = count
        if count & (count - 1) == 0:  # 1, 2, 4, 8 ...: a damaged shard must not flood the log
            logging.getLogger(__name__).warning(
                f"source {config.name!r}, stream {self._number}: skipped {count} samples so far as "
                f"{error.reason!r}; the last one is {error}"
            )
        self._in_a_row[source] += 1
        if self._in_a_row[source] > data.max_bad_in_a_row:
            raise ValueError(
                f"source {config.name!r}: skipped {self._in_a_row[source]} samples in a row, more than "
                f"data.max_bad_in_a_row = {data.max_bad_in_a_row}; the last one is {error}; repair the shards, correct the "
                "source, or raise the limit"
            )
        # The loader checks all streams of a rank, but only after each batch, which a stream without good samples would never complete.
        if not passed_over:
            check_skipped(self._spec, [self.state()], f"; the last one is {error}")


def _read_again(sources: list[OpenSource], places: list[tuple[int, int, int]]) -> list[Waiting]:
    """The documents of a saved state. A text with several waiting parts is read once."""
    samples: dict[tuple[int, int], list[Document]] = {}
    for source, index, _ in places:
        if (source, index) not in samples:
            try:
                samples[source, index] = sources[source].documents(index)
            except BadSample as error:
                raise ValueError(
                    f"{error}; when the checkpoint was saved, it could be used"
                ) from error
    # Documents are made anew from the sample, so a changed source may split a text differently.
    if any(part >= len(samples[source, index]) for source, index, part in places):
        raise ValueError(
            "a text has fewer parts than when the checkpoint was saved; its source or its keys were changed: set them back, "
            'or start the data anew with checkpoint.exclude_from_loading = ["dataloader"]'
        )
    return [Waiting(s, i, part, samples[s, i][part]) for s, i, part in places]


def open_mixture(spec: PipelineSpec, step: int = 0, rows: int = 0) -> StagedMixture:
    """The mixture of all streams, in a run that had made ``rows`` rows after ``step`` steps. It is stateless, so sharing it does not
    couple them."""
    stages = [
        (rows + (first - 1 - step) * spec.rows_per_step, [weights[s.name] for s in spec.sources])
        for first, weights in spec.config.weights_by_stage
    ]
    return StagedMixture(stages, spec.num_streams, spec.config.mixture_by)
