"""torch.compile of the parts between the collectives, each without a graph break.

A graph over a whole block would break at the data-dependent all-to-alls of its MoE layer and at the hooks of its FSDP units. So the
parts between them are compiled: the dense halves of a block, the router, the shared expert, the experts' matmuls, the ViT's blocks.
Their shapes are static except for the rows of the experts, which are marked dynamic. Token counts, steps and the shield's scale are
tensors, not constants, so nothing recompiles after the first step.

Equal blocks share one compiled graph.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtitan.config.job_config import ActivationCheckpoint

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.decoder import TransformerBlock
from symbiotic_titan.model.symbiotic import SymbioticModel


def compiles_model(config: JobConfig) -> bool:
    """Whether a run of ``config`` compiles the parts of its model."""
    return config.compile.enable and "model" in config.compile.components


def checkpointing(config: JobConfig) -> ActivationCheckpoint:
    """The checkpointing of a run of ``config``: that of [activation_checkpoint], but none where it is per operator and the model compiled.

    Per-op checkpointing sees no operator inside a compiled graph and would run every graph again, matmuls and attention too. The
    partitioner of each graph makes the same choice by itself: it saves matmuls and attention and recomputes what is elementwise.
    """
    checkpoint = config.activation_checkpoint
    per_op = checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op"
    return replace(checkpoint, mode="none") if per_op and compiles_model(config) else checkpoint


class Unit(NamedTuple):
    """A module's function that is compiled to one graph. ``dynamic``: its shapes change from batch to batch."""

    owner: nn.Module
    attribute: str
    dynamic: bool


def _inside(block: nn.Module) -> nn.Module:
    return block._checkpoint_wrapped_module if isinstance(block, CheckpointWrapper) else block


def compile_units(model: SymbioticModel) -> Iterator[Unit]:
    """The parts of ``model`` that are compiled, in the order they run."""
    for vit_block in model.vit.layers.values():
        yield Unit(vit_block, "forward", False)
    for wrapped in model.layers.values():
        block = _inside(wrapped)
        assert isinstance(block, TransformerBlock)
        yield Unit(block, "attend", False)
        if not block.moe_enabled:
            yield Unit(block, "feed", False)
            continue
        yield Unit(block.moe.router, "forward", False)
        for experts in block.moe.experts.values():
            yield Unit(experts, "swiglu", True)
        if block.moe.shared_experts is not None:
            yield Unit(block.moe.shared_experts, "forward", False)


def _eager_when_tiny(
    compiled: Callable[..., torch.Tensor], eager: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """``compiled``, except for 0 or 1 rows, which run eagerly."""
    # torch.compile specializes on the sizes 0 and 1 even of dynamic dims: either would compile another graph mid-training.

    def run(rows_ND: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        return (compiled if rows_ND.shape[0] > 1 else eager)(rows_ND, *args)

    return run


def apply_compile(model: SymbioticModel, backend: str) -> None:
    """Compile the units of ``model`` in place, with ``fullgraph``, so that a graph break is an error instead of a slowdown."""
    model.static_shapes = True
    for owner, attribute, dynamic in compile_units(model):
        eager = getattr(owner, attribute)
        # Static shapes give faster kernels; only the experts' rows change from batch to batch.
        compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=dynamic)
        setattr(owner, attribute, _eager_when_tiny(compiled, eager) if dynamic else compiled)
