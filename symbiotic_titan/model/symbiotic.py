"""SymbioticModel: embed three modalities, decode, two heads. Shape letters: sequence/shapes.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torchtitan.protocols.model import ModelProtocol

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.decoder import TransformerBlock
from symbiotic_titan.model.flops import model_cost
from symbiotic_titan.model.initialize import initialize
from symbiotic_titan.model.kv_cache import KeyValueCache, KeyValueSource, SequenceShard
from symbiotic_titan.model.latents import FlowHead, LatentEmbedding
from symbiotic_titan.model.layers import RMSNorm, compute_dtype
from symbiotic_titan.model.masks import (
    AttentionMask,
    MaskRule,
    block_mask,
    dense_mask,
    of_columns,
    patch_rule,
    query_rule,
    segment_mask,
    sequence_rule,
)
from symbiotic_titan.model.rope import RotaryTables, frequencies, frequency_axes, rotary_tables
from symbiotic_titan.model.vit import QueryIndices, VisionTransformer, VitOutput, grid_sizes
from symbiotic_titan.moe.record import RoutingRecord
from symbiotic_titan.sequence.batch import PackedBatch


@dataclass(frozen=True)
class ModelOutput:
    """Output of one forward. Where several processes share a sequence, of the tokens of ``SymbioticModel.own_part``.

    logits   (B, T, V) in the dtype of the computation, meaningless at padding; (N, V) with ``logit_index``.
    velocity (B, L, Z) float32; exactly 0 for unused latent tokens, and for those of other processes.
    records  one per MoE layer, in the order of the layers.
    """

    logits: torch.Tensor
    velocity: torch.Tensor
    records: tuple[RoutingRecord, ...]


# FSDP finds tensors in a module's output through pytree, which must know the dataclass.
pytree.register_dataclass(ModelOutput)


def write_tokens(
    h_BTD: torch.Tensor, index_BN: torch.Tensor, tokens_BND: torch.Tensor
) -> torch.Tensor:
    """(B, T, D): ``h`` with ``h[b, index[b, n]]`` replaced by ``tokens[b, n]``; tokens with index T are dropped."""
    # Unused tokens are written to an extra position T, which is cut off. They stay in the graph with zero gradients, so FSDP reduces
    # the same parameters on every rank. Used indices are unique, so the scatter and its gradient (a gather) are deterministic.
    length = h_BTD.shape[1]
    index_BND = index_BN.unsqueeze(-1).expand_as(tokens_BND)
    longer = F.pad(h_BTD, (0, 0, 0, 1))
    return longer.scatter(1, index_BND, tokens_BND.to(h_BTD.dtype))[:, :length]


def add_tokens(
    h_BTD: torch.Tensor, index_BN: torch.Tensor, tokens_BND: torch.Tensor
) -> torch.Tensor:
    """(B, T, D): ``h`` with ``tokens[b, n]`` added to ``h[b, index[b, n]]``; tokens with index T are dropped."""
    return h_BTD + write_tokens(torch.zeros_like(h_BTD), index_BN, tokens_BND)


def read_tokens(h_BTD: torch.Tensor, index_BN: torch.Tensor) -> torch.Tensor:
    """(B, N, D): ``h[b, index[b, n]]``; zeros where the index is T."""
    index_BND = index_BN.unsqueeze(-1).expand(-1, -1, h_BTD.shape[-1])
    return F.pad(h_BTD, (0, 0, 0, 1)).gather(1, index_BND)


def index_within_image(image_BI: torch.Tensor) -> torch.Tensor:
    """(B, I): index of each token within its image. An image's tokens are adjacent."""
    index_BI = torch.arange(image_BI.shape[1], device=image_BI.device).expand_as(image_BI)
    starts_BI = image_BI != image_BI.roll(1, dims=1)
    return index_BI - index_BI.where(starts_BI, 0).cummax(1).values


class SymbioticModel(ModelProtocol):
    """One decoder for text, input images and target images (arXiv 2604.07753).

    Noise and timesteps are arguments: the model draws no random numbers and knows no device mesh.
    """

    static_shapes = False
    """Set by ``parallel.compile``: shapes that differ from batch to batch would be compiled anew. A GPU has them always, since it would
    have to wait for the host to read the sizes; see ``forward``."""

    sequence_shard: SequenceShard | None = None
    """Set by ``parallel.context_parallel``, where several processes share a sequence."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.vit = VisionTransformer(args)
        self.latent_embedding = LatentEmbedding(args)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(args, i) for i in range(args.num_layers)}
        )
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.flow_head = FlowHead(args)
        self._tie_embeddings()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Give every parameter its initial value, a function of its name and ``args.init_seed`` alone."""
        self._tie_embeddings()  # ``to_empty`` off the meta device has split the shared tensor into two
        initialize(self, seed=self.args.init_seed)

    def nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """(number of parameters, FLOPs per training token, forward and backward, mean over the modalities)."""
        cost = model_cost(self, self.args, seq_len)
        return cost.parameters, cost.training_flops_per_token()

    def own_part(self, batch: PackedBatch) -> PackedBatch:
        """The part of ``batch`` that belongs to this process: all of it, unless several share its sequences. What ``forward`` returns for
        ``batch``, without a cache, is about this part, and so are the losses. On the device of ``batch``."""
        if self.sequence_shard is None:
            return batch
        return batch.columns(self._own_columns(self.sequence_shard, batch))

    def forward(
        self,
        batch: PackedBatch,
        noised_BLZ: torch.Tensor,
        timesteps_BL: torch.Tensor,
        shield_scale: torch.Tensor,
        *,
        cache: KeyValueCache | None = None,
        logit_index_N: torch.Tensor | None = None,
    ) -> ModelOutput:
        """``noised`` are the latents at ``timesteps`` (float32 in [0, 1], one per latent token); see ``flow.path``.

        cache: the earlier tokens of the same sequences; ``batch`` then holds their next T tokens only.
        logit_index: the tokens whose logits are needed, as indices into the B * T tokens of the batch, or of this process's part of it; all
        of them by default.

        Processes that share the sequences (``own_part``) all take the whole batch and encode all its images. A CPU computes a batch that
        is not shared as one sequence without unused image tokens: ViT and heads then cost what the images need, and attention,
        by segments, what the documents need.
        """
        is_shared = self.sequence_shard is not None
        if is_shared or cache is not None or self._has_static_shapes(batch.tokens.device):
            return self._compute(
                batch, noised_BLZ, timesteps_BL, shield_scale, cache, logit_index_N
            )
        one, latent = batch.as_one_sequence()
        noised, timesteps = (
            x.flatten(0, 1)[latent].unsqueeze(0) for x in (noised_BLZ, timesteps_BL)
        )
        output = self._compute(one, noised, timesteps, shield_scale, None, logit_index_N)
        velocity = output.velocity.new_zeros(noised_BLZ.flatten(0, 1).shape)
        logits = output.logits
        if logit_index_N is None:
            logits = logits.view(*batch.tokens.shape, logits.shape[-1])
        return replace(
            output,
            logits=logits,
            velocity=velocity.index_copy(0, latent, output.velocity[0]).view(noised_BLZ.shape),
        )

    def _compute(
        self,
        batch: PackedBatch,
        noised_BLZ: torch.Tensor,
        timesteps_BL: torch.Tensor,
        shield_scale: torch.Tensor,
        cache: KeyValueCache | None,
        logit_index_N: torch.Tensor | None,
    ) -> ModelOutput:
        """``forward`` of a batch as it is."""
        # Every part runs on every batch, also without an image: under FSDP a rank that skipped one would leave its peers waiting in
        # the all-gather.
        vit = self._encode(batch)
        others: Sequence[KeyValueSource] = ()
        if cache is not None:
            mask, others = self._cached_mask(batch, cache), cache.layers
        elif self.sequence_shard is not None:
            columns_T = self._own_columns(self.sequence_shard, batch)
            mask = self._sequence_mask(batch, columns_T)
            others = [self.sequence_shard] * len(self.layers)
            batch = batch.columns(columns_T)
        else:
            mask = self._sequence_mask(batch)
        h_BTD, condition_BLD = self._embed(batch, vit.tokens, noised_BLZ, timesteps_BL)
        rotary = self._rotary(batch.positions)
        records = []
        # Deepstack features belong to the first layers only, so the shorter lists are filled with None.
        for block, features_BID, source in zip_longest(self.layers.values(), vit.deepstack, others):
            h_BTD, record = block(
                h_BTD,
                rotary,
                mask,
                batch.modality,
                shield_scale,
                source,
                batch.modality_counts,
            )
            if features_BID is not None:
                h_BTD = add_tokens(h_BTD, batch.vit_index, features_BID)
            if record is not None:
                records.append(record)
        velocity_BLZ = self.flow_head(read_tokens(h_BTD, batch.vae_index), condition_BLD)
        # Unused latent tokens got noise too; with velocity exactly 0, sums over L need no mask.
        used_BL1 = (batch.vae_image >= 0).unsqueeze(-1)
        h = h_BTD
        if logit_index_N is not None:
            # Selected before the output layer, whose (B, T, V) logits are the largest tensor of a forward.
            h = h_BTD.flatten(0, 1).index_select(0, logit_index_N)
        return ModelOutput(
            logits=self.output(self.norm(h)),
            velocity=torch.where(used_BL1, velocity_BLZ, 0.0),
            records=tuple(records),
        )

    def _encode(self, batch: PackedBatch) -> VitOutput:
        """The input images as tokens of the decoder."""
        sizes_BPA = grid_sizes(batch.vit_coords, batch.vit_image)
        mask = self._mask(patch_rule(batch.vit_image), batch.vit_image)
        indices = self._query_indices(batch) if self.args.vit.queries else None
        return self.vit(batch.vit_patches, batch.vit_coords, sizes_BPA, mask, indices)

    def _query_indices(self, batch: PackedBatch) -> QueryIndices:
        """Learned query and patches of each ViT token."""
        # The spans of the ViT tokens; unused ones have index T and read the padded -1.
        image_BI = F.pad(batch.span, (0, 1), value=-1).gather(1, batch.vit_index)
        query_BI = index_within_image(image_BI).clamp(max=self.args.vit.queries[-1] - 1)
        rule = query_rule(image_BI, batch.vit_image)
        return QueryIndices(query_BI, self._mask(rule, image_BI, batch.vit_image))

    def _embed(
        self,
        batch: PackedBatch,
        vit_BID: torch.Tensor,
        noised_BLZ: torch.Tensor,
        timesteps_BL: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, T, D) token embeddings with images written over their placeholders, (B, L, D) timestep condition)."""
        latents_BLD, condition_BLD = self.latent_embedding(
            noised_BLZ, batch.vae_coords, timesteps_BL
        )
        h_BTD = self.tok_embeddings(batch.tokens)
        h_BTD = h_BTD.to(compute_dtype(h_BTD))  # a look-up is not autocast
        h_BTD = write_tokens(h_BTD, batch.vit_index, vit_BID)
        h_BTD = write_tokens(h_BTD, batch.vae_index, latents_BLD)
        # The same strides as the other blocks' inputs; others would recompile the attention for the first block.
        return h_BTD.contiguous(), condition_BLD

    def _own_columns(self, shard: SequenceShard, batch: PackedBatch) -> torch.Tensor:
        return shard.columns(batch.tokens.shape[1], batch.tokens.device)

    def _sequence_mask(
        self, batch: PackedBatch, columns_T: torch.Tensor | None = None
    ) -> AttentionMask:
        """The mask of ``masks.sequence_rule``, by default for all queries. Keys are all tokens."""
        rule = sequence_rule(batch, self.args.vit_attention)
        if columns_T is None:
            return self._mask(rule, batch.document)
        query_BT = batch.document.index_select(1, columns_T)
        return self._mask(of_columns(rule, columns_T), query_BT, batch.document)

    def _cached_mask(self, batch: PackedBatch, cache: KeyValueCache) -> AttentionMask:
        """The same for the queries of ``batch``; keys are those of the cache and its own."""
        # A chunk has few queries, so its mask is dense for every backend.
        columns = cache.columns_with(batch)
        rule = sequence_rule(columns, self.args.vit_attention)
        return dense_mask(rule, columns.document.shape, columns.document.device, cache.length)

    def _mask(
        self, rule: MaskRule, query_BT: torch.Tensor, key_BN: torch.Tensor | None = None
    ) -> AttentionMask:
        """The mask of ``rule`` in the backend's form, for queries and keys of these documents or images; by default keys are queries."""
        key_BN = query_BT if key_BN is None else key_BN
        shape, num_keys, device = query_BT.shape, key_BN.shape[1], query_BT.device
        if self.args.attention_backend == "flex" and shape[1] > 0:
            return block_mask(rule, shape, device, num_keys)
        if not self._has_static_shapes(device):
            return segment_mask(rule, query_BT, key_BN)
        return dense_mask(rule, shape, device, num_keys=num_keys)

    def _has_static_shapes(self, device: torch.device) -> bool:
        return self.static_shapes or device.type != "cpu"

    def _rotary(self, positions_BTA: torch.Tensor) -> RotaryTables:
        args, device = self.args, positions_BTA.device
        num = args.rotary_dim // 2
        axes_R = frequency_axes(args.mrope, args.mrope_sections, num, device)
        return rotary_tables(positions_BTA, axes_R, frequencies(num, args.rope_theta, device))

    def _tie_embeddings(self) -> None:
        if self.args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
