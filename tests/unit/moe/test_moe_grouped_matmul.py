"""The grouped SwiGLU against one expert after the other, and the threads it runs on."""

import threading

import pytest
import torch

from symbiotic_titan.moe import kernels as expert_threads
from symbiotic_titan.moe.kernels import (
    grouped_swiglu,
    row_multiple,
    swiglu_loop,
    swiglu_loop_backward,
)
from tests.helpers.moe_reference import swiglu

CPU = torch.device("cpu")


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(expert_threads, "_MIN_WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operands(counts, dtype=torch.float32, dim=16, hidden_dim=24):
    shapes = [
        (sum(counts), dim),
        (len(counts), hidden_dim, dim),
        (len(counts), dim, hidden_dim),
        (len(counts), hidden_dim, dim),
    ]
    tensors = [(0.5 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]
    return *tensors, torch.tensor(counts)


def plain(x, w1, w2, w3, counts):
    pieces = x.split(counts.tolist())
    return torch.cat([swiglu(p, w1[e], w2[e], w3[e]) for e, p in enumerate(pieces)])


def assert_one_after_the_other(counts, dtype=torch.float32, hidden_dim=24, **tolerance):
    *tensors, counts = operands(counts, dtype, hidden_dim=hidden_dim)
    out, expected = grouped_swiglu(*tensors, counts), plain(*tensors, counts)
    torch.testing.assert_close(out, expected, **tolerance)
    direction = torch.randn_like(out)
    found = torch.autograd.grad((out * direction).sum(), tensors)
    wanted = torch.autograd.grad((expected * direction).sum(), tensors)
    for grad, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, target, **tolerance)


@pytest.mark.parametrize(
    "counts", [[3, 0, 7, 1], [0, 0], [5], [0, 9], [4, 4, 4, 0, 0, 4], [700, 700], [0, 2, 2]]
)
def test_float32_equals_one_expert_after_the_other(counts):
    assert_one_after_the_other(counts)


@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [500, 20, 30, 1], [0, 300, 300, 300, 0, 5]])
def test_experts_that_share_elementwise_passes_equal_one_after_the_other(counts):
    assert_one_after_the_other(counts, hidden_dim=64, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [[32, 0, 64], [0, 32], [32, 32, 32, 64, 64, 0, 0]])
def test_bfloat16_equals_one_expert_after_the_other(counts):
    assert_one_after_the_other(counts, torch.bfloat16, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0], [1, 1, 40], [40, 1, 1]])
def test_threads_change_nothing(counts, two_threads):
    assert_one_after_the_other(counts)


# With 64, small experts share elementwise passes; with 23 they must not, because each has elements outside of whole vectors.
@pytest.mark.parametrize("hidden_dim", [23, 64])
def test_float32_bits_of_an_expert_do_not_depend_on_the_others(hidden_dim):
    *tensors, counts = operands([9] * 8 + [4], hidden_dim=hidden_dim)
    rows, *weights = tensors
    together = grouped_swiglu(*tensors, counts)
    grads = torch.autograd.grad(together.square().sum(), tensors)
    for e in range(8):
        of_e = slice(9 * e, 9 * e + 9)
        operands_e = [rows[of_e], *(w[e : e + 1] for w in weights)]
        alone = grouped_swiglu(*operands_e, torch.tensor([9]))
        grads_alone = torch.autograd.grad(alone.square().sum(), operands_e)
        assert torch.equal(together[of_e], alone)
        assert torch.equal(grads[0][of_e], grads_alone[0])
        for grad, grad_alone in zip(grads[1:], grads_alone[1:], strict=True):
            assert torch.equal(grad[e : e + 1], grad_alone)


def test_threads_give_the_same_bits(two_threads):
    *tensors, counts = operands([32, 64, 0, 32, 96, 96], torch.bfloat16)
    first = grouped_swiglu(*tensors, counts)
    torch.set_num_threads(1)
    assert torch.equal(first, grouped_swiglu(*tensors, counts))


def test_every_expert_is_computed_once_on_several_threads(two_threads):
    seen, names = [], set()
    barrier = threading.Barrier(2, timeout=20)

    def work(first, last):
        barrier.wait()  # both ranges run at the same time, or this times out
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        seen.extend(range(first, last))

    expert_threads.in_threads(work, [1, 5, 2, 4], CPU)
    assert sorted(seen) == [0, 1, 2, 3] and len(names) == 2
    assert torch.get_num_threads() == 2


def test_an_error_in_a_thread_reaches_the_caller(two_threads):
    def work(first, last):
        if first > 0:
            raise RuntimeError("in the second thread")

    with pytest.raises(RuntimeError, match="in the second thread"):
        expert_threads.in_threads(work, [4, 4], CPU)
    assert torch.get_num_threads() == 2


def test_inference_mode_reaches_the_threads(two_threads):
    with torch.inference_mode():
        *tensors, counts = operands([3, 5])
        assert grouped_swiglu(*tensors, counts).is_inference()


def test_rows_are_rounded_up_where_kernels_are_compiled_per_size():
    assert row_multiple(CPU, torch.bfloat16) > 1
    assert row_multiple(CPU, torch.float32) == 1
    assert row_multiple(torch.device("cuda"), torch.bfloat16) == 1


# torch 2.13 warns about itself when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_sees_one_call_and_gives_the_same():
    *tensors, counts = operands([3, 0, 7])
    compiled = torch.compile(grouped_swiglu, backend="aot_eager", fullgraph=True)
    out = compiled(*tensors, counts)
    assert torch.equal(out, grouped_swiglu(*tensors, counts))
    found = torch.autograd.grad(out.sum(), tensors)
    wanted = torch.autograd.grad(grouped_swiglu(*tensors, counts).sum(), tensors)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_custom_ops_keep_torch_rules():
    *tensors, counts = operands([3, 0, 7])
    tensors = [t.detach() for t in tensors]
    tests = ("test_schema", "test_faketensor")
    passed = dict.fromkeys(tests, "SUCCESS")
    assert torch.library.opcheck(swiglu_loop, (*tensors, counts), test_utils=tests) == passed
    out, gate, up = swiglu_loop(*tensors, counts)
    for weights_need_grad in (True, False):
        inputs = (out, *tensors, counts, gate, up, weights_need_grad)
        assert torch.library.opcheck(swiglu_loop_backward, inputs, test_utils=tests) == passed
