"""One group's routed experts.

Letters: N rows sorted by expert, D width, F hidden width, E experts of the group (e of them on this rank).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from symbiotic_titan.moe.grouped_matmul import grouped_swiglu
from symbiotic_titan.moe.precision import compute_dtype, local_tensor

# (rows (N, D), w1, w2, w3, rows of each expert) -> (N, D), as ``grouped_swiglu``.
SwiGLUKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class ExpertBank(nn.Module):
    """SwiGLU experts ``w2(silu(w1 x) * w3 x)`` with stacked weights: w1, w3 (E, F, D) and w2 (E, D, F).

    Values are uninitialised, as everywhere: they are set when the whole model is.
    """

    swiglu: SwiGLUKernel  # replaced as a whole by what converts or compiles the model

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.swiglu = grouped_swiglu
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, rows_ND: Tensor, counts_e: Tensor) -> Tensor:
        """(N, D). ``counts_e``: rows of each expert on this rank; they sum to N."""
        dtype = compute_dtype(rows_ND)
        w1, w2, w3 = (local_tensor(w).to(dtype) for w in (self.w1, self.w2, self.w3))
        return self.swiglu(rows_ND.to(dtype), w1, w2, w3, counts_e)
