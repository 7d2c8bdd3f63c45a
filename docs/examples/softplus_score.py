"""A router score: the softplus of each logit, which has no ceiling as the sigmoid has one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from symbiotic_titan.extend import register_router_score


@register_router_score("softplus")
def softplus(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    # Above 0 inside the group, whatever underflows: sums of scores are divided by.
    scores_TE = F.softplus(logits_TE).clamp(min=torch.finfo(torch.float32).tiny)
    scores_TE = scores_TE.masked_fill(~allowed_TE, 0.0)
    return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True)
