"""A data format: CSV files with a header, small enough for memory. A sample is a row."""

import csv
from dataclasses import dataclass
from typing import ClassVar

import fsspec

from symbiotic_titan.data.formats.shard import ChooseColumns, File, FileFormat, FilePart, Indexed
from symbiotic_titan.extend import register_format


@dataclass(frozen=True)
class Table(FilePart):
    """The rows of one file: what the order of samples needs to know. Worker processes get a copy."""

    num_samples: int
    names: tuple[str, ...]
    max_open: ClassVar[int] = 2

    def key(self, sample: int) -> str:
        return f"row {sample + 1}"

    def open(self) -> "OpenTable":
        return OpenTable(self)


class OpenTable:
    """The same file in the process that reads it."""

    def __init__(self, table: Table) -> None:
        self._rows = read_rows(table.file)

    def read(self, sample: int) -> dict[str, str]:
        return self._rows[sample]

    def close(self) -> None:
        self._rows = []


def read_rows(file: File) -> list[dict[str, str]]:
    with fsspec.open(file.data, "rt", encoding="utf-8", errors="replace", newline="") as opened:
        return list(csv.DictReader(opened))


@register_format("csv")
class Csv(FileFormat):
    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        rows = read_rows(file)
        return Indexed([Table(file, len(rows), tuple(rows[0]))] if rows else [])
