"""Logits of labelled tokens alone give the losses, accuracies and gradients that the logits of all tokens give."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from symbiotic_titan.build import build_loss
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.losses import LOSS_TERMS, LossTerm, losses_class
from symbiotic_titan.losses.step import LossFunction, correct_tokens
from symbiotic_titan.losses.terms import (
    StepInputs,
    label_counts,
    label_index,
    plain_text_errors,
    sum_by_task,
)
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from tests.helpers.tiny_models import MIXED, OTHER, pack_row, tiny_args, tiny_model

CPU = torch.device("cpu")


def labelled_batch(rows_with_labels=(0, 1)):
    """Two rows of several tasks with images; about half of the text of ``rows_with_labels`` has a label."""
    batch = stack_rows([pack_row(MIXED, tiny_args()), pack_row(OTHER, tiny_args(), seed=10)])
    is_label = (batch.span < 0) & (batch.document >= 0)
    is_label &= torch.rand(is_label.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    is_label &= torch.tensor([row in rows_with_labels for row in range(2)]).unsqueeze(1)
    labels = torch.where(is_label, batch.tokens.roll(-1, 1), IGNORE_INDEX)
    return replace(batch, labels=labels, task=batch.document.clamp(max=4))


def step_of(model, batch, index, autocast=False):
    """(sums by term, correct tokens, gradient of every parameter) of one micro-batch with the logits of ``index``."""
    model.zero_grad()
    loss_fn, times = LossFunction(), torch.full(batch.vae_image.shape, 0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(batch, batch.latents, times, torch.tensor(1.0), logit_index_N=index)
    target = torch.ones_like(output.velocity)
    inputs = StepInputs(
        batch, output.logits, output.velocity, target, output.records, logit_index=index
    )
    values = loss_fn.values(inputs)
    loss_fn.loss(values, loss_fn.totals(loss_fn.count_step([batch]))).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in values.items()}, correct_tokens(inputs), gradients


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [(0, 1), (1,), ()], ids=["both_rows", "one_row", "no_label"])
def test_losses_accuracies_and_gradients_are_those_of_all_logits(rows, tied, autocast):
    batch, model = labelled_batch(rows), tiny_model(tiny_args(tie_embeddings=tied))
    index = LossFunction().logit_index(batch)
    assert 0 < index.numel() < batch.labels.numel()
    values, correct, gradients = step_of(model, batch, index, autocast)
    expected_values, expected_correct, expected = step_of(model, batch, None, autocast)
    close = {"rtol": 1e-5, "atol": 1e-6} if not autocast else {"rtol": 2e-2, "atol": 2e-4}
    torch.testing.assert_close(values, expected_values, **close)
    torch.testing.assert_close(gradients, expected, **close)
    assert torch.equal(correct, expected_correct)
    assert (
        "output.weight" in gradients or tied
    )  # also without a label: FSDP reduces it on every rank
    assert bool(values["text"].sum() > 0) == bool(rows)


def test_only_the_tokens_of_the_index_reach_the_output_layer():
    batch, model, seen = labelled_batch(), tiny_model(tiny_args()), []
    model.output.register_forward_hook(
        lambda module, inputs, result: seen.append(result.flatten(0, -2).shape)
    )
    index = LossFunction().logit_index(batch)
    step_of(model, batch, index)
    step_of(model, batch, None)
    assert seen == [(index.numel(), 272), (2 * 48, 272)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("length", [5, 48, 1024, 1040])
def test_the_index_holds_every_label_once_and_has_one_of_few_sizes(length, share):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        is_label = torch.rand(2, length, generator=generator) < share
        index = label_index(torch.where(is_label, 3, IGNORE_INDEX))
        assert index.unique().numel() == index.numel()
        places = is_label.flatten().nonzero().flatten()
        assert torch.equal(index[: places.numel()], places)
        spare = index.numel() - places.numel()
        assert index.numel() > 0 and 0 <= spare <= max(16, 2 * length / 16)
    sizes = {
        label_index(torch.where(torch.arange(2 * length) < n, 3, IGNORE_INDEX)).numel()
        for n in range(0, 2 * length + 1, 7)
    }
    assert len(sizes) <= 33


def old_term(inputs):
    """As terms were written when all had all logits."""
    is_label = inputs.batch.labels != IGNORE_INDEX
    return sum_by_task(inputs.logits.float().square().mean(-1) * is_label, inputs.batch.task)


def test_a_term_that_says_nothing_about_logits_gets_all_of_them():
    batch, model = labelled_batch(), tiny_model(tiny_args())
    with LOSS_TERMS.temporarily(old=LossTerm(1.0, "", old_term, label_counts)):
        loss_fn = LossFunction(losses_class()())
        assert loss_fn.logit_index(batch) is None
        times = torch.full(batch.vae_image.shape, 0.5)
        output = model(batch, batch.latents, times, torch.tensor(1.0))
        inputs = StepInputs(batch, output.logits, output.velocity, output.velocity, output.records)
        assert output.logits.shape == (2, 48, 272) and loss_fn.values(inputs)["old"].sum() > 0
    term = LossTerm(1.0, "", old_term, label_counts, all_logits=False)
    with LOSS_TERMS.temporarily(old=term):
        assert LossFunction(losses_class()()).logit_index(batch) is not None


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)
def test_the_compiled_loss_is_compiled_once_for_any_number_of_labels():
    torch._dynamo.reset()
    counters.clear()
    config = JobConfig()
    config.compile = replace(config.compile, enable=True, backend="aot_eager")
    errors_of = build_loss(config).cross_entropy
    generator = torch.Generator().manual_seed(0)
    for shape in ((32,), (16,), (48,), (2, 24)):
        logits = torch.randn(*shape, 19, generator=generator, requires_grad=True)
        labels = torch.randint(19, shape, generator=generator)
        labels.flatten()[::3] = IGNORE_INDEX
        (expected,) = torch.autograd.grad(plain_text_errors(logits, labels).sum(), logits)
        errors = errors_of(logits, labels)
        errors.sum().backward()
        torch.testing.assert_close(errors, plain_text_errors(logits, labels))
        torch.testing.assert_close(logits.grad, expected)
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
