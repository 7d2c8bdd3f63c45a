"""Tiny models as checkpoints on disk, for the tests of this folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from symbiotic_titan.hf.model import open_model
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.model.vit_args import VitArgs
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.plan import Plan
from symbiotic_titan.partition.profile import (
    ModelIdentity,
    router_hash,
)
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights.reader import CheckpointReader

BIMODAL = (
    ExpertGroup("understanding", (TEXT, VIT), 5),
    ExpertGroup("generation", (VAE,), 3),
)


def values_of(reader: CheckpointReader) -> dict[str, Tensor]:
    """Every tensor that ``reader`` reads."""
    return {name: reader.read(name) for name in reader.tensors}


def assert_equal_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def tiny_args(**changes) -> ModelArgs:
    """Three layers, the first dense; eight experts in one pool and a shared one."""
    args = ModelArgs(
        vocab_size=64,
        dim=32,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        num_dense_layers=1,
        dense_hidden_dim=32,
        num_experts=8,
        top_k=2,
        expert_hidden_dim=16,
        shared_hidden_dim=16,
        rope_theta=10_000.0,
        mrope_sections=(4, 2, 2),
        vit=VitArgs(dim=16, num_layers=1, num_heads=2, hidden_dim=16, patch=4, merge=2),
        latent_channels=3,
        latent_stride=1,
        latent_patch=4,
        timestep_width=16,
    )
    return replace(args, **changes)


def make_model(args: ModelArgs, seed: int = 7) -> SymbioticModel:
    model = SymbioticModel(replace(args, init_seed=seed))
    model.init_weights()
    for name, buffer in model.named_buffers():
        if name.endswith(".bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    return model


def save(state: dict, folder: Path) -> Path:
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def plan_for(folder: Path, groups=BIMODAL, seed: int = 0) -> Plan:
    """A random plan for the checkpoint in ``folder``."""
    stored = open_model(folder)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(8, generator=generator) for _ in range(2)])
    identity = ModelIdentity("tiny", None, router_hash(stored), {"all": 8}, 2)
    return Plan(identity, "random", seed, groups, ("layers.1", "layers.2"), order)
