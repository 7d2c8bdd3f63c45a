"""Estimate of the activation memory of one rank, from the config.

It covers what autograd saves between forward and backward on the CUDA path (fused attention, grouped matmuls), per token and in the
dtype of the computation unless stated otherwise. Not covered: index tensors, statistics of norms, temporaries of kernels, the ViT's
projector, fragmentation. ``FORMULA`` states it as a formula; tests compare the estimate with what autograd saves.
"""

from dataclasses import dataclass

from torchtitan.config.job_config import ActivationCheckpoint

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.parallel.compile import checkpointing
from symbiotic_titan.parallel.dry_run import Precision

FORMULA = """\
Saved per token; b bytes per number, D width, UC query and uC key/value channels, K of E experts of width F, shared or dense width f
(of expert groups with a width or top-k of their own the one that saves most: all tokens may be its):
  none       b(4D + 4UC + 3uC + 4f) + 4U, with routed experts b(2KD + 4KF) + 4D + 9E + 16K more, without QK norm b(UC + uC)
             less; with sdpa b for every position of the row (the mask as numbers)
  full       bD a block, and one block of `none` while it is recomputed
  selective  op: b(2D + 2UC + uC + f) + 4U, with routed experts bK(2F + D) + 4E more, under expert parallelism 2bKD more, and one
             block of `none`; compiled at most `none`, since the compiler recomputes what is elementwise
             a number N: every N-th block as `full`, the others as `none`
  context    a rank has every C-th of these tokens, and 2buC a block, with `full` of one block, for each of the others
  ViT        b(11S + 2F) per patch and block, S the width of the ViT; with sdpa b for every patch of the sequence more
  heads      logits bV, and bV more for their gradient, while the loss is differentiated
  masks      with sdpa one byte for every pair of positions, and of patches, of a row, and for every patch that a query may read"""


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes on one rank.

    decoder:    saved between forward and backward by all blocks of the decoder.
    vit, masks: the same for the image encoder and for dense masks.
    logits:     held from the forward to the end of the backward.
    loss:       the gradient of the logits, in addition while the loss is differentiated.
    recomputed: in addition, while one block is recomputed.
    """

    decoder: int
    vit: int
    masks: int
    logits: int
    loss: int
    recomputed: int

    @property
    def peak(self) -> int:
        """The largest sum at any time."""
        # The gradient of the loss is complete before the first block is recomputed, so the two never coexist.
        return self.decoder + self.vit + self.masks + self.logits + max(self.loss, self.recomputed)


def saved_by_block(args: ModelArgs, computed: int, length: int, *, has_experts: bool) -> int:
    """Bytes per token that one decoder block saves without checkpointing, in sequences of ``length`` tokens."""
    heads, kv_heads = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
    # Norm: in, out; queries and keys before their norm and after rotary, values; result, as computed and with heads joined.
    numbers = 2 * args.dim + 2 * heads + 3 * kv_heads + 2 * heads
    numbers += length if args.attention_backend == "sdpa" else 0
    if args.qk_norm == "none":
        numbers -= heads + kv_heads
    numbers += 2 * args.dim  # the second norm: in, out
    if not has_experts:
        return computed * (numbers + 4 * args.dense_hidden_dim) + 4 * args.num_heads
    # Rows in and out of the experts; gate, up, activated gate, their product.
    moe = args.moe_args
    numbers += max(
        k * (2 * args.dim + 4 * f) for k, f in zip(moe.top_ks, moe.hidden_dims, strict=True)
    )
    numbers += 4 * args.shared_hidden_dim
    # Router: float32 input, logits and scores, mask; indices and weights of the chosen experts.
    router = 4 * args.dim + 9 * args.num_experts + 16 * max(moe.top_ks)
    return computed * numbers + router + 4 * args.num_heads


def saved_per_op(
    args: ModelArgs, computed: int, *, has_experts: bool, expert_parallel: bool
) -> int:
    """Bytes per token that one block saves with per-op checkpointing: its input, every second matrix product (wq, wv, the
    router's, w1 and w2 of the shared or dense expert), attention, the three grouped products, and what crossed the network."""
    heads, kv_heads = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
    numbers = args.dim + 2 * heads + kv_heads
    hidden_dim = args.shared_hidden_dim if has_experts else args.dense_hidden_dim
    numbers += hidden_dim + args.dim if hidden_dim else 0
    if not has_experts:
        return computed * numbers + 4 * args.num_heads
    moe, sent = args.moe_args, 2 * args.dim if expert_parallel else 0
    numbers += max(
        k * (2 * f + args.dim + sent) for k, f in zip(moe.top_ks, moe.hidden_dims, strict=True)
    )
    return computed * numbers + 4 * args.num_experts + 4 * args.num_heads


def recomputed_blocks(config: ActivationCheckpoint, num_layers: int) -> list[bool]:
    """For every block, whether its whole forward with its all-to-alls runs again in the backward. Per-op saves the all-to-alls."""
    if config.mode == "selective" and config.selective_ac_option != "op":
        every = int(config.selective_ac_option)
        return [every == 0 or (i + 1) % every == 0 for i in range(num_layers)]
    return [config.mode == "full"] * num_layers


def regathered_blocks(config: ActivationCheckpoint, num_layers: int) -> list[bool]:
    """For every block, whether context parallelism gathers its keys and values again in the backward. Per-op does not save them, so
    that a rank never holds those of all tokens of all blocks."""
    if config.mode == "selective" and config.selective_ac_option == "op":
        return [True] * num_layers
    return recomputed_blocks(config, num_layers)


def activation_memory(
    config: JobConfig, args: ModelArgs, precision: Precision, *, expert_parallel: bool
) -> ActivationMemory:
    """The estimate for one micro-batch of full sequences."""
    training, checkpoint = config.training, checkpointing(config)
    rows, length = training.local_batch_size, training.seq_len
    # Only the encoder computes on what other ranks of a sequence compute on, too; keys and values are gathered for all tokens.
    context = config.parallelism.context_parallel_degree
    tokens, b = rows * length // context, precision.computed
    per_op = checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op"
    decoder = recomputed = 0
    for layer, is_recomputed in enumerate(recomputed_blocks(checkpoint, args.num_layers)):
        has_experts = layer >= args.num_dense_layers
        everything = tokens * saved_by_block(args, b, length, has_experts=has_experts)
        everything += (rows * length - tokens) * b * 2 * args.num_kv_heads * args.head_dim
        if has_experts and config.losses.weight("z_loss"):
            everything += tokens * 5 * args.num_experts  # masked logits and their mask
        kept = everything
        if is_recomputed:
            kept = tokens * b * args.dim
        elif per_op:
            kept = tokens * saved_per_op(
                args, b, has_experts=has_experts, expert_parallel=expert_parallel
            )
        decoder += kept
        if is_recomputed or per_op:
            recomputed = max(recomputed, everything)
    data = config.data
    vit_tokens, patches = args.geometry.vit_room(data.max_vit_tokens or length, data.seen_pixels)
    hidden = {"swiglu": 4, "quick_gelu": 3}.get(args.vit.activation, 2)
    vit_numbers, masks = 11 * args.vit.dim + hidden * args.vit.hidden_dim, 0
    if args.attention_backend == "sdpa":
        vit_numbers += patches
        masks = tokens * length + rows * patches**2
        if args.vit.queries:
            masks += rows * vit_tokens * patches
    return ActivationMemory(
        decoder=decoder,
        vit=rows * patches * b * vit_numbers * args.vit.num_layers,
        masks=masks,
        logits=tokens * b * args.vocab_size,
        loss=tokens * b * args.vocab_size,
        recomputed=recomputed,
    )
