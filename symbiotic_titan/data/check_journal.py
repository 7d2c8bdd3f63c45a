"""The journal of a check: a line for each span of samples that was checked.

Its lines are keyed by all that decides the result, the version of the file included, so that a check that was interrupted, or whose
files or settings changed, checks what is missing and no more.
"""

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from symbiotic_titan.data.formats.shard import one_line

# Longest message of a bad sample; a decoder may quote the whole sample.
MAX_MESSAGE = 300


@dataclass
class Record:
    """What was found in a span of a file, whose samples are numbered through its shards.

    good and bad samples are counted apart from those that ``too_long = "skip"`` passes over.
    bad: (sample, key, reason, message) of each bad sample.
    """

    key: str
    file: str
    version: str
    start: int
    stop: int
    checked: int = 0
    good: int = 0
    passed_over: int = 0
    truncated: int = 0
    tokens: int = 0
    max_tokens: int = 0
    bad: list[tuple[int, str, str, str]] = field(default_factory=list)

    def add_bad(self, sample: int, key: str, reason: str, message: str) -> None:
        self.bad.append((sample, key[:MAX_MESSAGE], reason, one_line(message, MAX_MESSAGE)))


class Journal:
    """Records of checked spans in a file that only grows; a line that a killed process left unfinished is passed over."""

    def __init__(self, path: Path) -> None:
        """Raises OSError: the file cannot be read or written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._spans: dict[tuple[str, str, str], dict[int, Record]] = defaultdict(dict)
        text = path.read_bytes() if path.exists() else b""
        for line in text.splitlines():
            record = _parsed(line)
            if record is not None:
                self._keep(record)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if text and not text.endswith(b"\n"):
            os.write(self._file, b"\n")

    def add(self, record: Record) -> None:
        # One write of a whole line: a check beside this one may append to the same file.
        line = json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":")) + "\n"
        os.write(self._file, line.encode("utf-8", "replace"))
        self._keep(record)

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def records(self, key: str, file: str, version: str) -> list[Record]:
        """What is known of ``file``, by sample; no two records overlap."""
        found = self._spans.get((key, file, version), {})
        records: list[Record] = []
        for start in sorted(found):
            if not records or start >= records[-1].stop:
                records.append(found[start])
        return records

    def _keep(self, record: Record) -> None:
        self._spans[record.key, record.file, record.version].setdefault(record.start, record)


def _parsed(line: bytes) -> Record | None:
    try:
        values = json.loads(line)
        record = Record(**values)
        record.bad = [
            (int(n), str(key), str(reason), str(text)) for n, key, reason, text in record.bad
        ]
    except (ValueError, TypeError):
        return None
    return record if record.checked == record.good + record.passed_over + len(record.bad) else None
