"""SwiGLU of many experts over rows sorted by expert: the one place that knows which kernel is fastest where.

``row_multiple`` says to what multiple the dispatcher must round each expert's rows up (with zero rows), ``grouped_swiglu``
computes. CUDA uses ``F.grouped_mm`` where the device has it. Everything else loops over the experts inside one autograd
function, which keeps the loop's gradients out of autograd (indexing a stacked weight costs a full-size zero gradient per
expert) and its intermediates in cache. What was tried and measured is in the comments; ``tools/bench/moe.py`` repeats it.

Letters: N rows, D width, F hidden width, E experts on this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from symbiotic_titan.moe.expert_threads import for_each_expert

# oneDNN compiles a kernel for every new row count of a bf16 matmul (3 to 8 ms each, 1024 kept), and row counts change with
# every batch. Whole tiles also run 1.3 times faster than ragged ones. fp32 goes through MKL, which has neither problem.
_CPU_TILE_ROWS = 32


def row_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Each expert's rows must be a multiple of this; 1 is no constraint."""
    return _CPU_TILE_ROWS if device.type == "cpu" and dtype.itemsize == 2 else 1


def _has_grouped_mm(rows_ND: Tensor, hidden_dim: int) -> bool:
    """The device has the fused kernel for these operands: bf16, compute capability 9.0, rows of whole 16 bytes."""
    return (
        rows_ND.device.type == "cuda"
        and rows_ND.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows_ND.device) >= (9, 0)
        and rows_ND.shape[1] % 8 == 0
        and hidden_dim % 8 == 0
    )


def grouped_swiglu(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> Tensor:
    """(N, D): ``w2(silu(w1 x) * w3 x)`` with each expert's weights on its rows. Differentiable.

    All operands have one dtype. ``counts_E``: int64, rows of each expert, multiples of ``row_multiple``; they sum to N. An
    expert without rows gets a gradient of zeros.
    """
    if _has_grouped_mm(rows_ND, w1_EFD.shape[1]):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        gate_NF = F.grouped_mm(rows_ND, w1_EFD.transpose(1, 2), offs=offsets_E)
        up_NF = F.grouped_mm(rows_ND, w3_EFD.transpose(1, 2), offs=offsets_E)
        return F.grouped_mm(F.silu(gate_NF) * up_NF, w2_EDF.transpose(1, 2), offs=offsets_E)
    return _LoopedSwiGLU.apply(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E)


class _LoopedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
    ) -> Tensor:
        out_ND, gate_NF, up_NF = swiglu_loop(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E)
        ctx.save_for_backward(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E, gate_NF, up_NF)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        weights_need_grad = any(ctx.needs_input_grad[1:4])
        grad_rows_ND, *grad_weights = swiglu_loop_backward(
            grad_ND.contiguous(), *ctx.saved_tensors, weights_need_grad
        )
        return grad_rows_ND, *(grad_weights if weights_need_grad else (None,) * 3), None


# Custom ops, so that a compiled layer sees one call and not a loop over experts and threads.
@torch.library.custom_op("symbiotic_titan::swiglu_loop", mutates_args=())
def swiglu_loop(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """out (N, D), and for the backward pass gate = w1 x and up = w3 x, both (N, F)."""
    counts = counts_E.tolist()  # device sync, except on a CPU
    out_ND = torch.empty_like(rows_ND)
    gate_NF = rows_ND.new_empty(rows_ND.shape[0], w1_EFD.shape[1])
    up_NF = torch.empty_like(gate_NF)
    per_expert = list(
        zip(
            *(t.split(counts) for t in (rows_ND, out_ND, gate_NF, up_NF)),
            *(w.transpose(1, 2).unbind() for w in (w1_EFD, w2_EDF, w3_EFD)),
            strict=True,
        )
    )

    def work(first: int, last: int) -> None:
        # One scratch buffer per thread instead of one of all N rows: it stays in the core's cache.
        scratch = gate_NF.new_empty(max(counts[first:last], default=0), gate_NF.shape[1])
        for x, out, gate, up, w1, w2, w3 in per_expert[first:last]:
            if x.shape[0] == 0:
                continue
            hidden = scratch[: x.shape[0]]
            torch.mm(x, w1, out=gate)
            torch.mm(x, w3, out=up)
            torch.ops.aten.silu.out(gate, out=hidden).mul_(up)
            torch.mm(hidden, w2, out=out)

    for_each_expert(work, counts, rows_ND)
    return out_ND, gate_NF, up_NF


@swiglu_loop.register_fake
def _(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E):  # type: ignore[no-untyped-def]
    gate_NF = rows_ND.new_empty(rows_ND.shape[0], w1_EFD.shape[1])
    return torch.empty_like(rows_ND), gate_NF, torch.empty_like(gate_NF)


@torch.library.custom_op("symbiotic_titan::swiglu_loop_backward", mutates_args=())
def swiglu_loop_backward(
    grad_ND: Tensor,
    rows_ND: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    counts_E: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    weights_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, w1, w2 and w3; the last three are empty unless asked for."""
    counts = counts_E.tolist()  # device sync, except on a CPU
    weights = (w1_EFD, w2_EDF, w3_EFD)
    grad_rows_ND = torch.empty_like(rows_ND)
    grad_weights = [torch.empty_like(w) if weights_need_grad else w.new_empty(0) for w in weights]
    per_expert = list(
        zip(
            *(t.split(counts) for t in (grad_ND, rows_ND, grad_rows_ND, gate_NF, up_NF)),
            *(w.unbind() for w in weights),
            strict=True,
        )
    )
    grad_per_expert = list(zip(*(g.unbind() for g in grad_weights), strict=True))

    def work(first: int, last: int) -> None:
        most_rows = max(counts[first:last], default=0)
        scratch = [gate_NF.new_empty(most_rows, gate_NF.shape[1]) for _ in range(3)]
        for expert in range(first, last):
            grad, x, grad_x, gate, up, w1, w2, w3 = per_expert[expert]
            if x.shape[0] == 0:
                for grad_w in grad_per_expert[expert] if weights_need_grad else ():
                    grad_w.zero_()
                continue
            activated, hidden, grad_hidden = (buffer[: x.shape[0]] for buffer in scratch)
            torch.mm(grad, w2, out=grad_hidden)
            torch.ops.aten.silu.out(gate, out=activated)
            if weights_need_grad:
                torch.mul(activated, up, out=hidden)
                torch.mm(grad.t(), hidden, out=grad_per_expert[expert][1])
            grad_up = activated.mul_(grad_hidden)
            grad_gate = torch.ops.aten.silu_backward.grad_input(
                grad_hidden.mul_(up), gate, grad_input=hidden
            )
            if weights_need_grad:
                torch.mm(grad_gate.t(), x, out=grad_per_expert[expert][0])
                torch.mm(grad_up.t(), x, out=grad_per_expert[expert][2])
            torch.mm(grad_gate, w1, out=grad_x)
            torch.addmm(grad_x, grad_up, w3, out=grad_x)

    for_each_expert(work, counts, rows_ND)
    return grad_rows_ND, grad_weights[0], grad_weights[1], grad_weights[2]


@swiglu_loop_backward.register_fake
def _(grad_ND, rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E, gate_NF, up_NF, weights_need_grad):  # type: ignore[no-untyped-def]
    grads = [
        torch.empty_like(w) if weights_need_grad else w.new_empty(0)
        for w in (w1_EFD, w2_EDF, w3_EFD)
    ]
    return torch.empty_like(rows_ND), *grads
