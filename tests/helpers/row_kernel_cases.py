"""The kernels of ``moe.row_kernels`` against plain torch: cases that a GPU and Triton's interpreter on a CPU both run.

``TRITON_INTERPRET=1 python -m tests.helpers.row_kernel_cases`` runs all of them on a CPU and prints a line for each.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from symbiotic_titan.moe import row_kernels
from symbiotic_titan.moe.dispatch import (
    LocalDispatcher,
    RowCounts,
    lay_out_rows,
    permute,
    unpermute,
)


@dataclass(frozen=True)
class Case:
    """groups: each token's group, 2 for padding. experts: those to choose from in each group; None: all."""

    name: str
    groups: tuple[int, ...]
    top_ks: tuple[int, int] = (2, 2)
    sizes: tuple[int, int] = (5, 3)
    experts: tuple[int, int] | None = None
    dim: int = 24
    knows_counts: bool = True


MIXED = (0, 1, 2, 0, 0, 1, 0, 2, 2, 1, 0)
CASES = (
    Case("mixed", MIXED),
    Case("counts from the device", MIXED, knows_counts=False),
    Case("no padding", (0, 1) * 4),
    Case("one token", (1,)),
    Case("one group without tokens", (0, 0, 2, 0)),
    Case("padding only", (2, 2, 2)),
    Case("all to two experts", MIXED, experts=(2, 2)),
    Case("top-k by group", MIXED, top_ks=(3, 1)),
    Case("one place", MIXED, top_ks=(1, 1), dim=1),
    Case("a power of two", MIXED, dim=32),
)


def choose(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(experts_TK, group_T, counts_E), with E in unused places."""
    total, places = sum(case.sizes), max(case.top_ks)
    experts_TK = torch.full((len(case.groups), places), total)
    for token, group in enumerate(case.groups):
        if group < 2:
            most = (case.experts or case.sizes)[group]
            chosen = torch.randperm(most)[: case.top_ks[group]] + sum(case.sizes[:group])
            experts_TK[token, : len(chosen)] = chosen
    counts_E = torch.bincount(experts_TK.flatten(), minlength=total + 1)[:total]
    return experts_TK, torch.tensor(case.groups), counts_E


def layouts_of(case: Case, x_TD: torch.Tensor):
    experts_TK, group_T, counts_E = choose(case)
    known = tuple(case.groups.count(g) for g in (0, 1)) if case.knows_counts else None
    _, layouts = LocalDispatcher().dispatch(
        x_TD, experts_TK, group_T, counts_E, case.sizes, case.top_ks, 0, known
    )
    return layouts


def two_blocks_in_one_group():
    """As expert parallelism lays out what it sends where groups differ in top-k: tokens 0 and 3 have two copies, token 1 has one."""
    slots_TK = torch.tensor([[1, 0], [2, 9], [9, 9], [2, 1]])
    counts_e = torch.tensor([1, 2, 2])
    size = RowCounts(5, 5, ((2, 2), (1, 1)))
    return lay_out_rows(slots_TK, torch.tensor([0, 1, 2, 0]), (counts_e,), (counts_e,), [size])


def tolerance(dtype: torch.dtype, device: str) -> float:
    """One rounding: to the nearest on a GPU, towards zero in the interpreter."""
    if dtype == torch.float32:
        return 1e-5
    return 2**-8 if device == "cuda" else 2**-7


def assert_rows_equal_plain_torch(layouts, x_TD, places, dtype, device) -> None:
    """``spread`` copies, so it is exact. Sums are compared with float32, of which they differ by one rounding."""
    x_TD, rtol = x_TD.to(dtype), tolerance(dtype, device)
    token_t, row_tK, groups, zero_z, num_rows = (
        [t.to(device) if isinstance(t, torch.Tensor) else t for t in part]
        for part in row_kernels.arguments(layouts)
    )
    where = (token_t, row_tK, groups)
    expected = permute(x_TD, layouts)
    found = row_kernels.spread(x_TD.to(device), *where, zero_z, num_rows)
    for rows_ND, wanted_ND in zip(found, expected, strict=True):
        assert torch.equal(rows_ND.cpu(), wanted_ND)
    rows = tuple(torch.randn_like(r) for r in expected)
    weights_TK = torch.rand(len(x_TD), places)
    if device != "cuda":  # the interpreter would round them towards zero
        weights_TK = weights_TK.to(dtype).float()
    rounded_TK = weights_TK.to(dtype).float().requires_grad_()
    exact = tuple(r.float().requires_grad_() for r in rows)
    on_device = [r.to(device) for r in rows]
    grad_TD = torch.randn_like(x_TD)
    for weights in (None, rounded_TK):
        wanted_TD = unpermute(exact, weights, layouts, len(x_TD))
        given = None if weights is None else weights_TK.to(device)
        out_TD = row_kernels.collect(on_device, given, *where, len(x_TD))
        torch.testing.assert_close(out_TD.cpu().float(), wanted_TD, rtol=rtol, atol=1e-6)
        assert torch.equal(out_TD, row_kernels.collect(on_device, given, *where, len(x_TD)))
    wanted = torch.autograd.grad(wanted_TD, (rounded_TK, *exact), grad_TD.float())
    arguments = (grad_TD.to(device), on_device, weights_TK.to(device), *where, zero_z)
    grad_weights_TK, grads = row_kernels.collect_backward(*arguments)
    again_TK, grads_again = row_kernels.collect_backward(*arguments)
    for grad, target in zip((grad_weights_TK, *grads), wanted, strict=True):
        torch.testing.assert_close(grad.cpu().float(), target, rtol=rtol, atol=1e-5)
    for grad, again in zip((grad_weights_TK, *grads), (again_TK, *grads_again), strict=True):
        assert torch.equal(grad, again)


def assert_gated_silu_equals_float32(shape, dtype, device) -> None:
    rtol = tolerance(dtype, device)
    gate, up, grad = ((4 * torch.randn(shape)).to(dtype) for _ in range(3))
    exact = [gate.float().requires_grad_(), up.float().requires_grad_()]
    hidden = F.silu(exact[0]) * exact[1]
    wanted = (*torch.autograd.grad(hidden, exact, grad.float()), hidden.detach())
    gate, up, grad = (t.to(device) for t in (gate, up, grad))
    found = row_kernels.gated_silu_backward_kernel(grad, gate, up)
    for result, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(result.cpu().float(), target, rtol=rtol, atol=1e-5)
    assert torch.equal(found[2], row_kernels.gated_silu_kernel(gate, up))


def run_all(device: str) -> list[str]:
    """What was compared, one line each."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for case in CASES:
            torch.manual_seed(0)
            x_TD = torch.randn(len(case.groups), case.dim).to(dtype)
            layouts = layouts_of(case, x_TD)
            assert_rows_equal_plain_torch(layouts, x_TD, max(case.top_ks), dtype, device)
            lines.append(f"{dtype} {case.name}")
        x_TD = torch.randn(4, 24)
        assert_rows_equal_plain_torch(two_blocks_in_one_group(), x_TD, 2, dtype, device)
        lines.append(f"{dtype} two blocks")
        for shape in ((0, 8), (3, 8), (70, 40)):
            assert_gated_silu_equals_float32(shape, dtype, device)
            lines.append(f"{dtype} gated silu {shape}")
    return lines


if __name__ == "__main__":
    print("\n".join(run_all("cpu")))
