#!/usr/bin/env python
"""Encode target images once, so that training reads latents: those of sources of the tasks t2i and t2i_long.

Examples:
    symbiotic cache-latents train_configs/mini.toml --out latents --latents.codec flux --latents.path ae.safetensors
    torchrun --nproc-per-node 8 -m symbiotic_titan.cli cache-latents train_configs/mini.toml --out latents    # by shards

Then train with the same config and --latents.cache latents. What is encoded follows from [latents], data.vae_pixels,
data.max_aspect and the flavor; training refuses a cache that was made with others. Call it again after an interruption: shards
that are finished are kept, on any number of processes.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from symbiotic_titan import device
from symbiotic_titan.codecs.codec import build_codec
from symbiotic_titan.config.data import DataSource, used_sources
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.latent_cache import encoding_of, folder_of
from symbiotic_titan.data.latent_writer import CacheWriter
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.pipeline import indexed
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.process import Counter, exit_status
from symbiotic_titan.sequence.tasks import TASKS


class SampleCounter(Counter):
    """Counts bad samples as well."""

    num_bad = 0

    def advance(self, count: int, bad: int) -> None:
        self.num_bad += bad
        self(count)


def sources_of(config: JobConfig) -> list[tuple[str, int, DataSource]]:
    """(table, number in it, source) of all sources whose images are cached.

    Raises:
        ValueError: there is none.
    """
    tables = {"[[data.sources]]": (config.data.sources, config.data.stages)}
    if config.validation.enable:
        tables["[[validation.sources]]"] = (config.validation.sources, [])
    found = [
        (table, number, source)
        for table, (sources, stages) in tables.items()
        for number, source in enumerate(sources, start=1)
        if TASKS[source.task].is_cacheable and source in used_sources(sources, stages)
    ]
    if not found:
        names = " or ".join(name for name in TASKS if TASKS[name].is_cacheable)
        raise ValueError(f"[[data.sources]]: none has the task {names}, whose images are cached")
    return found


def run(config: JobConfig, out: Path, rank: int, num_ranks: int, where: torch.device) -> None:
    """Write this process's shards of every source.

    Raises:
        ValueError: a user's mistake.
    """
    latents = replace(config.latents, cache="")
    geometry = model_args(config).geometry
    encoding = encoding_of(config.data, latents, geometry)
    codec = build_codec(latents, where)
    for table, number, source in sources_of(config):
        folder = folder_of(out, table, source)
        shards, listed = indexed(config.data, source, f"{table} #{number} ({source.name})")
        own = [shard.num_samples for shard in shards[rank::num_ranks]]
        counter = SampleCounter(source.name, sum(own))
        writer = CacheWriter(
            config=config.data,
            source=source,
            listed=listed,
            targets=TargetImages(config.data, latents, geometry, [source]),
            codec=codec,
            dtype=getattr(torch, latents.dtype),
            advance=counter.advance,
        )
        writer.write(folder, encoding, shards, rank, num_ranks)
        bad = f", {counter.num_bad} of them bad" if counter.num_bad else ""
        print(f"{folder}: {len(own)} of {len(shards)} shards, {counter.done} samples{bad}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    options, overrides = parser.parse_known_args(arguments)
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    where = torch.device(device.device_type(), local_rank)
    if where.type != "cpu":
        torch.accelerator.set_device_index(where.index)

    def encode() -> None:
        config = load_job_config(["--job.config_file", options.config, *overrides])
        run(config, options.out, rank, int(os.environ.get("WORLD_SIZE", "1")), where)

    return exit_status(
        encode, interrupted=f"interrupted; finished shards are kept in {options.out}"
    )
