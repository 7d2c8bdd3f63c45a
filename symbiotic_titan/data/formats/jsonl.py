"""JSON: one object per line, or one array of objects. A sample is a line or an element, parsed when it is read.

Both formats look at the beginning of the file, since files of either kind are named ``.json`` on the hubs.
"""

import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import IO

import fsspec
import numpy as np

from symbiotic_titan.data.formats.byte_ranges import ByteRangeShard, compact
from symbiotic_titan.data.formats.json_array import BLOCK, BOM, SPACES, check_rows, elements
from symbiotic_titan.data.formats.shard import ChooseColumns, File, FileFormat, Indexed

# Bytes at the beginning of a file that show what it holds.
HEAD = 2**16
OBJECT = (
    "holds one JSON object, not rows; write the array that is in it to a file of its own, e.g. with: "
    'jq -c ".KEY[]" FILE > rows.jsonl, and set format = "jsonl"'
)


@dataclass(frozen=True)
class TextRows(ByteRangeShard):
    """The N samples of a file: 8 bytes per sample, 16 where the file has 4 GiB or more.

    unit:    ``line`` or ``row``.
    offsets: (N,) uint32 or int64.
    lengths: (N,) uint32 or int64.
    blanks:  (blank lines,) uint32 or int64: number of samples before each blank line.
    """

    unit: str
    offsets: np.ndarray
    lengths: np.ndarray
    blanks: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.offsets)

    def key(self, sample: int) -> str:
        """A line's number in the file, from 1, as editors count; an element's number from 0, as that of a Parquet row."""
        if self.unit == "row":
            return f"row {sample}"
        blanks_before = bisect_right(self.blanks, sample)
        return f"line {sample + 1 + blanks_before}"

    def byte_ranges(self, sample: int) -> dict[str, tuple[int, int]]:
        return {"json": (int(self.offsets[sample]), int(self.lengths[sample]))}


class JsonLines(FileFormat):
    """One shard per file."""

    cached_shard = TextRows
    suffixes = (".jsonl", ".ndjson")
    is_text = True
    may_be_empty = True

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        with fsspec.open(file.data, "rb") as opened:
            text, begin = _head(opened)
            if re.match(rb"\[\s*\{", text):
                note = 'is read as one JSON array, as with format = "json"'
                return _rows(file, opened, begin + 1, note)
            if re.match(rb'\{\s*\n\s*"', text):
                return Indexed([], OBJECT)
            return _lines(file, opened)


class Json(FileFormat):
    """One shard per file, of the elements of its array."""

    cached_shard = TextRows
    suffixes = (".json",)
    is_text = True

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        with fsspec.open(file.data, "rb") as opened:
            text, begin = _head(opened)
            if text.startswith(b"["):
                return _rows(file, opened, begin + 1)
            if _is_lines(opened):
                return _lines(file, opened, 'is read as JSON lines, as with format = "jsonl"')
            if text.startswith(b"{"):
                return Indexed([], OBJECT)
            found = f"begins with {text[:20]!r}" if text else "is blank"
            return Indexed([], f"{found}, not with a JSON array; write it again, or correct format")


def _head(opened: IO[bytes]) -> tuple[bytes, int]:
    """The beginning of the text, and the byte at which it begins."""
    head = opened.read(HEAD)
    text = head.removeprefix(BOM).lstrip()
    return text, len(head) - len(text)


def _is_lines(opened: IO[bytes]) -> bool:
    """Whether the first line is an object and the next one begins another."""
    opened.seek(0)
    first = opened.readline()
    following = opened.read(HEAD).lstrip()
    try:
        return following.startswith(b"{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _rows(file: File, opened: IO[bytes], begin: int, note: str = "") -> Indexed:
    try:
        ranges, damage = elements(opened, begin)
    except ValueError as error:
        return Indexed([], str(error))
    return _indexed(file, "row", ranges, np.empty(0, dtype=np.int64), damage, note)


def _lines(file: File, opened: IO[bytes], note: str = "") -> Indexed:
    opened.seek(0)
    try:
        ranges, blanks = lines(opened)
    except ValueError as error:
        return Indexed([], str(error))
    return _indexed(file, "line", ranges, blanks, "", note)


def _indexed(
    file: File, unit: str, ranges: np.ndarray, blanks: np.ndarray, damage: str, note: str
) -> Indexed:
    offsets, lengths = ranges.T
    rows = TextRows(file, unit, compact(offsets), compact(lengths), compact(blanks))
    return Indexed([rows] if len(ranges) else [], damage, note=note)


def lines(opened: IO[bytes], block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) int64: offset and length of each line that is not blank; and the number of such lines before each blank one. Raises
    ValueError where the lines are too short."""
    found, blanks, count = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.int64)], 0
    num_lines = 0
    start, place, has_text = 0, 0, False  # of the line that the last block began
    while content := opened.read(block):
        data = np.frombuffer(content, dtype=np.uint8)
        ends = np.flatnonzero(data == 10) + 1
        if len(ends):
            full = _have_text(data, ends)
            full[0] |= has_text
            offsets = np.concatenate([[start], place + ends[:-1]])
            found.append(np.stack([offsets, place + ends - offsets], axis=1)[full])
            blanks.append((count + np.cumsum(full))[~full])
            count += int(full.sum())
            num_lines += len(ends)
            check_rows(num_lines, place + int(ends[-1]))
            start, has_text = place + int(ends[-1]), False
        has_text |= bool(content[ends[-1] if len(ends) else 0 :].strip())
        place += len(content)
    if has_text:
        found.append(np.array([[start, place - start]]))
    return np.concatenate(found), np.concatenate(blanks)


def _have_text(data: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether each of the lines that end there has a byte that is no white space."""
    starts = np.concatenate([[0], ends[:-1]])
    full = ~SPACES[data[starts]]
    if not full.all():
        full = np.logical_or.reduceat(~SPACES[data[: ends[-1]]], starts)
    return full
