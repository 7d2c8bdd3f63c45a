"""Sums and counts by task -> numbers by name, as they are logged."""

from collections.abc import Mapping

from torch import Tensor

from symbiotic_titan.losses.terms import sum_by_task
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.tasks import TASKS


def mean_losses(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, float]:
    """``<term>`` and ``by_task/<task>_<term>`` from (J,) sums and counts by term; what has no target is left out."""
    losses = {  # device sync, here and below, where the sums are on a device
        term: float(sums_J.sum() / counts[term].sum())
        for term, sums_J in sums.items()
        if counts[term].sum() > 0
    }
    for i, task in enumerate(TASKS):
        for term, sums_J in sums.items():
            if counts[term][i] > 0:
                losses[f"by_task/{task}_{term}"] = float(sums_J[i] / counts[term][i])
    return losses


def correct_tokens(logits_BTV: Tensor, batch: PackedBatch) -> Tensor:
    """(J,) labelled tokens whose most likely next token is the label, by task."""
    # A label that is ignored is negative: no token is ever equal to it.
    return sum_by_task((logits_BTV.argmax(-1) == batch.labels).float(), batch.task)


def accuracies(correct_J: Tensor, count_J: Tensor) -> dict[str, float]:
    """``accuracy/<task>``: share of labelled tokens that are right; a task without one is left out."""
    return {
        f"accuracy/{task}": float(correct_J[i] / count_J[i])  # device sync
        for i, task in enumerate(TASKS)
        if count_J[i] > 0
    }
