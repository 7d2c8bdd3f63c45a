"""A run whose expert groups have a width and a top-k of their own: it trains, resumes to the last bit, and goes on over two ranks."""

import shutil

import pytest

from tests.helpers import launch as runs

TAGS = ("loss/text", "loss/flow", "loss/balance", "grad_norm/all")
OWN = {"num_experts = 12": "top_k = 3", "num_experts = 4\n": "top_k = 1\nhidden_dim = 40\n"}


def run(folder, demo, steps, ranks=1, own=OWN):
    """``own``: lines that are added to the tables of the groups, by the line before them."""
    settings = {
        "training.steps": steps,
        "training.local_batch_size": 4 // ranks,
        "parallelism.expert_parallel_degree": ranks,
        "losses.balance_scope": "global",
        "lr_scheduler.warmup_steps": 1,
    }
    arguments = runs.arguments_of(folder, demo, settings)
    path = folder / "job.toml"
    text = path.read_text()
    for before, lines in own.items():
        assert before in text
        text = text.replace(before, f"{before.strip()}\n{lines}")
    path.write_text(text)
    return runs.train(folder, arguments, world_size=ranks)


def test_a_run_of_unequal_groups_resumes_alone_and_over_two_ranks(tmp_path, demo):
    whole = run(tmp_path / "whole", demo, 6)
    assert whole.status == 0, whole.text[-3000:]
    assert whole.scalars("loss/flow")[6] < whole.scalars("loss/flow")[1]
    assert run(tmp_path / "alone", demo, 3).status == 0
    shutil.copytree(tmp_path / "alone", tmp_path / "two ranks")
    for name, ranks, near in (("alone", 1, 0.0), ("two ranks", 2, 1e-5)):
        resumed = run(tmp_path / name, demo, 6, ranks)
        assert resumed.status == 0 and "Training starts at step 4" in resumed.text
        for tag in TAGS:
            ours, theirs = resumed.scalars(tag), whole.scalars(tag)
            for step in (4, 5, 6):
                assert ours[step] == pytest.approx(theirs[step], rel=near, abs=0.0), (tag, step)


def test_a_top_k_above_the_group_ends_the_run_in_one_line(tmp_path, demo):
    wrong = run(tmp_path, demo, 1, own={"num_experts = 4\n": "top_k = 5\n"})
    assert wrong.status == 2 and "Traceback" not in wrong.text
    assert "'generation': top_k = 5 does not fit into num_experts = 4" in wrong.text
    assert not (tmp_path / "checkpoint").exists()
