"""LossTerms: sums and counts of one micro-batch. They are divided once, by the counts of the whole step.

Letters: B rows, T positions, L latent tokens, Z numbers per latent patch, V vocabulary, J tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import IGNORE_INDEX, TASK_NAMES


@dataclass(frozen=True)
class LossTerms:
    """Per-task sums of a loss over its tokens and the number of these tokens.

    text_sum, text_count  (J,) cross entropy in nats over labelled tokens.
    flow_sum, flow_count  (J,) squared velocity error, averaged over channels, over generated tokens.
    """

    text_sum: torch.Tensor
    text_count: torch.Tensor
    flow_sum: torch.Tensor
    flow_count: torch.Tensor


def sum_by_task(values: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
    """(J,) sums of ``values`` by ``tasks`` of the same shape; a negative task is left out."""
    one_hot = tasks.unsqueeze(-1) == torch.arange(len(TASK_NAMES), device=tasks.device)
    return (values.unsqueeze(-1) * one_hot).flatten(0, -2).sum(0)


def latent_tasks(batch: PackedBatch) -> torch.Tensor:
    """(B, L) task of each latent token; NO_TASK where the slot is unused."""
    last = batch.task.shape[1] - 1
    tasks_BL = batch.task.gather(1, batch.vae_index.clamp(max=last))
    return tasks_BL.masked_fill(batch.vae_image < 0, -1)


def target_counts(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """((J,) labelled tokens, (J,) generated tokens) of a batch, by task. Needs no forward."""
    is_label = (batch.labels != IGNORE_INDEX).float()
    text_count = sum_by_task(is_label, batch.task)
    tasks_BL = latent_tasks(batch)
    return text_count, sum_by_task(torch.ones_like(tasks_BL, dtype=torch.float32), tasks_BL)


def text_errors(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) float32 next-token cross entropy; 0 where there is no label."""
    errors = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        labels_BT.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return errors.view_as(labels_BT)


def flow_errors(
    velocity_BLZ: torch.Tensor, target_BLZ: torch.Tensor, vae_image_BL: torch.Tensor
) -> torch.Tensor:
    """(B, L) float32 squared velocity error, averaged over channels; 0 in unused slots."""
    errors_BL = (velocity_BLZ.float() - target_BLZ.float()).square().mean(-1)
    return errors_BL.masked_fill(vae_image_BL < 0, 0.0)


def loss_terms(
    logits_BTV: torch.Tensor,
    velocity_BLZ: torch.Tensor,
    target_BLZ: torch.Tensor,
    batch: PackedBatch,
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = text_errors,
) -> LossTerms:
    """The micro-batch's sums, differentiable, with their counts. ``cross_entropy``: ``text_errors`` or the same compiled."""
    text_count, flow_count = target_counts(batch)
    flow_BL = flow_errors(velocity_BLZ, target_BLZ, batch.vae_image)
    return LossTerms(
        text_sum=sum_by_task(cross_entropy(logits_BTV, batch.labels), batch.task),
        text_count=text_count,
        flow_sum=sum_by_task(flow_BL, latent_tasks(batch)),
        flow_count=flow_count,
    )
