"""Losses by name are the sums over the counts, bit for bit as the trainer logs them; nothing is said of what has no token."""

import torch

from symbiotic_titan.losses.step import (
    accuracies,
    correct_tokens,
    mean_losses,
)
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from symbiotic_titan.sequence.tasks import TASKS
from tests.unit.losses.test_losses import random_batch


def random_terms():
    generator = torch.Generator().manual_seed(0)
    sums = {
        "text": torch.rand(len(TASKS), generator=generator) * 1e3,
        "flow": torch.rand(len(TASKS), generator=generator),
    }
    counts = {
        "text": torch.tensor([311.0, 0.0, 97.0, 3.0, 0.0]),
        "flow": torch.tensor([0.0, 0.0, 1021.0, 77.0, 0.0]),
    }
    return sums, counts


def test_means_are_sums_over_counts_and_empty_tasks_are_left_out():
    sums, counts = random_terms()
    expected = {
        "text": float(sums["text"].sum() / counts["text"].sum()),
        "flow": float(sums["flow"].sum() / counts["flow"].sum()),
    }
    for i, task in enumerate(TASKS):
        if counts["text"][i]:
            expected[f"by_task/{task}_text"] = float(sums["text"][i] / counts["text"][i])
        if counts["flow"][i]:
            expected[f"by_task/{task}_flow"] = float(sums["flow"][i] / counts["flow"][i])
    assert mean_losses(sums, counts) == expected
    assert "by_task/mmu_text" not in expected and len(expected) == 7


def test_without_a_generated_token_there_is_no_flow_loss():
    sums, counts = random_terms()
    zeros = torch.zeros(len(TASKS))
    names = mean_losses(sums | {"flow": zeros}, counts | {"flow": zeros})
    assert "text" in names and not [name for name in names if "flow" in name]


def test_correct_tokens_are_counted_by_task_where_there_is_a_label():
    batch = random_batch()
    logits = torch.nn.functional.one_hot(batch.labels.clamp(min=0), 7).float()
    logits[0, :3] = 0  # then the most likely token is 0
    logits[0, :3, 0] = 1
    expected = [0.0] * len(TASKS)
    for row, place in (batch.labels != IGNORE_INDEX).nonzero().tolist():
        wrong = row == 0 and place < 3 and batch.labels[row, place] != 0
        expected[batch.task[row, place]] += not wrong
    inputs = StepInputs(batch, logits, batch.latents, batch.latents)
    assert correct_tokens(inputs).tolist() == expected
    shares = accuracies(torch.tensor([1.0, 0, 3, 0, 0]), torch.tensor([4.0, 0, 3, 0, 0]))
    assert shares == {"accuracy/lm": 0.25, "accuracy/t2i": 1.0}
