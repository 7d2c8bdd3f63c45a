"""The elements of a JSON array in a file of any size: their byte ranges, found block by block without parsing.

Per block, in NumPy: a quote after an odd number of backslashes is a character; the other quotes begin and end strings; brackets and
commas outside strings are structure; a comma at depth 1 ends an element. The state between blocks is the depth, whether a string or
an escape is open, and where the element began, so blocks may end anywhere. Whether an element is valid JSON shows when it is read.
"""

from collections.abc import Iterator
from typing import IO

import numpy as np

# A file of that many rows has at least so many bytes for each: an index takes 16, and must not be much larger than its file.
MANY_ROWS, SHORTEST_ROW = 2**22, 8
# Bytes read at a time.
BLOCK = 2**22
BOM = b"\xef\xbb\xbf"
QUOTE, BACKSLASH, COMMA = b'"\\,'
# Byte -> whether it may be structure; by how much it changes the depth; whether it is white space.
SIGNS = np.isin(np.arange(256), list(b'"[]{},'))
STEPS = np.isin(np.arange(256), list(b"[{")) * 1 - np.isin(np.arange(256), list(b"]}")) * 1
SPACES = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))


def check_rows(count: int, num_bytes: int) -> None:
    """Refuse ``count`` rows or lines in ``num_bytes``; raises ValueError."""
    if count > MANY_ROWS and num_bytes < SHORTEST_ROW * count:
        raise ValueError(
            f"has {count} rows or blank lines in its first {num_bytes} bytes, which cannot be samples; write it again"
        )


class ArrayScan:
    """Iterates over the ends of the elements, block by block, from the byte after the ``[``.

    end:    offset after the last byte of the array; 0 where the file ends before it.
    begin:  where the element begins that the scan has reached.
    count:  elements whose end has been found.
    """

    def __init__(self, opened: IO[bytes], begin: int, block: int = BLOCK) -> None:
        self._opened = opened
        self._block = block
        self._depth, self._in_string, self._escaped = 1, False, False
        self.begin, self.end, self.count = begin, 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """(number of elements,) int64: offsets of the commas that end elements, and of the ``]`` that ends the last one."""
        self._opened.seek(self.begin)
        place = self.begin
        while not self.end and (content := self._opened.read(self._block)):
            places, depths, signs = self._structure(np.frombuffer(content, dtype=np.uint8))
            [closing] = np.nonzero(depths == 0)
            if len(closing):
                places, depths, signs = (x[: closing[0] + 1] for x in (places, depths, signs))
                self.end = place + int(places[-1]) + 1
            ends = place + places[(depths == 0) | ((depths == 1) & (signs == COMMA))]
            if len(ends):
                self.count += len(ends)
                self.begin = int(ends[-1]) + 1
                check_rows(self.count, self.begin)
                yield ends
            place += len(content)

    def _structure(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places of brackets and commas outside strings; the depth after each; the bytes there."""
        live = SIGNS[data]
        live[self._escaped_places(data)] = False
        [places] = np.nonzero(live)
        signs = data[places]
        quotes = signs == QUOTE
        in_string = (np.cumsum(quotes) + self._in_string) % 2 == 1
        if len(places):
            self._in_string = bool(in_string[-1])
        structure = ~quotes & ~in_string
        places, signs = places[structure], signs[structure]
        depths = self._depth + np.cumsum(STEPS[signs])
        if len(places):
            self._depth = int(depths[-1])
        return places, depths, signs

    def _escaped_places(self, data: np.ndarray) -> np.ndarray:
        """Places of the characters that a backslash escapes; keeps whether the next block begins with one."""
        [slashes] = np.nonzero(data == BACKSLASH)
        is_first = np.ones(len(slashes), dtype=bool)
        is_first[1:] = np.diff(slashes) != 1
        firsts = slashes[is_first]
        afters = slashes[np.roll(is_first, -1)] + 1
        lengths = afters - firsts
        escaped = [0] if self._escaped else []
        if self._escaped and data[0] == BACKSLASH:
            lengths[0] -= 1
        places = np.concatenate([np.array(escaped, dtype=np.int64), afters[lengths % 2 == 1]])
        self._escaped = bool(len(places)) and int(places[-1]) == len(data)
        return places[:-1] if self._escaped else places


def elements(opened: IO[bytes], begin: int, block: int = BLOCK) -> tuple[np.ndarray, str]:
    """The elements of the array whose ``[`` comes before the byte ``begin``.

    Returns:
        (N, 2) int64: offset and length of each, white space included; and what is wrong with the file after them, "" if nothing.

    Raises:
        ValueError: there are so many that they are no samples.
    """
    scan = ArrayScan(opened, begin, block)
    ends = np.concatenate([np.empty(0, dtype=np.int64), *scan])
    offsets = np.concatenate([[begin], ends[:-1] + 1])[: len(ends)]
    ranges = np.stack([offsets, ends - offsets], axis=1)
    if not scan.end:
        return ranges, (
            f"breaks off in the array's row {scan.count}, which begins at byte {scan.begin}; copy or write it again"
        )
    if _is_blank(opened, *ranges[-1].tolist()):  # an empty array, or a comma after the last element
        ranges = ranges[:-1]
    opened.seek(scan.end)
    while content := opened.read(block):
        if content.strip():
            return ranges, (
                f"goes on after byte {scan.end}, where its array ends; write the rest to a file of its own"
            )
    return ranges, ""


def _is_blank(opened: IO[bytes], offset: int, length: int) -> bool:
    opened.seek(offset)
    return not opened.read(length).strip()
