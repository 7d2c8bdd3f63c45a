"""Interface of the formats: shards, which know their number of samples, and open shards, which read them; a reader of many shards.

FileFormat.index(file)  ->  Indexed: shards          once in every process; plain data, sent to worker processes
Shard.open()            ->  OpenShard                in the process that reads
OpenShard.read(sample)  ->  the values of a sample
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

# Column names of a file -> those that the source's task needs.
ChooseColumns = Callable[[list[str]], list[str]]


class OpenShard(Protocol):
    """A shard in the process that reads it; it may hold open files."""

    def read(self, sample: int) -> dict[str, Any]:
        """``Sample.members`` of one sample; raises BadSample."""

    def close(self) -> None: ...


class Stored(Protocol):
    """What is known of a shard without reading it.

    path:      the file as the user named it.
    num_bytes: length of the file at ``path``.
    """

    @property
    def path(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_samples(self) -> int: ...


class Shard(Stored, Protocol):
    """Samples stored together: a file or a part of one. Plain data: worker processes get a copy.

    max_open:  how many shards of this kind a reader keeps open.
    names:     field names of its samples, if the index knows them; else empty.

    The sample order of a run follows from ``num_samples`` of all shards, so indexing must be deterministic.
    """

    @property
    def max_open(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def key(self, sample: int) -> str:
        """Name of a sample within the file, for messages."""

    def open(self) -> OpenShard:
        """Raises OSError."""


class Limits(Protocol):
    """What formats need of ``config.files.InputLimits``."""

    max_record_bytes: int
    max_row_group_bytes: int


@dataclass(frozen=True)
class File:
    """A file of samples.

    path:      as the user named it.
    data:      path of the uncompressed bytes: ``path``, or a copy in the cache folder if that is compressed.
    num_bytes: length of the file at ``path``.
    limits:    what one of its samples may cost; None: anything.
    """

    path: str
    data: str
    num_bytes: int
    limits: Limits | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class FilePart:
    """Base of shards that are a file or a part of one."""

    file: File

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes


@dataclass(frozen=True)
class Indexed:
    """What was found in a file.

    shards:  its samples.
    damage:  what is wrong with the rest of it; "" if nothing.
    warning: what may be wrong with the samples; "" if nothing. In the log the path and a space come before it.
    note:    what was recognised in the file; likewise.
    """

    shards: list[Shard]
    damage: str = ""
    warning: str = ""
    note: str = ""


class FileFormat:
    """One format of ``data.sources.format``. Others are registered with ``extend.register_format``.

    cached_shard: a dataclass with the field ``file`` and others that are NumPy arrays or JSON values. ``index`` then returns at most
                  one shard, of this class, and the index is cached in ``data.cache_folder``. A large array stays in the cached file:
                  then numbers and slices of it are cheap, all else reads it whole. None: not cached, because indexing costs no more
                  than reading a cached index.
    suffixes:     ends of the names of its files in a folder, e.g. ``(".csv",)``; those of compressed files follow. (): a source's
                  ``path`` cannot be a folder.
    may_be_empty: a file of 0 bytes is valid and has no samples; else it is damaged, and ``index`` does not see it.
    is_text:      files are text, which has no header that ``index`` could miss; those that begin like an archive, say, are refused.
    """

    cached_shard: ClassVar[type[FilePart] | None] = None
    suffixes: ClassVar[tuple[str, ...]] = ()
    may_be_empty: ClassVar[bool] = False
    is_text: ClassVar[bool] = False

    def index(self, file: File, choose_columns: ChooseColumns) -> Indexed:
        """The shards of ``file``. The same file must give the same shards in every process.

        A damaged file gives the shards before the damage instead of an error.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class DamagedRest:
    """The unreadable rest of a file. It is one bad sample, so that it is skipped and counted like any other."""

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


# Characters of a message about a bad sample, of a value in it, and of the file and the key before it: every rank may log one for
# every sample.
LONGEST_MESSAGE, LONGEST_VALUE, LONGEST_PATH, LONGEST_KEY = 190, 80, 240, 50

# How many values a sample may have: each takes up to 100 bytes as an object of Python. They are counted in JSON of so many bytes.
MAX_VALUES, LARGE_JSON = 2**23, 2**24

# What reading a damaged file may raise: it may be too large or too deeply nested to be taken apart.
READ_ERRORS = (OSError, ValueError, OverflowError, RecursionError, MemoryError)

# Why a sample is bad; skipped samples are counted by these names.
REASONS = (
    "unreadable",
    "json",
    "encoding",
    "missing",
    "outside",  # an image that is not in the folders of its source
    "too_large",  # more bytes than a limit of [data]
    "wrong_type",
    "empty",
    "image",
    "image_size",
    "conversation",
    "too_long",
    "listed",  # in the source's skip_list
)


def brief(value: Any) -> str:
    """``value`` in a message: at most LONGEST_VALUE characters."""
    if isinstance(value, (str, bytes)):  # a repr of all of a long one would be made first
        value = value[: LONGEST_VALUE + 1]
    return one_line(repr(value), LONGEST_VALUE)


def one_line(text: str, longest: int) -> str:
    """``text`` without line breaks, and without its end where it has more characters than ``longest``."""
    text = " ".join(text[: 4 * longest].split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


class BadSample(Exception):
    """A sample that cannot be used; ``reason`` is one of REASONS. The caller decides whether to skip it or to stop.

    Its text is one line of at most 500 characters, whatever ``message`` quotes.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS
        super().__init__(one_line(message, LONGEST_MESSAGE))
        self.reason = reason
        self.place = ""

    def __str__(self) -> str:
        return f"{self.place}{self.args[0]}"

    def at(self, shard: str, key: str) -> "BadSample":
        """This error, with the sample's shard and key added to its text."""
        # The end of a long path tells more than its start.
        path = shard if len(shard) <= LONGEST_PATH else f"...{shard[3 - LONGEST_PATH :]}"
        self.place = f"{path}: sample {one_line(repr(key), LONGEST_KEY)}: "
        return self


def check_record(num_bytes: int, limits: Limits | None) -> None:
    """Refuse a sample before its ``num_bytes`` are read; raises BadSample."""
    if limits is not None and num_bytes > limits.max_record_bytes:
        limit = f"data.max_record_bytes = {limits.max_record_bytes}"
        raise BadSample("too_large", f"it has {num_bytes} bytes, more than {limit}")


def load_json(text: str | bytes) -> Any:
    """What ``text`` is JSON of.

    Raises:
        BadSample: its values would take gigabytes.
        ValueError, RecursionError: it is no JSON, or too deeply nested.
    """
    if len(text) > LARGE_JSON:
        content: Any = text
        signs = (b"[", b"{", b",") if isinstance(text, bytes) else ("[", "{", ",")
        check_values(sum(content.count(sign) for sign in signs))
    return json.loads(text)


def check_values(count: int) -> None:
    """Refuse a sample of ``count`` values before they are made; raises BadSample."""
    if count > MAX_VALUES:
        raise BadSample("too_large", f"it has more than {MAX_VALUES} values")


@dataclass(frozen=True)
class Sample:
    """Values of one sample, as its format stores them, and their source.

    members: bytes of tar members by extension; bytes of a JSON line as ``json``; values of Parquet columns by name.
    """

    shard: str
    key: str
    members: dict[str, Any]


class Reader:
    """Fetches samples of one source by shard and index. Do not share it between processes: they would share file positions."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._files: OrderedDict[int, OpenShard] = OrderedDict()

    def read(self, shard: int, sample: int) -> Sample:
        """Raises BadSample if it cannot be read."""
        at, key = self._shards[shard], f"number {sample}"
        try:
            key = at.key(sample)
            return Sample(at.path, key, self._open(shard).read(sample))
        except BadSample as error:
            raise error.at(at.path, key) from error.__cause__
        except Exception as error:  # noqa: BLE001  file systems of other packages raise what they like
            if not isinstance(error, READ_ERRORS) and "://" not in at.path:
                raise
            reason = str(error) or type(error).__name__
            raise BadSample("unreadable", f"it cannot be read ({reason})").at(
                at.path, key
            ) from error

    def _open(self, shard: int) -> OpenShard:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        # LRU eviction: the streams of a process read near each other, so a few open shards serve them all.
        if len(self._files) >= self._shards[shard].max_open:
            self._files.popitem(last=False)[1].close()
        self._files[shard] = self._shards[shard].open()
        return self._files[shard]
