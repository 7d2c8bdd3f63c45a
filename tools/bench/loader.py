#!/usr/bin/env python3
"""What one worker of the loader makes in a second, where its time goes, and whether its memory stays flat.

Example: tools/bench/loader.py --config train_configs/debug.toml --samples 2000 --memory-samples 50000

Cases:
  config     the sources of --config
  photos     tar shards of JPEGs of 512 pixels with captions and questions, written to a temporary folder; 256 x 256 pixels of each
             go into rows of 2048

Contenders, all in one process on one core, all with the same number of samples of each source, JSON parsed:
  bare, webdataset, datasets   the files from beginning to end: tarfile and json; the two packages, where they are installed and
                               can read the shards (extra ``bench``)
  read                         this project's readers, in shuffled order; the index that they need was made before (index_seconds)
  ..._decoded                  the same four with images decoded to RGB by Pillow
  documents                    read_decoded, and images resized and cut into patches, texts tokenised
  rows                         the whole loader: documents, packing, the tensors of rows

Stages are the time of one thread within ``rows``, in microseconds per sample, taken by timers around the functions: reading, decoding,
resizing (patches and normalising included), tokenising, the rest of the documents, choosing those of a row, writing its tensors;
and what a row costs on its way from a worker. Workers: the loader as the trainer has it, with 0, 1 and 2 worker processes. The
memory of the process is taken at ten points while --memory-samples are read.

The last line is JSON. ``over``: quotients of samples per second, medians over interleaved rounds with their quartiles; the bar is
0.9 for read_decoded over each of the others' decoded loops.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
from bench_timing import interleave, machine, summary
from loader_loops import LOOPS, Sample, loop_of, parsed, write_photos
from packing import mixed_indices

from symbiotic_titan.build import (
    build_dataloader,
    build_tokenizer,
)
from symbiotic_titan.config.data import Data
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data import layouts
from symbiotic_titan.data.decoding import decode_image
from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.loader import PackedLoader, SerializedRow
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.pipeline import build_loader
from symbiotic_titan.data.readers import Reader
from symbiotic_titan.data.samples import DocumentMaker
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.stream_state import PipelineSpec, new_state
from symbiotic_titan.data.streams import OpenSource, Stream, open_mixture
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.tasks import IMAGE_EXTENSIONS

BAR = 0.9
POINTS = 10
WORKERS = (0, 1, 2)
PHOTO_SHARDS = 4  # of each of two sources


# ---- this project's stages --------------------------------------------------------------------------------------------


def read_samples(spec: PipelineSpec, decode: bool) -> Iterator[Sample]:
    """Samples in the loader's order, as the bare loop gives them."""
    readers = [Reader(shards) for shards in spec.shards]
    orders = [
        SourceOrder(spec.config.seed, source.name, [shard.num_samples for shard in shards])
        for source, shards in zip(spec.sources, spec.shards, strict=True)
    ]
    for source, index in mixed_indices(spec):
        members = readers[source].read(*orders[source].locate(index)).members
        sample = parsed(members, decode=False)
        if decode:
            images = {n: decode_image(v) for n, v in members.items() if n in IMAGE_EXTENSIONS}
            sample |= images
        yield sample


def make_documents(spec: PipelineSpec) -> Iterator[list[Document]]:
    sources = [OpenSource(spec, number) for number in range(len(spec.sources))]
    return (sources[source].documents(index) for source, index in mixed_indices(spec))


def one_stream(spec: PipelineSpec) -> Stream:
    """Stream 0 of the spec, at its beginning."""
    sources = [OpenSource(spec, number) for number in range(len(spec.sources))]
    return Stream(spec, sources, open_mixture(spec), 0, new_state(spec))


def samples_read(stream: Stream) -> int:
    return sum(stream.state()["read"])


def make_rows(stream: Stream, num_samples: int) -> int:
    """Rows until ``num_samples`` more samples have been read; how many."""
    end, rows = samples_read(stream) + num_samples, 0
    while samples_read(stream) < end:
        stream.next_row()
        rows += 1
    return rows


def consumer(stream: Iterator[Any], num_samples: int) -> Callable[[], None]:
    """A function that takes ``num_samples`` from an endless stream, at each call further ones."""

    def run() -> None:
        for _ in range(num_samples):
            next(stream)

    return run


def contenders(spec: PipelineSpec, num_samples: int) -> dict[str, Callable[[], Any]]:
    """Name -> reading ``num_samples``. Streams go on, so that each call reads others, and all the same number."""
    entries: dict[str, Callable[[], Any]] = {}
    for name in LOOPS:
        try:
            next(loop_of(spec, name, decode=True))
        except (ImportError, ValueError) as error:
            print(f"  {name} is left out: {str(error).splitlines()[0]}")
            continue
        for decode in (False, True):
            key = f"{name}_decoded" if decode else name
            entries[key] = consumer(loop_of(spec, name, decode), num_samples)
    for decode in (False, True):
        key = "read_decoded" if decode else "read"
        entries[key] = consumer(read_samples(spec, decode), num_samples)
    stream = one_stream(spec)
    make_rows(stream, 1)  # fills the look-ahead buffer
    entries["documents"] = consumer(make_documents(spec), num_samples)
    entries["rows"] = lambda: make_rows(stream, num_samples)
    return entries


def quotients(times: dict[str, list[float]], over: list[str], of: str) -> dict[str, list[float]]:
    """Samples per second of ``of`` / of each in ``over``: [median, quartile 1, quartile 3] over the rounds."""
    result = {}
    for name in over:
        rounds = [a / b for a, b in zip(times[name], times[of], strict=True)]
        low, middle, high = quantiles(rounds, n=4, method="inclusive")
        result[name] = [round(value, 3) for value in (middle, low, high)]
    return result


class Timers:
    """Seconds spent in functions, each without those that it calls and that have timers too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.seconds.setdefault(name, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[name] += elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        return timed


def stage_times(spec: PipelineSpec, num_samples: int) -> dict[str, float]:
    """Microseconds per sample of each stage in a stream, and of a row on its way from a worker.

    Raises:
        ValueError: that many samples make no row.
    """
    timers, stream = Timers(), one_stream(spec)
    make_rows(stream, 1)
    assert isinstance(spec.maker, DocumentMaker)
    tokenizer = type(spec.maker._tokenizer)
    places: list[tuple[Any, str, str]] = [
        (Reader, "read", "read"),
        (layouts, "decode_image", "decode"),
        (layouts, "vit_patches", "resize"),
        (TargetImages, "from_image", "resize"),
        (tokenizer, "encode", "tokenise"),
        (DocumentMaker, "make", "documents"),
        (stream, "_choose", "choose"),
        (SequenceBuilder, "build", "build"),
    ]
    with ExitStack() as patches:
        for owner, attribute, name in places:
            timed = timers.around(name, getattr(owner, attribute))
            patches.enter_context(patch.object(owner, attribute, timed))
        before = samples_read(stream)
        rows = make_rows(stream, num_samples)
        count = samples_read(stream) - before
    row = stream.next_row()
    start = time.perf_counter()
    for _ in range(rows):
        SerializedRow.of(row).row()
    timers.seconds["flatten"] = time.perf_counter() - start
    return {name: round(1e6 * total / count, 1) for name, total in timers.seconds.items()}


# ---- worker processes and memory --------------------------------------------------------------------------------------


def worker_speeds(
    make_loader: Callable[[int], PackedLoader], num_rows: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Rows per second of the loader with so many workers; interleaved rounds, each with processes of its own."""
    times: dict[str, list[float]] = {str(workers): [] for workers in WORKERS}
    for _, workers in itertools.product(range(repeats), WORKERS):
        loader = make_loader(workers)
        rows_ahead = 2 * 2 * max(1, workers)  # what workers prefetch before the measurement
        with closing(iter(loader)) as batches:  # type: ignore[type-var]  # ends the worker processes
            rows = len(next(batches).tokens)
            for _ in range(rows_ahead):
                next(batches)
            start, num_batches = time.perf_counter(), -(-num_rows // rows)
            for _ in range(num_batches):
                next(batches)
            times[str(workers)].append((time.perf_counter() - start) / (num_batches * rows))
    base = times["0"]
    return {
        name: {
            "rows_per_second": round(1 / median(seconds), 1),
            "over_0_workers": round(median(a / b for a, b in zip(base, seconds, strict=True)), 3),
        }
        for name, seconds in times.items()
    }


def resident_mib() -> float | None:
    """Resident memory of this process; None where there is no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_points(spec: PipelineSpec, num_samples: int) -> list[tuple[int, float]]:
    """(samples read, resident MiB) at ten points of a run; the first one after a tenth of it."""
    stream = one_stream(spec)
    points: list[tuple[int, float]] = []
    for _ in range(POINTS):
        make_rows(stream, num_samples // POINTS)
        size = resident_mib()
        if size is not None:
            points.append((samples_read(stream), round(size, 1)))
    return points


# ---- cases ------------------------------------------------------------------------------------------------------------


def loader_of_config(config_file: str, overrides: list[str], num_workers: int) -> PackedLoader:
    config = load_job_config(["--job.config_file", config_file, *overrides])
    config.training.dataloader.num_workers = num_workers
    tokenizer = build_tokenizer(config)
    return build_dataloader(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)


def loader_of_photos(folder: Path, num_workers: int) -> PackedLoader:
    rows = [
        {"name": task, "task": task, "format": "webdataset", "path": f"{folder}/{task}-*.tar"}
        for task in ("t2i", "mmu")
    ]
    return build_loader(
        Data(
            sources=rows,
            vit_pixels=2**16,
            vae_pixels=2**16,
            max_vit_tokens=512,
            max_vae_tokens=1536,
        ),
        latents=Latents(patch=16),
        geometry=ImageGeometry(16, 2, 3, 3, 1, 16),
        rotary_layout="shared",
        tokenizer=ByteTokenizer(),
        seq_len=2048,
        local_batch_size=2,
        global_batch_size=4,
        num_workers=num_workers,
    )


def measure(
    make_loader: Callable[[int], PackedLoader], options: argparse.Namespace
) -> dict[str, Any]:
    """All figures of a case; prints them too."""
    start = time.perf_counter()
    spec = make_loader(0).spec
    index_seconds = round(time.perf_counter() - start, 3)
    entries = contenders(spec, options.samples)
    times = interleave(entries, repeats=options.repeats, warmup=1)
    speeds = {name: round(options.samples / median(seconds)) for name, seconds in times.items()}
    for name, speed in speeds.items():
        print(f"  {name:18s} {speed:8,d} samples/s")
    others = [name for name in times if name.partition("_")[0] in LOOPS]
    decoded = [name for name in others if name.endswith("_decoded")]
    plain = [name for name in others if name not in decoded]
    over = {
        "read": quotients(times, plain, "read"),
        "read_decoded": quotients(times, decoded, "read_decoded"),
        "rows": quotients(times, decoded, "rows"),
    }
    for name, values in over.items():
        print(
            f"  {name} over "
            + ", ".join(f"{n} {v[0]} ({v[1]} to {v[2]})" for n, v in values.items())
        )
    stages = stage_times(spec, options.samples)
    print("  microseconds per sample: " + ", ".join(f"{n} {t}" for n, t in stages.items()))
    workers = worker_speeds(make_loader, options.rows, options.repeats)
    for name, speed_of in workers.items():
        rate, gain = speed_of["rows_per_second"], speed_of["over_0_workers"]
        print(f"  {name} workers: {rate} rows/s, {gain} x")
    points = memory_points(spec, options.memory_samples)
    print("  MiB after samples: " + ", ".join(f"{size} after {n:,d}" for n, size in points))
    return {
        "over": over,
        "met": min(middle for middle, *_ in over["read_decoded"].values()) >= BAR,
        "index_seconds": index_seconds,
        "samples_per_second": speeds,
        "times": {name: summary(seconds) for name, seconds in times.items()},
        "stages_us": stages,
        "workers": workers,
        "memory_mib": points,
        "memory_growth_mib": round(points[-1][1] - points[0][1], 1) if points else None,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="train_configs/debug.toml", help="whose mixture")
    parser.add_argument("--case", choices=("config", "photos"), help="only this one")
    parser.add_argument(
        "--photos",
        type=int,
        default=250,
        help=f"in each of {2 * PHOTO_SHARDS} shards (default 250)",
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples of each round")
    parser.add_argument("--rows", type=int, default=200, help="rows of each round of the workers")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--memory-samples", type=int, default=10000, help="while memory is watched")
    options, overrides = parser.parse_known_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2 to have a spread, got {options.repeats}")
    if min(options.photos, options.samples, options.rows, options.memory_samples // POINTS) < 1:
        parser.error(
            f"--photos, --samples and --rows must be at least 1, --memory-samples at least {POINTS}"
        )
    torch.set_num_threads(1)  # as in a worker process
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "config": functools.partial(loader_of_config, options.config, overrides),
            "photos": functools.partial(loader_of_photos, Path(folder)),
        }
        try:
            for name in [options.case] if options.case else list(cases):
                print(name)
                if name == "photos":
                    write_photos(Path(folder), PHOTO_SHARDS, options.photos)
                results[name] = measure(cases[name], options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(json.dumps({**machine(), "bar": BAR, "cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
