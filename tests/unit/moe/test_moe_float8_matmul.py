"""Emulated float8 matmuls against torchao's own rounding, and against no rounding."""

import pytest
import torch
import torch.nn.functional as F

from symbiotic_titan.moe.float8_matmul import emulated_float8_swiglu, round_to_float8
from tests.helpers.moe_reference import swiglu

COUNTS = [[48, 0, 16, 32], [0, 0], [16], [0, 5]]


def operands(counts, dtype=torch.float32, dim=32, hidden_dim=48):
    """Rows, w1, w2, w3, and the counts as a tensor."""
    experts, rows = len(counts), (sum(counts), dim)
    shapes = [
        rows,
        (experts, hidden_dim, dim),
        (experts, dim, hidden_dim),
        (experts, hidden_dim, dim),
    ]
    tensors = [(0.5 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]
    return *tensors, torch.tensor(counts)


def plain(x, w1, w2, w3, counts):
    pieces = x.split(counts.tolist())
    return torch.cat([swiglu(p, w1[e], w2[e], w3[e]) for e, p in enumerate(pieces)])


def torchao_round(x, dim):
    """Rowwise recipe of torchao 0.18, as its kernels on a GPU round: dequantised."""
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    if x.numel() == 0:
        return x.double()
    granularity = ScalingGranularity.AXISWISE
    scale = tensor_to_scale(
        x,
        torch.float8_e4m3fn,
        scaling_granularity=granularity,
        axiswise_dim=dim,
        round_scales_to_power_of_2=True,
    )
    return to_fp8_saturated(x.float() * scale, torch.float8_e4m3fn).double() / scale.double()


def reference_linear(x, weight, counts):
    pieces = zip(x.split(counts), weight, strict=True)
    return torch.cat([torchao_round(p, 1) @ torchao_round(w, 1).t() for p, w in pieces]).to(x.dtype)


def reference_linear_grads(grad, x, weight, counts):
    """(gradient of x, gradient of weight), each product of two operands rounded along the dim it sums over."""
    pieces = list(zip(grad.split(counts), x.split(counts), weight, strict=True))
    grad_x = [torchao_round(g, 1) @ torchao_round(w, 0) for g, _, w in pieces]
    grad_w = [torchao_round(g, 0).t() @ torchao_round(p, 0) for g, p, _ in pieces]
    return torch.cat(grad_x).to(x.dtype), torch.stack(grad_w).to(x.dtype)


def reference_step(direction, x, w1, w2, w3, counts):
    """(output, gradients of the four operands), by the chain rule written out."""
    gate, up = (reference_linear(x, w, counts).requires_grad_() for w in (w1, w3))
    hidden = F.silu(gate) * up
    out = reference_linear(hidden.detach(), w2, counts)
    grad_hidden, grad_w2 = reference_linear_grads(direction, hidden.detach(), w2, counts)
    grad_gate, grad_up = torch.autograd.grad(hidden, (gate, up), grad_hidden)
    from_gate, grad_w1 = reference_linear_grads(grad_gate, x, w1, counts)
    from_up, grad_w3 = reference_linear_grads(grad_up, x, w3, counts)
    return out, (from_gate + from_up, grad_w1, grad_w2, grad_w3)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"]
)
def test_swiglu_is_what_torchao_computes(counts, dtype, tolerance):
    # An intermediate that differs in its last bit may round to the next float8 number, 1/16 away: few do.
    *tensors, counts_E = operands(counts, dtype)
    out = emulated_float8_swiglu(*tensors, counts_E)
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, direction)
    expected, wanted = reference_step(direction, *(t.detach() for t in tensors), counts)
    for ours, theirs in zip((out, *found), (expected, *wanted), strict=True):
        gap = (ours - theirs).float().norm()
        assert gap <= tolerance * theirs.float().norm()


def test_swiglu_is_near_the_unrounded_one():
    """Two rounded operands of a matmul give about 4 percent error, a chain of two matmuls about 6, its gradients up to 9."""
    *tensors, counts = operands([48, 16, 64], dim=64, hidden_dim=96)
    out, exact = emulated_float8_swiglu(*tensors, counts), plain(*tensors, counts)
    direction = torch.randn_like(out)
    results = zip(
        (out, *torch.autograd.grad(out, tensors, direction)),
        (exact, *torch.autograd.grad(exact, tensors, direction)),
        strict=True,
    )
    errors = [float((a - b).detach().norm() / b.detach().norm()) for a, b in results]
    assert all(0.005 < error < 0.09 for error in errors), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_is_rounding_once_and_keeps_small_slices(dtype):
    x = (torch.randn(6, 40) * torch.logspace(-12, 4, 6).unsqueeze(1)).to(dtype)
    once = round_to_float8(x, 1)
    assert torch.equal(once, round_to_float8(once, 1))
    assert ((once - x).norm(dim=1) < 0.04 * x.norm(dim=1)).all()


def test_rounding_of_zeros_is_zero_and_of_a_non_finite_number_is_seen():
    x = torch.zeros(3, 8)
    assert torch.equal(round_to_float8(x, 1), x)
    x[1, 2] = float("inf")
    x[2, 3] = float("nan")
    rounded = round_to_float8(x, 1)
    assert rounded[0].eq(0).all()
    assert not rounded[1].isfinite().all() and not rounded[2].isfinite().all()


def test_an_expert_without_rows_gets_a_gradient_of_zeros():
    x, w1, w2, w3, counts = operands([16, 0], dim=16, hidden_dim=16)
    emulated_float8_swiglu(x, w1, w2, w3, counts).sum().backward()
    for weight in (w1, w2, w3):
        assert weight.grad[0].abs().sum() > 0
        assert torch.equal(weight.grad[1], torch.zeros_like(weight.grad[1]))
