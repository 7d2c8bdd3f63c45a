"""A list of samples to pass over: JSON Lines, as ``symbiotic check-data`` writes them and ``data.sources.skip_list`` names them.

One object per sample:

    source            name of the source
    file, num_bytes   path and length of its file, as the index of the source has them
    sample            its number in that file, from 0; the damaged rest of a file is one sample after the others
    key, reason, message: for people and other programs; training does not read them

Training matches an entry by name and length of the file, so the files may move to another folder.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.formats.shard import DamagedRest, Stored

REMEDY = "write it with: symbiotic check-data CONFIG"


@dataclass(frozen=True)
class BadEntry:
    """A line of the list."""

    source: str
    file: str
    num_bytes: int
    sample: int
    key: str
    reason: str
    message: str

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class FileSpan:
    """The samples of a file among those of its source: ``count``, from number ``start``, in the order of the shards."""

    path: str
    start: int
    count: int


def read_skip_list(source: DataSource, shards: Sequence[Stored], where: str) -> np.ndarray:
    """(K,) int64, ascending: the listed samples of ``source``, numbered through all ``shards``; empty without a list.

    Entries of files that are gone or have another length are passed over with a warning.

    Raises:
        ValueError: the list cannot be read, is malformed, fits two files alike, or names every sample; ``where`` leads the message.
    """
    if not source.skip_list:
        return np.empty(0, dtype=np.int64)
    where = f"{where}.skip_list: {source.skip_list}"
    files = _FileTable(shards)
    found: list[int] = []
    stale: list[str] = []
    others: set[str] = set()
    for name, file, num_bytes, sample in _entries(source.skip_list, where):
        if name != source.name:
            others.add(name)
            continue
        span = files.find(file, num_bytes, where)
        if span is None or sample >= span.count:
            stale.append(file)
        else:
            found.append(span.start + sample)
    _warn(source, where, len(found), stale, others)
    listed = np.unique(np.asarray(found, dtype=np.int64))
    if len(listed) == files.num_samples:
        raise ValueError(
            f"{where} names all {len(listed)} samples of the source; repair its files, or remove the source"
        )
    return listed


def is_listed(listed: np.ndarray, number: int) -> bool:
    """Whether the ascending numbers ``listed`` have ``number``."""
    place = int(np.searchsorted(listed, number))
    return place < len(listed) and int(listed[place]) == number


def first_numbers(shards: Sequence[Stored]) -> np.ndarray:
    """(shards,) int64: number of each shard's first sample among those of all ``shards``."""
    sizes = np.asarray([shard.num_samples for shard in shards], dtype=np.int64)
    return np.cumsum(sizes) - sizes


def check_damage(shards: Sequence[Stored], listed: np.ndarray, where: str) -> None:
    """Refuse a damaged file whose damage is not ``listed``: without a list, indexing refuses it.

    Raises:
        ValueError: names the file.
    """
    for start, shard in zip(first_numbers(shards).tolist(), shards, strict=True):
        if isinstance(shard, DamagedRest) and not is_listed(listed, start):
            raise ValueError(
                f"{where}: {shard.path}: {shard.damage}; or list it: symbiotic check-data CONFIG"
            )


class _FileTable:
    """The files of a source by name and length."""

    def __init__(self, shards: Sequence[Stored]) -> None:
        spans: dict[tuple[str, int], FileSpan] = {}
        self.num_samples = 0
        for shard in shards:
            # Several shards may lie in one file, one after the other.
            at = spans.get((shard.path, shard.num_bytes))
            at = at or FileSpan(shard.path, self.num_samples, 0)
            spans[shard.path, shard.num_bytes] = FileSpan(
                at.path, at.start, at.count + shard.num_samples
            )
            self.num_samples += shard.num_samples
        self._by_name: dict[tuple[str, int], list[FileSpan]] = defaultdict(list)
        for (path, num_bytes), span in spans.items():
            self._by_name[PurePosixPath(path).name, num_bytes].append(span)
        self._known: dict[tuple[str, int], FileSpan | None] = {}

    def find(self, path: str, num_bytes: int, where: str) -> FileSpan | None:
        """The file that an entry means. Where several have its name and length, the one whose folders agree with it the furthest."""
        if (path, num_bytes) not in self._known:
            self._known[path, num_bytes] = self._find(path, num_bytes, where)
        return self._known[path, num_bytes]

    def _find(self, path: str, num_bytes: int, where: str) -> FileSpan | None:
        spans = self._by_name.get((PurePosixPath(path).name, num_bytes), [])
        ranked = sorted(spans, key=lambda span: -_common_end(span.path, path))
        if len(ranked) > 1:
            first, second = (_common_end(span.path, path) for span in ranked[:2])
            if first == second:
                raise ValueError(
                    f"{where} names {path} of {num_bytes} bytes, which may be {ranked[0].path} or {ranked[1].path}; {REMEDY}"
                )
        return ranked[0] if ranked else None


def _common_end(path: str, other: str) -> int:
    """How many parts at their ends two paths share."""
    pairs = zip(
        reversed(PurePosixPath(path).parts), reversed(PurePosixPath(other).parts), strict=False
    )
    count = 0
    for left, right in pairs:
        if left != right:
            break
        count += 1
    return count


def _entries(path: str, where: str) -> Iterator[tuple[str, str, int, int]]:
    """(source, file, num_bytes, sample) of every line."""
    try:
        with fsspec.open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _entry(line, f"{where} line {number}")
    except (OSError, ImportError) as error:
        raise ValueError(f"{where} cannot be read ({error}); {REMEDY}") from error


def _entry(line: bytes, where: str) -> tuple[str, str, int, int]:
    try:
        values: Any = json.loads(line)
        name, file = values["source"], values["file"]
        num_bytes, sample = values["num_bytes"], values["sample"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{where}: must be an object with source, file, num_bytes and sample ({error!r:.80}); {REMEDY}"
        ) from error
    numbers = (num_bytes, sample)
    if not (isinstance(name, str) and isinstance(file, str)) or not all(
        type(n) is int and n >= 0 for n in numbers
    ):
        raise ValueError(
            f"{where}: source and file must be texts, num_bytes and sample numbers from 0; {REMEDY}"
        )
    return name, file, num_bytes, sample


def _warn(
    source: DataSource, where: str, num_found: int, stale: list[str], others: set[str]
) -> None:
    logger = logging.getLogger(__name__)
    if stale:
        logger.warning(
            f"{where}: {len(stale)} of its entries name files that are not there or have changed, first {stale[0]}; they have no "
            "effect; check the data again with symbiotic check-data"
        )
    elif not num_found:
        elsewhere = f" but of {', '.join(sorted(others))}" if others else ""
        logger.warning(f"{where} names no sample of the source {source.name!r}{elsewhere}")
    else:
        logger.info(f"{where} names {num_found} samples of the source {source.name!r}")
