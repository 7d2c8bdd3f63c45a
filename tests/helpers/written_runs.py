"""Runs with known numbers, written as a run writes them."""

from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.moe.routing_metrics import write_routing
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

GROUPS = (ExpertGroup("und", (TEXT, VIT), 8), ExpertGroup("gen", (VAE,), 4))
LAYERS = range(1, 4)


def counts_of(step: int) -> torch.Tensor:
    """(3, 3, 12): text falls with the expert's number, ViT rises, VAE is even; all grow with the step and the layer."""
    counts_YME = torch.zeros(3, 3, 12, dtype=torch.int64)
    for i, layer in enumerate(LAYERS):
        counts_YME[i, TEXT, :8] = torch.arange(8, 0, -1) * step * layer
        counts_YME[i, VIT, :8] = torch.arange(1, 9) * step * layer
        counts_YME[i, VAE, 8:] = step
    return counts_YME


class Log:
    """One process of a run that writes into ``folder``."""

    def __init__(self, folder: Path, started: str = "20260101-0000") -> None:
        self.writer = SummaryWriter(str(folder / "tb" / started))

    def scalars(self, tag: str, points: dict[int, float]) -> "Log":
        for step, value in points.items():
            self.writer.add_scalar(tag, value, step)
        return self

    def counts(self, *steps: int) -> "Log":
        for step in steps:
            write_routing(self.writer, step, counts_of(step), GROUPS, LAYERS)
        return self

    def close(self) -> None:
        self.writer.close()


TAGS = (
    *("routing/capacity_rate/all", "loss/by_task/t2i_flow", "loss/by_task/lm_text"),
    *("loss/by_task/mmu_text", "validation/by_task/lm_text", "validation/by_task/mmu_text"),
    *(f"routing/capacity_rate/{name}" for name in ("text", "vit", "vae")),
    *(f"tokens/{name}" for name in ("text", "vit", "vae")),
    *(f"routing/capacity_rate_global/{name}" for name in ("all", "text", "vit", "vae")),
)


def write_full_run(folder: Path) -> Path:
    """A run that has everything: value = step + place of the tag in TAGS."""
    log = Log(folder)
    for place, tag in enumerate(TAGS):
        log.scalars(tag, {step: step + place for step in range(10, 401, 10)})
    log.counts(1, 100, 200).close()
    return folder
