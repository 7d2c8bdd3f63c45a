"""Attention masks against the rule spelled out token by token."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from symbiotic_titan.model.masks import (
    build_block_mask,
    build_dense_mask,
    dense_mask,
    patch_rule,
    sequence_rule,
)
from symbiotic_titan.sequence.modality import PADDING, VAE, VIT


def plain_mask(batch, vit_attention="bidirectional"):
    """The rule of design section 2, word by word, one pair at a time."""
    rows, length = batch.tokens.shape
    mask_BTT = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        document, span = batch.document[b].tolist(), batch.span[b].tolist()
        modality = batch.modality[b].tolist()
        for q in range(length):
            for k in range(length):
                if modality[q] == PADDING:
                    mask_BTT[b, q, k] = q == k
                    continue
                same_span = span[q] != -1 and span[q] == span[k]
                both_ways = same_span and not (modality[q] == VIT and vit_attention == "causal")
                in_order = k <= q or both_ways
                others_noise = modality[k] == VAE and not same_span
                mask_BTT[b, q, k] = document[q] == document[k] and in_order and not others_noise
    return mask_BTT


@pytest.mark.parametrize("vit_attention", ["bidirectional", "causal"])
def test_dense_mask_is_the_rule_pair_by_pair(mixed_batch, vit_attention):
    expected = plain_mask(mixed_batch, vit_attention)
    assert torch.equal(build_dense_mask(mixed_batch, vit_attention).squeeze(1), expected)


def test_causal_changes_how_images_to_be_understood_are_read_and_nothing_else(mixed_batch):
    changed = build_dense_mask(mixed_batch) & ~build_dense_mask(mixed_batch, "causal")
    rows, _, queries, keys = changed.nonzero().unbind(-1)
    assert len(rows) == 1 + 1 + 6 and (keys > queries).all()  # images of 2, 2 and 4 tokens
    assert (mixed_batch.modality[rows, queries] == VIT).all()


@pytest.mark.parametrize("vit_attention", ["bidirectional", "causal"])
def test_flex_mask_materialised_is_the_dense_mask(mixed_batch, vit_attention):
    rows, length = mixed_batch.tokens.shape
    rule = sequence_rule(mixed_batch, vit_attention)
    flex = create_mask(rule, rows, None, length, length, device="cpu")
    dense = build_dense_mask(mixed_batch, vit_attention)
    for b in range(rows):
        for q in range(length):
            assert torch.equal(flex[b, 0, q], dense[b, 0, q]), f"row {b}, query {q}"


@pytest.mark.parametrize("vit_attention", ["bidirectional", "causal"])
def test_block_mask_keeps_every_block_that_holds_a_visible_pair(pack, args, vit_attention):
    documents = [[("text", 100), ("vit", 2, 2), ("text", 90)], [("text", 60), ("vae", 3, 4)]]
    documents += [[("text", 300)]]
    batch = pack(documents, args, length=640)
    dense = build_dense_mask(batch, vit_attention)[0, 0]
    blocks = build_block_mask(batch, vit_attention)
    size = blocks.BLOCK_SIZE[0]
    visible = dense.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), visible)
    assert not visible.all()  # documents that cannot see each other leave blocks out


def test_every_query_sees_itself_so_no_softmax_is_empty(mixed_batch):
    assert build_dense_mask(mixed_batch).diagonal(dim1=-2, dim2=-1).all()


def test_patch_mask_joins_the_patches_of_one_image_only():
    image_BP = torch.tensor([[0, 0, 2, 2, -1, -1], [-1, -1, -1, -1, -1, -1]])
    mask = dense_mask(patch_rule(image_BP), image_BP.shape, image_BP.device)[:, 0]
    first = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2), torch.eye(2)).bool()
    assert torch.equal(mask[0], first)
    assert torch.equal(mask[1], torch.eye(6).bool())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("vit_attention", ["bidirectional", "causal"])
def test_flex_and_sdpa_give_the_same_model_output(
    mixed_batch, vit_attention, make_args, make_model, forward
):
    model = make_model(make_args(vit_attention=vit_attention))
    with torch.no_grad():
        expected = forward(model, mixed_batch)
        model.args.attention_backend = "flex"
        got = forward(model, mixed_batch)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.velocity, expected.velocity, atol=1e-4, rtol=1e-4)


def test_flex_without_a_gpu_refuses_to_train(mixed_batch, make_args, make_model, forward):
    model = make_model(make_args(attention_backend="flex"))
    with pytest.raises(AssertionError, match="no backward on CPU"):
        forward(model, mixed_batch)


@pytest.mark.gpu
def test_compiled_flex_trains_like_sdpa_on_a_gpu(mixed_batch, make_args, make_model, forward):
    gradients = {}
    for backend in ("sdpa", "flex"):
        model = make_model(make_args(attention_backend=backend)).cuda()
        output = forward(model, mixed_batch.to("cuda"))
        used = mixed_batch.document.cuda() >= 0
        (output.logits[used].square().mean() + output.velocity.square().mean()).backward()
        gradients[backend] = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in gradients["sdpa"].items():
        torch.testing.assert_close(gradients["flex"][name], expected, atol=1e-3, rtol=1e-2)
