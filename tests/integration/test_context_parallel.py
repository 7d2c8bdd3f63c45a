"""Ranks that share sequences: losses and held-out losses of one process, and checkpoints that go from one to the other."""

import shutil

import pytest

from tests.helpers import launch as runs
from tests.helpers.launch import NUM_STEPS
from tests.integration.test_validation import VALIDATION, assert_same, with_validation

TRAINING = ("loss/text", "loss/flow", "loss/balance", "grad_norm/all")
COUNTS = ("tokens/text", "tokens/vit", "tokens/vae", "data/fill", "data/skipped")
TOLERANCE = 1e-5  # relative, over 20 steps; sums are taken in another order
MIDDLE = 10


def copy_at(run, step, folder):
    """``run``'s folder as it was when it had saved ``step`` and nothing later."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("tb"))
    for saved in (folder / "checkpoint").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory, demo):
    """All steps on two ranks that share every sequence and the experts, two micro-batches a step, with validation."""
    with pytest.MonkeyPatch.context() as patch:
        with_validation(patch, demo)
        return runs.launch(
            tmp_path_factory.mktemp("shared"),
            demo,
            world_size=2,
            training__steps=NUM_STEPS,
            parallelism__context_parallel_degree=2,
            parallelism__expert_parallel_degree=2,
            checkpoint__interval=MIDDLE,
        )


def test_two_ranks_that_share_sequences_give_the_losses_of_one_process(shared, reference):
    steps = range(1, NUM_STEPS + 1)
    assert "expert parallel 2, context parallel 2" in shared.text
    assert_same(shared, reference, TRAINING, steps, TOLERANCE)
    assert_same(shared, reference, COUNTS, steps)


def test_one_process_goes_on_where_they_stopped_and_measures_what_they_did(
    tmp_path, demo, shared, reference, monkeypatch
):
    with_validation(monkeypatch, demo)
    folder = copy_at(shared, MIDDLE, tmp_path / "run")
    run = runs.launch(folder, demo, training__steps=NUM_STEPS)
    assert f"Training starts at step {MIDDLE + 1}" in run.text
    steps = range(MIDDLE + 1, NUM_STEPS + 1)
    assert_same(run, reference, TRAINING, steps, TOLERANCE)
    assert_same(run, reference, COUNTS, steps)
    assert_same(run, shared, VALIDATION, [16, NUM_STEPS], TOLERANCE)


def test_pairs_that_share_sequences_go_on_from_one_process(tmp_path, demo, reference):
    """Two data ranks of two processes each; expert counts are taken over each pair's micro-batch, as those of one process are."""
    folder = copy_at(reference, 14, tmp_path / "run")
    run = runs.launch(
        folder,
        demo,
        world_size=4,
        training__steps=NUM_STEPS,
        parallelism__context_parallel_degree=2,
        activation_checkpoint__mode="full",
    )
    assert "Training starts at step 15" in run.text
    steps = range(15, NUM_STEPS + 1)
    assert_same(run, reference, TRAINING, steps, TOLERANCE)
    assert_same(run, reference, COUNTS, steps)
