#!/usr/bin/env python3
"""Tokens per second of a training config on this machine, the share of a step's time that each part takes, and comparisons of steps.

    tools/bench/step.py train_configs/debug.toml train_configs/mini.toml --steps 10
    tools/bench/step.py train_configs/mini.toml --compare
    tools/bench/step.py train_configs/debug.toml train_configs/mini.toml --against d603279 --against transformers

The real trainer runs on the config's data, without checkpoints, logs, validation and sample grids. Options of the config may follow, as
for training: --training.mixed_precision_param float32.

Without --compare and --against parts are timed by hooks in the forward and the backward pass, in a compiled model too, so a part's
time is forward plus backward (step_shares.py). On a GPU the hooks are its own events, which do not make it wait. ``routing`` is the MoE
layers without their experts: router, dispatch and combine. ``other`` is what no hook covers: embeddings, heads, losses. With --compare
several trainers of one config take their steps in turn.

--against GITREF: the step of this checkout against that of another commit (step_commits.py). --against transformers: a step of the
whole model against transformers' with equal weights, at three shapes (step_transformers.py).

Tables, then one JSON line. Results of a config are under its name. Beside them, as far as they were asked for:
  step_speedup_NAME  seconds of the other commit's step of this config / ours
  share_of_dense     config -> seconds of plain matmuls with the FLOPs of the step / the step's seconds (step_dense.py)
  over_transformers  shape -> seconds of transformers' step / ours; ``transformers`` has the details
Ratios are medians over rounds of the ratio within a round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_timing import (
    WAITING,
    add_device_option,
    default_device,
    interleave,
    machine,
    ratio,
    restart_with,
    summary,
    use_device,
)
from step_child import make_trainer, register, stepper
from step_commits import Rounds, commit_of, compare_commits, print_commits
from step_shares import measure, print_shares
from step_transformers import (
    ENVIRONMENT,
    SHAPES,
    check_installed,
    compare_transformers,
    print_transformers,
    shape_of,
)

from symbiotic_titan.process import MISTAKE, raised_by_us

TRANSFORMERS = "transformers"


def compare(
    config_file: str,
    variants: dict[str, list[str]],
    *,
    steps: int,
    warmup: int,
    overrides: list[str],
) -> dict[str, Any]:
    """Median step of every variant, their steps taken in turn, and its ratio to the first variant's."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: make_trainer(config_file, f"{folder}/{name}", steps + warmup, overrides + extra)
            for name, extra in variants.items()
        }
        times = interleave(
            {name: stepper(trainer) for name, trainer in trainers.items()},
            repeats=steps,
            warmup=warmup,
        )
        for trainer in trainers.values():
            trainer.close()
    first = next(iter(variants))
    ratios = {f"{name}_over_{first}": round(ratio(times, name, first), 3) for name in variants}
    del ratios[f"{first}_over_{first}"]
    if {"ac_per_op", "ac_full"} <= times.keys():
        ratios["ac_per_op_over_ac_full"] = round(ratio(times, "ac_per_op", "ac_full"), 3)
    return {**ratios, "times": {name: summary(seconds) for name, seconds in times.items()}}


NO_AC = ["--activation_checkpoint.mode", "none"]
ONE_PROCESS = {
    "eager": NO_AC,
    "compiled": [*NO_AC, "--compile.enable"],
    "ac_full": ["--activation_checkpoint.mode", "full"],
    "ema": [*NO_AC, "--ema.enable"],
    "ac_per_op": [
        *("--activation_checkpoint.mode", "selective"),
        *("--activation_checkpoint.selective_ac_option", "op"),
    ],
}
TWO_PROCESSES = {
    "fsdp2": NO_AC,
    "fsdp2_ema": [*NO_AC, "--ema.enable"],
    "ep2": [*NO_AC, "--parallelism.expert_parallel_degree", "2"],
}


def chosen(every: dict[str, list[str]], names: list[str]) -> dict[str, list[str]]:
    """The variants of these ``names``; all where none is named."""
    return {name: options for name, options in every.items() if not names or name in names}


def compare_on_two_processes(arguments: list[str]) -> dict[str, Any]:
    """Run this program's --compare on two processes and read its last line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--local-ranks-filter=0"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, __file__, *arguments], capture_output=True, text=True, env=clean, check=True
    )
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def print_comparison(path: str, result: dict[str, Any]) -> None:
    print(f"{path}: ratios of step times, steps taken in turn")
    for name, row in result["times"].items():
        print(
            f"  {name:10s} {row['median_ms']:9.1f} ms  ({row['quartile_1_ms']} to {row['quartile_3_ms']})"
        )
    print("  " + "  ".join(f"{k} {v}" for k, v in result.items() if k != "times"))


def run_configs(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Result of every config, by its name; printed as it comes."""
    register()
    counts = {"steps": args.steps, "warmup": args.warmup, "overrides": overrides}
    every = TWO_PROCESSES if os.environ["WORLD_SIZE"] != "1" else ONE_PROCESS
    variants = chosen(every, args.variants)
    results = {}
    for path in args.configs:
        name = Path(path).stem
        if args.compare:
            results[name] = compare(path, variants, **counts) if variants else {"times": {}}
            print_comparison(path, results[name])
        else:
            results[name] = measure(path, **counts)
            print_shares(path, results[name])
    return results


def run_against(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """The comparisons of --against, and their figures under the names of the JSON line; printed as they come."""
    found: dict[str, Any] = {}
    rounds = Rounds(args.steps, args.warmup, args.threads, overrides, args.own_config)
    for reference in args.against:
        if reference == TRANSFORMERS:
            rows = found[TRANSFORMERS] = {}
            for name, shape in args.shapes or SHAPES.items():
                rows[name] = compare_transformers(name, shape, steps=args.steps, warmup=args.warmup)
                print_transformers(name, rows[name])
            found["over_transformers"] = {n: row["over_transformers"] for n, row in rows.items()}
            continue
        found["against"] = reference
        for path in args.configs:
            name = Path(path).stem
            found[name] = compare_commits(path, reference, rounds)
            print_commits(path, reference, found[name])
            found[f"step_speedup_{name}"] = found[name]["speedup"]
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", help="TOML files of training configs")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted")
    parser.add_argument("--warmup", type=int, default=3, help="steps before that")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    add_device_option(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="ratios instead of shares: compiled, [ema], full and per-op activation checkpointing over eager; with two processes, "
        "[ema] and expert parallel over FSDP2",
    )
    known = [*ONE_PROCESS, *TWO_PROCESSES]
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        choices=known,
        help=f"with --compare: the only ones that run, of {', '.join(known)}",
        metavar="NAME",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="GITREF",
        help="a commit, branch or tag of this repository, or transformers; may be given twice, for both",
    )
    parser.add_argument(
        "--own-config",
        action="store_true",
        help="with --against GITREF: that commit trains its own file of each config, as it was",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_of,
        metavar="SHAPE",
        help=f"with --against transformers: of {', '.join(SHAPES)} (default: all), or KEY=VALUE,... for what differs from "
        f"{next(iter(SHAPES))}, such as length=256,dtype=bfloat16",
    )
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, overrides: list[str]) -> None:
    """Refuse what cannot be run or would have no effect, in one line, before anything is built."""
    commits = [reference for reference in args.against if reference != TRANSFORMERS]
    needs_configs = bool(commits) or not args.against
    wrong = {
        f"--steps must be at least 2 to have a spread, got {args.steps}": args.steps < 2,
        f"--warmup must be at least 0, got {args.warmup}": args.warmup < 0,
        f"--threads must be at least 1, got {args.threads}": args.threads is not None
        and args.threads < 1,
        "name the TOML file of at least one config": needs_configs and not args.configs,
        f"--against {TRANSFORMERS} has shapes of its own; leave out {' '.join([*args.configs, *overrides])}": not needs_configs
        and bool(args.configs or overrides),
        "--variants has no effect without --compare": bool(args.variants) and not args.compare,
        f"--shapes has no effect without --against {TRANSFORMERS}": bool(args.shapes)
        and TRANSFORMERS not in args.against,
        "--compare and --against are two benchmarks; choose one": args.compare
        and bool(args.against),
        "--own-config has no effect without --against GITREF": args.own_config and not commits,
        f"--against takes one commit at a time, got {' and '.join(commits)}": len(commits) > 1,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            parser.error(message)
    for reference in commits:
        if commit_of(reference) is None:
            parser.error(
                f"--against {reference}: no commit, branch or tag of this repository, and not '{TRANSFORMERS}'"
            )
    if TRANSFORMERS in args.against:
        check_installed()


def main() -> int:
    parser = make_parser()
    args, overrides = parser.parse_known_args()
    check(parser, args, overrides)
    use_device(args.device)
    restart_with({**WAITING, **(ENVIRONMENT if TRANSFORMERS in args.against else {})})
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine()  # now: the checkout may go on to another commit in the meantime
    is_child = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        results = (run_against if args.against else run_configs)(args, overrides)
    except ValueError as error:
        if not raised_by_us(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    has_devices = default_device() == "cpu" or torch.cuda.device_count() >= 2
    if args.compare and not is_child and not has_devices:
        print("this machine has one GPU: what needs two processes is left out")
    elif args.compare and not is_child and chosen(TWO_PROCESSES, args.variants):
        others = compare_on_two_processes(sys.argv[1:])
        for path in args.configs:
            print_comparison(f"{path}, two processes", others[Path(path).stem])
        results = {name: {**results[name], "two_processes": others[name]} for name in results}
    shares = {
        name: row["share_of_dense"]
        for name, row in results.items()
        if isinstance(row, dict) and "share_of_dense" in row
    }
    print(json.dumps({**facts, **results, **({"share_of_dense": shares} if shares else {})}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
