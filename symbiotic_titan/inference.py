"""A trained model without a trainer: build it from a config, load a checkpoint's model part, run packed batches without gradients.

In one process the model is whole. In several (torchrun) it is made parallel as the config says, by the trainer's own function, and
each process reads rows of its own; sums are then reduced over them.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import set_default_dtype

from symbiotic_titan.checkpoint.fit import check_is_model, tensors_of_model
from symbiotic_titan.checkpoint.open_model import open_model
from symbiotic_titan.config.data import Data
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.device import device_type
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.initialize import initialize
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.parallel.parallelize import parallel_dims_of
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.train_spec import build_dataloader, build_tokenizer, parallelize
from symbiotic_titan.validation import held_out_data

# Tasks whose tokens are text and images to be understood.
UNDERSTANDING_TASKS = ("lm", "mmu")
# Where a config says what each split reads.
TABLES = {"train": "[[data.sources]]", "validation": "[[validation.sources]]"}


@dataclass(frozen=True)
class DataRanks:
    """This process among those that read different rows. ``dims`` is None where there is one."""

    device: torch.device
    rank: int
    size: int
    dims: ParallelDims | None

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the processes, in place."""
        if self.dims is not None:
            dist.all_reduce(values, group=self.dims.get_mesh("batch").get_group())
        return values


def data_ranks(device: torch.device, dims: ParallelDims) -> DataRanks:
    """This process in ``dims``."""
    if not dims.dp_enabled:
        return DataRanks(device, 0, 1, None)
    mesh = dims.get_mesh("batch")
    return DataRanks(device, mesh.get_local_rank(), mesh.size(), dims)


def join_ranks(config: JobConfig) -> DataRanks:
    """The processes that torchrun started, joined; or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(device_type(), int(os.environ.get("LOCAL_RANK", "0")))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if size == 1:
        return DataRanks(device, 0, 1, None)
    if not dist.is_initialized():
        dist_utils.init_distributed(config.comm, base_folder=config.job.dump_folder)
    return data_ranks(device, parallel_dims_of(config, size))


def model_args(config: JobConfig) -> ModelArgs:
    """The shape of the config's model.

    Raises:
        ValueError: an unknown flavor, or sections that break its rules.
    """
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    return args


class LoadedModel:
    """The config's model with the weights of a checkpoint, on this process's device, in ``training.dtype``; computes in
    ``training.mixed_precision_param`` as in training.

    Raises:
        ValueError: the folder is no complete checkpoint, or not of this model.
    """

    def __init__(self, config: JobConfig, folder: Path, ranks: DataRanks) -> None:
        self.args = model_args(config)
        self.stored = open_model(folder)
        self._ranks = ranks
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = SymbioticModel(self.args)
        check_is_model(self.stored, tensors_of_model(model))
        if ranks.dims is not None:
            # Nothing is kept for a backward: nothing is to be recomputed, and compiling would not pay.
            config = copy.deepcopy(config)
            config.activation_checkpoint.mode = "none"
            config.compile.enable = False
            parallelize(model, ranks.dims, config)
        model.to_empty(device=ranks.device)
        state: dict[str, Any] = get_model_state_dict(model)
        missing = state.keys() - self.stored.tensors.keys()  # parts for images to be generated
        initialize(model, seed=self.args.init_seed, only=missing)
        self.stored.read_into({name: state[name] for name in state if name not in missing})
        self.model: SymbioticModel = model.eval()
        self._precision = config.training.mixed_precision_param

    @property
    def autocast(self) -> AbstractContextManager[None]:
        """One process computes in another precision by autocast; on several FSDP casts."""
        if self._ranks.dims is not None or self._precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._ranks.device.type, dtype=TORCH_DTYPE_MAP[self._precision])

    def __call__(self, batch: PackedBatch) -> ModelOutput:
        """Predictions for a batch on the model's device. Images to be generated, if it has some, are taken as they are: nothing is
        drawn."""
        timesteps_BL = torch.zeros(batch.vae_image.shape, device=batch.tokens.device)
        no_shield = torch.ones((), device=batch.tokens.device)
        with torch.no_grad(), self.autocast:
            return self.model(batch, batch.latents, timesteps_BL, no_shield)


def understanding_data(config: JobConfig, split: str) -> Data:
    """[data] with the sources of ``split`` (``train``: [[data.sources]], ``validation``: [[validation.sources]]) that are text or
    questions about images; the others have no weight. Rows have no room for images to be generated.

    Raises:
        ValueError: there is none.
    """
    data = held_out_data(config) if split == "validation" else config.data
    sources = [
        row if row.task in UNDERSTANDING_TASKS else replace(row, weight=0.0) for row in data.sources
    ]
    if not any(row.weight > 0 for row in sources):
        raise ValueError(
            f"{TABLES[split]}: none has the task {' or '.join(UNDERSTANDING_TASKS)}, which is what is read here; "
            "add one, or choose another --split"
        )
    return replace(data, sources=sources, max_vae_tokens=1)


def packed_batches(
    config: JobConfig, data: Data, num_batches: int, ranks: DataRanks, split: str = "train"
) -> Iterator[PackedBatch]:
    """``num_batches`` batches of ``training.local_batch_size`` rows of ``data`` for this process, the same at every call. ``split``:
    that of its sources, for messages."""
    config = copy.deepcopy(config)
    config.data = data
    loader = build_dataloader(
        dp_world_size=ranks.size,
        dp_rank=ranks.rank,
        tokenizer=build_tokenizer(config),
        job_config=config,
        table=TABLES[split],
    )
    for batch in islice(loader, num_batches):
        yield batch.to(ranks.device)
