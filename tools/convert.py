#!/usr/bin/env python3
"""From a checkpoint whose experts are one pool to one whose experts are in groups.

Examples:
  tools/profile_experts.py --config train_configs/mini/vlm.toml --checkpoint outputs/mini/vlm/checkpoint/step-400 --out profile.json
  tools/convert.py plan --profile profile.json --config train_configs/mini/symbiotic.toml --out plan.json
  tools/convert.py partition --checkpoint outputs/mini/vlm/checkpoint/step-400 --config train_configs/mini/symbiotic.toml \\
      --plan plan.json --out outputs/mini/start/24_8
  tools/convert.py check --config train_configs/mini/symbiotic.toml --checkpoint outputs/mini/start/24_8 \\
      --original outputs/mini/vlm/checkpoint/step-400

Groups come from the config's [experts.partition]; further arguments --section.key value override the config.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs without an installation

from symbiotic_titan import device

device.prepare()

import torch.distributed as dist  # noqa: E402

from symbiotic_titan.checkpoint.partition import partition_checkpoint  # noqa: E402
from symbiotic_titan.checkpoint.plan import (  # noqa: E402
    PARTITION_RULES,
    KeptMass,
    Plan,
    kept_mass,
    make_plan,
)
from symbiotic_titan.checkpoint.profile import Profile, too_few_tokens  # noqa: E402
from symbiotic_titan.checks import check_job  # noqa: E402
from symbiotic_titan.config.job import JobConfig  # noqa: E402
from symbiotic_titan.config.load import load_job_config  # noqa: E402
from symbiotic_titan.extend import import_extension  # noqa: E402
from symbiotic_titan.inference import join_ranks, model_args  # noqa: E402
from symbiotic_titan.retention import StepZeroReport, step_zero_report  # noqa: E402


def read_config(path: str, overrides: list[str]) -> JobConfig:
    config = load_job_config(["--job.config_file", path, *overrides])
    import_extension(config)
    return config


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


# ---- plan -----------------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace, overrides: list[str]) -> None:
    config = read_config(options.config, overrides)
    if not config.experts.partition:
        raise ValueError(
            f"{options.config} has no [experts.partition], so there are no groups to plan; use the config of the partitioned model"
        )
    args = model_args(config)
    profile = Profile.load(options.profile)
    rule = options.rule or config.experts.partition_rule
    made = make_plan(profile, args.groups, rule, options.seed)
    kept = kept_mass(profile, made)
    made.save(options.out, {"profile": str(options.profile), "kept": [vars(row) for row in kept]})
    print_kept(made, kept)
    if warning := too_few_tokens(profile):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"\nwritten to {options.out}")


def print_kept(made: Plan, kept: list[KeptMass]) -> None:
    groups = " + ".join(f"{group.name} {group.num_experts}" for group in made.groups)
    print(f"{groups} experts in {len(made.layers)} layers by the rule {made.rule!r}\n")
    print("routed mass that stays inside the modality's group")
    for row in kept:
        where = f" ({row.worst_layer})" if row.worst_layer else ""
        print(
            f"  {row.modality:5s} mean over layers {percent(row.mean):>8s}   worst {percent(row.worst):>8s}{where}"
            f"   by lot {percent(row.by_lot):>8s}"
        )
    worse = [row.modality for row in kept if row.mean is not None and row.mean < row.by_lot]
    if worse:
        print(
            f"warning: a split by lot would keep more of {', '.join(worse)}; try another --rule: "
            f"{', '.join(PARTITION_RULES)}",
            file=sys.stderr,
        )


# ---- partition ------------------------------------------------------------------------------------------------------------


def partition(options: argparse.Namespace, overrides: list[str]) -> None:
    config = read_config(options.config, overrides)
    made = None if options.plan is None else Plan.load(options.plan)
    conversion = partition_checkpoint(
        options.checkpoint, model_args(config), made, options.out, overwrite=options.overwrite
    )
    print_table(conversion.rows())
    totals = conversion.totals()
    print(
        f"\nparameters: {totals['before']:,} before, {totals['after']:,} after "
        f"(copied {totals['copied']:,}, sliced {totals['sliced']:,}, new {totals['new']:,}, dropped {totals['dropped']:,})"
    )
    print(f"written to {options.out}; a run starts from it with checkpoint.initial_load_path")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Copied tensors by the part of the model they are in, others by name."""
    lines: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        part = row["tensor"].split(".")[0] + ".*"
        line = lines.setdefault(
            (row["what"], part if row["what"] == "copied" else row["tensor"]), [0, 0]
        )
        line[0] += row["tensors"]
        line[1] += row["parameters"]
    width = max(len(name) for _, name in lines)
    for what, name in sorted(lines, key=lambda line: line[0]):
        tensors, parameters = lines[what, name]
        print(f"  {what:8s}{name:{width}s}  x {tensors:<5d}{parameters:>16,}")


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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="{plan,partition,check}")

    def command(function: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(function.__name__, help=text, description=text)
        made.set_defaults(function=function)
        made.add_argument("--config", required=True, help="TOML file with [experts.partition]")
        return made

    one = command(plan, "which expert of each layer goes to which group, from a profile")
    one.add_argument("--profile", required=True, type=Path, help="file of tools/profile_experts.py")
    one.add_argument("--out", required=True, type=Path, help="file to write")
    one.add_argument(
        "--rule",
        help=f"instead of experts.partition_rule; ours: {', '.join(PARTITION_RULES)}",
    )
    one.add_argument("--seed", type=int, default=0, help="of rules that draw lots")

    one = command(
        partition, "write the checkpoint with its experts in groups, or without the shared expert"
    )
    one.add_argument("--checkpoint", required=True, type=Path, help="checkpoint to start from")
    one.add_argument("--plan", type=Path, help="file of the command plan")
    one.add_argument("--out", required=True, type=Path, help="checkpoint to write")
    one.add_argument("--overwrite", action="store_true", help="replace --out if it exists")

    one = command(check, "losses and accuracies of a partitioned checkpoint beside the original's")
    one.add_argument("--checkpoint", required=True, type=Path, help="partitioned checkpoint")
    one.add_argument("--original", type=Path, help="checkpoint before that")
    one.add_argument(
        "--original-config", help="its config; default: --config without [experts.partition]"
    )
    one.add_argument("--batches", type=int, default=25, help="batches each process reads")
    one.add_argument(
        "--split",
        choices=("train", "validation"),
        help="default: validation where the config has [[validation.sources]]",
    )
    one.add_argument("--json", type=Path, help="also write the report to this file")
    return top


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
