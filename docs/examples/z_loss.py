"""A loss term: keeps the logits' normaliser near 1 (the z-loss of PaLM, arXiv 2204.02311, section 5)."""

from torch import Tensor

from symbiotic_titan.extend import register_loss_term
from symbiotic_titan.losses.terms import StepInputs, label_counts, sum_by_task
from symbiotic_titan.sequence.modality import IGNORE_INDEX


@register_loss_term(
    "z",
    weight=1e-4,
    help="Weight of the z-loss of the logits.",
    count=label_counts,
    all_logits=False,
)
def z_loss(inputs: StepInputs) -> Tensor:
    """(J,) squared log of the normaliser, summed over labelled tokens."""
    squares_N = inputs.logits.float().logsumexp(-1).square()
    squares_N = squares_N.masked_fill(inputs.labels == IGNORE_INDEX, 0.0)
    return sum_by_task(squares_N, inputs.tasks)
