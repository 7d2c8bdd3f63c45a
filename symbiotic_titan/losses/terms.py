"""The loss terms that are averaged over tokens: next-token cross entropy and flow matching.

A term returns sums by task over one micro-batch, and counts its targets before the forward. The sums are divided once, by the counts
over all ranks and micro-batches (``losses.step``). ``config.losses`` registers the terms and their weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from symbiotic_titan.moe.record import RoutingRecord, RoutingTotals
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import IGNORE_INDEX, NO_TASK
from symbiotic_titan.sequence.tasks import TASKS

# Logits that are converted to float32 at a time: on a CPU as many as stay in the cache of every thread, elsewhere 64 MiB.
CHUNK_OF_A_THREAD, LARGEST_CHUNK = 1 << 20, 1 << 24


def plain_text_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """The formula of ``text_errors``. It copies all logits to float32, except where ``torch.compile`` makes one kernel of it."""
    errors_N = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return errors_N.view_as(labels)


def text_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Float32 next-token cross entropy in nats, of the shape of ``labels``; 0 where there is no label. ``logits`` have the
    vocabulary as one more dim.

    Rows are computed in chunks, so neither the errors nor the gradient, which has the logits' dtype, need a float32 tensor of the
    logits' size.
    """
    return _ChunkedCrossEntropy.apply(logits.flatten(0, -2), labels.flatten()).view_as(labels)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        errors_N = torch.empty(labels_N.shape, dtype=torch.float32, device=labels_N.device)
        for rows in _chunks(logits_NV):
            errors_N[rows] = plain_text_errors(logits_NV[rows], labels_N[rows])
        return errors_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, labels_N = ctx.saved_tensors
        scale_N1 = grad_N.masked_fill(labels_N == IGNORE_INDEX, 0.0).unsqueeze(1)
        index_N1 = labels_N.clamp(min=0).unsqueeze(1)
        grad_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            # The gradient of a row is softmax - one_hot(label).
            p_NV = logits_NV[rows].softmax(-1, dtype=torch.float32)
            p_NV.scatter_(1, index_N1[rows], p_NV.gather(1, index_N1[rows]) - 1.0)
            grad_NV[rows] = p_NV.mul_(scale_N1[rows])
        return grad_NV, None


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    """Ranges of rows that together are all rows."""
    num_rows, vocab_size = logits_NV.shape
    numbers = LARGEST_CHUNK
    if logits_NV.device.type == "cpu":
        numbers = min(CHUNK_OF_A_THREAD * torch.get_num_threads(), LARGEST_CHUNK)
    step = max(1, numbers // vocab_size)
    for first in range(0, num_rows, step):
        yield slice(first, first + step)


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a loss term: one micro-batch and the model's output on it. Where several processes share its sequences, the columns of
    this process: sums over columns add up.

    logits             (N, V) of the tokens ``logit_index``; (B, T, V), of all tokens, without it.
    velocity           (B, L, Z) predicted velocity.
    target_velocity    (B, L, Z).
    records            one per MoE layer; empty without MoE layers.
    routing            expert counts of the micro-batch on all processes that share it; None: those of ``records``.
    num_micro_batches  of the step, over all data ranks.
    step_routing       expert counts of the whole step with losses.balance_scope = "global"; else None.
    group_tokens       (G,) tokens of each expert group in the step, over all data ranks and micro-batches; None outside of training.
    group_batches      (G,) micro-batches in which the group has tokens, over all data ranks; None outside of training.
    cross_entropy      ``text_errors``, possibly compiled.
    logit_index        (N,) see ``label_index``; None where a term reads ``all_logits``.
    """

    batch: PackedBatch
    logits: Tensor
    velocity: Tensor
    target_velocity: Tensor
    records: Sequence[RoutingRecord] = ()
    routing: RoutingTotals | None = None
    num_micro_batches: int = 1
    step_routing: RoutingTotals | None = None
    group_tokens: Tensor | None = None
    group_batches: Tensor | None = None
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = text_errors
    logit_index: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """The label of every row of ``logits``; IGNORE_INDEX where there is none."""
        return self._of_logits(self.batch.labels)

    @property
    def tasks(self) -> Tensor:
        """The task of every row of ``logits``."""
        return self._of_logits(self.batch.task)

    def _of_logits(self, values_BT: Tensor) -> Tensor:
        if self.logit_index is None:
            return values_BT
        return values_BT.flatten().index_select(0, self.logit_index)


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


def label_index(labels_BT: Tensor) -> Tensor:
    """(N,) int64 indices into the B * T tokens: all labelled ones, then others up to a size that recurs. No token comes twice."""
    # At most 32 sizes, because kernels are compiled and memory is cached by size. And never none: under FSDP every rank takes part in
    # the reduction of the output layer's gradient.
    is_label = labels_BT.flatten() != IGNORE_INDEX
    multiple = 16 * -(-is_label.numel() // 512)
    num_labels = max(1, int(is_label.sum()))  # device sync, unless the labels are on the host
    return is_label.argsort(descending=True, stable=True)[: -(-num_labels // multiple) * multiple]


def label_counts(batch: PackedBatch) -> Tensor:
    """(J,) float32: labelled tokens by task."""
    return sum_by_task((batch.labels != IGNORE_INDEX).float(), batch.task)


def latent_counts(batch: PackedBatch) -> Tensor:
    """(J,) float32: latent tokens by task."""
    tasks_BL = latent_tasks(batch)
    return sum_by_task(torch.ones_like(tasks_BL, dtype=torch.float32), tasks_BL)


def text_sums(inputs: StepInputs) -> Tensor:
    """(J,) cross entropy in nats, summed over labelled tokens."""
    return sum_by_task(inputs.cross_entropy(inputs.logits, inputs.labels), inputs.tasks)


def flow_sums(inputs: StepInputs) -> Tensor:
    """(J,) squared velocity error, averaged over channels and summed over latent tokens (arXiv 2210.02747, eq. 9)."""
    errors_BL = (inputs.velocity.float() - inputs.target_velocity.float()).square().mean(-1)
    # Masked, not selected: shapes stay static, and without images the flow head still gets a gradient, of zero.
    errors_BL = errors_BL.masked_fill(inputs.batch.vae_image < 0, 0.0)
    return sum_by_task(errors_BL, latent_tasks(inputs.batch))
