#!/usr/bin/env python3
"""What it costs to index files, and what an index costs the processes that use it.

Example: tools/bench/index.py --samples 30000 --large 10000000

us_per_sample           index of a tar file with two members a sample (3,000 and 120 bytes), on one core; ``over`` has how many times
                        longer ``tarfile`` takes, the walk that it is compared with in tests, in interleaved rounds
json_us_per_sample      index of JSON lines, and of one array, of 60 bytes a row
private_mb_per_process  growth of Private_Clean and Private_Dirty (/proc/self/smaps_rollup) of a new process that opens a cached
                        index, of a tar file and of JSON lines, and reads 5,000 samples anywhere in it; of 100,000 samples and of --large
cached_open_s_10m       seconds that a process takes to open the cached index of --large samples and to read the first of them, with
                        the check of its digest
shuffle_us_per_sample   time to say which sample comes next in one shard of --large samples; and the memory that the order takes

The tar file of --large samples is sparse: all its samples have the bytes of one. The last line is JSON.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_timing import interleave, machine, ratio, summary
from plain_tar import PlainWalk

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.formats.byte_ranges import compact
from symbiotic_titan.data.formats.index_cache import cached_index
from symbiotic_titan.data.formats.jsonl import JsonLines
from symbiotic_titan.data.formats.shard import File, FileFormat, Indexed, Reader
from symbiotic_titan.data.formats.tar_walk import TarWalk
from symbiotic_titan.data.formats.webdataset import TarSamples, WebDataset
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.readers import index_source

ROW = b'{"text": "%09d words that are read one day"}\n'
READS = 5000
WHERE = "[[data.sources]] #1 (bench)"


def file_of(path: Path) -> File:
    return File(str(path), str(path), path.stat().st_size)


def write_tar(path: Path, num_samples: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num_samples):
            for extension, size in (("jpg", 3000), ("json", 120)):
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))


def write_lines(path: Path, num_samples: int, *, as_array: bool = False) -> None:
    with path.open("wb") as out:
        for start in range(0, num_samples, 100_000):
            rows = [ROW % number for number in range(start, min(start + 100_000, num_samples))]
            text = b"".join(rows)
            if as_array:
                text = text.replace(b"}\n", b"},\n")
                text = b"[" + text if not start else text
            out.write(text)
        if as_array:
            out.seek(-2, 1)
            out.write(b"]\n")


# ---- indexing ---------------------------------------------------------------------------------------------------------


def plain_index(path: Path) -> None:
    """Keys, extensions and places of all members, by ``tarfile``."""
    keys: dict[str, int] = {}
    rows = []
    with path.open("rb") as opened:
        for member in PlainWalk(opened):
            key, _, extension = member.name.partition(".")
            number = keys.setdefault(key, len(keys))
            rows.append((number, extension, member.offset_data, member.size))


def index_times(folder: Path, num_samples: int, repeats: int) -> dict[str, Any]:
    paths = {name: folder / name for name in ("s.tar", "s.jsonl", "s.json")}
    write_tar(paths["s.tar"], num_samples)
    write_lines(paths["s.jsonl"], 10 * num_samples)
    write_lines(paths["s.json"], 10 * num_samples, as_array=True)
    files = {name: file_of(path) for name, path in paths.items()}

    def walk() -> None:
        with paths["s.tar"].open("rb") as opened:
            list(TarWalk(opened))

    def index(file_format: FileFormat, name: str) -> Indexed:
        return file_format.index(files[name], list)

    times = interleave(
        {
            "tarfile": lambda: plain_index(paths["s.tar"]),
            "tar": lambda: index(WebDataset(), "s.tar"),
            "walk": walk,
            "jsonl": lambda: index(JsonLines(), "s.jsonl"),
            "json": lambda: index(JsonLines(), "s.json"),
        },
        repeats=repeats,
        warmup=1,
    )
    [tar] = index(WebDataset(), "s.tar").shards
    arrays = [value for value in vars(tar).values() if isinstance(value, np.ndarray)]

    def us(name: str) -> float:
        count = 10 * num_samples if name.startswith("json") else num_samples
        return round(1e6 * median(times[name]) / count, 3)

    return {
        "us_per_sample": us("tar"),
        "over": {name: round(ratio(times, "tarfile", name), 2) for name in ("tar", "walk")},
        "tarfile_us_per_sample": us("tarfile"),
        "json_us_per_sample": {"lines": us("jsonl"), "array": us("json")},
        "bytes_per_sample": round(sum(array.nbytes for array in arrays) / num_samples, 2),
        "times": {name: summary(seconds) for name, seconds in times.items()},
    }


# ---- a process that uses a cached index -------------------------------------------------------------------------------


def tar_index(file: File, num_samples: int) -> Indexed:
    """The index of a tar file whose samples all lie at its beginning; the number of members and the lengths of keys vary."""
    counts = np.full(num_samples, 2) + (np.arange(num_samples) % 1000 == 0)
    num_members = int(counts.sum())
    keys = np.frombuffer(b"".join(b"%09d" % n for n in range(num_samples)), dtype=np.uint8)
    shard = TarSamples(
        file,
        num_samples,
        ["jpg", "json", "txt"],
        (np.arange(num_members) % 3).astype(np.uint8),
        compact(np.arange(num_members) % 8),
        compact(np.full(num_members, 100)),
        compact(np.cumsum(counts)),
        keys,
        compact(9 * np.arange(1, num_samples + 1)),
    )
    return Indexed([shard])


def cached(folder: Path, num_samples: int) -> dict[str, DataSource]:
    """A tar file and JSON lines with so many samples, whose indexes are in the cache."""
    tar, lines = folder / f"{num_samples}.tar", folder / f"{num_samples}.jsonl"
    tar.write_bytes(bytes(2**16))
    write_lines(lines, num_samples)
    cache = str(folder / "cache")
    file = file_of(tar)
    cached_index(lambda: tar_index(file, num_samples), file, "webdataset", WebDataset(), cache)
    sources = {
        "tar": DataSource("bench", "lm", "webdataset", str(tar)),
        "jsonl": DataSource("bench", "lm", "jsonl", str(lines)),
    }
    index_source(sources["jsonl"], WHERE, cache_folder=cache)
    return sources


def private_mb() -> float:
    """Private memory of this process, in MB of 10^6 bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    rows = [line.split() for line in lines if line.startswith("Private_")]
    return sum(int(row[1]) for row in rows) * 1024 / 1e6


def use(kind: str, path: str, cache: str) -> dict[str, float]:
    """What a new process measures of itself."""
    row = DataSource("bench", "lm", kind, path)
    generator = np.random.default_rng(0)
    small = [DataSource("bench", "lm", kind, str(p)) for p in Path(path).parent.glob("warm.*")]
    for source in small:  # what the process needs whatever the index
        if path.endswith(Path(source.path).suffix):
            Reader(index_source(source, WHERE, cache_folder=cache)).read(0, 0)
    before, start = private_mb(), time.perf_counter()
    shards = index_source(row, WHERE, cache_folder=cache)
    opened = time.perf_counter() - start
    reader = Reader(shards)
    reader.read(0, 0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for sample in generator.integers(shards[0].num_samples, size=READS).tolist():
        reader.read(0, sample)
    reading = (time.perf_counter() - start) / READS
    return {
        "private_mb": round(private_mb() - before, 2),
        "open_s": round(opened, 4),
        "open_and_first_sample_s": round(first, 3),
        "read_us": round(1e6 * reading, 1),
    }


def processes(folder: Path, sizes: list[int]) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {"tar": {}, "jsonl": {}}
    write_tar(folder / "warm.tar", 10)
    write_lines(folder / "warm.jsonl", 10)
    for size in sizes:
        for name, source in cached(folder, size).items():
            command = [sys.executable, __file__, "--use", source.format, source.path]
            done = subprocess.run(
                [*command, str(folder / "cache")], capture_output=True, text=True, check=True
            )
            results[name][str(size)] = json.loads(done.stdout.splitlines()[-1])
    return results


def shuffle(num_samples: int, reads: int = 20_000) -> dict[str, float]:
    before, start = private_mb(), time.perf_counter()
    order = SourceOrder(0, "bench", [num_samples])
    for index in range(reads):
        order.locate(index)
    return {
        "us_per_sample": round(1e6 * (time.perf_counter() - start) / reads, 2),
        "mb": round(private_mb() - before, 2),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=30_000, help="of the tar file that is indexed"
    )
    parser.add_argument(
        "--small", type=int, default=100_000, help="samples of the smaller cached index"
    )
    parser.add_argument(
        "--large", type=int, default=10_000_000, help="samples of the larger cached index"
    )
    parser.add_argument("--repeats", type=int, default=10, help="rounds that count (default 10)")
    parser.add_argument("--use", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.use:
        print(json.dumps(use(*options.use)))
        return 0
    if options.repeats < 2 or min(options.samples, options.small, options.large) < 1:
        parser.error("--repeats must be at least 2, and all numbers of samples at least 1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = index_times(folder, options.samples, options.repeats)
        found = processes(folder, [options.small, options.large])
    large = str(options.large)
    results |= {
        "private_mb_per_process": {
            name: {size: row["private_mb"] for size, row in rows.items()}
            for name, rows in found.items()
        },
        "cached_open_s_10m": {
            name: rows[large]["open_and_first_sample_s"] for name, rows in found.items()
        },
        "processes": found,
        "shuffle_10m": shuffle(options.large),
    }
    for key in ("us_per_sample", "over", "json_us_per_sample", "bytes_per_sample"):
        print(f"  {key}: {results[key]}")
    print(json.dumps({**machine(), **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
