"""The parts of a run that are saved and loaded, without its trainer and its data, for ranks of a gloo world."""

from contextlib import nullcontext

import torch
from torch.distributed.tensor import DTensor

from symbiotic_titan.checkpoint.manager import SymbioticCheckpointManager
from symbiotic_titan.model.initialize import leaving_out
from symbiotic_titan.optim.build import param_group_optimizers
from symbiotic_titan.optim.group_record import GroupRecord
from tests.helpers.debug_model import build


class Number:
    """State that is no tensor."""

    def __init__(self, value=0):
        self.step = value

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def adam(model, config):
    return param_group_optimizers(model, config.optimizer, None)


def parts_of_run(config, given=(), make_optimizers=None):
    """A model, its checkpointer and its state that is no tensor."""
    with leaving_out(given) if given else nullcontext():
        model, _ = build(config)
    optimizers = (make_optimizers or adam)(model, config)
    step = Number()
    manager = SymbioticCheckpointManager(
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


def whole(tensors):
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t.detach()).clone()
        for name, t in tensors.items()
        if isinstance(t, torch.Tensor)
    }
