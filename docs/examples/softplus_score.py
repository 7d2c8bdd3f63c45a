"""A router score: the softplus of each logit, which is unbounded, unlike the sigmoid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from symbiotic_titan.extend import register_router_score


@register_router_score("softplus")
def softplus(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    # Positive inside the group even after underflow, because weights are divided by sums of scores.
    scores_TE = F.softplus(logits_TE).clamp(min=torch.finfo(torch.float32).tiny)
    scores_TE = scores_TE.masked_fill(~allowed_TE, 0.0)
    return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True)
