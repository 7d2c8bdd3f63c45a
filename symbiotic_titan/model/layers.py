"""Layers that decoder and image encoder share: RMSNorm, SwiGLU feed-forward, and attention over a mask.

Attention runs over a dense mask or by segments (both SDPA), or over a block mask (FlexAttention). Shape letters: sequence/shapes.py.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from symbiotic_titan.model.masks import AttentionMask, Segment, SegmentMask


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the residual stream: autocast's, in a single process with mixed precision; else that of ``x``.

    What begins the stream is cast to it: the embeddings of tokens and of latents. From there on every layer computes in the dtype of
    its input, and a loss does not depend on whether autocast or FSDP gives the weights that dtype.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight in the dtype of ``x``; the mean square is taken in float32 (arXiv 1910.07467)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        # Under autocast ``x`` arrives in bfloat16 while the weight is float32; the fused kernel needs one dtype.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of ``x``, computed in float32 (arXiv 1607.06450)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Weights rounded as FSDP rounds them. On CUDA autocast would return float32, which the next layer's matmul casts back.
        weight, bias = (p if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU, w2(silu(w1 x) * w3 x), without biases (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    # Uncompiled, FlexAttention materialises the (T, T) scores.
    return torch.compile(flex_attention)


def _attend_in_segments(
    q_BUTC: torch.Tensor, k_BuNC: torch.Tensor, v_BuNC: torch.Tensor, mask: SegmentMask
) -> torch.Tensor:
    """(B, U, T, C), without meaning for padding. Only pairs of tokens inside a segment are computed, and a segment's output does not
    depend on the others."""
    if not any(s.num_queries and s.num_keys for segments in mask.rows for s in segments):
        # Padding only, in a batch without images: the layer's parameters get a gradient, of zero, as the other ranks' do.
        return F.scaled_dot_product_attention(
            q_BUTC, k_BuNC[:, :, :1], v_BuNC[:, :, :1], enable_gqa=True
        )
    rows = []
    for b, segments in enumerate(mask.rows):
        queries = [segment.num_queries for segment in segments]
        keys = [segment.num_keys for segment in segments]
        # Split, not sliced: the backward is then one concatenation instead of a full-size tensor of zeros per segment.
        parts = zip(
            q_BUTC[b : b + 1].split(queries, dim=2),
            k_BuNC[b : b + 1].split(keys, dim=2),
            v_BuNC[b : b + 1].split(keys, dim=2),
            segments,
            strict=True,
        )
        rows.append(torch.cat([_segment_output(*part) for part in parts], dim=2))
    return torch.cat(rows)


def _segment_output(
    q_1UTC: torch.Tensor, k_1uNC: torch.Tensor, v_1uNC: torch.Tensor, segment: Segment
) -> torch.Tensor:
    if not segment.num_queries or not segment.num_keys:
        return torch.zeros_like(q_1UTC)
    grouped = q_1UTC.shape[1] != k_1uNC.shape[1]
    return F.scaled_dot_product_attention(
        q_1UTC,
        k_1uNC,
        v_1uNC,
        attn_mask=segment.visible,
        is_causal=segment.causal,
        enable_gqa=grouped,
    )


def attend(
    q_BUTC: torch.Tensor, k_BuTC: torch.Tensor, v_BuTC: torch.Tensor, mask: AttentionMask
) -> torch.Tensor:
    """(B, T, U * C) attention output. The type of ``mask`` chooses the kernel; u divides U.

    In cross-attention and with a cache, keys and values have another length than the queries.
    """
    grouped = q_BUTC.shape[1] != k_BuTC.shape[1]
    if isinstance(mask, SegmentMask):
        out_BUTC = _attend_in_segments(q_BUTC, k_BuTC, v_BuTC, mask)
    elif isinstance(mask, BlockMask):
        assert q_BUTC.is_cuda or not q_BUTC.requires_grad, "FlexAttention has no backward on CPU"
        # Under an outer torch.compile flex_attention joins that graph; otherwise it is compiled by itself.
        compiled_alone = q_BUTC.is_cuda and not torch.compiler.is_compiling()
        kernel: Callable[..., torch.Tensor] = flex_attention
        if compiled_alone:
            kernel = _compiled_flex_attention()
        out_BUTC = kernel(q_BUTC, k_BuTC, v_BuTC, block_mask=mask, enable_gqa=grouped)
    else:
        if grouped and q_BUTC.is_cuda:
            # On CUDA grouped queries with a mask fall back to the kernel that stores all scores. With repeated keys the
            # memory-efficient kernel applies.
            repeats, grouped = q_BUTC.shape[1] // k_BuTC.shape[1], False
            k_BuTC, v_BuTC = (x.repeat_interleave(repeats, dim=1) for x in (k_BuTC, v_BuTC))
        out_BUTC = F.scaled_dot_product_attention(
            q_BUTC, k_BuTC, v_BuTC, attn_mask=mask, enable_gqa=grouped
        )
    return out_BUTC.transpose(1, 2).flatten(2)
