"""Sums and counts per task equal a plain loop; splitting a batch changes nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.losses import Losses
from symbiotic_titan.losses.step import LossFunction, StepTotals
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.sequence.batch import PackedBatch, stack_rows
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from symbiotic_titan.sequence.tasks import TASKS
from symbiotic_titan.training.checks import check_job
from tests.helpers.launch import ROOT


def random_batch(rows: int = 2, length: int = 12, slots: int = 5) -> PackedBatch:
    """Rows whose first half is a text document (task 0) and whose second half holds an image (task 2)."""
    generator = torch.Generator().manual_seed(0)
    task = torch.zeros(rows, length, dtype=torch.int64)
    task[:, length // 2 :] = 2
    task[:, -1] = -1
    labels = torch.randint(0, 7, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = IGNORE_INDEX
    labels[:, -1] = IGNORE_INDEX
    vae_index = torch.arange(length // 2, length // 2 + slots).repeat(rows, 1)
    vae_image = torch.zeros(rows, slots, dtype=torch.int64)
    vae_image[:, -2:], vae_index[:, -2:] = -1, length
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    empty = torch.zeros(rows, 0, dtype=torch.int64)
    return PackedBatch(
        tokens=zeros, modality=zeros, document=zeros, span=zeros, labels=labels, task=task,
        positions=zeros.unsqueeze(-1).expand(-1, -1, 3),
        vit_patches=torch.zeros(rows, 0, 1), vit_coords=torch.zeros(rows, 0, 2, dtype=torch.int64),
        vit_image=empty, vit_index=empty,
        latents=torch.randn(rows, slots, 3, generator=generator),
        vae_coords=torch.zeros(rows, slots, 2, dtype=torch.int64),
        vae_image=vae_image, vae_index=vae_index,
    )  # fmt: skip


def terms_of(logits, velocity, target, batch):
    """(sums, counts) by term."""
    loss = LossFunction()
    values = loss.values(StepInputs(batch, logits, velocity, target))
    return {name: values[name] for name in loss.counted}, loss.counts(batch)


def test_terms_equal_a_plain_loop():
    batch = random_batch()
    logits, velocity = torch.randn(2, 12, 7), torch.randn(2, 5, 3)
    target = torch.randn(2, 5, 3)
    sums, counts = terms_of(logits, velocity, target, batch)
    text, flow = [0.0] * len(TASKS), [0.0] * len(TASKS)
    for row in range(2):
        for t in range(12):
            if batch.labels[row, t] != IGNORE_INDEX:
                text[batch.task[row, t]] += F.cross_entropy(
                    logits[row, t], batch.labels[row, t]
                ).item()
        for slot in range(3):
            flow[2] += (velocity[row, slot] - target[row, slot]).square().mean().item()
    torch.testing.assert_close(sums["text"], torch.tensor(text), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums["flow"], torch.tensor(flow), rtol=1e-5, atol=1e-5)
    assert counts["flow"].tolist() == [0, 0, 6, 0, 0]
    assert counts["text"].sum() == (batch.labels != IGNORE_INDEX).sum()


def test_sums_of_two_rows_are_the_sum_of_each():
    batch = random_batch()
    rows = [replace_rows(batch, i) for i in range(2)]
    assert torch.equal(stack_rows(rows).labels, batch.labels)
    logits, velocity, target = torch.randn(2, 12, 7), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    whole, _ = terms_of(logits, velocity, target, batch)
    first, second = (
        terms_of(logits[i : i + 1], velocity[i : i + 1], target[i : i + 1], rows[i])[0]
        for i in range(2)
    )
    for name in ("text", "flow"):
        torch.testing.assert_close(whole[name], first[name] + second[name])


def replace_rows(batch: PackedBatch, row: int) -> PackedBatch:
    return replace(batch, **{k: v[row : row + 1] for k, v in batch.tensors().items()})


def test_batch_without_images_still_gives_the_velocity_a_zero_gradient():
    batch = random_batch()
    batch = replace(
        batch,
        vae_image=torch.full_like(batch.vae_image, -1),
        vae_index=torch.full_like(batch.vae_index, 12),
    )
    velocity = torch.randn(2, 5, 3, requires_grad=True)
    sums, _ = terms_of(torch.randn(2, 12, 7), velocity, torch.randn(2, 5, 3), batch)
    sums["flow"].sum().backward()
    assert sums["flow"].sum() == 0 and torch.equal(velocity.grad, torch.zeros_like(velocity))


def step_totals(counts):
    empty = torch.zeros(0)
    return StepTotals(counts, modality=empty, positions=empty, sets=empty)


@pytest.mark.parametrize("weights", [{}, {"t2i": 4.0}, {"lm": 0.5, "t2i": 3.0, "mmu": 7.0}])
def test_a_task_with_a_weight_counts_as_that_many_targets_of_it(weights):
    batch = random_batch()
    logits = torch.randn(2, 12, 7, requires_grad=True)
    velocity, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    loss_fn = LossFunction(Losses(balance=0.0, task_weights=weights))
    values = loss_fn.values(StepInputs(batch, logits, velocity, target))
    values = {name: values[name] for name in loss_fn.counted}
    counts = loss_fn.counts(batch)
    loss = loss_fn.loss(values, step_totals(counts))
    by_task = torch.tensor([weights.get(task, 1.0) for task in TASKS])
    expected = {
        name: (by_task * value.detach()).sum() / (by_task * counts[name]).sum()
        for name, value in values.items()
    }
    torch.testing.assert_close(loss, sum(expected.values()))
    [gradient] = torch.autograd.grad(loss, logits)
    [expected_gradient] = torch.autograd.grad(
        (by_task * loss_fn.values(StepInputs(batch, logits, velocity, target))["text"]).sum(),
        logits,
    )
    torch.testing.assert_close(gradient * (by_task * counts["text"]).sum(), expected_gradient)
    logged = loss_fn.step_losses(
        torch.cat([value.detach() for value in values.values()] + [torch.zeros(1)]),
        step_totals(counts),
    )
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-6)
        plain = float(values[name][2].detach() / counts[name][2])
        assert logged[f"by_task/t2i_{name}"] == pytest.approx(plain, rel=1e-6)


def test_without_weights_the_loss_has_the_bits_of_plain_means():
    batch = random_batch()
    inputs = StepInputs(batch, torch.randn(2, 12, 7), torch.randn(2, 5, 3), torch.randn(2, 5, 3))
    loss_fn = LossFunction(Losses(balance=0.0))
    values, counts = loss_fn.values(inputs), loss_fn.counts(batch)
    values = {name: values[name] for name in loss_fn.counted}
    plain = sum(1.0 * value.sum() / counts[name].sum() for name, value in values.items())
    assert torch.equal(loss_fn.loss(values, step_totals(counts)), plain)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e4])
def test_a_weight_of_a_task_has_a_range(weight):
    with pytest.raises(ValueError, match=r"losses\.task_weights\.mmu.*source"):
        Losses(task_weights={"mmu": weight})


def test_a_weight_of_a_task_that_no_source_has_is_refused():
    config = load_job_config(["--job.config_file", str(ROOT / "train_configs/debug.toml")])
    config.losses = Losses(task_weights={"mmu": 2.0, "interleaved": 2.0})
    with pytest.raises(ValueError, match=r"task_weights\.interleaved: no source .* lm, mmu, t2i"):
        check_job(config, 1, elsewhere=True)
