"""The share of a training step's time that each part takes, and of the dense limit that the step reaches: ``step.py`` without options."""

import statistics
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch
from step_child import make_trainer, stepper, wait_for_device
from step_dense import DenseLimit
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from symbiotic_titan.training.trainer import SymbioticTrainer

PARTS = ("data", "vit", "attention", "routing", "experts", "optimizer", "other")


class Clock:
    """Seconds per part, summed since the last ``take``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        wait_for_device()
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
        limit = DenseLimit(trainer)
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
            row["dense"] = limit.seconds()
            if step >= warmup:
                rows.append(row)
        trainer.close()
    return summarize(rows)


def summarize(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Tokens per second, the parts' shares and the share of the dense limit, from medians."""

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
        "share_of_dense": round(statistics.median(r["dense"] / r["step"] for r in rows), 3),
    }


def print_shares(path: str, result: dict[str, Any]) -> None:
    speed, seconds = result["tokens_per_second"], result["step_seconds"]
    print(f"{path}: {speed:,} tokens/s, {seconds:.3f} s a step")
    for part, share in result["share"].items():
        print(f"  {part:10s} {100 * share:5.1f} %")
    print(f"  {100 * result['share_of_dense']:.1f} % of the dense limit")
