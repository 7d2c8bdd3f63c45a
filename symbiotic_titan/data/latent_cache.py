"""A cache of latents: tar shards in place of a source's images, and a manifest that says what they were made of.

    <latents.cache>/data/<source>/          of [[data.sources]]; validation/<source>/ of [[validation.sources]]
        manifest.json                       written first: how images were encoded, and all shards that the cache will have
        00000-<name of the file>.tar        one for each shard of the source, with its samples in its order;
                                            <key>.json, the fields of its task, and <key>.safetensors, the latents

A run that reads it has the rows that it would have had without it: the shards have the same samples in the same order, and a
sample whose image was bad has no latents. The source's own files are not read, and may have been removed.
"""

import glob
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from symbiotic_titan.codecs.codec import fingerprint
from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.files import source_files
from symbiotic_titan.data.formats.shard import Shard
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.tasks import TASKS

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Encoding:
    """All that decides the latents of an image: the codec, and the size it is given first."""

    codec: str
    vae_pixels: int
    max_aspect: float
    step: int
    # Of the source; manifests of older versions lack it.
    truncated_images: str = "bad"

    def __str__(self) -> str:
        kept = ", also truncated ones (truncated_images)" if self.truncated_images != "bad" else ""
        return (
            f"codec {self.codec}, images of at most {self.vae_pixels} pixels (data.vae_pixels) and aspect {self.max_aspect:g} "
            f"(data.max_aspect), sides in steps of {self.step} pixels (latents.patch and the codec's stride){kept}"
        )


def encoding_of(config: Data, latents: Latents, geometry: ImageGeometry) -> Encoding:
    """What this run would do to images; reads the codec's weights file once."""
    return Encoding(
        codec=fingerprint(latents),
        vae_pixels=config.vae_pixels,
        max_aspect=float(config.max_aspect),
        step=geometry.vae_token_pixels,
    )


@dataclass(frozen=True)
class CachedShard:
    """``file`` holds the latents of a shard with so many samples, which came from the file ``source`` of that length."""

    file: str
    source: str
    num_bytes: int
    num_samples: int

    @property
    def path(self) -> str:
        return self.source


@dataclass(frozen=True)
class Manifest:
    encoding: Encoding
    shards: tuple[CachedShard, ...]

    @classmethod
    def of(cls, encoding: Encoding, shards: list[Shard]) -> "Manifest":
        return cls(encoding, tuple(_cached_shard(i, shard) for i, shard in enumerate(shards)))

    @property
    def source_files(self) -> list[tuple[str, int]]:
        """(name, length) of the files that were encoded; several shards may lie in one."""
        return list(dict.fromkeys((shard.source, shard.num_bytes) for shard in self.shards))

    def missing(self, folder: Path) -> list[str]:
        """Shards that are not there yet. One that is there is whole: it gets its name when it is."""
        return [shard.file for shard in self.shards if not (folder / shard.file).is_file()]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def _cached_shard(number: int, shard: Shard) -> CachedShard:
    name = PurePosixPath(shard.path).name
    file = f"{number:05d}-{name.partition('.')[0]}.tar"
    return CachedShard(file, name, shard.num_bytes, shard.num_samples)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in ``folder``; None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        shards = tuple(CachedShard(**shard) for shard in saved["shards"])
        return Manifest(Encoding(**saved["encoding"]), shards)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no manifest of cached latents ({error!r})") from error


def folder_of(cache: str | Path, table: str, source: DataSource) -> Path:
    """Where the latents of ``source``, a row of ``table``, are."""
    return Path(cache) / table.strip("[]").removesuffix(".sources") / source.name


def cached_sources(
    rows: list[tuple[int, DataSource]],
    config: Data,
    latents: Latents,
    geometry: ImageGeometry,
    table: str,
) -> list[tuple[int, DataSource]]:
    """``rows``, numbered as in ``table``, with sources as they are read in this run: their latents in place of their images.

    Raises:
        ValueError: there is no cache, it is not finished, or it was made by another codec, for other buckets or of other files.
    """
    if not latents.cache:
        return rows
    as_read: list[tuple[int, DataSource]] = []
    encoding = None
    for number, source in rows:
        if TASKS[source.task].is_cacheable:
            encoding = encoding or encoding_of(config, latents, geometry)
            folder = folder_of(latents.cache, table, source)
            of_source = replace(encoding, truncated_images=source.truncated_images)
            _check(folder, of_source, source, f"{table} #{number} ({source.name})")
            path = f"{glob.escape(str(folder))}/*.tar"
            source = replace(source, format="webdataset", path=path, keys={}, image_folder="")
        as_read.append((number, source))
    return as_read


def encoded_shards(latents: Latents, table: str, source: DataSource) -> tuple[CachedShard, ...]:
    """What the shards in the cache were made of, in their order, where ``source``, a row of ``table``, is read from it; else none."""
    if not latents.cache or not TASKS[source.task].is_cacheable:
        return ()
    manifest = read_manifest(folder_of(latents.cache, table, source))
    return manifest.shards if manifest else ()


def _check(folder: Path, encoding: Encoding, source: DataSource, where: str) -> None:
    remedy = "make it with: symbiotic cache-latents CONFIG --out FOLDER"
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{where}: latents.cache has no {folder}/{MANIFEST}; {remedy}")
    if manifest.encoding != encoding:
        raise ValueError(
            f"{where}: the latents in {folder} were made with {manifest.encoding}; this run has {encoding}. Set these keys "
            "back, or make another cache with symbiotic cache-latents"
        )
    if manifest.source_files != (_source_files(source, where) or manifest.source_files):
        raise ValueError(
            f"{where}: the latents in {folder} were made of other files than path {source.path!r} now matches (names or sizes); "
            "make another cache with symbiotic cache-latents"
        )
    missing = manifest.missing(folder)
    if missing:
        raise ValueError(
            f"{where}: the cache in {folder} is not finished: {len(missing)} of {len(manifest.shards)} shards are missing, "
            f"the first is {missing[0]}; {remedy}"
        )


def _source_files(source: DataSource, where: str) -> list[tuple[str, int]]:
    """(name, length) of the source's own files; none where they are gone."""
    try:
        paths = source_files(source, where)
    except ValueError:
        return []
    files = [url_to_fs(path) for path in paths]
    return [(PurePosixPath(name).name, filesystem.size(name)) for filesystem, name in files]
