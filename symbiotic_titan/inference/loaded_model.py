"""A trained model without a trainer: build it from a config, load a checkpoint's model part, run packed batches without gradients.

A single process holds the whole model. Under torchrun the trainer's own function parallelises it as the config says; each process
reads its own rows, and sums are reduced over processes.
"""

import contextlib
import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.initialize import initialize
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.parallel.parallelize import parallelize
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.weights.compatibility import (
    check_is_model,
    tensors_of_model,
)


class LoadedModel:
    """The config's model with the weights of a checkpoint, on this process's device, in ``training.dtype``; computes in
    ``training.mixed_precision_param`` as in training. ``weights``: "ema" for the average that the run kept.

    Raises:
        ValueError: the folder is not a complete checkpoint of this model, or lacks the ``weights``.
    """

    def __init__(
        self, config: JobConfig, folder: Path, ranks: DataRanks, weights: Weights = "trained"
    ) -> None:
        self.args = model_args(config)
        self.stored = open_model(folder, weights)
        self._ranks = ranks
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = SymbioticModel(self.args)
        check_is_model(self.stored, tensors_of_model(model))
        if ranks.dims is not None:
            # There is no backward, so activation checkpointing has no use, and compiling would not pay.
            config = copy.deepcopy(config)
            config.activation_checkpoint.mode = "none"
            config.compile.enable = False
            parallelize(model, ranks.dims, config)
        model.to_empty(device=ranks.device)
        state: dict[str, Any] = get_model_state_dict(model)
        missing = state.keys() - self.stored.tensors.keys()  # parts for target images
        initialize(model, seed=self.args.init_seed, only=missing)
        self.stored.read_into({name: state[name] for name in state if name not in missing})
        self.model: SymbioticModel = model.eval()
        self._precision = config.training.mixed_precision_param

    @property
    def autocast(self) -> AbstractContextManager[None]:
        """Autocast for a single process; with several, FSDP casts instead."""
        if self._ranks.dims is not None or self._precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._ranks.device.type, dtype=TORCH_DTYPE_MAP[self._precision])

    def __call__(self, batch: PackedBatch) -> ModelOutput:
        """Predictions for a batch on the model's device. Target images, if any, get no noise."""
        timesteps_BL = torch.zeros(batch.vae_image.shape, device=batch.tokens.device)
        no_shield = torch.ones((), device=batch.tokens.device)
        with torch.no_grad(), self.autocast:
            return self.model(batch, batch.latents, timesteps_BL, no_shield)
