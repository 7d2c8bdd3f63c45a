"""SwiGLU of many experts over rows sorted by expert: the one place that knows which kernel is fastest where."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> Tensor:
    outs = []
    for x, w1, w2, w3 in zip(
        rows_ND.split(counts_E.tolist()), w1_EFD.unbind(), w2_EDF.unbind(), w3_EFD.unbind(), strict=True
    ):
        outs.append((F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t())
    return torch.cat(outs)
