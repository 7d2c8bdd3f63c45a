"""Parquet: each row group is a shard, because a row group is the smallest unit that can be decoded.

The sample order finishes one shard before the next, so each row group is decoded once per stream and epoch. With an
order over the whole file, every sample could cost the decoding of a whole row group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from symbiotic_titan.data.formats.shard import (
    BadSample,
    ChooseColumns,
    File,
    FileFormat,
    FilePart,
    Indexed,
)

# Arrow's errors derive from OSError or ValueError, except those for unsupported features.
PARQUET_ERRORS = (OSError, ValueError, pa.ArrowException)


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
        try:
            with fsspec.open(shard.file.data, "rb") as opened:
                # No threads: Arrow's thread pool does not survive a fork, and this may run in a forked worker.
                table = pq.ParquetFile(
                    opened, pre_buffer=False, page_checksum_verification=True
                ).read_row_group(shard.number, columns=list(shard.columns), use_threads=False)
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
        try:
            values = [column[sample].as_py() for column in self._columns]
        except UnicodeDecodeError as error:
            raise BadSample("encoding", f"its text is not UTF-8 ({error})") from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        self._columns = []


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
