"""Triton kernels of ``moe.row_kernels``, which says what each computes.

Every program writes elements of its own, so no order of execution changes a bit. Sums are in float32. A program over rows holds a
whole row in registers.

triton is installed with torch for CUDA; only the launch of a kernel imports this module. ``TRITON_INTERPRET=1`` runs it on a CPU.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def spread_kernel(
    x, token_t, row_tK, zero_z, out, num_tokens, DIM: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    if program < num_tokens:
        token = tl.load(token_t + program)
        value = tl.load(x + token * DIM + column, mask=inside)
        for copy in tl.static_range(COPIES):
            row = tl.load(row_tK + program * COPIES + copy)
            tl.store(out + row * DIM + column, value, mask=inside)
    else:
        row = tl.load(zero_z + program - num_tokens)
        zeros = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
        tl.store(out + row * DIM + column, zeros, mask=inside)


@triton.jit
def collect_kernel(
    rows, weights, token_t, row_tK, out, PLACES: tl.constexpr, DIM: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    token = tl.load(token_t + program)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for copy in tl.static_range(COPIES):
        row = tl.load(row_tK + program * COPIES + copy)
        value = tl.load(rows + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
        if PLACES > 0:
            weight = tl.load(weights + token * PLACES + copy)
            value *= weight.to(rows.dtype.element_ty).to(tl.float32)
        total += value
    tl.store(out + token * DIM + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def collect_backward_kernel(
    grad, rows, weights, token_t, row_tK, zero_z, grad_rows, grad_weights, num_tokens,
    PLACES: tl.constexpr, DIM: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    if program < num_tokens:
        token = tl.load(token_t + program)
        value = tl.load(grad + token * DIM + column, mask=inside, other=0.0).to(tl.float32)
        for copy in tl.static_range(COPIES):
            row = tl.load(row_tK + program * COPIES + copy)
            weight = tl.load(weights + token * PLACES + copy)
            output = tl.load(rows + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
            dot = tl.sum(output * value, axis=0).to(rows.dtype.element_ty)
            tl.store(grad_weights + token * PLACES + copy, dot.to(grad_weights.dtype.element_ty))
            weighted = value * weight.to(rows.dtype.element_ty).to(tl.float32)
            weighted = weighted.to(grad_rows.dtype.element_ty)
            tl.store(grad_rows + row * DIM + column, weighted, mask=inside)
    else:
        row = tl.load(zero_z + program - num_tokens)
        zeros = tl.zeros([BLOCK], dtype=grad_rows.dtype.element_ty)
        tl.store(grad_rows + row * DIM + column, zeros, mask=inside)


@triton.jit
def gated_silu_kernel(gate, up, hidden, size, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    g = tl.load(gate + element, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + element, (g * tl.sigmoid(g) * u).to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def gated_silu_backward_kernel(
    grad, gate, up, grad_gate, grad_up, hidden, size, BLOCK: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    d = tl.load(grad + element, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + element, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + element, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    slope = sigmoid + silu * (1.0 - sigmoid)
    tl.store(grad_gate + element, (d * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + element, (d * silu).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(hidden + element, (silu * u).to(hidden.dtype.element_ty), mask=inside)


# Elements of a program without rows: each of its 128 threads moves 16 bytes of bf16 at a time.
ELEMENTS = 1024


def by_row(kernel: Any, programs: int, dim: int, *operands: Any, **constants: int) -> None:
    """Launch ``kernel`` with one program for each token and zero row of ``dim`` channels."""
    assert all(x.is_contiguous() for x in operands if isinstance(x, Tensor))
    if programs:
        block = triton.next_power_of_2(dim)
        # Registers for a row in float32: 16 per thread up to 2048 channels, at most 32 up to 8192.
        warps = 4 if block <= 2048 else 8
        kernel[(programs,)](*operands, **constants, DIM=dim, BLOCK=block, num_warps=warps)


def by_element(kernel: Any, *operands: Tensor) -> None:
    """Launch ``kernel`` over contiguous ``operands`` of one shape."""
    size = operands[0].numel()
    assert all(operand.is_contiguous() and operand.numel() == size for operand in operands)
    if size:
        kernel[(triton.cdiv(size, ELEMENTS),)](*operands, size, BLOCK=ELEMENTS)
