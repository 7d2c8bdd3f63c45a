"""JSON Lines: one JSON object per line. A sample is a non-blank line, parsed when it is read."""

from array import array
from dataclasses import dataclass

import fsspec
import numpy as np

from symbiotic_titan.data.formats.byte_ranges import ByteRangeShard
from symbiotic_titan.data.formats.shard import ChooseColumns, File, FileFormat, Indexed


@dataclass(frozen=True)
class Lines(ByteRangeShard):
    """The lines of a file with N samples: 16 bytes per sample.

    lines:  (N, 2) int64: offset and length of each non-blank line.
    blanks: (blank lines,) int64: number of samples before each blank line.
    """

    lines: np.ndarray
    blanks: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.lines)

    def key(self, sample: int) -> str:
        """The line's number in the file, from 1, as editors count."""
        blanks_before = int(np.searchsorted(self.blanks, sample, side="right"))
        return f"line {sample + 1 + blanks_before}"

    def byte_ranges(self, sample: int) -> dict[str, tuple[int, int]]:
        offset, length = self.lines[sample].tolist()
        return {"json": (offset, length)}


class JsonLines(FileFormat):
    """One shard per file."""

    cached_shard = Lines

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        lines, blanks, offset = array("q"), array("q"), 0
        with fsspec.open(file.data, "rb") as opened:
            for line in opened:
                if line.strip():
                    lines.extend((offset, len(line)))
                else:
                    blanks.append(len(lines) // 2)
                offset += len(line)
        if not lines:
            return Indexed([])
        ranges = np.frombuffer(lines, dtype=np.int64).reshape(-1, 2)
        return Indexed([Lines(file, ranges, np.frombuffer(blanks, dtype=np.int64))])
