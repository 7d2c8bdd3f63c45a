"""Shards with random access: an index of the byte ranges that hold each sample in the uncompressed file."""

from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
import numpy as np

from symbiotic_titan.data.formats.shard import BadSample, FilePart, check_record


def compact(numbers: np.ndarray) -> np.ndarray:
    """Numbers of at least 0 as uint32 where they fit, else as int64."""
    fit = numbers.max(initial=0) < 2**32
    return numbers.astype(np.uint32 if fit else np.int64)


@dataclass(frozen=True)
class ByteRangeShard(FilePart):
    """A shard that ``OpenByteRanges`` reads. Formats derive from it and add the arrays of their index.

    Arrays, not objects: an index of millions of samples stays small, is quickly sent to worker processes, and can be cached in a file.
    """

    max_open: ClassVar[int] = 8
    names: ClassVar[tuple[str, ...]] = ()

    def byte_ranges(self, sample: int) -> dict[str, tuple[int, int]]:
        """Name -> (offset, length) of each part of a sample."""
        raise NotImplementedError

    def open(self) -> "OpenByteRanges":
        return OpenByteRanges(self)


class OpenByteRanges:
    """Reads samples from one open file. Raises OSError if it cannot be opened."""

    def __init__(self, shard: ByteRangeShard) -> None:
        self._shard = shard
        self._file = fsspec.open(shard.file.data, "rb").open()
        self._num_bytes = self._file.seek(0, 2)

    def read(self, sample: int) -> dict[str, Any]:
        ranges = self._shard.byte_ranges(sample)
        # A header may claim more bytes than a truncated file has, and a read past the end is no error: it returns fewer.
        for name, (offset, length) in ranges.items():
            if offset + length > self._num_bytes:
                raise BadSample("unreadable", f"the file ends inside its .{name}")
        check_record(sum(length for _, length in ranges.values()), self._shard.file.limits)
        return {name: self._read(*byte_range) for name, byte_range in ranges.items()}

    def _read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    def close(self) -> None:
        self._file.close()
