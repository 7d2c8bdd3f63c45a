"""From a released model to one whose experts are in groups, and back.

Examples:
  symbiotic convert from-hf --hf Qwen3-VL-30B-A3B-Instruct --out outputs/qwen
  symbiotic profile-experts --config train_configs/mini/vlm.toml --checkpoint outputs/mini/vlm/checkpoint/step-400 --out profile.json
  symbiotic convert plan --profile profile.json --config train_configs/mini/symbiotic.toml --out plan.json
  symbiotic convert partition --checkpoint outputs/mini/vlm/checkpoint/step-400 --config train_configs/mini/symbiotic.toml \\
      --plan plan.json --out outputs/mini/start/24_8
  symbiotic convert check --config train_configs/mini/symbiotic.toml --checkpoint outputs/mini/start/24_8 \\
      --original outputs/mini/vlm/checkpoint/step-400
  symbiotic convert to-hf --checkpoint outputs/mini/symbiotic/checkpoint/step-250 --part whole --out outputs/mini/symbiotic/safetensors

A checkpoint is a training or model-only checkpoint of any number of ranks, the folder of a released model, or what to-hf --part whole
wrote. from-hf writes a checkpoint and beside it model.json, the model's shape, for configs: model.flavor = "outputs/qwen/model.json".
Latent parts are not in a released model; partition makes them, as [latents] says, and a run starts from what it writes.

Groups come from the config's [experts.partition]; further arguments --section.key value override the config.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchtitan.config import TORCH_DTYPE_MAP

from symbiotic_titan.config.files import check_file, write_json
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.hf.export import (
    export_understanding,
    export_whole,
    find_source,
)
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import (
    LEFT_BEHIND,
    SOURCE,
    HuggingFaceModel,
    open_model,
)
from symbiotic_titan.model import model_config as shape_file
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.parallel.ranks import join_ranks
from symbiotic_titan.partition.apply import partition_checkpoint
from symbiotic_titan.partition.command_options import (
    byte_count,
    check_options,
    from_hf_options,
    partition_options,
    plan_options,
    to_hf_options,
)
from symbiotic_titan.partition.evaluate import step_zero_report
from symbiotic_titan.partition.plan import (
    Plan,
    kept_mass,
    make_plan,
)
from symbiotic_titan.partition.preflight import (
    check_apart,
    check_holds_tensors,
    check_original,
    check_release,
)
from symbiotic_titan.partition.profile import (
    Profile,
    too_few_tokens,
)
from symbiotic_titan.partition.tables import (
    better_by_lot,
    conversion_table,
    kept_table,
    parts_table,
    step_zero_table,
)
from symbiotic_titan.process import exit_status, show_progress
from symbiotic_titan.training.checks import check_job
from symbiotic_titan.weights.reader import some_of


def read_config(path: str, overrides: list[str]) -> JobConfig:
    config = load_job_config(["--job.config_file", path, *overrides])
    return config


def files_of(config: JobConfig, *paths: str | None) -> list[str | None]:
    """What is read of a config: its files, and the shape that it names."""
    flavor = config.model.flavor
    return [*paths, flavor if flavor.endswith(".json") else None]


def show_bytes(done: int, total: int) -> None:
    """A progress callback."""
    show_progress(f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB", is_last=done == total)


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
    check_release(options.hf)
    check_apart(options.out, [options.hf])
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
        print(
            f"left behind, as the network has no such part; {SOURCE}/{LEFT_BEHIND} keeps it for to-hf:\n{parts_table(stored.left_behind)}"
        )
    shape = options.out / shape_file.NAME
    print(
        f"written to {options.out}; next, as a run needs the latent parts too:\n  symbiotic convert partition "
        f"--checkpoint {options.hf if options.shape_only else options.out} --config CONFIG --out START\n"
        f'where CONFIG has model.flavor = "{shape}"; it trains from START'
    )


# ---- to-hf ----------------------------------------------------------------------------------------------------------------


def to_hf(options: argparse.Namespace, overrides: list[str]) -> None:
    check_holds_tensors(options.checkpoint, "--checkpoint")
    args, flavor, sources = exported_shape(options, overrides)
    check_apart(options.out, [options.checkpoint, *sources])
    stored = open_model(options.checkpoint)
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
            source = find_source(options.checkpoint, flavor)
            export = export_understanding(stored, args, source, options.out, **settings)
    parameters = sum(kind.num_values for kind in export.written.values())
    print(f"{len(export.written):,} tensors, {parameters:,} parameters")
    if export.left_out:
        print(f"left out:\n{parts_table(export.left_out)}")
    print(f"written to {options.out}")
    if export.missing:
        print(
            f"warning: the release has {some_of(export.missing)}, which have no part in our network and are not written: nobody kept "
            "them, or they are a layer with another number of experts",
            file=sys.stderr,
        )


def exported_shape(
    options: argparse.Namespace, overrides: list[str]
) -> tuple[ModelArgs, str, list[str | None]]:
    """(the model's shape, its flavor, the files it was read from). Without --config the checkpoint's own, or its run's config."""
    shape = options.checkpoint / shape_file.NAME
    if options.config is None and shape.is_file():
        if overrides:
            raise ValueError(
                f"{shape} has the model's shape, so there is no use for {' '.join(overrides)} without --config"
            )
        return shape_file.read_model_config(shape), "", []
    path = options.config or str(saved_config(options.checkpoint))
    config = read_config(path, overrides)
    return model_args(config), config.model.flavor, files_of(config, path)


# ---- plan -----------------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace, overrides: list[str]) -> None:
    config = read_config(options.config, overrides)
    if not config.experts.partition and not config.experts.new_shared_experts:
        raise ValueError(
            f"{options.config} has no [experts.partition], so there are no groups to plan; use the config of the partitioned model"
        )
    check_apart(options.out, files_of(config, options.config, options.profile))
    check_file(options.out, "--out")
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
    check_holds_tensors(options.checkpoint, "--checkpoint")
    sources = files_of(config, options.config, options.plan)
    check_apart(options.out, [options.checkpoint, *sources])
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
    check_folders(options)
    if options.json is not None:
        check_apart(
            options.json, files_of(config, options.config, options.original_config), "--json"
        )
        check_file(options.json, "--json")
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
        shares = report.layers, report.inside, report.equal
        print(step_zero_table(report.columns, report.differences, *shares))
        if options.json is not None:
            write_json(options.json, "step zero report", report.values())


def check_folders(options: argparse.Namespace) -> None:
    check_holds_tensors(options.checkpoint, "--checkpoint")
    if options.original is not None:
        check_holds_tensors(options.original, "--original")
        check_original(options.checkpoint, options.original)


# ---- command line ---------------------------------------------------------------------------------------------------------


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


def check_processes(function: Any) -> None:
    """Pass if as many processes run as the command has work for: only check divides its rows among several."""
    if function is not check and (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        name = function.__name__.replace("_", "-")
        raise ValueError(
            f"{name} runs in one process, got WORLD_SIZE = {size}; start it without torchrun"
        )


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parser().parse_known_args(arguments)

    def run() -> None:
        check_processes(options.function)
        options.function(options, overrides)

    kept = f"; nothing of {options.out} was kept" if "out" in options else ""
    return exit_status(run, interrupted=f"interrupted{kept}")
