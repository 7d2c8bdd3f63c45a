#!/usr/bin/env python3
"""From a released model to one whose experts are in groups, and back.

Examples:
  tools/convert.py from-hf --hf Qwen3-VL-30B-A3B-Instruct --out outputs/qwen
  tools/profile_experts.py --config train_configs/mini/vlm.toml --checkpoint outputs/mini/vlm/checkpoint/step-400 --out profile.json
  tools/convert.py plan --profile profile.json --config train_configs/mini/symbiotic.toml --out plan.json
  tools/convert.py partition --checkpoint outputs/mini/vlm/checkpoint/step-400 --config train_configs/mini/symbiotic.toml \\
      --plan plan.json --out outputs/mini/start/24_8
  tools/convert.py check --config train_configs/mini/symbiotic.toml --checkpoint outputs/mini/start/24_8 \\
      --original outputs/mini/vlm/checkpoint/step-400
  tools/convert.py to-hf --checkpoint outputs/mini/symbiotic/checkpoint/step-250 --part whole --out outputs/mini/symbiotic/safetensors

A checkpoint is a training or model-only checkpoint of any number of ranks, the folder of a released model, or what to-hf --part whole
wrote. from-hf writes a checkpoint and beside it model.json, the model's shape: model.flavor = "outputs/qwen/model.json" trains it.
Latent parts are not in a released model; partition makes them, as [latents] says.

Groups come from the config's [experts.partition]; further arguments --section.key value override the config.
"""

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs without an installation

from symbiotic_titan import device

device.prepare()

import torch.distributed as dist  # noqa: E402
from torchtitan.config import TORCH_DTYPE_MAP  # noqa: E402

from symbiotic_titan.checkpoint.export import (  # noqa: E402
    export_understanding,
    export_whole,
    find_source,
)
from symbiotic_titan.checkpoint.hugging_face import HuggingFaceModel  # noqa: E402
from symbiotic_titan.checkpoint.imports import import_model  # noqa: E402
from symbiotic_titan.checkpoint.open_model import open_model  # noqa: E402
from symbiotic_titan.checkpoint.partition import partition_checkpoint  # noqa: E402
from symbiotic_titan.checkpoint.plan import (  # noqa: E402
    PARTITION_RULES,
    Plan,
    kept_mass,
    make_plan,
)
from symbiotic_titan.checkpoint.profile import Profile, too_few_tokens  # noqa: E402
from symbiotic_titan.checkpoint.stored_model import some_of  # noqa: E402
from symbiotic_titan.checkpoint.tables import (  # noqa: E402
    better_by_lot,
    conversion_table,
    kept_table,
    parts_table,
    percent,
)
from symbiotic_titan.checks import check_job  # noqa: E402
from symbiotic_titan.config.job import JobConfig  # noqa: E402
from symbiotic_titan.config.load import load_job_config  # noqa: E402
from symbiotic_titan.config.saved import saved_config  # noqa: E402
from symbiotic_titan.extend import import_extension  # noqa: E402
from symbiotic_titan.inference import join_ranks, model_args  # noqa: E402
from symbiotic_titan.model import shape_file  # noqa: E402
from symbiotic_titan.retention import StepZeroReport, step_zero_report  # noqa: E402


def read_config(path: str, overrides: list[str]) -> JobConfig:
    config = load_job_config(["--job.config_file", path, *overrides])
    import_extension(config)
    return config


def show_bytes(done: int, total: int) -> None:
    """A counter on standard error where somebody watches."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        text = f"\r{done / 2**30:.2f} of {total / 2**30:.2f} GiB"
        print(text, end=end, file=sys.stderr, flush=True)


@contextmanager
def measured() -> Iterator[None]:
    """Prints what the block took, if it ends well."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"took {seconds:.1f} s, peak memory {peak / 2**30:.2f} GiB")


# ---- from-hf --------------------------------------------------------------------------------------------------------------


def from_hf(options: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"from-hf reads no config, so it has no use for {' '.join(overrides)}")
    with measured():
        stored = HuggingFaceModel(options.hf)
        import_model(
            stored,
            options.out,
            dtype=TORCH_DTYPE_MAP[options.dtype] if options.dtype else None,
            shape_only=options.shape_only,
            overwrite=options.overwrite,
            watch=show_bytes,
        )
    args = stored.args
    print(
        f"{stored.backbone.model_type}: {args.num_layers} layers, {args.num_experts} experts, top-{args.top_k}, "
        f"{sum(kind.num_values for kind in stored.tensors.values()):,} parameters"
    )
    print(parts_table(stored.tensors))
    if stored.left_behind:
        print(f"left behind, as the network has no such part:\n{parts_table(stored.left_behind)}")
    shape = options.out / shape_file.NAME
    print(f'written to {options.out}; a config trains the model with model.flavor = "{shape}"')


# ---- to-hf ----------------------------------------------------------------------------------------------------------------


def to_hf(options: argparse.Namespace, overrides: list[str]) -> None:
    config = read_config(options.config or str(saved_config(options.checkpoint)), overrides)
    stored, args = open_model(options.checkpoint), model_args(config)
    settings: dict[str, Any] = {
        "shard_bytes": byte_count(options.shard_size),
        "dtype": TORCH_DTYPE_MAP[options.dtype] if options.dtype else None,
        "overwrite": options.overwrite,
        "watch": show_bytes,
    }
    with measured():
        if options.part == "whole":
            export = export_whole(stored, args, options.out, **settings)
        else:
            source = find_source(options.checkpoint, config.model.flavor)
            export = export_understanding(stored, args, source, options.out, **settings)
    parameters = sum(kind.num_values for kind in export.written.values())
    print(f"{len(export.written):,} tensors, {parameters:,} parameters")
    if export.left_out:
        print(f"left out:\n{parts_table(export.left_out)}")
    print(f"written to {options.out}")
    if export.missing:
        print(
            f"warning: the release has {some_of(export.missing)}, which have no part in our network and are not written; whoever "
            "loads the folder must bring them",
            file=sys.stderr,
        )


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def byte_count(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB.

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B", text)
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if size == 0:
        raise ValueError(f"--shard-size: must be a size such as 5GB or 500MB, got {text!r}")
    return size


# ---- plan -----------------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace, overrides: list[str]) -> None:
    config = read_config(options.config, overrides)
    if not config.experts.partition and not config.experts.new_shared_experts:
        raise ValueError(
            f"{options.config} has no [experts.partition], so there are no groups to plan; use the config of the partitioned model"
        )
    args = model_args(config)
    profile = Profile.load(options.profile)
    rule = options.rule or config.experts.partition_rule
    num_shared = config.experts.new_shared_experts
    made = make_plan(profile, args.groups, rule, options.seed, num_shared)
    kept = kept_mass(profile, made)
    made.save(options.out, {"profile": str(options.profile), "kept": [vars(row) for row in kept]})
    print(kept_table(made, kept))
    if warning := better_by_lot(kept):
        print(f"warning: {warning}", file=sys.stderr)
    if warning := too_few_tokens(profile):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"\nwritten to {options.out}")


# ---- partition ------------------------------------------------------------------------------------------------------------


def partition(options: argparse.Namespace, overrides: list[str]) -> None:
    config = read_config(options.config, overrides)
    made = None if options.plan is None else Plan.load(options.plan)
    with measured():
        conversion = partition_checkpoint(
            options.checkpoint,
            model_args(config),
            made,
            options.out,
            overwrite=options.overwrite,
            watch=show_bytes,
        )
    print(conversion_table(conversion))
    print(f"written to {options.out}; a run starts from it with checkpoint.initial_load_path")


# ---- check ----------------------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.batches < 1:
        raise ValueError(f"--batches: must be at least 1, got {options.batches}")
    config = read_config(options.config, overrides)
    original = None
    if options.original_config is not None:
        if options.original is None:
            raise ValueError("--original-config has no effect without --original")
        original = read_config(options.original_config, overrides)
    check_job(config)
    ranks = join_ranks(config)
    report = step_zero_report(
        config,
        options.checkpoint,
        ranks,
        original_config=original,
        original=options.original,
        split=options.split,
        num_batches=options.batches,
    )
    if ranks.rank == 0:
        print_report(report)
        if options.json is not None:
            options.json.write_text(json.dumps(report.values(), indent=1) + "\n", encoding="utf-8")


def print_report(report: StepZeroReport) -> None:
    columns = report.columns
    print("  " + " " * 22 + "".join(name.rjust(14) for name in columns) + "    difference")
    names = dict.fromkeys(name for values in columns.values() for name in values)
    for name in names:
        cells = "".join(f"{values[name]:14.4f}" for values in columns.values())
        difference = report.differences.get(name)
        print(
            f"  {name:22s}{cells}" + ("" if difference is None else f"{100 * difference:+12.2f} %")
        )
    if not report.inside:
        return
    print("\nshare of tokens whose top-k stays inside the group")
    for i, layer in enumerate(report.layers):
        shares = "  ".join(f"{name} {percent(v[i]):>8s}" for name, v in report.inside.items())
        print(f"  {layer:10s} {shares}")
    means = {name: sum(v) / len(v) for name, v in report.inside.items()}
    print(f"  {'mean':10s} " + "  ".join(f"{name} {percent(v):>8s}" for name, v in means.items()))


# ---- command line ---------------------------------------------------------------------------------------------------------


_PARTITIONED = "TOML file with [experts.partition]"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="{from-hf,plan,partition,check,to-hf}")

    def command(function: Any, text: str) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(function=function)
        return made

    from_hf_options(command(from_hf, "write a released model as a checkpoint"))
    plan_options(command(plan, "which expert of each layer goes to which group, from a profile"))
    partition_options(
        command(
            partition,
            "write the checkpoint with its experts in groups, or without the shared expert",
        )
    )
    check_options(
        command(check, "losses and accuracies of a partitioned checkpoint beside the original's")
    )
    to_hf_options(command(to_hf, "write a checkpoint as safetensors"))
    return top


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
        help="write model.json without tensors: the other commands read them from the folder",
    )


def plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help=_PARTITIONED)
    command.add_argument(
        "--profile", required=True, type=Path, help="file of tools/profile_experts.py"
    )
    command.add_argument("--out", required=True, type=Path, help="file to write")
    command.add_argument(
        "--rule", help=f"instead of experts.partition_rule; ours: {', '.join(PARTITION_RULES)}"
    )
    command.add_argument("--seed", type=int, default=0, help="of rules that draw lots")


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
        help="what text and ViT tokens use, as a model of the backbone; or all, for our own loader",
    )
    model_out_options(command, "folder")
    dtype_option(command)
    command.add_argument("--shard-size", default="5GB", help="largest file; default: 5GB")


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parser().parse_known_args(arguments)
    try:
        options.function(options, overrides)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
