#!/usr/bin/env python3
"""Tokens per second of a training config on this machine, and the share of a step's time that each part takes.

Example: tools/bench/step.py train_configs/debug.toml train_configs/mini.toml --steps 10

The real trainer runs on the config's data; parts are timed by marks in the forward and the backward pass, so a part's time is
forward plus backward. ``routing`` is the MoE layers without their experts: router, dispatch and combine. ``other`` is what no
mark covers: embeddings, heads, norms, losses. One table per config, then one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from symbiotic_titan import device

device.prepare()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from symbiotic_titan.checks import check_job  # noqa: E402
from symbiotic_titan.config.load import load_job_config  # noqa: E402
from symbiotic_titan.train_spec import register  # noqa: E402
from symbiotic_titan.trainer import SymbioticTrainer  # noqa: E402

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
        if isinstance(result, tuple):
            return (_Mark.apply(result[0], begin_backward), *result[1:])
        return _Mark.apply(result, begin_backward)

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
    """Put marks on the parts of the trainer's model."""
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
    """Medians over ``steps`` steps behind ``warmup`` steps that are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_job_config(
            [
                *("--job.config_file", config_file, "--job.dump_folder", folder),
                *("--training.steps", str(steps + warmup), "--checkpoint.no_enable"),
                *("--metrics.no_enable_tensorboard", "--metrics.log_freq", "1000000", *overrides),
            ]
        )
        check_job(config)
        trainer = SymbioticTrainer(config)
        clock = Clock()
        instrument(trainer, clock)
        batches = trainer.batch_generator(trainer.dataloader)  # type: ignore[arg-type]
        rows: list[dict[str, float]] = []
        for step in range(steps + warmup):
            clock.take()
            trainer.step += 1
            tokens = int(trainer.tokens_seen.sum())
            begin = clock.now()
            trainer.train_step(batches)
            row = dict(clock.take())
            row["step"] = clock.now() - begin
            row["tokens"] = int(trainer.tokens_seen.sum()) - tokens
            row["data"] = sum(trainer.metrics_processor.data_loading_times)
            trainer.metrics_processor.data_loading_times.clear()
            if step >= warmup:
                rows.append(row)
        trainer.close()
    return summarize(rows)


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="TOML files of training configs")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted")
    parser.add_argument("--warmup", type=int, default=3, help="steps before that")
    args, overrides = parser.parse_known_args()
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (defaults | {"MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)
    register()
    results = {}
    for path in args.configs:
        result = measure(path, steps=args.steps, warmup=args.warmup, overrides=overrides)
        results[Path(path).stem] = result
        print(
            f"{path}: {result['tokens_per_second']:,} tokens/s, {result['step_seconds']:.3f} s a step"
        )
        for part, share in result["share"].items():
            print(f"  {part:10s} {100 * share:5.1f} %")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({**machine, "device": device.device_type(), **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
