"""The chunked cross entropy is the plain one, without its float32 tensors of the logits' size."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.losses import terms
from symbiotic_titan.losses.terms import plain_text_errors, text_errors
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.parallel.dry_run import Precision
from symbiotic_titan.parallel.dry_run_activations import activation_memory
from symbiotic_titan.sequence.modality import IGNORE_INDEX

DEBUG = Path(__file__).parents[3] / "train_configs" / "debug.toml"
ROWS, VOCABULARY = 11, 37


def logits_and_labels(dtype=torch.float32, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    labels[::3] = IGNORE_INDEX
    return logits.requires_grad_(), labels


def errors_and_gradient(function, logits, labels):
    logits.grad = None
    errors = function(logits, labels)
    # A weight of its own for every row, as after the division of sums by counts.
    (errors * torch.linspace(0.5, 1.5, errors.numel()).view_as(errors)).sum().backward()
    return errors.detach(), logits.grad


@pytest.fixture(params=[1, 4 * VOCABULARY, 1 << 24], ids=["a_row", "four_rows", "all"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(terms, "LARGEST_CHUNK", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_the_errors_and_the_gradient_of_the_plain_formula(dtype, chunk):
    logits, labels = logits_and_labels(dtype)
    expected, expected_grad = errors_and_gradient(plain_text_errors, logits, labels)
    errors, grad = errors_and_gradient(text_errors, logits, labels)
    assert errors.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(errors, expected, rtol=1e-6, atol=1e-6)
    # bf16: both round the same float32 gradient, which differs in its last bits.
    torch.testing.assert_close(
        grad, expected_grad, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7
    )
    assert (errors[::3] == 0).all() and (grad[::3] == 0).all() and errors[1] > 0


def test_chunks_are_as_near_to_float64_as_float32_allows(chunk):
    logits, labels = logits_and_labels()
    errors, grad = errors_and_gradient(text_errors, logits, labels)
    exact = logits.detach().double().requires_grad_()
    expected, expected_grad = errors_and_gradient(
        lambda x, y: F.cross_entropy(x, y, ignore_index=IGNORE_INDEX, reduction="none"),
        exact,
        labels,
    )
    torch.testing.assert_close(errors.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [0, ROWS])
def test_without_a_label_errors_and_gradient_are_zero(rows, chunk):
    logits, _ = logits_and_labels(rows=rows)
    labels = torch.full((rows,), IGNORE_INDEX)
    errors, grad = errors_and_gradient(text_errors, logits, labels)
    assert torch.equal(errors, torch.zeros(rows)) and torch.equal(grad, torch.zeros_like(logits))


def test_rows_of_sequences_keep_their_shape():
    logits, labels = logits_and_labels(rows=2 * ROWS)
    errors = text_errors(logits.view(2, ROWS, VOCABULARY), labels.view(2, ROWS))
    assert torch.equal(errors.flatten(), text_errors(logits, labels))


class LargestFloat32(TorchDispatchMode):
    """Numbers in the largest float32 tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_float32_tensor_is_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr(terms, "LARGEST_CHUNK", 4 * VOCABULARY)
    logits, labels = logits_and_labels(torch.bfloat16)
    for function, largest in ((plain_text_errors, ROWS), (text_errors, 4)):
        with LargestFloat32() as seen:
            errors_and_gradient(function, logits, labels)
        assert seen.largest == largest * VOCABULARY


def test_the_dry_run_counts_the_logits_and_their_gradient():
    config = load_job_config(["--job.config_file", str(DEBUG)])
    args, precision = FLAVORS["debug"], Precision(stored=4, computed=2, reduced=4)
    estimate = activation_memory(config, args, precision, expert_parallel=False)
    num_tokens = config.training.local_batch_size * config.training.seq_len
    logits = torch.zeros(num_tokens, args.vocab_size, dtype=torch.bfloat16, requires_grad=True)
    saved = {}

    def pack(tensor):
        if tensor.is_floating_point():  # not the labels
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        errors = text_errors(logits, torch.zeros(num_tokens, dtype=torch.int64))
    errors.sum().backward()
    assert estimate.logits == sum(saved.values()) and estimate.loss == logits.grad.nbytes
