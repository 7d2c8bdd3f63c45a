"""SwiGLU of many experts with emulated float8 matmuls: equal to the GPU's kernel up to summation order. For tests, not speed.

Both operands of every matmul, in forward and backward, are rounded to float8 (e4m3) with one scale per slice along the
contracted dimension. For a weight's gradient that dimension is an expert's rows, so each expert has its own scales.
Scales are powers of two, as in torchao's rowwise scaling: the rounded values are exact in bfloat16 and float32, so a matmul in these
dtypes computes what the float8 kernel does.

Shape letters: sequence/shapes.py. N are rows sorted by expert, D is the width in, F the width out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_FLOAT8 = torch.float8_e4m3fn
_SMALLEST_AMAX = 1e-12  # as in torchao: keeps the scale of a slice of zeros finite


def round_to_float8(x: Tensor, dim: int) -> Tensor:
    """``x`` rounded to float8 values, in its own dtype, with one scale for each slice along ``dim``.

    The error of a value is at most 1/16 of it or 2^-18 of the largest value in its slice.
    """
    largest = torch.finfo(_FLOAT8).max
    amax = x.abs().amax(dim, keepdim=True).double().clamp(min=_SMALLEST_AMAX)
    scale = (largest / amax).float().log2().floor().exp2()
    # Clamped, because torch 2.11 and older overflow to NaN instead of saturating.
    scaled = (x.float() * scale).clamp(-largest, largest)
    return (scaled.to(_FLOAT8).float() / scale).to(x.dtype)


# Custom ops, so that torch.compile sees one call instead of a loop over experts whose length depends on the data.
@torch.library.custom_op("symbiotic_titan::float8_grouped_linear", mutates_args=())
def float8_grouped_linear(rows_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """(N, F): each expert's rows times its weight, both rounded along D."""
    counts = counts_E.tolist()  # device sync, except on a CPU
    out_NF = rows_ND.new_empty(rows_ND.shape[0], weight_EFD.shape[1])
    parts = (rows_ND.split(counts), weight_EFD.unbind(), out_NF.split(counts))
    for x, weight, out in zip(*parts, strict=True):
        torch.mm(round_to_float8(x, 1), round_to_float8(weight, 1).t(), out=out)
    return out_NF


@float8_grouped_linear.register_fake
def _(rows_ND, weight_EFD, counts_E):  # type: ignore[no-untyped-def]
    return rows_ND.new_empty(rows_ND.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("symbiotic_titan::float8_grouped_linear_backward", mutates_args=())
def float8_grouped_linear_backward(
    grad_NF: Tensor, rows_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows (operands rounded along F) and weight (operands rounded along each expert's rows)."""
    counts = counts_E.tolist()  # device sync, except on a CPU
    grad_rows_ND, grad_weight_EFD = torch.empty_like(rows_ND), torch.zeros_like(weight_EFD)
    parts = (
        *(t.split(counts) for t in (grad_NF, rows_ND, grad_rows_ND)),
        *(w.unbind() for w in (weight_EFD, grad_weight_EFD)),
    )
    for grad, x, grad_x, weight, grad_weight in zip(*parts, strict=True):
        if x.shape[0] == 0:  # no maximum over no rows; the weight's gradient is zero already
            continue
        torch.mm(round_to_float8(grad, 1), round_to_float8(weight, 0), out=grad_x)
        torch.mm(round_to_float8(grad, 0).t(), round_to_float8(x, 0), out=grad_weight)
    return grad_rows_ND, grad_weight_EFD


@float8_grouped_linear_backward.register_fake
def _(grad_NF, rows_ND, weight_EFD, counts_E):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows_ND), torch.empty_like(weight_EFD)


class _Float8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_EFD, counts_E)
        return float8_grouped_linear(rows_ND, weight_EFD, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, None]:
        return *float8_grouped_linear_backward(grad_NF.contiguous(), *ctx.saved_tensors), None


def emulated_float8_swiglu(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> Tensor:
    """(N, D): ``kernels.grouped_swiglu`` with the three matmuls in emulated float8."""
    gate_NF = _Float8GroupedLinear.apply(rows_ND, w1_EFD, counts_E)
    up_NF = _Float8GroupedLinear.apply(rows_ND, w3_EFD, counts_E)
    return _Float8GroupedLinear.apply(F.silu(gate_NF) * up_NF, w2_EDF, counts_E)
