"""Score functions of the router: logits -> scores by which the top-k are chosen and weighted.

Shape letters: sequence/shapes.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RouterScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits_TE float32, allowed_TE bool: the expert is in the token's group) -> (scores_TE, probabilities_TE), both float32.

Scores are positive inside the group and 0 outside it. The experts with the highest scores are chosen; their scores become their
weights, divided by their sum if the flavor normalizes. Probabilities are what the balancing loss reads: scores divided by
their sum over the group. Padding is allowed every expert; nothing reads its scores, but they must stay finite.
"""


def softmax(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the group's experts."""
    # Masked before the softmax, so that experts of other groups take no part in its denominator.
    scores_TE = logits_TE.masked_fill(~allowed_TE, float("-inf")).softmax(-1)
    return scores_TE, scores_TE


def sigmoid(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid of each logit (arXiv 2412.19437, eq. 15)."""
    # All scores of a token may underflow at once: the clamp keeps their sum, a divisor, above 0.
    scores_TE = logits_TE.sigmoid().clamp(min=torch.finfo(torch.float32).tiny)
    scores_TE = scores_TE.masked_fill(~allowed_TE, 0.0)
    return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True)
