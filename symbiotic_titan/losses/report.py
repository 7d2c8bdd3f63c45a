"""Sums and counts by task -> numbers by name, as they are logged.

Letters: B rows, T positions, V vocabulary, J tasks.
"""

import torch

from symbiotic_titan.losses.terms import LossTerms, sum_by_task
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import TASK_NAMES


def mean_losses(terms: LossTerms) -> dict[str, float]:
    """``text``, ``flow``, ``by_task/<task>_text`` and ``by_task/<task>_flow``; what has no token is left out."""
    parts = {"text": (terms.text_sum, terms.text_count), "flow": (terms.flow_sum, terms.flow_count)}
    losses = {  # device sync, here and below, where the terms are on a device
        name: float(sums_J.sum() / counts_J.sum())
        for name, (sums_J, counts_J) in parts.items()
        if counts_J.sum() > 0
    }
    for i, task in enumerate(TASK_NAMES):
        for name, (sums_J, counts_J) in parts.items():
            if counts_J[i] > 0:
                losses[f"by_task/{task}_{name}"] = float(sums_J[i] / counts_J[i])
    return losses


def correct_tokens(logits_BTV: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """(J,) labelled tokens whose most likely next token is the label, by task."""
    # A label that is ignored is negative: no token is ever equal to it.
    return sum_by_task((logits_BTV.argmax(-1) == batch.labels).float(), batch.task)


def accuracies(correct_J: torch.Tensor, count_J: torch.Tensor) -> dict[str, float]:
    """``accuracy/<task>``: share of labelled tokens that are right; a task without one is left out."""
    return {
        f"accuracy/{task}": float(correct_J[i] / count_J[i])  # device sync
        for i, task in enumerate(TASK_NAMES)
        if count_J[i] > 0
    }
