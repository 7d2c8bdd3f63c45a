"""What the model costs: parameters, and FLOPs per token of each modality.

A multiply-add is two FLOPs. A token counts the parameters it passes through: the decoder with its top-k experts, and the embedding
and head of its own modality (text: embedding table and output; vit: the encoder; vae: latent embedding and flow head). Text without a
label has no logits in training, and pays for none. Attention counts twice: by the pairs of query and key that the masks let through,
which is what a step needs, and by whole rows and images of full size, as torchtitan counts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import nn

from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import NUM_MODALITIES, TEXT, VAE, VIT

if TYPE_CHECKING:
    from symbiotic_titan.model.args import ModelArgs

NUM_PAIRS = 3  # kinds of pairs of query and key that ``visible_pairs`` counts

# Modality whose embedding or head a parameter belongs to, by the first part of its name.
_MODALITY_OF_PART = {
    "tok_embeddings": TEXT,
    "output": TEXT,
    "vit": VIT,
    "latent_embedding": VAE,
    "flow_head": VAE,
}

_TABLES = ("tok_embeddings.weight", "vit.position_embedding.weight", "vit.merger.queries.weight")

# Parameters of the image encoder that are used once per patch; the others are used once per token.
_PER_PATCH = re.compile(
    r"vit\.(?!merger\.|deepstack_mergers\.)|vit\.merger\.(norm|patch_norm|wk|wv)\."
)


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of a model. Tuples are indexed by modality.

    parameters:      number of all parameters.
    active:          parameters that one token passes through.
    forward_flops:   FLOPs of one token's forward, with attention to a whole row and, in the encoder, a whole image.
    attention_flops: those of attention in them.
    logit_flops:     those of a text token's logits, which are part of its ``forward_flops``.
    pair_flops:      those of the forward of one pair of query and key, by the kinds of ``visible_pairs``.
    """

    parameters: int
    active: tuple[int, ...]
    forward_flops: tuple[int, ...]
    attention_flops: tuple[int, ...]
    logit_flops: int
    pair_flops: tuple[int, ...]

    def training_flops_per_token(
        self, shares: tuple[float, ...] | None = None, labelled: float | None = None
    ) -> int:
        """Forward and backward (twice the forward), mean over the modalities weighted by their ``shares`` of the tokens, which are
        equal by default. ``labelled``: the share of tokens with a label; by default all text has one."""
        shares = shares or (1.0,) * NUM_MODALITIES
        total = sum(f * s for f, s in zip(self.forward_flops, shares, strict=True))
        if labelled is not None:
            total -= self.logit_flops * (shares[TEXT] - labelled)
        return round(3 * total / sum(shares))

    def visible_training_flops(
        self, tokens: Sequence[float], labelled: float, pairs: Sequence[float]
    ) -> float:
        """Forward and backward of so many ``tokens`` of each modality and ``labelled`` labels, with attention by ``pairs`` of the kinds
        of ``visible_pairs``."""
        matmuls = zip(self.forward_flops, self.attention_flops, tokens, strict=True)
        total = sum((forward - attention) * count for forward, attention, count in matmuls)
        total -= self.logit_flops * (tokens[TEXT] - labelled)
        return 3 * (total + sum(f * n for f, n in zip(self.pair_flops, pairs, strict=True)))


def visible_pairs(batch: PackedBatch, vit_attention: str = "bidirectional") -> torch.Tensor:
    """(NUM_PAIRS,) float64 pairs of query and key that the masks of ``model.masks`` let through: in the decoder, in the image encoder,
    and of its queries, where it has any, with patches. Padding, which attends to itself, counts nothing. ``batch``: on the host."""
    is_used_BT = batch.document >= 0
    order_BT = is_used_BT.long().cumsum(1)  # 1, 2, ... without padding
    first_B1 = batch.tokens.shape[1] * torch.arange(len(batch.tokens)).unsqueeze(1)

    def count(index: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """How often each value of ``index``, of documents or images, which each row numbers from 0, is ``kept``."""
        return (index + first_B1)[kept].bincount(minlength=batch.tokens.numel()).double()

    # A key of text or of an input image is seen by itself and by what follows it in its document.
    document_N = (batch.document + first_B1)[is_used_BT]
    last_N = torch.zeros(batch.tokens.numel(), dtype=torch.int64)
    last_N.scatter_reduce_(0, document_N, order_BT[is_used_BT], "amax")
    seen_N = last_N[document_N] - order_BT[is_used_BT] + 1
    pairs = seen_N[batch.modality[is_used_BT] != VAE].sum().double()
    # A target image is seen by itself alone; an input image also by its tokens that precede it.
    # Delimiters of an image may be routed as its tokens are, but are in no span.
    in_span_BT = batch.span >= 0
    pairs = pairs + count(batch.span, in_span_BT & (batch.modality == VAE)).square().sum()
    vit_tokens = count(batch.span, in_span_BT & (batch.modality == VIT))
    if vit_attention == "bidirectional":
        pairs = pairs + (vit_tokens * (vit_tokens - 1)).sum() / 2
    patches = count(batch.vit_image, batch.vit_image >= 0)
    return torch.stack([pairs, patches.square().sum(), (vit_tokens * patches).sum()])


def model_cost(
    model: nn.Module, args: "ModelArgs", seq_len: int, image_patches: int | None = None
) -> ModelCost:
    """Cost of an unsharded ``model`` on sequences of ``seq_len`` tokens with input images of ``image_patches`` patches: by default 256
    or, with learned queries, a square of the largest size that they read."""
    vit = args.vit
    patches_per_token: float = vit.merge**2
    if image_patches is None:
        image_patches = vit.query_sides[-1] ** 2 if vit.queries else 256
    if vit.queries:
        side = isqrt(image_patches)
        patches_per_token = image_patches / args.geometry.vit_grid(side, side)[1]
    active = [0.0] * NUM_MODALITIES
    matmul = [0.0] * NUM_MODALITIES
    for name, parameter in model.named_parameters():
        for modality, share in enumerate(_shares(name, args)):
            active[modality] += share * parameter.numel()
            if name in _TABLES:
                continue  # a look-up, no matmul
            repeats = patches_per_token if _PER_PATCH.match(name) else 1
            matmul[modality] += share * parameter.numel() * repeats
    if args.tie_embeddings:
        # The table was skipped above as a look-up, but tied it is also the output's matmul.
        matmul[TEXT] += args.vocab_size * args.dim

    # Scores and weighted values: two matmuls of 2 FLOPs per multiply-add.
    pair_flops = (
        4 * args.num_layers * args.num_heads * args.head_dim,
        4 * vit.num_layers * vit.dim,
        4 * vit.dim if vit.queries else 0,
    )
    of_row, of_image, of_queries = pair_flops
    attention = [float(of_row * seq_len)] * NUM_MODALITIES
    attention[VIT] += of_image * image_patches * patches_per_token + of_queries * image_patches
    return ModelCost(
        parameters=sum(p.numel() for p in model.parameters()),
        active=tuple(round(a) for a in active),
        forward_flops=tuple(round(2 * m + a) for m, a in zip(matmul, attention, strict=True)),
        attention_flops=tuple(round(a) for a in attention),
        logit_flops=2 * args.vocab_size * args.dim,
        pair_flops=pair_flops,
    )


def _shares(name: str, args: "ModelArgs") -> tuple[float, ...]:
    """The share of parameter ``name`` that a token of each modality passes through."""
    owner = _MODALITY_OF_PART.get(name.split(".")[0])
    if owner is not None:
        return tuple(float(m == owner) for m in range(NUM_MODALITIES))
    inside = re.search(r"\.moe\.(experts|router)\.([^.]+)\.", name)
    if inside is None:
        return (1.0,) * NUM_MODALITIES
    moe = args.moe_args
    group, top_k = next(
        pair for pair in zip(moe.groups, moe.top_ks, strict=True) if pair[0].name == inside[2]
    )
    share = top_k / group.num_experts if inside[1] == "experts" else 1.0
    return tuple(share * (m in group.modalities) for m in range(NUM_MODALITIES))
