"""Operators for CUDA: the grouped matmul's forward and backward against the loop over experts, and the kernels against plain torch."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from symbiotic_titan.moe import row_kernels
from symbiotic_titan.moe.grouped_mm import swiglu_by_grouped_mm
from symbiotic_titan.moe.kernels import grouped_swiglu
from tests.helpers.row_kernel_cases import CASES, layouts_of, run_all

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: torch for a CPU comes without it"
)


def operands(counts, dtype, dim=16, hidden_dim=24):
    shapes = [(sum(counts), dim), (len(counts), hidden_dim, dim), (len(counts), dim, hidden_dim)]
    shapes.append(shapes[1])
    return [(0.5 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [5], [0, 9], [1, 0], [40, 1, 0, 0]])
def test_grouped_matmul_in_float32_equals_the_loop(counts):
    tensors, counts_E = operands(counts, torch.float32), torch.tensor(counts)
    out = swiglu_by_grouped_mm(*tensors, counts_E)
    expected = grouped_swiglu(*tensors, counts_E)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    found = torch.autograd.grad((out * direction).sum(), tensors)
    wanted = torch.autograd.grad((expected * direction).sum(), tensors)
    for grad, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, target)


def test_grouped_matmul_in_bfloat16_is_as_close_to_float32_as_the_loop_is():
    counts, counts_E = [32, 0, 64, 32], torch.tensor([32, 0, 64, 32])
    tensors = operands(counts, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]

    def run(kernel, inputs):
        out = kernel(*inputs, counts_E)
        return (out, *torch.autograd.grad(out.float().square().sum(), inputs))

    wanted = run(grouped_swiglu, exact)
    found, looped = run(swiglu_by_grouped_mm, tensors), run(grouped_swiglu, tensors)
    for ours, theirs, target in zip(found, looped, wanted, strict=True):
        assert (ours.float() - target).norm() <= 1.05 * (theirs.float() - target).norm()


def test_frozen_experts_get_no_gradient_and_the_rows_the_same():
    tensors, counts_E = operands([3, 0, 5], torch.float32), torch.tensor([3, 0, 5])
    rows, *weights = tensors
    all_grads = torch.autograd.grad(swiglu_by_grouped_mm(*tensors, counts_E).sum(), tensors)
    frozen = [w.detach() for w in weights]
    out = swiglu_by_grouped_mm(rows, *frozen, counts_E)
    assert torch.equal(torch.autograd.grad(out.sum(), rows)[0], all_grads[0])
    assert all(w.grad is None for w in frozen)


# torch 2.13 warns about itself when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_grouped_matmul_is_one_graph_for_any_number_of_rows():
    compiled = torch.compile(
        swiglu_by_grouped_mm, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for counts in ([3, 0, 7], [2, 2, 9]):
        tensors, counts_E = operands(counts, torch.bfloat16), torch.tensor(counts)
        out, expected = compiled(*tensors, counts_E), swiglu_by_grouped_mm(*tensors, counts_E)
        assert torch.equal(out, expected)
        found = torch.autograd.grad(out.sum(), tensors)
        wanted = torch.autograd.grad(expected.sum(), tensors)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_operators_keep_torch_rules():
    tests = ("test_schema", "test_faketensor")
    passed = dict.fromkeys(tests, "SUCCESS")
    gate, up, grad = (torch.randn(5, 8, dtype=torch.bfloat16) for _ in range(3))
    assert torch.library.opcheck(row_kernels.gated_silu, (gate, up), test_utils=tests) == passed
    inputs = (grad, gate, up)
    assert (
        torch.library.opcheck(row_kernels.gated_silu_backward, inputs, test_utils=tests) == passed
    )


def test_layouts_of_the_cases_cover_what_they_name():
    by_name = {case.name: case for case in CASES}
    one_place = layouts_of(by_name["one place"], torch.randn(11, 1))
    assert [block.row_tK.shape[1] for layout in one_place for block in layout.blocks] == [1, 1]
    empty, full = layouts_of(by_name["one token"], torch.randn(1, 24))
    assert len(empty.row_n) == 0 and len(full.row_n) == 2


@needs_triton
def test_kernels_in_the_interpreter_equal_plain_torch():
    # A process of its own: triton reads the variable when it is imported.
    command = [sys.executable, "-m", "tests.helpers.row_kernel_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.splitlines()) == 2 * (len(CASES) + 4)


@needs_triton
def test_kernels_compile_for_hopper_with_wide_accesses_and_without_atomics():
    command = [sys.executable, "-m", "tests.helpers.row_kernels_compiled"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {
        "spread_kernel", "collect_kernel", "collect_backward_kernel", "gated_silu_kernel",
        "gated_silu_backward_kernel",
    }  # fmt: skip
    assert all(k["widest_access_bits"] == 128 and k["atomics"] == 0 for k in kernels)


@pytest.mark.gpu
def test_kernels_on_a_gpu_equal_plain_torch():
    assert len(run_all("cuda")) == 2 * (len(CASES) + 4)
