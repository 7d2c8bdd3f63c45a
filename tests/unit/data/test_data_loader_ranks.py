"""Loaders of the shipped large configs on 8 to 512 ranks: all rows of a global batch are read, each by one rank."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from symbiotic_titan.build import global_batch_size, with_rows_of_rank
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.loader import PackedLoader, StreamDataset, streams_of_rank
from symbiotic_titan.data.pipeline import build_loader
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.sequence.batch import stack_rows

CONFIGS = Path(__file__).parents[3] / "train_configs"
RANKS = (8, 64, 128, 256, 512)


@pytest.mark.parametrize("name", ["30b_a3b", "qwen3_vl_30b_a3b", "aria_25b", "ernie_vl_28b_a3b"])
def test_every_row_of_a_step_is_read_by_one_rank(name):
    shipped = load_job_config(["--job.config_file", str(CONFIGS / f"{name}.toml")])
    for num_ranks in RANKS:
        config = with_rows_of_rank(shipped, num_ranks)
        total = global_batch_size(config, num_ranks)
        rows, rest = divmod(total // num_ranks, config.training.local_batch_size)
        assert rest == 0 and rows >= 1  # whole micro-batches
        read: Counter[int] = Counter()
        for rank in range(num_ranks):
            streams = streams_of_rank(config.data.num_streams(total), rank, num_ranks)
            # A rank takes its streams in turn: as many rows as it has streams are one row of each.
            assert len(streams) == total // num_ranks
            read.update(streams)
        assert read == Counter(range(total))


@pytest.fixture(scope="module")
def loader_of(demo_world):
    """The loader of one rank of 30b_a3b.toml over the tiny demo world, in short rows and with a short look-ahead."""
    config = load_job_config(["--job.config_file", str(CONFIGS / "30b_a3b.toml")])
    args, training = model_args(config), config.training
    sources = [
        replace(source, path=source.path.replace("demo_data", str(demo_world)))
        for source in config.data.sources
    ]
    data = replace(config.data, sources=sources, max_vae_tokens=256, lookahead=2)
    spec = build_loader(
        data,
        latents=config.latents,
        geometry=args.geometry,
        rotary_layout=args.rotary_layout,
        tokenizer=ByteTokenizer(),
        seq_len=512,
        local_batch_size=1,
        global_batch_size=training.global_batch_size,
    ).spec

    def make(rank, num_ranks):
        return PackedLoader(
            spec,
            streams_of_rank(spec.num_streams, rank, num_ranks),
            min(training.local_batch_size, spec.num_streams // num_ranks),
            num_workers=training.dataloader.num_workers,
            pin_memory=False,
            prefetch_factor=None,
            gather=lambda states: [states],
        )

    return make


@pytest.mark.parametrize(("rank", "num_ranks"), [(511, 512), (254, 256), (127, 128)])
def test_a_rank_reads_its_streams_in_turn_with_as_many_workers_as_they_allow(
    loader_of, rank, num_ranks
):
    """The workers are four, the streams of a rank one, two and four."""
    loader, alone = loader_of(rank, num_ranks), loader_of(rank, num_ranks)
    one_process = iter(StreamDataset(alone.spec, alone.position))
    for batch in islice(loader, 2):
        taken = list(islice(one_process, len(batch.tokens)))
        assert [number for number, _, _ in taken] == list(streams_of_rank(512, rank, num_ranks))
        expected = stack_rows([row for _, row, _ in taken])
        for name, tensor in batch.tensors().items():
            assert torch.equal(tensor, getattr(expected, name))
