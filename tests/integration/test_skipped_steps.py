"""A run with [stability] skips bad steps, and one that is stopped between them goes on bit for bit."""

from pathlib import Path

import torch

from symbiotic_titan.process import DIVERGED
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers.launch import arguments_of, read_scalars, train

# The losses of steps 3 and 6 are NaN, the gradient norm of step 5 is a spike, whatever the weights.
FAULTS = """
from symbiotic_titan.training.trainer import SymbioticTrainer

read_step = SymbioticTrainer.read_step


def with_faults(self, results, grad_norm, *others):
    sums, norm, *rest = read_step(self, results, grad_norm, *others)
    if self.step in (3, 6):
        sums = sums * float("nan")
    return [sums, norm * 1000 if self.step == 5 else norm, *rest]


SymbioticTrainer.read_step = with_faults
"""
LAST = 8


def run(folder: Path, demo: Path, steps: int, max_in_a_row: int = 2, **settings: object):
    (folder.parent / "faults.py").write_text(FAULTS)
    options = {
        "training.steps": steps, "training.seq_len": 256, "experimental.custom_import": "faults",
        "stability.on_bad_step": "skip", "stability.max_in_a_row": max_in_a_row,
        "stability.grad_norm_spike": 100, "stability.window": 2, "ema.enable": True, **settings,
    }  # fmt: skip
    arguments = arguments_of(folder, demo, options)
    return train(folder, arguments, path=str(folder.parent))


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and their average."""
    path = folder / "checkpoint" / f"step-{step}"
    files = {kind: DistributedCheckpoint(path, kind) for kind in ("trained", "ema")}
    return {f"{k} {name}": file.read(name) for k, file in files.items() for name in file.tensors}


def test_bad_steps_are_skipped_and_a_resumed_run_skips_the_same(tmp_path, demo):
    whole = run(
        tmp_path / "whole", demo, LAST, **{"checkpoint.interval": 2, "checkpoint.keep_latest_k": 0}
    )
    assert whole.status == 0, whole.text[-3000:]
    assert "step 3 is skipped: text, flow, balance not finite" in whole.text
    assert "step 5 is skipped: grad_norm" in whole.text and "(2 in a row, 3 since" in whole.text
    counts = whole.scalars("stability/skipped_steps")
    assert counts == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 3, 7: 3, 8: 3}
    assert whole.scalars("loss/total").keys() == {1, 2, 4, 7, 8}
    before, after = saved(whole.folder, 4), saved(whole.folder, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    folder = tmp_path / "resumed"
    first = run(folder, demo, 5)
    assert first.status == 0, first.text[-3000:]
    stopped = run(folder, demo, LAST, max_in_a_row=1)
    assert stopped.status == DIVERGED and "Traceback" not in stopped.text
    assert "step 6: text, flow, balance not finite" in stopped.text
    second = run(folder, demo, LAST)
    assert second.status == 0 and "Training starts at step 6" in second.text, second.text[-3000:]
    for tag in ("loss/total", "grad_norm/all", "stability/skipped_steps", "tokens/vae"):
        assert read_scalars(folder, tag) == whole.scalars(tag)
    ours, theirs = saved(folder, LAST), saved(whole.folder, LAST)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(after[name], theirs[name]) for name in theirs)
