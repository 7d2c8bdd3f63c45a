"""RMSNorm for every mixture of precisions."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight in the dtype of ``x``; the mean square is taken in float32 (arXiv 1910.07467).

    Under autocast queries and keys arrive in bfloat16 while the weight is float32. With one dtype the fused kernel applies.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
