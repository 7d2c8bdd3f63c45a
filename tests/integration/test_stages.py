"""A run whose mixture and rates change at a step: interrupted and resumed on other ranks, it equals the undisturbed one."""

import json

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.helpers.launch import arguments_of, read_scalars
from tests.helpers.launch import train as train_ranks

STAGES = """
[[data.stages]]
from_step = 4
weights = {lm = 0.0, mmu = 4.0}
lr = {generation = 1e-3}

[[data.stages]]
from_step = 7
weights = {lm = 1.0, t2i = 0.0}
"""
NUM_STEPS = 9


def train(folder, demo, steps, world_size, stages=STAGES, **settings):
    """(exit status, console text) of a run of debug.toml with ``stages`` up to step ``steps``."""
    settings |= {
        "training.steps": steps,
        "data.lookahead": 4,
    }
    arguments = arguments_of(folder, demo, settings)
    config = folder / "job.toml"
    config.write_text(config.read_text() + stages)
    run = train_ranks(folder, arguments, world_size=world_size)
    return run.status, run.text


def data_state(folder, step):
    whole = folder / "whole.pt"
    dcp_to_torch_save(folder / f"checkpoint/step-{step}", whole)
    return json.loads(torch.load(whole, weights_only=False)["dataloader"]["state"])


def test_a_run_interrupted_between_its_stages_equals_the_undisturbed_one(tmp_path, demo):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, text = train(whole, demo, NUM_STEPS, 1)
    assert status == 0, text[-3000:]
    for steps, world_size, workers in ((5, 2, 2), (NUM_STEPS, 1, 0)):
        options = {"training.dataloader.num_workers": workers}
        status, text = train(parts, demo, steps, world_size, **options)
        assert status == 0, text[-3000:]
    assert "the mixture changes" not in text  # by the resume: it goes on as planned
    assert data_state(parts, NUM_STEPS) == data_state(whole, NUM_STEPS)
    tags = [f"tokens/{name}" for name in ("text", "vit", "vae")]
    tags += [f"data/weight/{name}" for name in ("lm", "mmu", "t2i")] + ["lr/generation"]
    for tag in tags:
        assert read_scalars(parts, tag) == read_scalars(whole, tag)
    for tag in ("loss/text", "loss/flow"):
        assert read_scalars(parts, tag) == pytest.approx(read_scalars(whole, tag), rel=1e-5)
    weights = list(read_scalars(whole, "data/weight/lm").values())
    assert weights == [2.0] * 3 + [0.0] * 3 + [1.0] * 3
    rates = read_scalars(whole, "lr/generation")
    assert rates[3] == pytest.approx(4e-3 * 3 / 5) and rates[4] == pytest.approx(1e-3 * 4 / 5)

    late = STAGES.replace("from_step = 7", "from_step = 8")
    status, text = train(parts, demo, NUM_STEPS + 1, 1, late)
    assert status == 2
    assert "[[data.stages]] #2: from_step = 8 is in the past: the run resumes after step 9" in text
    assert "Traceback" not in text
    other = STAGES[: STAGES.index("[[data.stages]]\nfrom_step = 7")]
    status, text = train(parts, demo, NUM_STEPS + 1, 1, other)
    assert status == 0 and "the mixture changes after step 9: shares of the samples" in text
