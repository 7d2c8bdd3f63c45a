"""Reads, decodes and tokenises the samples of sources as training does, and records what is bad.

    a source's shards -> blocks of samples -> spans, which worker processes check -> records in a journal -> a report

Documents are made of the worst case: no caption is dropped, whatever ``data.condition_dropout`` says.
"""

import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import ceil
from pathlib import PurePosixPath

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.check_journal import Journal, Record
from symbiotic_titan.data.files import source_files
from symbiotic_titan.data.formats.index_cache import version_of
from symbiotic_titan.data.formats.shard import BadSample, Reader, Shard
from symbiotic_titan.data.image_files import check_image_folder
from symbiotic_titan.data.order import hash_key, permutation
from symbiotic_titan.data.readers import check_names, index_source
from symbiotic_titan.data.stream_state import MakesDocuments
from symbiotic_titan.data.worker_pool import Crash, Position, WorkerPool

# Samples of a span at least; with a share, more are passed over.
BLOCK = 256
# Crashes of workers after which the check stops: then it is not the samples.
MAX_CRASHES = 100
# Reason of a sample that crashes the process that reads it.
CRASH = "crash"
# Part of a record's key: increment it where a check finds something else than before.
VERSION = 1

# Settings that change no document, so that a change of one repeats no check.
_WITHOUT_EFFECT = {
    *(
        "sources",
        "stages",
        "max_bad_share",
        "num_lanes",
        "mixture_by",
        "at_end",
        "lookahead",
        "packing",
        "bad_samples",
    ),
    *("cache_folder", "max_bad_samples", "max_bad_in_a_row", "weight", "skip_list", "name"),
}


@dataclass(frozen=True)
class CheckedSource:
    """A source, and what was found when its files were indexed.

    key:    hash of all that decides the documents of its samples.
    firsts: number of each shard's first sample within its file.
    errors: (file, or "" where it is the whole source; message): what cannot be indexed.
    """

    table: str
    source: DataSource
    config: Data
    maker: MakesDocuments
    key: str
    shards: list[Shard]
    firsts: list[int]
    versions: dict[str, str]
    errors: list[tuple[str, str]]

    def records(self, journal: Journal, path: str) -> list[Record]:
        return journal.records(self.key, path, self.versions[path])

    def new_record(self, span: "Span") -> Record:
        path, first = self.shards[span.shard].path, self.firsts[span.shard]
        return Record(self.key, path, self.versions[path], first + span.start, first + span.stop)


@dataclass(frozen=True)
class Span:
    """Samples ``start`` .. ``stop`` - 1 of a shard of a source, all of one block. ``alone``: the one sample crashed a worker before."""

    source: int
    shard: int
    start: int
    stop: int
    alone: bool = False


def open_source(
    table: str, number: int, source: DataSource, config: Data, maker: MakesDocuments, settings: str
) -> CheckedSource:
    """Index the files of row ``number`` of ``table``. What cannot be indexed becomes an error of the result; other files go on.

    settings: everything else that decides the documents: tokenizer, geometry, length of a packed sequence, share.
    """
    where = f"{table} #{number} ({source.name})"
    shards, errors = _indexed(source, config, where)
    if shards:
        try:
            if source.image_folder:
                check_image_folder(source.image_folder, where)
            check_names(source, shards, where)
        except ValueError as error:
            shards, errors = [], [*errors, ("", str(error))]
    firsts: list[int] = []
    ends: dict[str, int] = defaultdict(int)
    for shard in shards:
        firsts.append(ends[shard.path])
        ends[shard.path] += shard.num_samples
    versions = {path: version_of(path) for path in ends}
    key = _key_of(source, config, settings)
    return CheckedSource(table, source, config, maker, key, shards, firsts, versions, errors)


def _indexed(
    source: DataSource, config: Data, where: str
) -> tuple[list[Shard], list[tuple[str, str]]]:
    """The shards, and the errors of the files that have none."""

    def index(path: str) -> list[Shard]:
        alone = replace(source, path=path)
        folder, limits = config.cache_folder, config.limits
        return index_source(alone, where, cache_folder=folder, tolerant=True, limits=limits)

    try:
        return index(source.path), []
    except (ValueError, OSError) as error:
        first = str(error)
    try:
        paths = source_files(source, where)
    except ValueError:
        return [], [("", first)]
    shards: list[Shard] = []
    errors: list[tuple[str, str]] = []
    for path in paths:
        try:
            shards += index(path)
        except (ValueError, OSError) as error:
            errors.append((path, str(error)))
    return shards, errors


def _key_of(source: DataSource, config: Data, settings: str) -> str:
    used = {
        name: value
        for values in (vars(config), asdict(source))
        for name, value in values.items()
        if name not in _WITHOUT_EFFECT
    }
    policy = (source.too_long_of(config), VERSION, settings)
    text = json.dumps([used, policy], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


# ---- which samples ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The part of the samples that is checked, at least one of each block; the same for the same seed and files."""

    share: float = 1.0
    seed: int = 0

    @property
    def block(self) -> int:
        return ceil(BLOCK / self.share)

    def chosen(self, checked: CheckedSource, span: Span) -> list[int]:
        """Samples of ``span``, ascending."""
        if self.share == 1.0:
            return list(range(span.start, span.stop))
        shard = checked.shards[span.shard]
        low = span.start // self.block * self.block
        length = min(self.block, shard.num_samples - low)
        name, first = PurePosixPath(shard.path).name, checked.firsts[span.shard]
        key = hash_key(self.seed, checked.source.name, "check", name, first + low)
        drawn = low + permutation(length, key)[: self.count(length)]
        return sorted(n for n in drawn.tolist() if span.start <= n < span.stop)

    def count(self, length: int) -> int:
        """How many of a block of ``length`` samples are checked."""
        return ceil(self.share * length)

    def total(self, checked: CheckedSource) -> int:
        sizes = [shard.num_samples for shard in checked.shards]
        whole = sum(n // self.block for n in sizes) * self.count(self.block)
        return whole + sum(self.count(n % self.block) for n in sizes)


class SpanQueue:
    """Spans that wait, by shard: a worker stays with its shard, whose row group it has decoded already."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], deque[Span]] = {}
        self._fresh: deque[tuple[int, int]] = deque()

    def add(self, span: Span) -> None:
        at = (span.source, span.shard)
        if at not in self._waiting:
            self._waiting[at] = deque()
            self._fresh.append(at)
        self._waiting[at].append(span)

    def next(self, last: Span | None) -> Span | None:
        """One of the shard of ``last``; or of a shard that no worker has begun; or of the one with the most spans left."""
        at = (last.source, last.shard) if last else None
        if at not in self._waiting:
            while self._fresh and self._fresh[0] not in self._waiting:
                self._fresh.popleft()
            if self._fresh:
                at = self._fresh.popleft()
            elif self._waiting:
                at = max(self._waiting, key=lambda shard: len(self._waiting[shard]))
            else:
                return None
        assert at is not None
        span = self._waiting[at].popleft()
        if not self._waiting[at]:
            del self._waiting[at]
        return span


def missing_spans(checked: list[CheckedSource], journal: Journal, share: Share) -> Iterator[Span]:
    """What the journal does not have yet, in the order of the sources, their shards and samples."""
    for number, source in enumerate(checked):
        known = {path: source.records(journal, path) for path in source.versions}
        for shard_number, shard in enumerate(source.shards):
            first = source.firsts[shard_number]
            done = [(r.start - first, r.stop - first) for r in known[shard.path]]
            for low in range(0, shard.num_samples, share.block):
                high = min(low + share.block, shard.num_samples)
                for start, stop in _gaps(low, high, done):
                    yield Span(number, shard_number, start, stop)


def _gaps(low: int, high: int, done: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of ``low`` .. ``high`` - 1 that none of the ascending intervals ``done`` has."""
    for start, stop in done:
        if stop <= low or start >= high:
            continue
        if start > low:
            yield low, start
        low = max(low, stop)
    if low < high:
        yield low, high


# ---- the check ----------------------------------------------------------------------------------------------------------------


class SpanChecker:
    """Checks spans; made in the parent, used in the worker processes."""

    def __init__(self, checked: list[CheckedSource], share: Share) -> None:
        self._checked = checked
        self._share = share
        self._readers: dict[int, Reader] = {}

    def __call__(self, span: Span, position: Position) -> Record:
        checked = self._checked[span.source]
        if span.source not in self._readers:
            self._readers[span.source] = Reader(checked.shards)
        record = checked.new_record(span)
        for sample in self._share.chosen(checked, span):
            position.set(sample)
            _check(checked, self._readers[span.source], span.shard, sample, record)
        return record


def _check(checked: CheckedSource, reader: Reader, shard: int, sample: int, record: Record) -> None:
    """Add what becomes of the sample to ``record``."""
    record.checked += 1
    number = checked.firsts[shard] + sample
    try:
        documents = checked.maker.make(checked.source, reader.read(shard, sample), number)
    except BadSample as error:
        if error.reason == "too_long" and checked.source.too_long_of(checked.config) == "skip":
            record.passed_over += 1
        else:
            key = checked.shards[shard].key(sample)
            record.add_bad(number, key, error.reason, str(error.args[0]))
        return
    tokens = sum(document.num_tokens for document in documents)
    record.good += 1
    record.tokens += tokens
    record.max_tokens = max(record.max_tokens, tokens)
    record.truncated += any(document.truncated for document in documents)


def check_spans(
    checked: list[CheckedSource],
    spans: list[Span],
    journal: Journal,
    share: Share,
    num_workers: int,
    advance: Callable[[int, int], None],
) -> None:
    """Check ``spans`` in processes, and add each one's record to ``journal`` as it is done.

    advance: called with the number of samples done and the number of bad ones among them.

    Raises:
        ValueError: workers crash so often that it is not the samples.
    """
    queue = SpanQueue()
    for span in spans:
        queue.add(span)
    crashes = _Crashes(checked)
    pool: WorkerPool[Span, Record] = WorkerPool(SpanChecker(checked, share), num_workers)
    with pool:
        for span, result in pool.run(queue.next):
            record, parts = (
                crashes.handle(span, result) if isinstance(result, Crash) else (result, [])
            )
            for part in parts:
                queue.add(part)
            if record is not None:
                journal.add(record)
                advance(record.checked, len(record.bad))


class _Crashes:
    """What becomes of a span whose worker crashed: all but the sample that it was at is checked once more, and the sample by itself.
    If it crashes a worker again, it is bad."""

    def __init__(self, checked: list[CheckedSource]) -> None:
        self._checked = checked
        self._number = 0

    def handle(self, span: Span, crash: Crash) -> tuple[Record | None, list[Span]]:
        """(the record of a sample that is bad, spans to check once more)."""
        self._number += 1
        checked, sample = self._checked[span.source], crash.sample
        record = checked.new_record(span)
        where = f"source {checked.source.name!r}, {record.file}, samples {record.start} to {record.stop - 1}"
        if self._number > MAX_CRASHES:
            raise ValueError(
                f"{where}: {crash.message}; that happened {self._number} times, so that the check stops; mend what makes the workers "
                "crash, or give them more memory with fewer --workers, and start it again: it goes on where it was"
            )
        logging.getLogger(__name__).warning(f"{where}: {crash.message}")
        if sample < 0:
            return None, [span]
        if span.alone:
            key = checked.shards[span.shard].key(sample)
            record.checked = 1
            record.add_bad(record.start, key, CRASH, crash.message)
            return record, []
        parts = [
            replace(span, stop=sample),
            replace(span, start=sample, stop=sample + 1, alone=True),
            replace(span, start=sample + 1),
        ]
        return None, [part for part in parts if part.start < part.stop]
