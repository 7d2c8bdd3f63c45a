"""Context parallelism: the ranks of one mesh axis share every sequence, so that activations of long sequences fit.

All ranks of the axis read the same rows and encode all their images. Then each computes its own columns: a sequence is cut into twice as
many chunks as there are ranks, and rank r has chunk r and, counted from the end, chunk r again. Under a causal mask the two together
attend to as many keys on every rank. (Llama 3, arXiv 2407.21783, section 3.3.2.) Only attention needs other columns: the keys and
values of all ranks are gathered in every layer, and their gradients are reduced and scattered. The mask is the same rule over the true
columns. Everything else is computed per token.

Losses and counts are sums over columns, so they add up over the ranks of the axis as over those that read different rows, and so do
gradients: torchtitan makes the axis a part of the mesh over which FSDP shards. A rank's gradient of the image encoder is the part that
its own columns cause. Rings of ranks that pass keys on (arXiv 2310.01889) would hold fewer keys at a time but need their own attention
kernel; with grouped queries, keys and values are a small part of a layer's activations.

Shape letters: sequence/shapes.py. X are the ranks of the axis, N all tokens of a sequence.
"""

import torch
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from symbiotic_titan.model.symbiotic import SymbioticModel


def head_tail_columns(length: int, degree: int, rank: int, device: torch.device) -> torch.Tensor:
    """(length / degree,) int64: the columns of ``rank``; ``length`` is a multiple of 2 * degree."""
    chunks = torch.arange(length, device=device).chunk(2 * degree)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


class HeadTailShard:
    """The columns of this rank among those of ``mesh`` (one axis), and the keys and values of the others."""

    def __init__(self, mesh: DeviceMesh) -> None:
        assert mesh.ndim == 1, f"context parallelism spans one mesh axis, got {mesh}"
        self.group = mesh.get_group()
        self.degree, self.rank = mesh.size(), mesh.get_local_rank()

    def columns(self, length: int, device: torch.device) -> torch.Tensor:
        return head_tail_columns(length, self.degree, self.rank, device)

    def complete(
        self, k_BuTC: torch.Tensor, v_BuTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, u, N, C), (B, u, N, C)) of all columns, in the order of the sequence. A collective, in the backward too."""
        both = torch.stack([k_BuTC, v_BuTC])  # one collective for both
        gathered = collectives.wait_tensor(
            collectives.all_gather_tensor_autograd(both, 0, self.group)
        )
        # (X, k or v, B, u, head or tail, tokens, C). Unbound, not sliced: the backward then adds no tensors of zeros.
        halves = gathered.unflatten(0, (self.degree, 2)).unflatten(-2, (2, -1))
        heads, tails = (half.unbind(0) for half in halves.unbind(4))
        keys, values = torch.cat([*heads, *reversed(tails)], dim=3).unbind(0)
        return keys, values


def apply_context_parallel(model: SymbioticModel, mesh: DeviceMesh) -> None:
    """Let ``model`` compute this rank's columns of every batch that it gets without a cache."""
    model.sequence_shard = HeadTailShard(mesh)
