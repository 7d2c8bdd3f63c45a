"""SHA-256 digests of a checkpoint's files, computed while these are written and kept beside them in ``SHA256SUMS``.

The lengths in ``.metadata`` show a save that was cut off or a file that was lost. Bytes that changed in place (a bad disk or cable, a copy
that went wrong) only a digest shows. ``sha256sum -c SHA256SUMS`` checks a folder without this package.

SHA-256 and not a faster checksum, because of that program and because every Python has it. Hashing runs in a thread beside the write, or
the read, of the same bytes. On two busy EPYC cores with SHA instructions crc32 was 2.5 times as fast, and blake2b half as fast
(``benchmarks/``). A digest shows accidents. It does not make a stranger's
checkpoint trustworthy: who changes the files can change their digests too.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

SUMS = "SHA256SUMS"
METADATA = ".metadata"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0]+)")
# Smaller chunks are hashed at once: a thread is not worth its switch.
_WORTH_A_THREAD = 1 << 16
_BLOCK = 8 << 20


# ---- writing --------------------------------------------------------------------------------------------------------------


class HashedFile(io.RawIOBase):
    """Hashes what is written to ``file``, each chunk in a thread while it is written. ``digest``: of everything so far."""

    def __init__(self, file: BinaryIO | io.FileIO) -> None:
        super().__init__()
        self._file, self._hash, self._threads = file, hashlib.sha256(), ThreadPoolExecutor(1)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """All of ``data``, which may be reused afterwards. What makes it fail is kept as ``failure``: torch.save reports another error."""
        try:
            return self._write(memoryview(data).cast("B"))
        except OSError as error:
            self.failure = error
            raise

    def _write(self, chunk: memoryview) -> int:
        if len(chunk) < _WORTH_A_THREAD:
            self._hash.update(chunk)
            _write_all(self._file, chunk)
            return len(chunk)
        hashing = self._threads.submit(self._hash.update, chunk)
        try:
            _write_all(self._file, chunk)
        finally:
            hashing.result()
        return len(chunk)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._threads.shutdown()
        super().close()


def _write_all(file: BinaryIO | io.FileIO, chunk: memoryview) -> None:
    """One call of an unbuffered file's ``write`` may write only part, on Linux at most 2 GiB."""
    done = 0
    while done < len(chunk):
        done += file.write(chunk[done:]) or 0


@dataclass(frozen=True)
class _Digest:
    """Travels to the first rank among the places of tensors."""

    name: str
    value: str


class _HashingFileSystem(FileSystem):
    """``written``: digest of each file of this rank. ``others``: of all ranks, once they are known."""

    def __init__(self) -> None:
        self.written: dict[str, str] = {}
        self.others: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file, HashedFile(cast(BinaryIO, file)) as hashed:
            try:
                yield hashed
            except RuntimeError:
                if hashed.failure is not None:
                    raise hashed.failure from None
                raise
            self.written[Path(path).name] = hashed.digest

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """The last act of a save gives ``.metadata`` its name, which makes the checkpoint complete: the digests come before it."""
        sums = {**self.others, Path(new_path).name: self.written[Path(path).name]}
        write_sums(Path(new_path).parent, sums)
        super().rename(path, new_path)


class DigestingWriter(FileSystemWriter):
    """Writes ``SHA256SUMS`` with a distributed checkpoint. Each rank hashes its own files; the first one gets the digests with the places
    of the tensors and writes them before ``.metadata``, without which no checkpoint is complete."""

    def __init__(self, path: Path | str, **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = self._files = _HashingFileSystem()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        for name, value in self._files.written.items():
            results.append(WriteResult(MetadataIndex(name), 0, cast(Any, _Digest(name, value))))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places: list[list[WriteResult]] = []
        for of_rank in results:
            data = [result.storage_data for result in of_rank]
            self._files.others |= {d.name: d.value for d in data if isinstance(d, _Digest)}
            places.append([r for r in of_rank if not isinstance(r.storage_data, _Digest)])
        super().finish(metadata, places)


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` in the form of the program sha256sum. It is there as a whole or not at all."""
    unfinished = folder / f"{SUMS}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(f"{value}  {name}\n" for name, value in sorted(digests.items()))
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / SUMS)


# ---- checking -------------------------------------------------------------------------------------------------------------


def read_sums(folder: Path) -> dict[str, str] | None:
    """File name -> digest, of a checkpoint; None where it was written without.

    Raises:
        ValueError: ``SHA256SUMS`` is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = [""]
    found = [_LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    if not found or None in found:
        raise ValueError(f"its {SUMS} is damaged: a line is no digest and file name")
    return {match[2]: match[1] for match in found if match is not None}


def sha256_of(path: Path) -> str:
    """Digest of a file, hashed in a thread while its next block is read."""
    digest, running = hashlib.sha256(), None
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        for block in cycle((bytearray(_BLOCK), bytearray(_BLOCK))):
            count = file.readinto(block)
            if running is not None:
                running.result()
            if not count:
                return digest.hexdigest()
            running = hashing.submit(digest.update, memoryview(block)[:count])
    raise AssertionError  # the loop has no other end


def wrong_files(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> Iterator[str]:
    """What is wrong with those of the files ``names`` that have not their digest in ``sums``. Files are read several at a time where the
    process has cores for it."""

    def check(name: str) -> str | None:
        path = folder / name
        if name not in sums:
            return f"its {SUMS} has no digest of {name}"
        if not path.is_file():
            return f"its file {name} is missing"
        if sha256_of(path) != sums[name]:
            return f"the bytes of its file {name} are damaged (another SHA-256 than in {SUMS})"
        return None

    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(cores // 2, 8))) as threads:
        yield from filter(None, threads.map(check, names))


def wrong_file(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The first of ``wrong_files``; None if there is none."""
    return next(wrong_files(folder, sums, names), None)


def in_order(names: Iterable[str]) -> list[str]:
    """By the numbers in the names, as ranks are counted: ``__2_0.distcp`` before ``__10_0.distcp``."""
    return sorted(names, key=lambda name: ([int(n) for n in re.findall(r"\d+", name)], name))
