"""A loss term from outside: its weight, its gradient, its metrics, without a line changed elsewhere."""

import dataclasses

import pytest
import torch

from symbiotic_titan.config.losses import LOSS_TERMS, Losses, LossTerm, losses_class
from symbiotic_titan.extend import register_loss_term
from symbiotic_titan.losses.step import LossFunction, MicroBatchResult
from symbiotic_titan.losses.terms import StepInputs, label_counts, sum_by_task
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from tests.unit.losses.test_losses import random_batch


def squared_logits(inputs):
    """(J,) squares of the logits, averaged over the vocabulary and summed over labelled tokens."""
    is_label = inputs.batch.labels != IGNORE_INDEX
    return sum_by_task(inputs.logits.square().mean(-1) * is_label, inputs.batch.task)


SQUARES = LossTerm(0.5, "Weight of the squared logits.", squared_logits, label_counts)


def inputs_of(batch):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 12, 7, generator=generator, requires_grad=True)
    return StepInputs(batch, logits, torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))


def test_a_term_from_outside_has_a_weight_a_gradient_and_a_metric():
    batch = random_batch()
    with LOSS_TERMS.temporarily(squares=SQUARES):
        settings = losses_class()(text=0.0, flow=0.0, balance=0.0)
        assert [f.name for f in dataclasses.fields(settings)][-1] == "squares"
        loss, inputs = LossFunction(settings), inputs_of(batch)
        totals = loss.totals(loss.count_step([batch, batch]))
        values = loss.values(inputs)
        share = loss.loss(values, totals)
        share.backward()
        result = MicroBatchResult({n: v.detach() for n, v in values.items()}, None)
        losses = loss.step_losses(loss.sum_results([result, result]), totals)
    is_label = batch.labels != IGNORE_INDEX
    mean = inputs.logits.detach().square().mean(-1)[is_label].mean()
    torch.testing.assert_close(share.detach(), 0.5 * mean / 2)  # one of two micro-batches
    expected = torch.where(is_label.unsqueeze(-1), inputs.logits.detach() / 7, 0) / (
        2 * is_label.sum()
    )
    torch.testing.assert_close(inputs.logits.grad, expected)
    assert losses["squares"] == pytest.approx(mean.item())
    assert losses["total"] == pytest.approx(0.5 * mean.item())
    assert {"by_task/lm_squares", "by_task/t2i_squares"} <= losses.keys()


def test_a_term_that_counts_nothing_is_the_sum_of_the_micro_batches_shares():
    share = LossTerm(2.0, "", lambda inputs: inputs.logits.mean() / inputs.num_micro_batches)
    batch = random_batch()
    with LOSS_TERMS.temporarily(average=share):
        loss, inputs = LossFunction(losses_class()()), inputs_of(batch)
        inputs = dataclasses.replace(inputs, num_micro_batches=2)
        values = {n: v.detach() for n, v in loss.values(inputs).items()}
        totals = loss.totals(loss.count_step([batch, batch]))
        losses = loss.step_losses(loss.sum_results([MicroBatchResult(values, None)] * 2), totals)
    assert losses["average"] == pytest.approx(inputs.logits.mean().item())


def test_a_term_registered_after_the_config_was_read_is_told():
    with LOSS_TERMS.temporarily(late=SQUARES):
        with pytest.raises(
            ValueError, match="losses.late: this term was registered after the config was"
        ):
            LossFunction(Losses())


def test_weights_must_not_be_negative():
    with pytest.raises(ValueError, match="losses.flow: must be zero or positive, got -1"):
        Losses(flow=-1)


@pytest.mark.parametrize(
    "name", ["my z", "1z", "class", "total", "terms", "weight", "balance_scope"]
)
def test_a_name_that_cannot_be_a_key_is_refused(name):
    with pytest.raises(
        ValueError, match=f"losses: a term cannot have the name '{name}'; choose an"
    ):
        register_loss_term(name, weight=1.0)(squared_logits)
    assert name not in LOSS_TERMS


@pytest.mark.parametrize(("weight", "rule"), [(-1.0, "zero or positive"), ("1", "a number")])
def test_a_default_weight_must_be_one(weight, rule):
    with pytest.raises(ValueError, match=f"losses: the weight of a term must be {rule}, got"):
        LossTerm(weight, "", squared_logits)


@pytest.mark.parametrize(
    ("value", "count", "message"),
    [
        (
            lambda i: i.logits.mean(),
            label_counts,
            r"value of the loss term 'odd': .*\(5,\), a sum for each task, got \(\)",
        ),
        (squared_logits, None, r"value of the loss term 'odd': .*\(\), one number, got \(5,\)"),
        (lambda i: None, None, "value of the loss term 'odd': .* got NoneType"),
        (squared_logits, lambda b: 2.0, "count of the loss term 'odd': .* got float"),
    ],
)
def test_what_is_no_sum_is_told_with_the_terms_name(value, count, message):
    batch = random_batch()
    with LOSS_TERMS.temporarily(odd=LossTerm(1.0, "", value, count)):
        loss = LossFunction(losses_class()())
        with pytest.raises(ValueError, match=message):
            loss.counts(batch)
            loss.values(inputs_of(batch))
