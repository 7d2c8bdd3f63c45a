"""A run that starts from a checkpoint on several ranks: the first alone reads its metadata, and no value is drawn that it gives."""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager

from symbiotic_titan.checkpoint.start import begin, find_start, share_start
from symbiotic_titan.model.initialize import leaving_out
from symbiotic_titan.optim.build import param_group_optimizers
from symbiotic_titan.optim.group_record import GroupRecord
from symbiotic_titan.training.train_spec import register
from tests.helpers.debug_model import build, config_of
from tests.helpers.gloo import run_on_ranks

EXPERT_PARALLEL = "--parallelism.expert_parallel_degree 2"


class Number:
    """State that is no tensor."""

    def __init__(self, value=0):
        self.step = value

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def parts_of_run(config, given=()):
    """A model, its checkpointer and its state that is no tensor."""
    with leaving_out(given) if given else nullcontext():
        model, _ = build(config)
    optimizers = param_group_optimizers(model, config.optimizer, None)
    step = Number()
    manager = CheckpointManager(
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=Number(3),
        states={"train_state": step, "param_groups": GroupRecord(model, optimizers)},
        checkpoint_config=config.checkpoint,
        sd_adapter=None,
        base_folder=config.job.dump_folder,
    )
    return model, manager, optimizers, step


def tensors_of(model, optimizers):
    state = {**model.state_dict(), **optimizers.state_dict()}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t.detach()).clone()
        for name, t in tensors.items()
    }


def saved(rank, overrides):
    """Tensors of a run that was saved at step 3."""
    config = config_of(overrides)
    model, manager, optimizers, step = parts_of_run(config)
    torch.manual_seed(5)
    for tensor in model.parameters():
        tensor.grad = torch.ones_like(tensor)
    optimizers.step()
    step.step = 3
    manager.save(3, last_step=True)
    return tensors_of(model, optimizers)


def resumed(rank, overrides, changes=None):
    """(tensors, step, how often this rank opened a .metadata, what was NaN before loading)."""
    config, opened = config_of(overrides), []
    register()
    sys.addaudithook(
        lambda event, details: (
            opened.append(details[0])
            if event == "open" and str(details[0]).endswith(".metadata")
            else None
        )
    )
    start = share_start(find_start(config), config.checkpoint)
    assert start is not None and config.checkpoint.load_step == 3
    model, manager, optimizers, step = parts_of_run(config, start.entries)
    drawn = [name for name, p in model.named_parameters() if not torch.isnan(p).any()]
    begin(start, config.checkpoint, manager, None)
    assert manager.load(step=config.checkpoint.load_step)
    return tensors_of(model, optimizers), step.step, len(opened), drawn


@pytest.mark.parametrize("layout", ["fsdp", "expert_parallel"])
def test_only_the_first_rank_reads_the_metadata_and_reads_them_once(tmp_path, layout):
    options = f"--checkpoint.enable --job.dump_folder {tmp_path}"
    degree = EXPERT_PARALLEL if layout == "expert_parallel" else ""
    [expected] = run_on_ranks(1, saved, options)
    ranks = run_on_ranks(2, resumed, f"{options} {degree}")
    assert [opened for _, _, opened, _ in ranks] == [1, 0]
    for tensors, step, _, drawn in ranks:
        assert step == 3 and drawn == []
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
