"""Writes a cache of latents. What is in it, and how it is read: see ``latent_cache``.

Shards are shared out over processes by number. Each gets its name when it is whole, so that work that was interrupted goes on
where it was, with any number of processes.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbiotic_titan.codecs.codec import Codec
from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.files import replacing
from symbiotic_titan.data.fields import CACHED_EXTENSION, Fields
from symbiotic_titan.data.formats.shard import (
    BadSample,
    Sample,
    Shard,
)
from symbiotic_titan.data.latent_cache import MANIFEST, Encoding, Manifest, read_manifest
from symbiotic_titan.data.latents import TargetImages, cached_bytes, to_pixels
from symbiotic_titan.data.readers import Reader
from symbiotic_titan.data.samples import image_of
from symbiotic_titan.data.skip_list import first_numbers, is_listed
from symbiotic_titan.sequence.tasks import TASKS

# Samples whose images are in memory together; those of one size are encoded together.
SAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class CacheWriter:
    """Encodes samples of a source, whose bad ones are treated as ``config`` says.

    listed: samples that the source's ``skip_list`` names: they get no latents.
    dtype: what latents are stored in.   advance: called with the number of samples done and the number of bad ones among them.
    """

    config: Data
    source: DataSource
    listed: np.ndarray
    targets: TargetImages
    codec: Codec
    dtype: torch.dtype
    advance: Callable[[int, int], None]

    def write(
        self, folder: Path, encoding: Encoding, shards: list[Shard], rank: int, num_ranks: int
    ) -> None:
        """Those shards of number ``rank``, ``rank + num_ranks`` ... that are not there yet.

        Raises:
            ValueError: the folder holds latents of another kind, or a sample is bad and the config says to raise.
        """
        encoding = replace(encoding, truncated_images=self.source.truncated_images)
        manifest = Manifest.of(encoding, shards)
        _put_manifest(folder, manifest, rank)
        missing = set(manifest.missing(folder))
        reader, first = Reader(shards), first_numbers(shards)
        for number in range(rank, len(shards), num_ranks):
            cached = manifest.shards[number]
            if cached.file in missing:
                samples = self._samples(reader, number, cached.num_samples, int(first[number]))
                _write_tar(folder / cached.file, self._members(samples))
            else:
                self.advance(cached.num_samples, 0)

    def _samples(
        self, reader: Reader, shard: int, count: int, first: int
    ) -> Iterator[Sample | BadSample]:
        """first: number of the shard's first sample among those of all shards."""
        for number in range(count):
            if is_listed(self.listed, first + number):
                yield BadSample("listed", f"it is in {self.source.skip_list}")
                continue
            try:
                yield reader.read(shard, number)
            except BadSample as error:
                self._refuse_or_pass(error)
                yield error

    def _members(self, samples: Iterable[Sample | BadSample]) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of all members of a shard."""
        numbered = enumerate(samples)
        while chunk := [item for _, item in zip(range(SAMPLES_AT_ONCE), numbered, strict=False)]:
            cells = [self._image(sample) for _, sample in chunk]
            good = [image_CHW for image_CHW in cells if image_CHW is not None]
            latents = iter(self.codec.encode(good))
            for (number, sample), image_CHW in zip(chunk, cells, strict=True):
                key = _key(sample, number)
                yield f"{key}.json", _fields(self.source, sample)
                if image_CHW is not None:
                    data = cached_bytes(next(latents), self.dtype)
                    yield f"{key}.{CACHED_EXTENSION}", data
            self.advance(len(chunk), len(chunk) - len(good))

    def _image(self, sample: Sample | BadSample) -> torch.Tensor | None:
        """(3, H, W) in [-1, 1], in its aspect bucket; None where it is bad."""
        if isinstance(sample, BadSample):
            return None
        try:
            image = image_of(self.source, sample, self.config.limits)
        except BadSample as error:
            self._refuse_or_pass(error)
            return None
        return to_pixels(self.targets.fit(image))

    def _refuse_or_pass(self, error: BadSample) -> None:
        if self.source.bad_samples_of(self.config) == "raise":
            raise ValueError(
                f'{error} (source {self.source.name!r}); repair it, or set data.bad_samples = "skip"'
            ) from error


def _put_manifest(folder: Path, manifest: Manifest, rank: int) -> None:
    """Write it, or see that what is there is the same."""
    found = read_manifest(folder)
    if found is not None and found.encoding != manifest.encoding:
        raise ValueError(
            f"{folder}: holds latents made with {found.encoding}; now it is {manifest.encoding}. Name another --out"
        )
    if found is not None and found != manifest:
        raise ValueError(
            f"{folder}: holds latents of other files (names, sizes or numbers of samples); name another --out, or remove it"
        )
    if found is None:
        with replacing(folder / MANIFEST, f".partial-{rank}") as unfinished:
            unfinished.write_text(manifest.text(), encoding="utf-8")


def _write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    # One process writes this shard, so the next attempt overwrites what a killed one left.
    with (
        replacing(path, ".partial") as unfinished,
        tarfile.open(unfinished, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in members:
            member = tarfile.TarInfo(name)  # no time and no owner: the same bytes every time
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _key(sample: Sample | BadSample, number: int) -> str:
    """Name of a sample among the members: its own where that can be one, for messages."""
    key = sample.key if isinstance(sample, Sample) else ""
    return key if key and "." not in key else f"sample {number}"


def _fields(source: DataSource, sample: Sample | BadSample) -> bytes:
    """The JSON object of a sample. A field that is missing or no text stays so: the sample is as bad in the cache as it was."""
    if isinstance(sample, BadSample):
        return b"{}"
    names = [name for name in TASKS[source.task].fields if name != "image"]
    values = {name: _json_value(source, sample, name) for name in names}
    return json.dumps(values, default=lambda value: None).encode()


def _json_value(source: DataSource, sample: Sample, field: str) -> Any:
    try:
        value = Fields(sample, source.keys).get(field)
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except (BadSample, UnicodeDecodeError):
        return None
