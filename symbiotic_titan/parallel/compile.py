"""torch.compile of the parts between the collectives, each without a graph break.

A MoE layer sends rows of data-dependent number to other ranks, and FSDP's hooks stand at every unit: a graph over a whole block
would break there. So what is compiled is what lies between: the dense halves of a block, the router, the shared expert, the
experts' matmuls, the ViT's blocks. Their shapes are static but for the rows of an expert bank, which are marked dynamic, so
after the first step nothing is compiled again: token counts, steps and the shield's scale (a tensor) are no constants.

Equal blocks share one compiled graph.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from symbiotic_titan.model.decoder import TransformerBlock
from symbiotic_titan.model.symbiotic import SymbioticModel


class Unit(NamedTuple):
    """A callable of a module that is compiled as one graph; ``dynamic``: its shapes change from batch to batch."""

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
        for bank in block.moe.experts.values():
            yield Unit(bank, "swiglu", True)
        if block.moe.shared_experts is not None:
            yield Unit(block.moe.shared_experts, "forward", False)


def _eager_when_tiny(
    compiled: Callable[..., torch.Tensor], eager: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A graph with a dynamic size takes 0 and 1 for constants: these batches run eagerly instead of compiling once more."""

    def run(rows_ND: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        return (compiled if rows_ND.shape[0] > 1 else eager)(rows_ND, *args)

    return run


def apply_compile(model: SymbioticModel, backend: str) -> None:
    """Compile the units of ``model`` in place, each with ``fullgraph``: a graph break is an error, not a slow surprise."""
    for owner, attribute, dynamic in compile_units(model):
        eager = getattr(owner, attribute)
        compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=dynamic)
        setattr(owner, attribute, _eager_when_tiny(compiled, eager) if dynamic else compiled)
