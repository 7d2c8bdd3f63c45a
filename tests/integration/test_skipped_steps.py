"""A run with [stability] skips bad steps or rolls back, and one that is stopped between them goes on bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from symbiotic_titan.process import DIVERGED
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers.launch import arguments_of, read_scalars, train

# Whatever the weights: steps whose losses are NaN, and those whose gradient norm is a spike.
FAULTS = """
from symbiotic_titan.training.trainer import SymbioticTrainer

read_step = SymbioticTrainer.read_step


def with_faults(self, results, grad_norm, *others):
    sums, norm, *rest = read_step(self, results, grad_norm, *others)
    if self.step in NAN:
        sums = sums * float("nan")
    return [sums, norm * 1000 if self.step in SPIKES else norm, *rest]


SymbioticTrainer.read_step = with_faults
"""
LAST = 8


def run(
    folder: Path,
    demo: Path,
    steps: int,
    max_in_a_row: int = 2,
    faults: str = "NAN, SPIKES = (3, 6), (5,)",
    **settings: object,
):
    """``faults``: 3, 5 and 6 are bad steps if not given."""
    (folder.parent / "faults.py").write_text(f"{faults}\n{FAULTS}")
    options = {
        "training.steps": steps, "training.seq_len": 256, "experimental.custom_import": "faults",
        "stability.on_bad_step": "skip", "stability.max_in_a_row": max_in_a_row,
        "stability.grad_norm_spike": 100, "stability.window": 2, "ema.enable": True, **settings,
    }  # fmt: skip
    arguments = arguments_of(folder, demo, options)
    return train(folder, arguments, path=str(folder.parent))


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, their average, and the optimizer's state."""
    path = folder / "checkpoint" / f"step-{step}"
    files = {kind: DistributedCheckpoint(path, kind) for kind in ("trained", "ema")}
    found = {f"{k} {name}": file.read(name) for k, file in files.items() for name in file.tensors}
    state = {
        name: torch.empty(e.size)
        for name, e in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if name.startswith("optimizer.")
    }
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    assert len(state) > len(found) / 2
    return found | state


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demo):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    found = run(folder, demo, LAST, **{"checkpoint.interval": 1, "checkpoint.keep_latest_k": 0})
    assert found.status == 0, found.text[-3000:]
    return found


def go_on_from(whole, step: int, folder: Path) -> Path:
    """``folder``, of a run that has the checkpoint of ``step`` alone."""
    name = Path("checkpoint", f"step-{step}")
    shutil.copytree(whole.folder / name, folder / name)
    return folder


def test_bad_steps_are_skipped_and_a_resumed_run_skips_the_same(tmp_path, demo, whole):
    assert "step 3 is skipped: text, flow, balance not finite" in whole.text
    assert "step 5 is skipped: grad_norm" in whole.text and "(2 in a row, 3 since" in whole.text
    counts = whole.scalars("stability/skipped_steps")
    assert counts == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 3, 7: 3, 8: 3}
    assert whole.scalars("loss/total").keys() == {1, 2, 4, 7, 8}
    before, after = saved(whole.folder, 4), saved(whole.folder, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    folder = go_on_from(whole, 5, tmp_path / "resumed")
    stopped = run(folder, demo, LAST, max_in_a_row=1)
    assert stopped.status == DIVERGED and "Traceback" not in stopped.text
    assert "step 6: text, flow, balance not finite" in stopped.text
    second = run(folder, demo, LAST)
    assert second.status == 0 and "Training starts at step 6" in second.text, second.text[-3000:]
    for tag in ("loss/total", "grad_norm/all", "stability/skipped_steps", "tokens/vae"):
        values = whole.scalars(tag).items()
        assert read_scalars(folder, tag) == {step: value for step, value in values if step > 5}
    ours, theirs = saved(folder, LAST), saved(whole.folder, LAST)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(after[name], theirs[name]) for name in theirs)


def test_a_run_rolls_back_as_if_the_steps_since_the_checkpoint_were_skipped(tmp_path, demo, whole):
    """From step 4 on, with one bad step, 6: the way back to step 4 undoes step 5, which ``whole`` skipped."""
    settings = {
        "faults": "NAN, SPIKES = (6,), ()", "stability.on_bad_step": "roll_back",
        "checkpoint.interval": 4, "checkpoint.keep_latest_k": 2,
    }  # fmt: skip
    undisturbed, stopped = (go_on_from(whole, 4, tmp_path / n) for n in ("undisturbed", "stopped"))
    first = run(undisturbed, demo, LAST, **{"checkpoint.async_mode": "async"}, **settings)
    assert first.status == 0 and "Traceback" not in first.text, first.text[-3000:]
    assert (
        "step 6 is rolled back: text, flow, balance not finite; weights, optimizer state and average are those of step 4 again (1 in a "
        "row, 1 since the start)"
    ) in first.text
    assert run(stopped, demo, 5, **settings).status == 0
    second = run(stopped, demo, LAST, **settings)
    assert second.status == 0 and "Training starts at step 6" in second.text, second.text[-3000:]
    expected = saved(whole.folder, LAST)
    for folder in (undisturbed, stopped):
        ours = saved(folder, LAST)
        assert ours.keys() == expected.keys()
        assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
        losses, counts = (
            read_scalars(folder, tag) for tag in ("loss/total", "stability/rolled_back_steps")
        )
        assert losses.keys() == {5, 7, 8} and counts == {5: 0, 6: 1, 7: 1, 8: 1}
        assert all(losses[step] == whole.scalars("loss/total")[step] for step in (7, 8))
    assert read_scalars(stopped, "loss/total") == read_scalars(undisturbed, "loss/total")
