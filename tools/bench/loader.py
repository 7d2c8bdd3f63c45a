#!/usr/bin/env python3
"""What one worker of the loader makes in a second, where its time goes, and whether its memory stays flat.

Example: tools/bench/loader.py --config train_configs/debug.toml --samples 2000 --memory-samples 50000

Contenders, all with as many samples of each source, on one core, in one process (a worker process does the same):
  bare        the files of the sources from beginning to end: tarfile and json, images decoded by Pillow, nothing else
  webdataset  the same through the webdataset package where it is installed (extra ``bench``); JSONL as in ``bare``
  read        this project's readers in shuffled order, images decoded by Pillow: what ``bare`` does
  documents   read, decode, resize, cut into patches, tokenise
  rows        the whole loader: documents, packing, row tensors

What resizing and tokenising cost is the difference between read and documents, what packing costs that between documents and
rows; ``choose_ms`` and ``build_ms`` time the two halves of packing a row by themselves. The memory of the process is taken at
ten points while --memory-samples are read.

The last line is JSON. Quotients of samples per second: read_over_bare and rows_over_bare (the bar: 0.9 for reading).
"""

import argparse
import itertools
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also runs without an installation

from symbiotic_titan import device  # noqa: E402

device.prepare()

import fsspec  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from symbiotic_titan.data.fields import IMAGE_EXTENSIONS  # noqa: E402
from symbiotic_titan.data.images import decode_image  # noqa: E402
from symbiotic_titan.data.lanes import Lane, LaneRecipe, OpenSource, new_state  # noqa: E402
from symbiotic_titan.data.mixture import Mixture  # noqa: E402
from symbiotic_titan.data.order import SourceOrder  # noqa: E402
from symbiotic_titan.data.packing import PACKINGS  # noqa: E402
from symbiotic_titan.data.readers import Reader  # noqa: E402
from symbiotic_titan.data.samples import Document  # noqa: E402
from tools.bench.packing import mixed_indices, recipe_of  # noqa: E402
from tools.bench.timing import interleave, machine, ratio, summary  # noqa: E402

BAR = 0.9
POINTS = 10


# ---- other people's loops ---------------------------------------------------------------------------------------------


def bare_tar(paths: list[str]) -> Iterator[dict[str, Any]]:
    """Samples of tar files in the order in which they lie: members with one key that follow each other."""
    for path in paths:
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
            members = (member for member in archive if member.isfile())
            for _, group in itertools.groupby(members, key=lambda m: m.name.partition(".")[0]):
                sample = {}
                for member in group:
                    data = archive.extractfile(member)
                    assert data is not None
                    sample[member.name.partition(".")[2]] = data.read()
                yield decoded(sample)


def bare_lines(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with fsspec.open(path, "rb") as file:
            yield from (decoded({"json": line}) for line in file)


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    """JSON parsed, images as RGB."""
    result = {}
    for name, value in sample.items():
        if name == "json" and isinstance(value, bytes):
            value = json.loads(value)
        elif name in IMAGE_EXTENSIONS:
            value = Image.open(BytesIO(value)).convert("RGB")
        result[name] = value
    return result


def webdataset_tar(paths: list[str]) -> Iterator[dict[str, Any]]:
    import webdataset

    yield from webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode("pilrgb")


Loop = Callable[[list[str]], Iterator[dict[str, Any]]]


def loop_of(recipe: LaneRecipe, tar_loop: Loop) -> Iterator[dict[str, Any]]:
    """Endless samples, mixed as the recipe says; ``tar_loop`` reads the tar files."""
    loops: dict[str, Loop] = {"webdataset": tar_loop, "jsonl": bare_lines}
    streams = []
    for source, shards in zip(recipe.sources, recipe.shards, strict=True):
        if source.format not in loops:
            raise ValueError(
                f"source {source.name!r}: the bare loop reads webdataset and jsonl, not {source.format}; "
                "name a config with such sources"
            )
        paths = list(dict.fromkeys(shard.path for shard in shards))
        streams.append(
            itertools.chain.from_iterable(map(loops[source.format], itertools.repeat(paths)))
        )
    return (next(streams[source]) for source, _ in mixed_indices(recipe))


# ---- this project's stages --------------------------------------------------------------------------------------------


def read_samples(recipe: LaneRecipe) -> Iterator[dict[str, Any]]:
    """Samples in the loader's order, as the bare loop gives them."""
    seed = recipe.config.seed
    readers = [Reader(shards) for shards in recipe.shards]
    orders = [
        SourceOrder(seed, source.name, [shard.num_samples for shard in shards])
        for source, shards in zip(recipe.sources, recipe.shards, strict=True)
    ]
    for source, index in mixed_indices(recipe):
        members = readers[source].read(*orders[source].locate(index)).members
        images = {n: decode_image(v) for n, v in members.items() if n in IMAGE_EXTENSIONS}
        rest = {n: v for n, v in members.items() if n not in IMAGE_EXTENSIONS}
        yield {**images, **decoded(rest)}


def make_documents(recipe: LaneRecipe) -> Iterator[list[Document]]:
    sources = [OpenSource(recipe, number) for number in range(len(recipe.sources))]
    return (sources[source].documents(index) for source, index in mixed_indices(recipe))


def one_lane(recipe: LaneRecipe) -> Lane:
    """Lane 0 of the recipe, at its beginning."""
    sources = [OpenSource(recipe, number) for number in range(len(recipe.sources))]
    mixture = Mixture([source.weight for source in recipe.sources], recipe.num_lanes)
    return Lane(recipe, sources, mixture, 0, new_state(recipe))


def samples_read(lane: Lane) -> int:
    return sum(lane.state()["read"])


def make_rows(lane: Lane, num_samples: int) -> None:
    """Rows until ``num_samples`` more samples have been read."""
    end = samples_read(lane) + num_samples
    while samples_read(lane) < end:
        lane.next_row()


def consumer(stream: Iterator[Any], num_samples: int) -> Callable[[], None]:
    """A function that takes ``num_samples`` from an endless stream, at each call further ones."""

    def run() -> None:
        for _ in range(num_samples):
            next(stream)

    return run


def contenders(recipe: LaneRecipe, num_samples: int) -> dict[str, Callable[[], None]]:
    """Name -> reading ``num_samples``. Streams go on, so that each call reads others, and all the same number."""
    lane = one_lane(recipe)
    make_rows(lane, 1)  # fills the look-ahead buffer
    entries: dict[str, Callable[[], None]] = {
        "bare": consumer(loop_of(recipe, bare_tar), num_samples),
        "read": consumer(read_samples(recipe), num_samples),
        "documents": consumer(make_documents(recipe), num_samples),
        "rows": lambda: make_rows(lane, num_samples),
    }
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        print(f"webdataset is left out ({error}); pip install 'webdataset>=1,<2' adds it")
    else:
        entries["webdataset"] = consumer(loop_of(recipe, webdataset_tar), num_samples)
    return entries


def packing_milliseconds(recipe: LaneRecipe, num_samples: int) -> dict[str, float]:
    """Medians over the rows of ``num_samples``: choosing the documents of a row, and writing its tensors."""
    choose = PACKINGS[recipe.config.packing]
    waiting: list[Document] = []
    times: dict[str, list[float]] = {"choose_ms": [], "build_ms": []}
    for documents in itertools.islice(make_documents(recipe), num_samples):
        waiting += documents
        while len(waiting) >= recipe.config.lookahead:
            start = time.perf_counter()
            chosen = choose(waiting, recipe.size)
            middle = time.perf_counter()
            recipe.builder.build([waiting[i] for i in chosen])
            times["choose_ms"].append(middle - start)
            times["build_ms"].append(time.perf_counter() - middle)
            taken = set(chosen)
            waiting = [document for i, document in enumerate(waiting) if i not in taken]
    if not times["choose_ms"]:
        raise ValueError(
            f"--samples {num_samples}: too few for a row; the look-ahead buffer alone holds "
            f"{recipe.config.lookahead} (data.lookahead)"
        )
    return {name: round(1e3 * median(seconds), 3) for name, seconds in times.items()}


# ---- memory -----------------------------------------------------------------------------------------------------------


def resident_mib() -> float | None:
    """Resident memory of this process; None where there is no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_points(recipe: LaneRecipe, num_samples: int) -> list[tuple[int, float]]:
    """(samples read, resident MiB) at ten points of a run; the first one lies behind a tenth of it."""
    lane = one_lane(recipe)
    points: list[tuple[int, float]] = []
    for _ in range(POINTS):
        make_rows(lane, num_samples // POINTS)
        size = resident_mib()
        if size is not None:
            points.append((samples_read(lane), round(size, 1)))
    return points


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="train_configs/debug.toml", help="whose mixture")
    parser.add_argument("--samples", type=int, default=2000, help="samples of each round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--memory-samples", type=int, default=20000, help="while memory is watched")
    options, overrides = parser.parse_known_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2 to have a spread, got {options.repeats}")
    if min(options.samples, options.memory_samples // POINTS) < 1:
        parser.error(f"--samples must be at least 1 and --memory-samples at least {POINTS}")
    torch.set_num_threads(1)  # as in a worker process
    try:
        recipe = recipe_of(options.config, overrides)
        packing = packing_milliseconds(recipe, options.samples)
        entries = contenders(recipe, options.samples)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times = interleave(entries, repeats=options.repeats, warmup=1)
    speeds = {name: round(options.samples / median(seconds)) for name, seconds in times.items()}
    for name, speed in speeds.items():
        print(f"  {name:10s} {speed:8,d} samples/s")
    print("  a row: " + ", ".join(f"{name} {value}" for name, value in packing.items()))
    points = memory_points(recipe, options.memory_samples)
    print("  MiB after samples: " + ", ".join(f"{size} after {n:,d}" for n, size in points))
    over_bare = {f"{n}_over_bare": round(ratio(times, "bare", n), 3) for n in speeds if n != "bare"}
    growth = round(points[-1][1] - points[0][1], 1) if points else None
    print(
        json.dumps(
            {
                **machine(),
                **over_bare,
                "read_bar": BAR,
                "read_met": over_bare["read_over_bare"] >= BAR,
                "samples_per_second": speeds,
                "times": {name: summary(seconds) for name, seconds in times.items()},
                **packing,
                "memory_mib": points,
                "memory_growth_mib": growth,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
