"""Attention masks against the rule spelled out token by token."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from symbiotic_titan.model.layers import attend
from symbiotic_titan.model.masks import (
    build_block_mask,
    build_dense_mask,
    dense_mask,
    patch_rule,
    query_rule,
    segment_mask,
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
    used = mixed_batch.document >= 0
    torch.testing.assert_close(got.logits[used], expected.logits[used], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.velocity, expected.velocity, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vit_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("gap", [slice(0), slice(3, 6)])
def test_attention_by_segments_equals_the_dense_mask(mixed_batch, vit_attention, gap):
    """Outputs and all gradients, also with padding inside a document, as a generator has it between a prompt and its image."""
    document_BT = mixed_batch.document.clone()
    document_BT[:, gap] = -1
    mixed_batch = replace(mixed_batch, document=document_BT)
    rows, length = document_BT.shape
    rule = sequence_rule(mixed_batch, vit_attention)
    used_B1T1 = (document_BT >= 0)[:, None, :, None]
    torch.manual_seed(0)
    shapes = [(rows, heads, length, 8) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight_BTS = torch.randn(rows, length, 32) * used_B1T1[:, 0]
    results = {}
    for name, mask in {
        "dense": dense_mask(rule, document_BT.shape, document_BT.device),
        "segments": (by_segments := segment_mask(rule, document_BT, document_BT)),
    }.items():
        output_BTS = attend(*tensors, mask)
        gradients = torch.autograd.grad((output_BTS * weight_BTS).sum(), tensors)
        results[name] = (output_BTS * used_B1T1[:, 0], *gradients)
    assert not used_B1T1.all() and output_BTS.isfinite().all()
    assert {s.causal for row in by_segments.rows for s in row} == {False, vit_attention == "causal"}
    for got, expected in zip(results["segments"], results["dense"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_unused_patches_and_image_tokens_have_segments_of_their_own():
    """Cross attention of image tokens to patches: two images, unused tokens and patches at the end and in between."""
    token_image_BI = torch.tensor([[0, 0, 3, 3, 3, -1], [-1] * 6])
    patch_image_BP = torch.tensor([[0, 0, 0, -1, 3, 3, -1], [-1] * 7])
    rule = query_rule(token_image_BI, patch_image_BP)
    mask = segment_mask(rule, token_image_BI, patch_image_BP)
    sizes = [[(s.num_queries, s.num_keys) for s in row] for row in mask.rows]
    assert sizes == [[(2, 3), (0, 1), (3, 2), (1, 0), (0, 1)], [(6, 0), (0, 7)]]
    assert all(segment.visible is None for row in mask.rows for segment in row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_document_do_not_depend_on_its_neighbours(pack, args, dtype):
    """Output and gradients of one document alone in a sequence, and among others in another."""
    document = [("text", 29), ("vit", 2, 2), ("text", 7), ("vae", 2, 2)]
    others = [[("text", 14)], [("text", 33), ("vae", 2, 3)]]
    results = []
    for documents, number in (([document], 0), ([*others, document, [("text", 5)]], 2)):
        batch = pack(documents, args, length=160)
        own_T = batch.document[0] == number
        torch.manual_seed(0)
        own = [torch.randn(1, heads, int(own_T.sum()), 16, dtype=dtype) for heads in (4, 2, 2)]
        tensors = [torch.randn(1, heads, 160, 16, dtype=dtype) for heads in (4, 2, 2)]
        for whole, part in zip(tensors, own, strict=True):
            whole[:, :, own_T] = part
            whole.requires_grad_()
        mask = segment_mask(sequence_rule(batch), batch.document, batch.document)
        output_BTS = attend(*tensors, mask)
        gradients = torch.autograd.grad(output_BTS[:, own_T].square().sum(), tensors)
        results.append([output_BTS[:, own_T], *(g[:, :, own_T] for g in gradients)])
    for alone, among in zip(*results, strict=True):
        assert torch.equal(alone, among)


def test_flex_without_a_gpu_refuses_to_train(mixed_batch, make_args, make_model, forward):
    model = make_model(make_args(attention_backend="flex"))
    with pytest.raises(AssertionError, match="no backward on CPU"):
        forward(model, mixed_batch)


@pytest.mark.gpu
def test_compiled_flex_trains_like_sdpa_on_a_gpu(mixed_batch, make_args, make_model, forward):
    gradients, vit = {}, replace(make_args().vit, dim=32)  # Flex needs heads of 16 channels
    for backend in ("sdpa", "flex"):
        model = make_model(make_args(attention_backend=backend, vit=vit)).cuda()
        output = forward(model, mixed_batch.to("cuda"))
        used = mixed_batch.document.cuda() >= 0
        (output.logits[used].square().mean() + output.velocity.square().mean()).backward()
        gradients[backend] = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in gradients["sdpa"].items():
        torch.testing.assert_close(gradients["flex"][name], expected, atol=1e-3, rtol=1e-2)
