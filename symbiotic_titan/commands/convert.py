"""From a released model to one whose experts are in groups, and back.

Examples:
  symbiotic convert from-hf --hf Qwen3-VL-30B-A3B-Instruct --out outputs/qwen
  symbiotic convert tokenizer --vocabulary Hunyuan-A13B-Instruct/hy.tiktoken --out Hunyuan-A13B-Instruct/tokenizer.json
  symbiotic profile-experts --config train_configs/study/vlm.toml \\
      --checkpoint outputs/reproduce/seed-0/vlm/checkpoint/step-400 --out profile.json
  symbiotic convert plan --profile profile.json --config train_configs/study/symbiotic.toml --out plan.json
  symbiotic convert partition --checkpoint outputs/reproduce/seed-0/vlm/checkpoint/step-400 --config train_configs/study/symbiotic.toml \\
      --plan plan.json --out outputs/reproduce/seed-0/start/24_8
  symbiotic convert check --config train_configs/study/symbiotic.toml --checkpoint outputs/reproduce/seed-0/start/24_8 \\
      --original outputs/reproduce/seed-0/vlm/checkpoint/step-400
  symbiotic convert to-hf --checkpoint outputs/reproduce/seed-0/symbiotic/checkpoint/step-450 --part whole --out outputs/safetensors

A checkpoint is a distributed checkpoint saved by any number of ranks, the folder of a released model, or the output of to-hf --part
whole. from-hf writes a checkpoint with model.json, the model's config: model.flavor = "outputs/qwen/model.json" uses it. A released
model has no latent parts; partition adds them, as [latents] says, and a run starts from its output.

Groups come from the config's [experts.partition]. Further arguments --section.key value override the config; from-hf, which reads
none, takes --experimental.custom_import MODULE for an architecture that MODULE registers.
"""

import argparse
import os
import sys
from typing import Any

from symbiotic_titan.commands.convert_options import (
    check_options,
    files_of,
    from_hf_options,
    measured,
    partition_options,
    plan_options,
    read_config,
    showing_bytes,
    to_hf_options,
    tokenizer_options,
)
from symbiotic_titan.commands.convert_release import from_hf, tokenizer
from symbiotic_titan.commands.convert_to_hf import to_hf
from symbiotic_titan.config.files import check_file, write_json
from symbiotic_titan.hf.model import (
    check_holds_tensors,
)
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.parallel.ranks import join_ranks
from symbiotic_titan.partition.apply import (
    check_original,
    partition_checkpoint,
)
from symbiotic_titan.partition.conversion import (
    conversion_table,
)
from symbiotic_titan.partition.evaluate import (
    step_zero_report,
    step_zero_table,
)
from symbiotic_titan.partition.plan import (
    Plan,
    make_plan,
    retained_mass_table,
    retained_routing_mass,
    worse_than_random,
)
from symbiotic_titan.partition.profile import (
    Profile,
    too_few_tokens,
)
from symbiotic_titan.process import exit_status
from symbiotic_titan.training.checks import check_job
from symbiotic_titan.weights.new_folder import check_apart

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
    rows = config.experts.partition
    made = make_plan(profile, args.groups, rule, options.seed, num_shared, rows)
    retained = retained_routing_mass(profile, made)
    kept = [row.values() for row in retained]
    made.save(options.out, {"profile": str(options.profile), "kept": kept})
    print(retained_mass_table(made, retained))
    if warning := worse_than_random(retained):
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
            rows=config.experts.partition,
            overwrite=options.overwrite,
            progress=showing_bytes(),
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
    check_job(config, is_training=False)
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
    commands = top.add_subparsers(
        required=True, metavar="{from-hf,tokenizer,plan,partition,check,to-hf}"
    )

    def command(function: Any, text: str) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(function=function)
        return made

    from_hf_options(command(from_hf, "write a released model as a checkpoint"))
    tokenizer_options(command(tokenizer, "make the tokenizer.json of a tiktoken vocabulary"))
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
    """Pass unless several processes run a command other than check, the only one that is distributed."""
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
