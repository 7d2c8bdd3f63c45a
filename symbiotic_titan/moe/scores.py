"""Logits of the router -> scores that its top-k chooses by and weights with.

Letters: T tokens, E experts of all groups in group-major order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from symbiotic_titan.registry import Registry

RouterScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits_TE float32, allowed_TE bool: the expert is in the token's group) -> (scores_TE, probabilities_TE), both float32.

Scores are positive inside the group and 0 outside it; the experts with the highest are chosen, and their scores are their
weights, divided by their sum where the flavor normalises. Probabilities are what the balancing loss reads: scores divided by
their sum over the group. A token of padding may see every expert; nothing reads its scores, but they must stay finite.
"""

ROUTER_SCORES: Registry[RouterScore] = Registry("experts.score_function")


def softmax(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the group's experts."""
    scores_TE = logits_TE.masked_fill(~allowed_TE, float("-inf")).softmax(-1)
    return scores_TE, scores_TE


def sigmoid(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid of each logit."""
    # Scores may underflow, all of a token's at once: they are kept from 0, so that no sum of them is.
    scores_TE = logits_TE.sigmoid().clamp(min=torch.finfo(torch.float32).tiny)
    scores_TE = scores_TE.masked_fill(~allowed_TE, 0.0)
    return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True)


ROUTER_SCORES.register("softmax", softmax)
ROUTER_SCORES.register("sigmoid", sigmoid)
