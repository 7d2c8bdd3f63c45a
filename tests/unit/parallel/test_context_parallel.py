"""Which columns a rank has, what of a batch belongs to them, and the rows of the mask that its queries see."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.losses.terms import label_counts, latent_counts
from symbiotic_titan.model.layers import attend
from symbiotic_titan.model.masks import (
    block_mask,
    build_dense_mask,
    dense_mask,
    of_columns,
    segment_mask,
    sequence_rule,
)
from symbiotic_titan.parallel.context_parallel import head_tail_columns
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from tests.helpers.tiny_models import LENGTH, MIXED, OTHER, pack_row, tiny_args

CPU = torch.device("cpu")
DEGREES = [1, 2, 4, 8]


def columns_of_all(degree, length=LENGTH):
    return [head_tail_columns(length, degree, rank, CPU) for rank in range(degree)]


@pytest.fixture(scope="module")
def batch():
    """Two rows whose images lie across the edges of chunks, with labels and tasks."""
    batch = stack_rows([pack_row(MIXED, tiny_args()), pack_row(OTHER, tiny_args(), seed=7)])
    batch.task[:] = batch.document.clamp(max=2)
    batch.labels[:] = batch.tokens.where((batch.span < 0) & (batch.document >= 0), IGNORE_INDEX)
    return batch


def test_two_ranks_have_the_ends_and_the_middle():
    assert [c.tolist() for c in columns_of_all(2, 8)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize("degree", DEGREES)
def test_ranks_share_all_columns_and_the_causal_work_evenly(degree):
    columns = columns_of_all(degree)
    assert torch.cat(columns).sort().values.equal(torch.arange(LENGTH))
    assert len({int((c + 1).sum()) for c in columns}) == 1  # keys that a causal mask shows
    assert all(c.diff().gt(0).all() for c in columns)


@pytest.mark.parametrize("degree", DEGREES)
def test_every_token_of_a_batch_belongs_to_one_rank(batch, degree):
    parts = [batch.columns(c) for c in columns_of_all(degree)]
    order_T = torch.cat(columns_of_all(degree)).argsort()
    for name in ("tokens", "modality", "document", "span", "positions", "labels", "task"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert joined.index_select(1, order_T).equal(getattr(batch, name)), name
    for index, image in (("vit_index", "vit_image"), ("vae_index", "vae_image")):
        owners = torch.zeros_like(getattr(batch, index))
        for part, columns_T in zip(parts, columns_of_all(degree), strict=True):
            own = getattr(part, index)
            used = own < len(columns_T)
            owners += used
            true_index = columns_T[own.clamp(max=len(columns_T) - 1)]
            assert true_index[used].equal(getattr(batch, index)[used])
            if image == "vae_image":
                assert part.vae_image.equal(batch.vae_image.where(used, -1))
        assert owners.equal((getattr(batch, index) < LENGTH).long())
    assert all(part.vit_patches.equal(batch.vit_patches) for part in parts)  # encoded by every rank


@pytest.mark.parametrize("degree", DEGREES)
def test_every_target_is_counted_once(batch, degree):
    parts = [batch.columns(c) for c in columns_of_all(degree)]
    for count in (label_counts, latent_counts):
        assert count(batch).sum() > 0
        assert sum(count(part) for part in parts).equal(count(batch))
    loss = LossFunction()
    named = [[batch], *([] for _ in parts[1:])]  # the first rank counts the batch as a whole
    shares = [loss.count_step([part], whole) for part, whole in zip(parts, named, strict=True)]
    assert sum(shares).equal(loss.count_step([batch]))


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("vit_attention", ["bidirectional", "causal"])
def test_masks_of_a_rank_are_rows_of_the_full_mask(batch, degree, vit_attention):
    full = build_dense_mask(batch, vit_attention)
    rule = sequence_rule(batch, vit_attention)
    for columns_T in columns_of_all(degree):
        own, shape = of_columns(rule, columns_T), (2, len(columns_T))
        expected = full.index_select(2, columns_T)
        assert dense_mask(own, shape, CPU, num_keys=LENGTH).equal(expected)
        flex = create_mask(own, 2, None, len(columns_T), LENGTH, device="cpu")
        assert flex.equal(expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padded_in_front", [False, True])
def test_attention_of_a_rank_is_that_of_its_queries(batch, padded_in_front):
    """By segments, by blocks and over a dense mask; also where a rank's first chunk, or its last, is padding."""
    if padded_in_front:
        moved = {n: getattr(batch, n).roll(16, 1) for n in ("document", "span", "modality")}
        batch = replace(batch, **moved)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    expected = attend(q, k, v, build_dense_mask(batch))
    rule = sequence_rule(batch)
    for columns_T in columns_of_all(4):
        own, shape = of_columns(rule, columns_T), (2, len(columns_T))
        query_BT = batch.document.index_select(1, columns_T)
        used_BT1 = (query_BT >= 0).unsqueeze(-1)
        for mask in (
            dense_mask(own, shape, CPU, num_keys=LENGTH),
            segment_mask(own, query_BT, batch.document),
            block_mask(own, shape, CPU, LENGTH),
        ):
            got = attend(q.index_select(2, columns_T), k, v, mask)
            torch.testing.assert_close(got * used_BT1, expected[:, columns_T] * used_BT1)
