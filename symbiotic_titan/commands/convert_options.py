"""What the commands of symbiotic convert share: their options, reading configs, showing progress."""

import argparse
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from symbiotic_titan.config.experts import PARTITION_RULES
from symbiotic_titan.config.extension import import_extension
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.optimizer import WEIGHTS
from symbiotic_titan.process import ProgressLine
from symbiotic_titan.weights.reader import ProgressCallback

_PARTITIONED = "TOML file with [experts.partition]"


def model_out_options(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--out", required=True, type=Path, help=f"{what} to write")
    command.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def dtype_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored"
    )


def from_hf_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hf", required=True, type=Path, help="folder with config.json and safetensors"
    )
    model_out_options(command, "checkpoint")
    dtype_option(command)
    command.add_argument(
        "--shape-only",
        action="store_true",
        help="write model.json without the model's tensors: the other commands read them from the folder",
    )
    command.add_argument(
        "--spare-rows",
        type=int,
        default=0,
        metavar="N",
        help="add at least N embeddings, up to a multiple of 64, for special tokens that the tokenizer lacks; each is the mean of the "
        "others (default: 0)",
    )


def tokenizer_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vocabulary",
        required=True,
        type=Path,
        help="tiktoken file: a token in base64 and its rank per line",
    )
    command.add_argument("--out", required=True, type=Path, help="tokenizer.json to write")
    command.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    command.add_argument(
        "--pattern",
        help="regular expression that splits a text before the merges, which is in the release's Python code; default: by the file's "
        "name",
    )


def plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help=_PARTITIONED)
    command.add_argument(
        "--profile", required=True, type=Path, help="file of symbiotic profile-experts"
    )
    command.add_argument("--out", required=True, type=Path, help="file to write")
    command.add_argument(
        "--rule", help=f"instead of experts.partition_rule; ours: {', '.join(PARTITION_RULES)}"
    )
    command.add_argument("--seed", type=int, default=0, help="of rules that use random numbers")


def partition_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help=_PARTITIONED)
    command.add_argument("--checkpoint", required=True, type=Path, help="checkpoint to start from")
    command.add_argument("--plan", type=Path, help="file of the command plan")
    model_out_options(command, "checkpoint")


def check_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help=_PARTITIONED)
    command.add_argument("--checkpoint", required=True, type=Path, help="partitioned checkpoint")
    command.add_argument("--original", type=Path, help="checkpoint before that")
    command.add_argument(
        "--original-config", help="its config; default: --config without [experts.partition]"
    )
    command.add_argument("--batches", type=int, default=25, help="batches each process reads")
    command.add_argument(
        "--split",
        choices=("train", "validation"),
        help="default: validation where the config has [[validation.sources]]",
    )
    command.add_argument("--json", type=Path, help="also write the report to this file")


def to_hf_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", help="TOML file; default: the config that its run kept")
    command.add_argument("--checkpoint", required=True, type=Path, help="checkpoint to write")
    command.add_argument(
        "--part",
        choices=("understanding", "whole"),
        required=True,
        help="what text and ViT tokens use, as a model of the released architecture; or all, for our own loader",
    )
    command.add_argument(
        "--release",
        type=Path,
        help="the released model, or a checkpoint made from it, with its config, tokenizer and processor; default: the checkpoint, "
        "the model.json of its flavor, or what its run started from",
    )
    command.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="trained",
        help="ema: the average that the run kept, float32 unless --dtype says otherwise",
    )
    model_out_options(command, "folder")
    dtype_option(command)
    command.add_argument("--shard-size", default="5GB", help="largest file; default: 5GB")


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def byte_count(text: str) -> int:
    """The number of bytes in a size such as 5GB or 500MB.

    Raises:
        ValueError: ``text`` is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B", text)
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if size == 0:
        raise ValueError(f"--shard-size: must be a size such as 5GB or 500MB, got {text!r}")
    return size


def without_extension(overrides: list[str]) -> list[str]:
    """Import the module of ``--experimental.custom_import``, where no config is read; returns the other overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--experimental.custom_import", dest="module", default="")
    options, others = parser.parse_known_args(overrides)
    if options.module:
        import_extension(options.module)
    return others


def read_config(path: str, overrides: list[str]) -> JobConfig:
    return load_job_config(["--job.config_file", path, *overrides])


def files_of(config: JobConfig, *paths: str | None) -> list[str | None]:
    """The files that a command reads: ``paths``, and the model.json that a config names."""
    flavor = config.model.flavor
    return [*paths, flavor if flavor.endswith(".json") else None]


def showing_bytes() -> ProgressCallback:
    """A progress callback, for one model."""
    line = ProgressLine()

    def show(done: int, total: int) -> None:
        text = f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB, {line.left(done, total)}"
        line.show(text, is_last=done == total)

    return show


@contextmanager
def measured() -> Iterator[None]:
    """Prints the block's time and peak memory, unless it fails."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    # ru_maxrss is in kilobytes, on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"took {seconds:.1f} s, peak memory {peak / 2**30:.2f} GiB")
