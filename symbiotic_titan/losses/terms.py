"""The loss terms that are averaged over tokens: next-token cross entropy and flow matching.

A term returns sums by task over one micro-batch, and counts its targets before the forward. The sums are divided once, by the counts
over all ranks and micro-batches (``losses.step``). ``config.losses`` registers the terms and their weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from symbiotic_titan.moe.record import RoutingRecord, RoutingTotals
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import IGNORE_INDEX, NO_TASK
from symbiotic_titan.sequence.tasks import TASKS


def text_errors(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """(B, T) float32 next-token cross entropy in nats; 0 at positions without a label."""
    errors = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        labels_BT.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return errors.view_as(labels_BT)


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a loss term: one micro-batch and the model's output on it.

    logits             (B, T, V).
    velocity           (B, L, Z) predicted velocity.
    target_velocity    (B, L, Z).
    records            one per MoE layer; empty without MoE layers.
    num_micro_batches  of the step, over all data ranks.
    step_routing       expert counts of the whole step with losses.balance_scope = "global"; else None.
    group_tokens       (G,) tokens of each expert group in the step, over all data ranks and micro-batches; None outside of training.
    cross_entropy      ``text_errors``, possibly compiled.
    """

    batch: PackedBatch
    logits: Tensor
    velocity: Tensor
    target_velocity: Tensor
    records: Sequence[RoutingRecord] = ()
    num_micro_batches: int = 1
    step_routing: RoutingTotals | None = None
    group_tokens: Tensor | None = None
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = text_errors


def sum_by_task(values: Tensor, tasks: Tensor) -> Tensor:
    """(J,) sums of ``values`` by ``tasks`` of the same shape; NO_TASK is left out."""
    # A product and a sum in fixed order; a scatter_add of floats is nondeterministic on a GPU.
    one_hot = tasks.unsqueeze(-1) == torch.arange(len(TASKS), device=tasks.device)
    return (values.unsqueeze(-1) * one_hot).flatten(0, -2).sum(0)


def latent_tasks(batch: PackedBatch) -> Tensor:
    """(B, L) task of each latent token; NO_TASK where the slot is unused."""
    last = batch.task.shape[1] - 1
    tasks_BL = batch.task.gather(1, batch.vae_index.clamp(max=last))
    return tasks_BL.masked_fill(batch.vae_image < 0, NO_TASK)


def label_counts(batch: PackedBatch) -> Tensor:
    """(J,) float32: labelled tokens by task."""
    return sum_by_task((batch.labels != IGNORE_INDEX).float(), batch.task)


def latent_counts(batch: PackedBatch) -> Tensor:
    """(J,) float32: latent tokens by task."""
    tasks_BL = latent_tasks(batch)
    return sum_by_task(torch.ones_like(tasks_BL, dtype=torch.float32), tasks_BL)


def text_sums(inputs: StepInputs) -> Tensor:
    """(J,) cross entropy in nats, summed over labelled tokens."""
    return sum_by_task(inputs.cross_entropy(inputs.logits, inputs.batch.labels), inputs.batch.task)


def flow_sums(inputs: StepInputs) -> Tensor:
    """(J,) squared velocity error, averaged over channels and summed over latent tokens (arXiv 2210.02747, eq. 9)."""
    errors_BL = (inputs.velocity.float() - inputs.target_velocity.float()).square().mean(-1)
    # Masked, not selected: shapes stay static, and without images the flow head still gets a gradient, of zero.
    errors_BL = errors_BL.masked_fill(inputs.batch.vae_image < 0, 0.0)
    return sum_by_task(errors_BL, latent_tasks(inputs.batch))
