"""Lanes: independent, endless streams of packed rows. Global row r belongs to lane r % num_lanes.

A lane is a pure function of (config, seed, lane number). Its steps, one sample at a time until enough documents wait:

    1. the mixture names the source                                       counts of this lane -> source
    2. the lane's k-th sample of a source is number k * num_lanes + lane  -> index in the source's endless sequence
    3. the order turns the index into shard and sample, the reader fetches it                       -> bytes
    4. the sample becomes documents, which join the waiting ones; a bad sample is skipped or stops the run
    5. the packing chooses documents among those waiting                                            -> one row

The state after a row is a few counters and the names of the documents that wait; these are read again on resume.
"""

from dataclasses import dataclass
from typing import TypedDict

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.mixture import Mixture
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.packing import RowBuilder, RowSize, choose_documents
from symbiotic_titan.data.readers import Reader, Shard
from symbiotic_titan.data.samples import BadSample, Document, DocumentMaker
from symbiotic_titan.sequence.batch import PackedBatch


@dataclass(frozen=True)
class LaneRecipe:
    """All that decides a lane's rows, besides its number. Plain data: it travels to worker processes."""

    config: Data
    sources: list[DataSource]
    shards: list[list[Shard]]
    num_lanes: int
    size: RowSize
    maker: DocumentMaker
    builder: RowBuilder


class LaneState(TypedDict):
    """A lane between two rows, JSON-able.

    rows:      rows made so far.
    scheduled: samples that the mixture has had of each source.
    read:      samples read of each source; those beyond ``scheduled`` were bad.
    waiting:   (source, index in its endless sequence, part) of each document that waits for its row.
    """

    rows: int
    scheduled: list[int]
    read: list[int]
    waiting: list[tuple[int, int, int]]


class OpenSource:
    """A source in the process that reads it: its order and its open files."""

    def __init__(self, recipe: LaneRecipe, number: int) -> None:
        self.config = recipe.sources[number]
        self._maker = recipe.maker
        sizes = [len(shard.keys) for shard in recipe.shards[number]]
        self._order = SourceOrder(recipe.config.seed, self.config.name, sizes)
        self._reader = Reader(recipe.shards[number])

    def documents(self, index: int) -> list[Document]:
        """Documents of number ``index`` of the source's endless sequence; raises BadSample."""
        return self._maker.make(self.config, self._reader.read(*self._order.locate(index)), index)


@dataclass(frozen=True)
class Waiting:
    """A document that waits for its row, and where it can be read again."""

    source: int
    index: int
    part: int
    document: Document


class Lane:
    """One lane, at the moment that ``state`` tells."""

    def __init__(
        self,
        recipe: LaneRecipe,
        sources: list[OpenSource],
        mixture: Mixture,
        number: int,
        state: LaneState,
    ) -> None:
        self._recipe = recipe
        self._sources = sources
        self._mixture = mixture
        self._number = number
        self._num_rows = state["rows"]
        self._scheduled = list(state["scheduled"])
        self._read = list(state["read"])
        self._waiting = _read_again(sources, state["waiting"])

    def next_row(self) -> PackedBatch:
        """The next row; raises ValueError for a bad sample, as data.bad_samples says."""
        while len(self._waiting) < self._recipe.config.lookahead:
            self._draw()
        documents = [waiting.document for waiting in self._waiting]
        chosen = choose_documents(documents, self._recipe.size)
        taken = set(chosen)
        self._waiting = [w for i, w in enumerate(self._waiting) if i not in taken]
        self._num_rows += 1
        return self._recipe.builder.build([documents[i] for i in chosen])

    def state(self) -> LaneState:
        """``Lane(..., state)`` goes on with exactly the rows that would have come next."""
        return {
            "rows": self._num_rows,
            "scheduled": list(self._scheduled),
            "read": list(self._read),
            "waiting": [(w.source, w.index, w.part) for w in self._waiting],
        }

    def _draw(self) -> None:
        """Read one sample. After a bad one the mixture stays where it is, so the next comes from the same source."""
        source = self._mixture.next(self._number, self._scheduled)
        index = self._read[source] * self._recipe.num_lanes + self._number
        self._read[source] += 1
        try:
            documents = self._sources[source].documents(index)
        except BadSample as error:
            self._refuse_or_count(self._sources[source].config, error)
            return
        self._scheduled[source] += 1
        self._waiting += [
            Waiting(source, index, part, document) for part, document in enumerate(documents)
        ]

    def _refuse_or_count(self, source: DataSource, error: BadSample) -> None:
        if self._recipe.config.bad_samples == "raise":
            raise ValueError(
                f'{error} (source {source.name!r}); repair it, or set data.bad_samples = "skip"'
            ) from error
        check_skipped(self._recipe, [self.state()], f"; the last one is {error}")


def _read_again(sources: list[OpenSource], places: list[tuple[int, int, int]]) -> list[Waiting]:
    """The documents of a saved state. The parts of one long text wait together: it is read once."""
    samples: dict[tuple[int, int], list[Document]] = {}
    for source, index, _ in places:
        if (source, index) not in samples:
            try:
                samples[source, index] = sources[source].documents(index)
            except BadSample as error:
                raise ValueError(f"{error}; it was good when the checkpoint was saved") from error
    return [Waiting(s, i, part, samples[s, i][part]) for s, i, part in places]


def new_state(recipe: LaneRecipe) -> LaneState:
    """State of a lane that has not begun."""
    zeros = [0] * len(recipe.sources)
    return {"rows": 0, "scheduled": zeros, "read": zeros, "waiting": []}


def num_skipped(states: list[LaneState]) -> list[int]:
    """Bad samples skipped so far, per source: those read beyond those the mixture asked for."""
    differences = [
        [read - scheduled for read, scheduled in zip(s["read"], s["scheduled"], strict=True)]
        for s in states
    ]
    return [sum(column) for column in zip(*differences, strict=True)]


def check_skipped(recipe: LaneRecipe, states: list[LaneState], last: str = "") -> None:
    """Raise ValueError when more than data.max_bad_samples were skipped in the lanes of ``states``."""
    counts, limit = num_skipped(states), recipe.config.max_bad_samples
    if sum(counts) > limit:
        named = ", ".join(
            f"{source.name}: {count}"
            for source, count in zip(recipe.sources, counts, strict=True)
            if count
        )
        raise ValueError(
            f"skipped {sum(counts)} bad samples ({named}), more than data.max_bad_samples = {limit}"
            f"{last}; repair the shards or raise the limit"
        )
