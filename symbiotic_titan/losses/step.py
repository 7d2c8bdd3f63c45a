"""What one optimizer step counts and finds out: targets before the forward passes, sums behind them.

Letters: J tasks, M modalities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from symbiotic_titan.config.losses import Losses
from symbiotic_titan.losses.report import mean_losses
from symbiotic_titan.losses.terms import LossTerms, target_counts
from symbiotic_titan.moe.record import RoutingTotals
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import MODALITY_NAMES, TASK_NAMES

WEIGHTED = ("text", "flow", "balance")


@dataclass(frozen=True)
class StepTotals:
    """What the targets of one step count over all ranks and micro-batches; known before any forward.

    text, flow  (J,) labelled and generated tokens by task.   modality  (M,) tokens.   positions  () tokens and padding.
    """

    text: Tensor
    flow: Tensor
    modality: Tensor
    positions: Tensor

    @staticmethod
    def count(batches: list[PackedBatch]) -> Tensor:
        """(J + J + M + 1,) float64: this rank's share, to be summed over ranks."""
        rows = []
        for batch in batches:
            text, flow = target_counts(batch)
            positions = torch.tensor([batch.tokens.numel()], device=text.device)
            rows.append(torch.cat([text, flow, batch.num_tokens(), positions]).double())
        return torch.stack(rows).sum(0)

    @classmethod
    def of_sum(cls, total: Tensor) -> "StepTotals":
        """From ``count`` summed over ranks."""
        text, flow, modality, positions = total.split(
            [len(TASK_NAMES), len(TASK_NAMES), len(MODALITY_NAMES), 1]
        )
        return cls(text.float(), flow.float(), modality, positions)

    def loss(self, terms: LossTerms, balance: Tensor, weights: Losses) -> Tensor:
        """A micro-batch's share of the step's loss: sums over the counts of all ranks and micro-batches."""
        return (
            weights.text * terms.text_sum.sum() / self.text.sum().clamp(min=1)
            + weights.flow * terms.flow_sum.sum() / self.flow.sum().clamp(min=1)
            + weights.balance * balance
        )


@dataclass(frozen=True)
class MicroBatchResult:
    """What one micro-batch on this rank leaves behind, detached.

    text_sum, flow_sum  (J,) sums by task.   balance  () its share of the balancing loss.   routing  None without MoE layers.
    """

    text_sum: Tensor
    flow_sum: Tensor
    balance: Tensor
    routing: RoutingTotals | None

    @property
    def is_finite(self) -> Tensor:
        """() bool."""
        return torch.isfinite(self.text_sum.sum() + self.flow_sum.sum() + self.balance)


def sum_results(results: list[MicroBatchResult]) -> Tensor:
    """(J + J + 1,) loss sums of this rank, to be summed over ranks."""
    rows = [torch.cat([r.text_sum, r.flow_sum, r.balance.reshape(1)]) for r in results]
    return torch.stack(rows).sum(0)


def step_losses(total: Tensor, totals: StepTotals, weights: Losses) -> dict[str, float]:
    """Losses of the step by name, from ``sum_results`` summed over ranks; a task without a token in this step is left out."""
    text_sum, flow_sum, balance = total.split([len(TASK_NAMES), len(TASK_NAMES), 1])
    means = mean_losses(LossTerms(text_sum, totals.text, flow_sum, totals.flow))
    losses = {"text": 0.0, "flow": 0.0, "balance": float(balance)} | means
    losses["total"] = sum(getattr(weights, name) * losses[name] for name in WEIGHTED)
    return losses


def not_finite(losses: dict[str, float], grad_norm: float) -> dict[str, float]:
    """Those of the step's weighted losses and of its gradient norm that are not finite."""
    values = {**{name: losses[name] for name in WEIGHTED}, "grad_norm": grad_norm}
    return {
        name: value for name, value in values.items() if not torch.isfinite(torch.tensor(value))
    }
