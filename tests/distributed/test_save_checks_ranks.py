"""A save on two ranks that is refused, or that fails: both say why in the same line, and what was saved before stays."""

import errno
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from symbiotic_titan.checkpoint.manager import SymbioticCheckpointManager
from symbiotic_titan.optim.group_norms import local_part
from symbiotic_titan.process import DiskFull
from symbiotic_titan.weights.damage import damage_of
from tests.helpers.debug_model import backward, config_of, forward
from tests.helpers.gloo import run_on_ranks
from tests.helpers.saved_run import parts_of_run

OPTIONS = "--parallelism.expert_parallel_degree 2 --checkpoint.enable --checkpoint.interval 1"


def refusal(save, kind):
    with pytest.raises(kind) as error:
        save()
    return str(error.value)


def broken(tensor, rank, value=torch.nan):
    """On rank 1, ``tensor`` with one ``value`` in its shard; undone by what is returned."""
    part = local_part(tensor.detach()).view(-1)
    kept = part[-1:].clone()
    if rank == 1:
        part[-1:] = value
    return lambda: part[-1:].copy_(kept)


def refused_saves(rank, folder):
    """What each save said, and the steps that are there then."""
    texts = {}
    config = config_of(f"{OPTIONS} --job.dump_folder {folder}")
    model, manager, optimizers, _ = parts_of_run(config)
    backward(forward(model, model.args, rank))
    optimizers.step()
    manager.save(1)
    expert = model.layers["2"].moe.experts["generation"].w1
    moment = optimizers.optimizers[0].state[model.tok_embeddings.weight]["exp_avg_sq"]
    for name, tensor, value in (
        ("weight", expert, torch.nan),
        ("moment", moment, torch.inf),
    ):
        undo = broken(tensor, rank, value)
        texts[name] = refusal(lambda: manager.save(2), FloatingPointError)
        undo()
    usage = "symbiotic_titan.checkpoint.save_checks.shutil.disk_usage"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage, lambda _: SimpleNamespace(free=12_345))
        texts["before"] = refusal(lambda: manager.save(2), DiskFull)
    with pytest.MonkeyPatch.context() as patch:
        write = "symbiotic_titan.checkpoint.history.write_json"
        patch.setattr(write, lambda *_: _raise(OSError(errno.ENOSPC, "No space left on device")))
        texts["folder"] = refusal(lambda: manager.save(2), DiskFull)
    texts["sync"] = full_on_rank_1(rank, lambda: manager.save(2))
    asynchronous = config_of(f"{OPTIONS} --job.dump_folder {folder} --checkpoint.async_mode async")
    later = SymbioticCheckpointManager(
        None, [model], optimizers, manager.states["lr_scheduler"], manager.states,
        asynchronous.checkpoint, None, folder,
    )  # fmt: skip
    failed = []
    later.on_failed_save = lambda: failed.append(True)

    def save_and_wait():
        later.save(2)
        later.save_now(2)

    texts["async"] = full_on_rank_1(rank, save_and_wait)
    later.save(3)
    later.close()
    manager.close()
    return texts, failed, sorted(path.name for path in Path(manager.folder).iterdir())


def _raise(error):
    raise error


def full_on_rank_1(rank, save):
    """What ``save`` says where the second rank's disk takes no more than 1 MB."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        return refusal(save, DiskFull)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_is_refused_or_fails_is_told_on_all_ranks_and_leaves_nothing(tmp_path):
    (texts, failed, steps), (others, also_failed, _) = run_on_ranks(2, refused_saves, str(tmp_path))
    assert texts == others and all("\n" not in text for text in texts.values())
    for name, entry in (
        ("weight", "layers.2.moe.experts.generation.w1 (NaN)"),
        ("moment", "optimizer.state.tok_embeddings.weight.exp_avg_sq (inf)"),
    ):
        assert (
            "step 2: its checkpoint was not written, because it is not finite in 1 of"
            in texts[name]
        )
        assert f"tensors on rank 1: {entry}" in texts[name]
    assert "MB and 12.35 kB are free" in texts["before"]
    assert "No space left on device while it was written" in texts["folder"]
    for name in ("sync", "async"):
        assert "File too large while it was written" in texts[name]
    assert failed == also_failed == [True]
    assert steps == ["step-1", "step-3"]
    assert not any(damage_of(tmp_path / "checkpoint" / step) for step in steps)
