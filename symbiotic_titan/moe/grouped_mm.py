"""SwiGLU of many experts by ``F.grouped_mm``. ``moe.kernels`` chooses it where that is a kernel that never waits for the host.

Shape letters: sequence/shapes.py. N are rows sorted by expert, E the experts on this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from symbiotic_titan.moe.row_kernels import gated_silu, gated_silu_backward


class _GroupedSwiGLU(torch.autograd.Function):
    # Written out, because the product that w2 reads need not be kept: the pass that computes the gradients of gate and up gives it.
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
    ) -> Tensor:
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        gate_NF = F.grouped_mm(rows_ND, w1_EFD.mT, offs=offsets_E)
        up_NF = F.grouped_mm(rows_ND, w3_EFD.mT, offs=offsets_E)
        ctx.save_for_backward(rows_ND, w1_EFD, w2_EDF, w3_EFD, offsets_E, gate_NF, up_NF)
        return F.grouped_mm(gated_silu(gate_NF, up_NF), w2_EDF.mT, offs=offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, w1_EFD, w2_EDF, w3_EFD, offsets_E, gate_NF, up_NF = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_hidden_NF = F.grouped_mm(grad_ND, w2_EDF, offs=offsets_E)
        grad_gate_NF, grad_up_NF, hidden_NF = gated_silu_backward(grad_hidden_NF, gate_NF, up_NF)
        grad_weights: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[1:4]):  # frozen experts skip three of the six matmuls
            grad_weights = (
                F.grouped_mm(grad_gate_NF.t(), rows_ND, offs=offsets_E),
                F.grouped_mm(grad_ND.t(), hidden_NF, offs=offsets_E),
                F.grouped_mm(grad_up_NF.t(), rows_ND, offs=offsets_E),
            )
        grad_rows_ND = F.grouped_mm(grad_gate_NF, w1_EFD, offs=offsets_E)
        grad_rows_ND += F.grouped_mm(grad_up_NF, w3_EFD, offs=offsets_E)
        return grad_rows_ND, *grad_weights, None


def swiglu_by_grouped_mm(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> Tensor:
    """(N, D): see ``kernels.grouped_swiglu``. D and F are multiples of 16 bytes; ``counts`` sum to N, or rows are left undefined."""
    return _GroupedSwiGLU.apply(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E)
