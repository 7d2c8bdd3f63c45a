"""Imported by a run (``experimental.custom_import``): where each of its steps reads values that on a GPU lie on the device.

On a CPU the host and the device share their memory, so tensors are followed instead: the parameters, what is copied to the device,
and all that is computed from these. Every read of such a tensor by the host, which on a GPU waits for it, is noted with its function.
``reads.json`` in the run's folder has one list for each step.
"""

import json
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from symbiotic_titan.flow import noise
from symbiotic_titan.training import step_data, trainer

READS = {"item", "tolist", "cpu", "numpy", "nonzero"} | {
    f"__{kind}__" for kind in ("bool", "float", "index", "int")
}
PACKAGE = str(Path(trainer.__file__).parents[1])


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def follow(values):
    for tensor in tensors_in(values):
        tensor.is_followed = True
    return values


def place():
    """``room/file.py function`` of this package that called torch."""
    frame = sys._getframe()
    while not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]} {frame.f_code.co_name}"


class DeviceReads(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(hasattr(tensor, "is_followed") for tensor in tensors_in((args, kwargs))):
            return result
        if func.__name__ not in READS:
            return follow(result)
        self.places.append(place())
        # A copy on the host, which may be read at will.
        return result.detach().clone() if isinstance(result, torch.Tensor) else result


def copied_and_followed(tensor, device):
    return follow(tensor.clone())


def watched(train_step):
    steps = []

    def step(self, data):
        follow(list(self.model_parts[0].parameters()))
        with DeviceReads() as reads:
            train_step(self, data)
        steps.append(reads.places)
        Path(self.job_config.job.dump_folder, "reads.json").write_text(json.dumps(steps))

    return step


for module in (noise, step_data, trainer):
    module.copy_from_host = copied_and_followed
trainer.SymbioticTrainer.train_step = watched(trainer.SymbioticTrainer.train_step)
