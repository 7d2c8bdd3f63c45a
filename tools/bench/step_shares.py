"""The share of a training step's time that each part takes, and of the dense limit that the step reaches: ``step.py`` without options.

Parts are the units that ``parallel/compile.py`` compiles, compiled or not: ``attention`` is the attention half of a block with its norm
and residual, ``experts`` the matmuls of routed experts and the shared expert, ``routing`` the rest of the MoE layers.
"""

import statistics
import tempfile
from typing import Any

from bench_timing import Clock, default_device
from step_child import make_trainer, stepper
from step_dense import DenseLimit
from stopwatch import Stopwatch

from symbiotic_titan.parallel.compile import compile_units
from symbiotic_titan.training.trainer import SymbioticTrainer

PARTS = ("data", "vit", "attention", "routing", "experts", "optimizer", "other")


def part_of(name: str, attribute: str) -> str | None:
    """The part that a compiled unit belongs to, by its owner's name in the model; None where ``moe`` or ``other`` has it."""
    if attribute == "attend":
        return "attention"
    if attribute == "swiglu" or name.endswith("shared_experts"):
        return "experts"
    return "vit" if name.startswith("vit.") else None


def instrument(trainer: SymbioticTrainer, watch: Stopwatch) -> None:
    """Watch the parts of the trainer's model."""
    (model,) = trainer.model_parts
    names = {id(module): name for name, module in model.named_modules()}
    for unit in compile_units(model):  # type: ignore[arg-type]
        part = part_of(names[id(unit.owner)], unit.attribute)
        if part is not None:
            watch.watch(unit.owner, unit.attribute, part)
    for name, module in model.named_modules():
        if name.endswith(".moe"):
            watch.watch(module, "forward", "moe")
    watch.watch_call(trainer.optimizers, "step", "optimizer")


def measure(config_file: str, *, steps: int, warmup: int, overrides: list[str]) -> dict[str, Any]:
    """Medians over ``steps`` steps after ``warmup`` steps that are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config_file, folder, steps + warmup, overrides)
        clock = Clock(default_device())
        watch = Stopwatch(clock)
        instrument(trainer, watch)
        limit = DenseLimit(trainer)
        run = stepper(trainer)
        rows: list[dict[str, float]] = []
        for step in range(steps + warmup):
            tokens = int(trainer.tokens_seen.sum())
            begin = clock.now()
            run()
            row = {"step": clock.seconds(begin, clock.now()), **watch.take()}
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
