#!/usr/bin/env python3
"""Tokens per second of a training config on this machine, and the share of a step's time that each part takes.

Example: tools/bench/step.py train_configs/debug.toml train_configs/mini.toml --steps 10

The real trainer runs on the config's data; parts are timed by hooks in the forward and the backward pass, so a part's time is
forward plus backward. ``routing`` is the MoE layers without their experts: router, dispatch and combine. ``other`` is what no
hook covers: embeddings, heads, norms, losses. One table per config, then one JSON line.

With --compare several trainers of one config take their steps in turn, and ratios of step times are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bench_timing import interleave, machine, ratio, restart_with, summary
from step_child import make_trainer, register, stepper
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from symbiotic_titan.process import MISTAKE, raised_by_us
from symbiotic_titan.training.trainer import SymbioticTrainer

PARTS = ("data", "vit", "attention", "routing", "experts", "optimizer", "other")


class Clock:
    """Seconds per part, summed since the last ``take``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # device sync
        return time.perf_counter()

    def take(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds


class _Mark(torch.autograd.Function):
    """Identity that calls back when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, callback: Any) -> torch.Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.callback()
        return grad, None


def time_module(module: nn.Module, part: str, clock: Clock) -> None:
    """Add the module's forward and backward seconds to ``part``; its first argument and (first) result are tensors."""
    forward = module.forward

    def timed(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        started: dict[str, float] = {}

        def end_backward() -> None:
            if "backward" in started:
                clock.seconds[part] += clock.now() - started.pop("backward")

        def begin_backward() -> None:
            started["backward"] = clock.now()

        begin = clock.now()
        if (
            not x.requires_grad
        ):  # an input of the model: without a gradient its backward would have no end
            x = x.detach().requires_grad_()
        result = forward(_Mark.apply(x, end_backward), *args, **kwargs)
        clock.seconds[part] += clock.now() - begin
        leaves, structure = tree_flatten(result)
        return tree_unflatten([_Mark.apply(leaves[0], begin_backward), *leaves[1:]], structure)

    module.forward = timed  # type: ignore[method-assign]


def time_call(owner: Any, name: str, part: str, clock: Clock) -> None:
    """Add the seconds of a method's calls to ``part``."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = clock.now()
        result = method(*args, **kwargs)
        clock.seconds[part] += clock.now() - begin
        return result

    setattr(owner, name, timed)


def instrument(trainer: SymbioticTrainer, clock: Clock) -> None:
    """Put timers on the parts of the trainer's model."""
    (model,) = trainer.model_parts
    for block in model.layers.values():  # type: ignore[operator, union-attr]
        time_module(block.attention, "attention", clock)
        if not block.moe_enabled:
            continue
        time_module(block.moe, "moe", clock)
        for bank in block.moe.experts.values():
            time_module(bank, "experts", clock)
        if block.moe.shared_experts is not None:
            time_module(block.moe.shared_experts, "experts", clock)
    time_module(model.vit, "vit", clock)  # type: ignore[arg-type]
    time_call(trainer.optimizers, "step", "optimizer", clock)


def measure(config_file: str, *, steps: int, warmup: int, overrides: list[str]) -> dict[str, Any]:
    """Medians over ``steps`` steps after ``warmup`` steps that are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config_file, folder, steps + warmup, overrides)
        clock = Clock()
        instrument(trainer, clock)
        run = stepper(trainer)
        rows: list[dict[str, float]] = []
        for step in range(steps + warmup):
            clock.take()
            tokens = int(trainer.tokens_seen.sum())
            begin = clock.now()
            run()
            row = dict(clock.take())
            row["step"] = clock.now() - begin
            row["tokens"] = int(trainer.tokens_seen.sum()) - tokens
            row["data"] = sum(trainer.metrics_processor.data_loading_times)
            trainer.metrics_processor.data_loading_times.clear()
            if step >= warmup:
                rows.append(row)
        trainer.close()
    return summarize(rows)


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


def summarize(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Tokens per second and the parts' shares, from medians."""

    def median(part: str) -> float:
        return statistics.median(row.get(part, 0.0) for row in rows)

    step = median("step")
    seconds = {part: median(part) for part in ("data", "vit", "attention", "experts", "optimizer")}
    seconds["routing"] = median("moe") - seconds["experts"]
    seconds["other"] = step - sum(seconds.values())
    return {
        "tokens_per_second": round(statistics.median(r["tokens"] / r["step"] for r in rows)),
        "step_seconds": round(step, 4),
        "share": {part: round(seconds[part] / step, 3) for part in PARTS},
    }


def print_comparison(path: str, result: dict[str, Any]) -> None:
    print(f"{path}: ratios of step times, steps taken in turn")
    for name, row in result["times"].items():
        print(
            f"  {name:10s} {row['median_ms']:9.1f} ms  ({row['quartile_1_ms']} to {row['quartile_3_ms']})"
        )
    print("  " + "  ".join(f"{k} {v}" for k, v in result.items() if k != "times"))


def run(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Result of every config, by its name; printed as it comes."""
    counts = {"steps": args.steps, "warmup": args.warmup, "overrides": overrides}
    results = {}
    for path in args.configs:
        name = Path(path).stem
        if not args.compare:
            result = measure(path, **counts)
            print(
                f"{path}: {result['tokens_per_second']:,} tokens/s, {result['step_seconds']:.3f} s a step"
            )
            for part, share in result["share"].items():
                print(f"  {part:10s} {100 * share:5.1f} %")
        else:
            every = TWO_PROCESSES if os.environ["WORLD_SIZE"] != "1" else ONE_PROCESS
            result = compare(path, chosen(every, args.variants), **counts)
            print_comparison(path, result)
        results[name] = result
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="TOML files of training configs")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted")
    parser.add_argument("--warmup", type=int, default=3, help="steps before that")
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
    args, overrides = parser.parse_known_args()
    if args.steps < 2:
        parser.error(f"--steps must be at least 2 to have a spread, got {args.steps}")
    restart_with({"OMP_WAIT_POLICY": "PASSIVE"})
    is_child = int(os.environ.get("WORLD_SIZE", "1")) > 1
    register()
    try:
        results = run(args, overrides)
    except ValueError as error:
        if not raised_by_us(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if args.compare and not is_child and chosen(TWO_PROCESSES, args.variants):
        others = compare_on_two_processes(sys.argv[1:])
        for path in args.configs:
            print_comparison(f"{path}, two processes", others[Path(path).stem])
        results = {name: {**results[name], "two_processes": others[name]} for name in results}
    print(json.dumps({**machine(), **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
