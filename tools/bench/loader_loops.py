"""What ``loader.py`` compares with and on: other people's loops over shards, and shards of photos."""

import functools
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from packing import mixed_indices
from PIL import Image

from symbiotic_titan.data.stream_state import PipelineSpec
from symbiotic_titan.sequence.tasks import IMAGE_EXTENSIONS

Sample = dict[str, Any]
Loop = Callable[[list[str]], Iterator[Sample]]


def parsed(sample: Sample, decode: bool) -> Sample:
    """JSON parsed; with ``decode`` images as RGB."""
    result = {}
    for name, value in sample.items():
        if name == "json" and isinstance(value, bytes):
            value = json.loads(value)
        elif decode and name in IMAGE_EXTENSIONS:
            opened = Image.open(io.BytesIO(value)) if isinstance(value, bytes) else value
            value = opened.convert("RGB")
        result[name] = value
    return result


def bare_tar(paths: list[str]) -> Iterator[Sample]:
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
                yield sample


def bare_lines(paths: list[str]) -> Iterator[Sample]:
    for path in paths:
        with fsspec.open(path, "rb") as file:
            yield from ({"json": line} for line in file)


def webdataset_tar(paths: list[str]) -> Iterator[Sample]:
    import webdataset

    yield from webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)


def datasets_loop(kind: str, paths: list[str]) -> Iterator[Sample]:
    """The streaming loop of ``datasets``; images stay encoded, ``parsed`` decodes them as it does everyone's."""
    import datasets

    stream = datasets.load_dataset(kind, data_files={"a": paths}, split="a", streaming=True)
    images = [n for n, f in (stream.features or {}).items() if isinstance(f, datasets.Image)]
    for name in images:
        stream = stream.cast_column(name, datasets.Image(decode=False))
    for sample in stream:
        yield sample | {name: sample[name]["bytes"] for name in images}


LOOPS: dict[str, dict[str, Loop]] = {
    "bare": {"webdataset": bare_tar, "jsonl": bare_lines},
    "webdataset": {"webdataset": webdataset_tar, "jsonl": bare_lines},
    "datasets": {
        "webdataset": functools.partial(datasets_loop, "webdataset"),
        "jsonl": functools.partial(datasets_loop, "json"),
        "parquet": functools.partial(datasets_loop, "parquet"),
    },
}


def loop_of(spec: PipelineSpec, name: str, decode: bool) -> Iterator[Sample]:
    """Endless samples, mixed as the spec says.

    Raises:
        ValueError: ``name`` has no loop for one of the formats.
    """
    streams = []
    for source, shards in zip(spec.sources, spec.shards, strict=True):
        if source.format not in LOOPS[name]:
            raise ValueError(f"it reads {', '.join(LOOPS[name])}, not {source.format}")
        paths = list(dict.fromkeys(shard.path for shard in shards))
        loop = LOOPS[name][source.format]
        streams.append(itertools.chain.from_iterable(map(loop, itertools.repeat(paths))))
    return (parsed(next(streams[source]), decode) for source, _ in mixed_indices(spec))


def write_photos(folder: Path, shards: int, photos: int) -> None:
    """Smooth random pictures of 512 pixels, some 40 kB each, as tar shards of the tasks t2i and mmu; seeded."""
    random = np.random.default_rng(0)
    values = {"t2i": {"caption": "boats at dusk " * 8}, "mmu": {"question": "what?", "answer": "a"}}
    for (task, value), shard in itertools.product(values.items(), range(shards)):
        with tarfile.open(folder / f"{task}-{shard}.tar", "w") as archive:
            for number in range(photos):
                height, width = ((384, 512), (512, 384), (512, 512), (288, 512))[number % 4]
                noise = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
                photo = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
                file = io.BytesIO()
                photo.save(file, "JPEG", quality=88)
                for ending, data in (
                    ("jpg", file.getvalue()),
                    ("json", json.dumps(value).encode()),
                ):
                    member = tarfile.TarInfo(f"{number:05d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
