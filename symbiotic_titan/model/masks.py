"""Attention masks: one rule, a function of indices, from which all forms of the mask are built: dense, by segments, by blocks.

A packed sequence with documents 0 and 1, ``v`` an input (ViT) image, ``g`` a target (VAE) image, ``.`` padding; one line per query,
one column per key:

              0 0 0 0 0 0  1 1 1 1 1  .
              a v v b g g  c g g d e  .
        0 a   x
        0 v   x x x                        an image attends to all of itself and to what precedes it
        0 v   x x x
        0 b   x x x x
        0 g   x x x x x x
        0 g   x x x x x x
        1 c                x
        1 g                x x x
        1 g                x x x
        1 d                x     x         later tokens do not attend to a target image: in training it is noise
        1 e                x     x x
        . .                          x     padding attends to itself: an empty softmax would give NaN

Shape letters: sequence/shapes.py. N are keys.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import VAE, VIT

# (batch, head, query, key) -> whether the query attends to the key; index tensors that broadcast.
MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Segment(NamedTuple):
    """Adjacent queries of a sequence, and the adjacent keys which hold all that they attend to. Queries without keys are padding.

    visible: (1, 1, queries, keys) bool; None where every query attends to every key, or to all up to its own (``causal``).
    """

    num_queries: int
    num_keys: int
    visible: torch.Tensor | None = None
    causal: bool = False


class SegmentMask(NamedTuple):
    """The segments of each sequence in order. Together they hold all its queries and all its keys."""

    rows: tuple[tuple[Segment, ...], ...]


AttentionMask = torch.Tensor | BlockMask | SegmentMask

VitAttention = Literal["bidirectional", "causal"]


class Columns(NamedTuple):
    """The part of a ``PackedBatch`` that the sequence rule reads, (B, T) each. A cache keeps it for the tokens it holds."""

    document: torch.Tensor
    span: torch.Tensor
    modality: torch.Tensor


def sequence_rule(
    batch: PackedBatch | Columns, vit_attention: VitAttention = "bidirectional"
) -> MaskRule:
    """The rule drawn at the top of this module: the key is in the same document, not in the future unless in the same image, and not
    in another target image. With ``causal`` an input image is read as text is, as the released decoders do."""
    document_BT, span_BT = batch.document, batch.span
    if vit_attention == "causal":
        span_BT = span_BT.masked_fill(batch.modality == VIT, -1)
    target_BT = batch.modality == VAE

    # FlexAttention traces this function with scalar indices, ``dense_mask`` calls it with broadcast tensors: plain indexing and
    # comparisons serve both.
    def attends(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        same_document = (document_BT[b, q] == document_BT[b, k]) & (document_BT[b, q] >= 0)
        same_image = (span_BT[b, q] == span_BT[b, k]) & (span_BT[b, q] >= 0)
        visible = same_document & ((k <= q) | same_image) & (same_image | ~target_BT[b, k])
        return visible | (q == k)  # for padding, which is in no document

    return attends


def of_columns(rule: MaskRule, columns_T: torch.Tensor) -> MaskRule:
    """``rule`` for queries that are these tokens of the sequence; the keys are all of its tokens."""

    def attends(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return rule(b, h, columns_T[q], k)

    return attends


def patch_rule(image_BP: torch.Tensor) -> MaskRule:
    """ViT patches of one image attend to each other; an unused patch (image -1) attends to itself."""

    def attends(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((image_BP[b, q] == image_BP[b, k]) & (image_BP[b, q] >= 0)) | (q == k)

    return attends


def query_rule(token_image_BI: torch.Tensor, patch_image_BP: torch.Tensor) -> MaskRule:
    """A ViT token attends to the patches of its image; an unused one (image -1) to the first patch, so that no softmax is over an
    empty set, which would give NaN."""

    def attends(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        used = token_image_BI[b, q] >= 0
        return torch.where(used, token_image_BI[b, q] == patch_image_BP[b, k], k == 0)

    return attends


def dense_mask(
    rule: MaskRule,
    shape: tuple[int, ...],
    device: torch.device,
    first_query: int = 0,
    num_keys: int | None = None,
) -> torch.Tensor:
    """(B, 1, T, N) bool for ``F.scaled_dot_product_attention``; True where the query attends to the key.

    shape: (B, number of queries). first_query: leave out the queries before this one. num_keys: by default as many as queries.
    """
    rows, length = shape
    query_T = torch.arange(first_query, length, device=device)
    key_N = torch.arange(length if num_keys is None else num_keys, device=device)
    # Broadcasting index vectors avoid a (B, T, N) tensor of integers.
    index_B = torch.arange(rows, device=device)
    head = torch.zeros((), dtype=torch.long, device=device)
    return rule(index_B[:, None, None], head, query_T[:, None], key_N[None, :]).unsqueeze(1)


def _runs(index_N: torch.Tensor) -> list[tuple[int, int]]:
    """(value, length) of each run of equal values; padding (-1) between two equal runs makes them one."""
    values, lengths = torch.unique_consecutive(index_N, return_counts=True)
    runs: list[tuple[int, int]] = []
    for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
        if len(runs) > 1 and runs[-1][0] < 0 and runs[-2][0] == value:
            length += runs.pop()[1] + runs.pop()[1]
        runs.append((value, length))
    return runs


def _row_segments(
    rule: MaskRule, row: int, query_T: torch.Tensor, key_N: torch.Tensor
) -> Iterator[Segment]:
    index, head, first_query, first_key = torch.tensor(row), torch.tensor(0), 0, 0
    keys = iter(_runs(key_N))
    for value, num_queries in _runs(query_T):
        query_S = torch.arange(first_query, first_query + num_queries)
        first_query += num_queries
        if value < 0:
            yield Segment(num_queries, 0)
            continue
        for key_value, num_keys in keys:
            first_key += num_keys
            if key_value == value:
                break
            yield Segment(0, num_keys)
        key_S = torch.arange(first_key - num_keys, first_key)
        visible = rule(index, head, query_S[:, None], key_S[None, :])
        # Without a mask attention is 1.5 times as fast over 1,024 tokens, and leaves out the pairs above the diagonal.
        if visible.all():
            yield Segment(num_queries, num_keys)
        elif visible.equal(torch.ones_like(visible).tril()):
            yield Segment(num_queries, num_keys, causal=True)
        else:
            yield Segment(num_queries, num_keys, visible[None, None])
    yield from (Segment(0, num_keys) for _, num_keys in keys)


def segment_mask(rule: MaskRule, query_BT: torch.Tensor, key_BN: torch.Tensor) -> SegmentMask:
    """The mask of ``rule`` by runs of the document, or image, of each query and key. A query attends to keys of its own run only; the
    runs of queries and of keys are in the same order, and -1 is padding. The host reads the indices, so they are on the CPU."""
    pairs = zip(query_BT, key_BN, strict=True)
    return SegmentMask(tuple(tuple(_row_segments(rule, b, *pair)) for b, pair in enumerate(pairs)))


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    # Uncompiled, the mask is materialised for every pair of tokens before its blocks are found.
    return torch.compile(create_block_mask)


def block_mask(
    rule: MaskRule, shape: tuple[int, ...], device: torch.device, num_keys: int | None = None
) -> BlockMask:
    """The same mask for FlexAttention, shared by all heads."""
    rows, length = shape
    num_keys = length if num_keys is None else num_keys
    # On a CPU, compiling takes longer than building the mask eagerly.
    create = _compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    return create(rule, B=rows, H=None, Q_LEN=length, KV_LEN=num_keys, device=device)


def build_dense_mask(
    batch: PackedBatch, vit_attention: VitAttention = "bidirectional"
) -> torch.Tensor:
    """(B, 1, T, T) bool: the sequence rule for SDPA, the reference and the CPU path."""
    rule = sequence_rule(batch, vit_attention)
    return dense_mask(rule, batch.tokens.shape, batch.tokens.device)


def build_block_mask(
    batch: PackedBatch, vit_attention: VitAttention = "bidirectional"
) -> BlockMask:
    """The sequence rule for FlexAttention, the CUDA path."""
    rule = sequence_rule(batch, vit_attention)
    return block_mask(rule, batch.tokens.shape, batch.tokens.device)
