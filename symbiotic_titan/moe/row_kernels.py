"""Kernels over rows sorted by expert on CUDA, as operators that torch.compile and activation checkpointing treat as one.

``moe.dispatch`` and ``moe.kernels`` choose by device between these and plain torch, which they must equal. Each reads and writes
every element once: a token is read once for all its copies, and no intermediate of N rows is made.

A layout is given as lists: ``token_t``, ``row_tK`` and ``groups`` (the block's group) have one entry per block, ``zero_z`` and
``num_rows`` one per group; see ``dispatch.RowLayout``. Shape letters: sequence/shapes.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def arguments(
    layouts: Sequence[Any],
) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor], list[int]]:
    """(token_t, row_tK, groups, zero_z, num_rows) of layouts: ``dispatch.RowLayout``, whose file imports this one."""
    blocks = [(group, block) for group, layout in enumerate(layouts) for block in layout.blocks]
    return (
        [block.token_t for _, block in blocks],
        [block.row_tK for _, block in blocks],
        [group for group, _ in blocks],
        [layout.zero_z for layout in layouts],
        [layout.num_rows for layout in layouts],
    )


@torch.library.custom_op("symbiotic_titan::spread", mutates_args=())
def spread(
    x_TD: Tensor,
    token_t: list[Tensor],
    row_tK: list[Tensor],
    groups: list[int],
    zero_z: list[Tensor],
    num_rows: list[int],
) -> list[Tensor]:
    """(N, D) per group: every token written to its rows, zeros to all others."""
    from symbiotic_titan.moe.triton_kernels import by_row, spread_kernel

    x_TD, dim = x_TD.contiguous(), x_TD.shape[1]
    out = [x_TD.new_empty(n, dim) for n in num_rows]
    zeros = list(zero_z)
    for tokens, rows, group in zip(token_t, row_tK, groups, strict=True):
        zero_rows, zeros[group] = zeros[group], zeros[group][:0]  # once, with the first block
        operands = (x_TD, tokens, rows, zero_rows, out[group], len(tokens))
        by_row(spread_kernel, len(tokens) + len(zero_rows), dim, *operands, COPIES=rows.shape[1])
    return out


@spread.register_fake
def _(x_TD, token_t, row_tK, groups, zero_z, num_rows):  # type: ignore[no-untyped-def]
    return [x_TD.new_empty(n, x_TD.shape[1]) for n in num_rows]


@torch.library.custom_op("symbiotic_titan::collect", mutates_args=())
def collect(
    rows: list[Tensor],
    weights_TK: Tensor | None,
    token_t: list[Tensor],
    row_tK: list[Tensor],
    groups: list[int],
    num_tokens: int,
) -> Tensor:
    """(T, D): each token's sum over its rows, weighted unless ``weights`` is None; 0 for a token without rows.

    Weights are rounded to the rows' dtype; the sum is in float32 and rounded once.
    """
    from symbiotic_titan.moe.triton_kernels import by_row, collect_kernel

    rows, dim, routed = [r.contiguous() for r in rows], rows[0].shape[1], sum(map(len, token_t))
    out_TD = (torch.empty if routed == num_tokens else torch.zeros)(
        num_tokens, dim, dtype=rows[0].dtype, device=rows[0].device
    )
    weights = out_TD if weights_TK is None else weights_TK.contiguous()
    places = 0 if weights_TK is None else weights_TK.shape[1]
    for tokens, row, group in zip(token_t, row_tK, groups, strict=True):
        operands = (rows[group], weights, tokens, row, out_TD)
        copies = row.shape[1]
        by_row(collect_kernel, len(tokens), dim, *operands, PLACES=places, COPIES=copies)
    return out_TD


@collect.register_fake
def _(rows, weights_TK, token_t, row_tK, groups, num_tokens):  # type: ignore[no-untyped-def]
    return rows[0].new_empty(num_tokens, rows[0].shape[1])


@torch.library.custom_op("symbiotic_titan::collect_backward", mutates_args=())
def collect_backward(
    grad_TD: Tensor,
    rows: list[Tensor],
    weights_TK: Tensor,
    token_t: list[Tensor],
    row_tK: list[Tensor],
    groups: list[int],
    zero_z: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the weighted ``collect``: of the weights, (T, K), and of each group's rows, (N, D).

    A weight's gradient is a dot product over D in float32, rounded once to the rows' dtype.
    """
    from symbiotic_titan.moe.triton_kernels import by_row, collect_backward_kernel

    dim, places = grad_TD.shape[1], weights_TK.shape[1]
    grad_TD, weights_TK = grad_TD.contiguous(), weights_TK.contiguous()
    rows = [r.contiguous() for r in rows]
    grad_weights_TK = torch.zeros_like(weights_TK)
    grads = [torch.empty_like(r) for r in rows]
    zeros = list(zero_z)
    for tokens, row, group in zip(token_t, row_tK, groups, strict=True):
        zero_rows, zeros[group] = zeros[group], zeros[group][:0]
        where = (tokens, row, zero_rows, grads[group], grad_weights_TK, len(tokens))
        operands = (grad_TD, rows[group], weights_TK, *where)
        programs, copies = len(tokens) + len(zero_rows), row.shape[1]
        by_row(collect_backward_kernel, programs, dim, *operands, PLACES=places, COPIES=copies)
    return grad_weights_TK, grads


@collect_backward.register_fake
def _(grad_TD, rows, weights_TK, token_t, row_tK, groups, zero_z):  # type: ignore[no-untyped-def]
    return torch.empty_like(weights_TK), [torch.empty_like(r) for r in rows]


@torch.library.custom_op("symbiotic_titan::gated_silu", mutates_args=())
def gated_silu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """(N, F): ``silu(gate) * up``, computed in float32 and rounded once."""
    return (F.silu(gate_NF.float()) * up_NF.float()).to(gate_NF.dtype)


@gated_silu.register_kernel("cuda")
def gated_silu_kernel(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``gated_silu`` in one pass."""
    from symbiotic_titan.moe import triton_kernels

    hidden_NF = torch.empty_like(gate_NF)
    triton_kernels.by_element(triton_kernels.gated_silu_kernel, gate_NF, up_NF, hidden_NF)
    return hidden_NF


@gated_silu.register_fake
def _(gate_NF, up_NF):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate_NF)


@torch.library.custom_op("symbiotic_titan::gated_silu_backward", mutates_args=())
def gated_silu_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and ``silu(gate) * up`` once more, which need not be kept for the gradient of w2."""
    grad, gate, up = grad_NF.float(), gate_NF.float(), up_NF.float()
    silu, slope = F.silu(gate), torch.ops.aten.silu_backward(grad * up, gate)
    parts = [part.to(gate_NF.dtype) for part in (slope, grad * silu, silu * up)]
    return parts[0], parts[1], parts[2]


@gated_silu_backward.register_kernel("cuda")
def gated_silu_backward_kernel(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``gated_silu_backward`` in one pass."""
    from symbiotic_titan.moe import triton_kernels

    out = [torch.empty_like(gate_NF) for _ in range(3)]
    operands = (grad_NF, gate_NF, up_NF, *out)
    triton_kernels.by_element(triton_kernels.gated_silu_backward_kernel, *operands)
    return out[0], out[1], out[2]


@gated_silu_backward.register_fake
def _(grad_NF, gate_NF, up_NF):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate_NF), torch.empty_like(gate_NF), torch.empty_like(gate_NF)
