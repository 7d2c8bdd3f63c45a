"""Count how often text and ViT tokens choose each expert of a checkpoint; symbiotic convert plans a partition from the counts.

Example: symbiotic profile-experts --config train_configs/study/vlm.toml \\
             --checkpoint outputs/reproduce/seed-0/vlm/checkpoint/step-400 --out profile.json

The checkpoint runs without gradients over the config's sources of text (task lm) and of questions about images (task mmu), mixed
and packed as in training. Sources of target images are left out, as their tokens are not profiled. For every layer it prints the
imbalance ratio (fullest expert / mean), the relative standard deviation, and how many of the most and of the least used experts
text and ViT share. torchrun divides the batches among processes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.files import check_file
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.hf.release_files import RELEASE_FILES
from symbiotic_titan.inference.held_out import (
    packed_batches,
    understanding_data,
)
from symbiotic_titan.inference.loaded_model import LoadedModel
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.parallel.ranks import join_ranks
from symbiotic_titan.partition.evaluate import (
    describe_data,
    lacks_encoder,
    profile_model,
    unpartitioned,
)
from symbiotic_titan.partition.profile import (
    Profile,
    layer_statistics,
    too_few_tokens,
)
from symbiotic_titan.process import Counter
from symbiotic_titan.sequence.tasks import TASKS
from symbiotic_titan.training.checks import check_job
from symbiotic_titan.weights.compatibility import router_groups
from symbiotic_titan.weights.reader import CheckpointReader

# Names of the vocabulary file in releases.
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json")


def tokenizer_file(checkpoint: Path) -> Path | None:
    """The vocabulary file of the released model that a checkpoint is or came from, if any."""
    found = (
        path
        for folder in (checkpoint, checkpoint / RELEASE_FILES)
        for pattern in _TOKENIZERS
        for path in sorted(folder.glob(pattern))
    )
    return next(found, None)


def warnings_for(config: JobConfig, reader: CheckpointReader, data: Data) -> list[str]:
    """Reasons, known before any token is read, why the profile will be of little use."""
    warnings = []
    file = tokenizer_file(reader.folder)
    if config.tokenizer.kind == "bytes" and file is not None:
        warnings.append(
            f"{reader.folder} has a tokenizer, {file}, but tokenizer.kind = 'bytes' reads text as tokens that the model does not "
            "know; set tokenizer.kind and tokenizer.path to that of the model"
        )
    if lacks_encoder(reader) and any(
        row.weight > 0 and TASKS[row.task].has_images for row in data.sources
    ):
        warnings.append(
            f"{reader.folder} has no vit.* tensors: images pass an untrained encoder, so ViT tokens are not counted and experts "
            "rank by text alone; sources of task lm suffice"
        )
    return warnings


def run(options: argparse.Namespace, overrides: list[str]) -> Profile | None:
    """Write and return the profile; None on all processes but the first.

    Raises:
        ValueError: an option, the config or the checkpoint is wrong.
    """
    if options.batches < 1:
        raise ValueError(f"--batches: must be at least 1, got {options.batches}")
    check_file(options.out, "--out")
    config = load_job_config(["--job.config_file", options.config, *overrides])
    reader = open_model(options.checkpoint)
    if router_groups(reader.tensors) == {g.name for g in FLAVORS[config.model.flavor].groups}:
        config = unpartitioned(config)  # --config may already describe the partitioned model
    check_job(config, is_training=False)
    ranks = join_ranks(config)
    data = understanding_data(config, options.split)
    for warning in warnings_for(config, reader, data) if ranks.rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    loaded = LoadedModel(config, options.checkpoint, ranks)
    batches = packed_batches(config, data, options.batches, ranks, options.split)
    rows = options.batches * config.training.local_batch_size * ranks.size
    profile = profile_model(
        loaded,
        config,
        Counter("batches", options.batches).over(batches),
        describe_data(config, data, options.split, rows),
        ranks,
    )
    if ranks.rank != 0:
        return None
    profile.save(options.out)
    return profile


def print_profile(profile: Profile) -> None:
    read = ", ".join(f"{count:,} {name}" for name, count in profile.tokens.items() if count)
    model = profile.model
    pools = [
        f"top-{model.top_k_of(name)} of {size}{'' if len(model.groups) == 1 else f' {name}'}"
        for name, size in model.groups.items()
    ]
    print(f"{read} tokens, {' + '.join(pools)} experts\n")
    rows = layer_statistics(profile)
    names = list(rows[0])
    print("  ".join(name.rjust(max(len(name), 9)) for name in names))
    for row in rows:
        print("  ".join(cell(row[name]).rjust(max(len(name), 9)) for name in names))


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        help="TOML file of the checkpoint's config, or of the partitioned model that will be made from it",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="its folder, .../step-N, or that of a released model",
    )
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--batches", type=int, default=50, help="batches each process reads")
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="[[data.sources]] or [[validation.sources]]",
    )
    options, overrides = parser.parse_known_args(arguments)
    try:
        profile = run(options, overrides)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if profile is not None:
        print_profile(profile)
        if warning := too_few_tokens(profile):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"\nwritten to {options.out}")
    return 0
