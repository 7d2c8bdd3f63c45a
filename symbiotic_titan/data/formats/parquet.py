"""Parquet: each row group is a shard, because a row group is the smallest unit that can be decoded.

The sample order finishes one shard before the next, so each row group is decoded once per stream and epoch. With an
order over the whole file, every sample could cost the decoding of a whole row group.

A few kilobytes can be gigabytes once they are decoded: pages of zeros, or many rows that are one and the same long entry of a
dictionary. The first is told by the footer. Where the entries might make more than ``data.max_row_group_bytes``, they stay in the
dictionary, and each sample is measured before it is taken out.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from symbiotic_titan.data.formats.shard import (
    BadSample,
    ChooseColumns,
    File,
    FileFormat,
    FilePart,
    Indexed,
    check_record,
    check_values,
)

# Arrow's errors derive from OSError or ValueError, except those for unsupported features.
PARQUET_ERRORS = (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException)
DICTIONARY_HEADER = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,9}[\0-\x7f])")
# Bytes of a decoded value at least; for other types the schema says how many.
WIDTHS = {
    "BOOLEAN": 1,
    "INT32": 4,
    "INT64": 8,
    "INT96": 8,
    "FLOAT": 4,
    "DOUBLE": 8,
    "BYTE_ARRAY": 4,
}
# Rows of a group. Arrow writes no more, and their order is made at once.
MAX_ROWS = 2**26


@dataclass(frozen=True)
class RowGroup(FilePart):
    """Row group ``number`` of a file, which begins at the file's row ``first_row``; only ``columns`` are read."""

    number: int
    first_row: int
    num_samples: int
    columns: tuple[str, ...]
    names: tuple[str, ...]
    # Decoded row groups are large. Two suffice: the one that most streams read, and the next for those that are ahead.
    max_open: ClassVar[int] = 2

    def key(self, sample: int) -> str:
        return f"row {self.first_row + sample}"

    def open(self) -> "OpenRowGroup":
        return OpenRowGroup(self)


class OpenRowGroup:
    """A decoded row group."""

    def __init__(self, shard: RowGroup) -> None:
        self._names = shard.columns
        self._limits = shard.file.limits
        try:
            with fsspec.open(shard.file.data, "rb") as opened:
                table = _decoded(opened, shard)
        except PARQUET_ERRORS as error:
            raise OSError(
                f"row group {shard.number} cannot be decoded ({_one_line(error)})"
            ) from error
        if table.num_rows != shard.num_samples:
            raise OSError(
                f"row group {shard.number} has {table.num_rows} rows, {shard.num_samples} were indexed"
            )
        self._columns = [table.column(name) for name in shard.columns]

    def read(self, sample: int) -> dict[str, Any]:
        cells = [column.slice(sample, 1) for column in self._columns]
        sizes = [_size(chunk) for cell in cells for chunk in cell.chunks]
        check_record(sum(num_bytes for _, num_bytes in sizes), self._limits)
        check_values(sum(count for count, _ in sizes))
        return {n: _value(n, cell) for n, cell in zip(self._names, cells, strict=True)}

    def close(self) -> None:
        self._columns = []


def _decoded(opened: Any, shard: RowGroup) -> pa.Table:
    """The columns of ``shard``; as dictionaries and indices where the entries written out might take too much. Raises one of
    PARQUET_ERRORS."""
    limits, columns = shard.file.limits, list(shard.columns)
    limit = limits.max_row_group_bytes if limits else sys.maxsize
    metadata = pq.read_metadata(opened)
    group, schema = metadata.row_group(shard.number), metadata.schema
    num_bytes = 0
    dictionaries = []
    for number in range(group.num_columns):
        chunk, path = group.column(number), schema.column(number).path
        if not any(path == name or path.startswith(f"{name}.") for name in columns):
            continue
        width = WIDTHS.get(chunk.physical_type, schema.column(number).length)
        num_bytes += max(chunk.total_uncompressed_size, width * chunk.num_values)
        if chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY":
            longest = _dictionary_bytes(opened, chunk)
            _check_row_group(longest, limit)
            if longest * chunk.num_values > limit:
                dictionaries.append(path)
    _check_row_group(num_bytes, limit)
    # No threads: Arrow's thread pool does not survive a fork, and this may run in a forked worker.
    table = pq.ParquetFile(
        opened,
        metadata=metadata,
        read_dictionary=dictionaries,
        pre_buffer=False,
        page_checksum_verification=True,
    ).read_row_group(shard.number, columns=columns, use_threads=False)
    _check_row_group(table.nbytes, limit)
    return table


def _check_row_group(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ValueError(
            f"{num_bytes} bytes, data.max_row_group_bytes = {limit}; write smaller ones"
        )


def _dictionary_bytes(opened: Any, chunk: Any) -> int:
    """Unpacked bytes of a dictionary, from the header of its page: in Thrift's compact protocol, the page's type and its size come first,
    each one byte and a number in groups of seven bits."""
    opened.seek(chunk.dictionary_page_offset)
    header = DICTIONARY_HEADER.match(opened.read(16))
    if header is None:
        return chunk.total_uncompressed_size
    number = sum((byte & 127) << 7 * place for place, byte in enumerate(header[1]))
    return number >> 1  # zigzag


def _size(values: pa.Array) -> tuple[int, int]:
    """How many values, those in lists and tables included; and their bytes, each entry of a dictionary as often as it comes."""
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _size(values.storage)
    if pa.types.is_dictionary(kind) and not pa.types.is_primitive(kind.value_type):
        lengths = pc.binary_length(values.dictionary).take(values.indices)
        return len(values), pc.sum(lengths).as_py() or 0
    if not pa.types.is_nested(kind) or pa.types.is_union(kind):
        return len(values), values.nbytes
    if pa.types.is_map(kind):
        first, last = values.offsets[0].as_py(), values.offsets[-1].as_py()
        inner = [values.keys[first:last], values.items[first:last]]
    else:
        inner = values.flatten()
    sizes = [_size(part) for part in (inner if isinstance(inner, list) else [inner])]
    return len(values) + sum(n for n, _ in sizes), sum(num_bytes for _, num_bytes in sizes)


def _value(name: str, one: pa.ChunkedArray) -> Any:
    """The only value of ``one``, of column ``name``; raises BadSample."""
    try:
        return one[0].as_py()
    except UnicodeDecodeError as error:
        raise BadSample("encoding", f"its text is not UTF-8 ({error})") from error
    except Exception as error:  # noqa: BLE001  each type of Arrow raises what its conversion does
        raise BadSample(
            "wrong_type", f"its {name} ({one.type}) cannot be converted ({_one_line(error)})"
        ) from error


class Parquet(FileFormat):
    """One shard per row group. The footer of a Parquet file is an index already, so none is cached."""

    suffixes = (".parquet",)

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        try:
            with fsspec.open(file.data, "rb") as opened:
                parquet = pq.ParquetFile(opened, pre_buffer=False)
                schema, metadata = parquet.schema_arrow, parquet.metadata
                sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
                if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
                    raise ValueError(f"{metadata.num_rows} rows, {sizes} in its row groups")
                if max(sizes, default=0) > MAX_ROWS:
                    raise ValueError(f"a row group of {max(sizes)} rows, {MAX_ROWS} are read")
        except PARQUET_ERRORS as error:
            damage = f"cannot be read as a Parquet file ({_one_line(error)}); write it again, or correct format"
            return Indexed([], damage)
        chosen, names = tuple(choose_columns(schema.names)), tuple(_names(schema))
        if twice := [name for name in chosen if schema.names.count(name) > 1]:
            return Indexed([], f"has several columns {twice[0]!r}; rename all but one of them")
        starts = accumulate(sizes, initial=0)
        groups = [
            RowGroup(file, number, start, size, chosen, names)
            for number, (start, size) in enumerate(zip(starts, sizes, strict=False))
            if size
        ]
        return Indexed(list(groups))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _names(schema: pa.Schema) -> Iterator[str]:
    """Columns, and the fields of struct columns as ``column.field``."""
    for column in schema:
        yield column.name
        if pa.types.is_struct(column.type):
            yield from (f"{column.name}.{inner.name}" for inner in column.type)
