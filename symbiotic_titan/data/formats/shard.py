"""What every format gives: shards, which say how many samples they have, and open shards, which read them."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


class OpenShard(Protocol):
    """A shard in the process that reads it."""

    def read(self, sample: int) -> dict[str, Any]:
        """``Sample.members`` of one sample; raises BadSample."""

    def close(self) -> None: ...


class Shard(Protocol):
    """Samples that are read near each other: a file, or a part of one. Plain data, it travels to worker processes.

    path:      what the user calls the file.
    num_bytes: length of the file at ``path``.
    max_open:  how many shards of this kind a reader keeps open.
    names:     names that its samples have, where that is known without reading them.
    """

    max_open: ClassVar[int]

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def path(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_samples(self) -> int: ...

    def key(self, sample: int) -> str:
        """Name of a sample within the file, for messages."""

    def open(self) -> OpenShard:
        """Raises OSError."""


@dataclass(frozen=True)
class File:
    """A file of shards.

    path: what the user calls it.
    data: where its plain bytes are; another place than ``path`` where that is compressed.
    """

    path: str
    data: str
    num_bytes: int


@dataclass(frozen=True)
class FilePart:
    """What shards share that are a file or a part of one."""

    file: File

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes


@dataclass(frozen=True)
class Indexed:
    """The shards of a file, and what is wrong with the rest of it, if anything is."""

    shards: list[Shard]
    damage: str = ""


@dataclass(frozen=True)
class DamagedRest:
    """What cannot be read of a file. It counts as one bad sample, so that skipping it is counted like any other skip."""

    path: str
    num_bytes: int
    damage: str
    num_samples: ClassVar[int] = 1
    max_open: ClassVar[int] = 8
    names: ClassVar[tuple[str, ...]] = ()

    def key(self, sample: int) -> str:
        return "(damaged part)"

    def open(self) -> OpenShard:
        return self

    def read(self, sample: int) -> dict[str, Any]:
        raise BadSample("unreadable", self.damage)

    def close(self) -> None:
        pass


# Why a sample is bad; skipped ones are counted under these.
REASONS = (
    "unreadable",
    "json",
    "encoding",
    "missing",
    "wrong_type",
    "empty",
    "image",
    "image_size",
    "conversation",
    "too_long",
)


class BadSample(Exception):
    """A sample that cannot be used; ``reason`` is one of REASONS. What happens then is the policy of the caller."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS
        super().__init__(message)
        self.reason = reason
        self.place = ""

    def __str__(self) -> str:
        return f"{self.place}{self.args[0]}"

    def at(self, shard: str, key: str) -> "BadSample":
        """The same, naming where the sample is."""
        self.place = f"{shard}: sample {key!r}: "
        return self


@dataclass(frozen=True)
class Sample:
    """Values of one sample, as its format stores them, and where they came from.

    members: bytes of the members of a tar file, by extension; the bytes of a JSON line, as ``json``; or values of Parquet columns.
    """

    shard: str
    key: str
    members: dict[str, Any]
