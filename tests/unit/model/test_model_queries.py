"""Learned queries that read images: each against itself written out, and alone against packed."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask
from torch.utils.flop_counter import FlopCounterMode

from symbiotic_titan.model.flops import model_cost
from symbiotic_titan.model.masks import dense_mask, query_rule
from symbiotic_titan.model.symbiotic import SymbioticModel, index_within_image
from symbiotic_titan.model.vit import (
    QueryIndices,
    QueryProjector,
)
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import VIT

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
# Of 3, 5 and 3 queries.
DOCUMENTS = [
    [("text", 3), ("vit", 2, 2), ("text", 4)],
    [("text", 2), ("vit", 3, 4), ("text", 2), ("vae", 2, 2), ("text", 3)],
]
OTHER = [[("vit", 1, 2), ("text", 2), ("vit", 2, 1), ("text", 1)], [("text", 7)]]


@pytest.fixture
def model(query_args, make_model):
    return make_model(query_args)


@pytest.fixture
def batch(query_args, pack):
    return stack_rows([pack(DOCUMENTS, query_args), pack(OTHER, query_args, seed=7)])


def plain_projector(projector, x_PS, number):
    """``number`` queries read one image, with torch's own attention over what the first layers make of both."""
    heads = x_PS.shape[-1] // projector.head_dim
    attention = nn.MultiheadAttention(x_PS.shape[-1], heads, batch_first=True)
    inner = [part[1] for part in (projector.wq, projector.wk, projector.wv)]
    attention.load_state_dict(
        {
            "in_proj_weight": torch.cat([layer.weight for layer in inner]),
            "in_proj_bias": torch.cat([layer.bias for layer in inner]),
            "out_proj.weight": projector.wo[0].weight,
            "out_proj.bias": projector.wo[0].bias,
        }
    )
    queries_IS = projector.wq[0](projector.query_norm(projector.queries.weight[:number]))
    normed_PS = projector.patch_norm(x_PS)
    keys_PS, values_PS = projector.wk[0](normed_PS), projector.wv[0](normed_PS)
    read_IS = attention(queries_IS[None], keys_PS[None], values_PS[None])[0][0]
    hidden = projector.w1(projector.last_norm(projector.wo[1](read_IS)))
    return projector.w2(nn.GELU("tanh")(hidden))


@torch.no_grad()
def test_projector_equals_each_image_by_itself_with_torch_s_attention(query_args):
    vit = query_args.vit
    projector = QueryProjector(vit, query_args.dim)
    for parameter in projector.parameters():
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    x_BPS = torch.randn(1, 18, vit.dim, generator=torch.Generator().manual_seed(0))
    patch_image_BP = torch.tensor([[4] * 12 + [6] * 4 + [-1] * 2])
    token_image_BI = torch.tensor([[4] * 5 + [6] * 3 + [-1]])
    mask = dense_mask(
        query_rule(token_image_BI, patch_image_BP), token_image_BI.shape, x_BPS.device, num_keys=18
    )
    found = projector(x_BPS, QueryIndices(index_within_image(token_image_BI), mask))[0]
    torch.testing.assert_close(found[:5], plain_projector(projector, x_BPS[0, :12], 5), **CLOSE)
    torch.testing.assert_close(found[5:8], plain_projector(projector, x_BPS[0, 12:16], 3), **CLOSE)
    assert found.isfinite().all()


def test_indices_start_again_with_every_image():
    images = [[4, 4, 4, 2, 2, 7, -1, -1], [3, 3, 3, 3, 3, 3, 3, 3], [-1] * 8]
    indices = [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8)), list(range(8))]
    assert index_within_image(torch.tensor(images)).tolist() == indices
    assert index_within_image(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_a_token_sees_the_patches_of_its_image_and_an_unused_one_one_patch():
    token_image_BI = torch.tensor([[0, 0, 3, -1], [-1, -1, -1, -1]])
    patch_image_BP = torch.tensor([[0, 0, 0, 3, -1], [-1, -1, -1, -1, -1]])
    rule = query_rule(token_image_BI, patch_image_BP)
    mask = dense_mask(rule, token_image_BI.shape, token_image_BI.device, num_keys=5)
    first = [1, 0, 0, 0, 0]
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], first]
    assert mask[1, 0].int().tolist() == [first] * 4
    flex = create_mask(rule, 2, None, 4, 5, device="cpu")
    assert torch.equal(flex, mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_and_sdpa_give_the_same_model_output(model, batch, forward):
    used_BT = batch.document >= 0
    with torch.no_grad():
        expected = forward(model, batch).logits[used_BT]
        model.args.attention_backend = "flex"
        found = forward(model, batch).logits[used_BT]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_compiled_flex_trains_like_sdpa_on_a_gpu(query_args, batch, make_model, forward):
    gradients, vit = {}, replace(query_args.vit, dim=32)  # Flex needs heads of 16 channels
    for backend in ("sdpa", "flex"):
        model = make_model(replace(query_args, attention_backend=backend, vit=vit)).cuda()
        used_BT = batch.document.cuda() >= 0
        forward(model, batch.to("cuda")).logits[used_BT].square().mean().backward()
        gradients[backend] = {name: p.grad for name, p in model.vit.named_parameters()}
    for name, expected in gradients["sdpa"].items():
        torch.testing.assert_close(gradients["flex"][name], expected, atol=1e-3, rtol=1e-2)


def test_a_document_reads_the_same_alone_and_packed(model, query_args, pack, forward):
    packed = forward(model, pack(DOCUMENTS, query_args), timestep=0.4)
    start = 0
    for number, document in enumerate(DOCUMENTS):
        batch = pack([document], query_args, seed=number)
        length = int((batch.document == 0).sum())
        alone = forward(model, batch, timestep=0.4)
        torch.testing.assert_close(
            alone.logits[:, :length], packed.logits[:, start : start + length], **CLOSE
        )
        start += length


def test_every_patch_is_read_by_all_tokens_of_its_image_and_by_no_other(model, batch, forward):
    before = forward(model, batch).logits
    for patch, first in ((3, 3), (4, 12)):  # of the first and of the second image
        patches = batch.vit_patches.clone()
        patches[0, patch] += 1.0
        after = forward(model, replace(batch, vit_patches=patches)).logits
        moved = ((after - before).abs().amax(-1) > 1e-5)[0].nonzero().flatten().tolist()
        document = batch.document[0, first]
        end = int((batch.document[0] <= document).sum()) - int((batch.document[0] < 0).sum())
        assert moved == list(range(first, end))


def test_padding_has_no_influence_and_gradients_are_finite(model, batch, forward):
    patches = batch.vit_patches.clone()
    patches[batch.vit_image < 0] = 3.0
    before, after = forward(model, batch), forward(model, replace(batch, vit_patches=patches))
    used_BT = batch.document >= 0
    assert torch.equal(before.logits[used_BT], after.logits[used_BT])
    before.logits[used_BT].square().mean().backward()
    gradients = dict(model.vit.merger.named_parameters())
    assert all(p.grad.isfinite().all() and p.grad.any() for p in gradients.values())


def test_rows_without_images_give_the_encoder_zero_gradients(model, query_args, pack, forward):
    batch = pack([[("text", 20)], [("text", 9)]], query_args)
    out = forward(model, batch)
    out.logits.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.vit.parameters())


@pytest.mark.parametrize("number", [0, 1])
def test_the_cost_of_an_image_is_that_of_the_products_that_torch_counts(query_args, number):
    """Of a full square of either size. torch does not count SDPA on CPU: that part is written out."""
    sizes = {"queries": (40, 60), "query_sides": (6, 12)}
    vit = replace(query_args.vit, dim=128, hidden_dim=256, num_layers=1, **sizes)
    args = replace(query_args, vit=vit)
    queries, side = vit.queries[number], vit.query_sides[number]
    patches = side**2
    model = SymbioticModel(args)
    coords_1PA = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
    indices = QueryIndices(
        torch.arange(queries)[None], torch.ones(1, 1, queries, patches, dtype=torch.bool)
    )
    whole = torch.ones(1, 1, patches, patches, dtype=torch.bool)
    values_1PQ = torch.zeros(1, patches, args.geometry.vit_patch_values)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.vit(values_1PQ, coords_1PA, torch.full_like(coords_1PA, side), whole, indices)
    attention = 4 * vit.dim * patches * (vit.num_layers * patches + queries)
    encoder = nn.ModuleDict({"vit": model.vit})
    decoder_attention = 4 * args.num_layers * args.num_heads * args.head_dim * 48
    asked = model_cost(encoder, args, 48, image_patches=patches).forward_flops[VIT]
    found = queries * (asked - decoder_attention)
    assert found == pytest.approx(counter.get_total_flops() + attention, rel=0.015)
    assert 4 * vit.dim * patches * queries > 0.02 * found  # what the queries read would be missed
    if number:  # the largest is what is counted where nothing is said
        assert model_cost(encoder, args, 48).forward_flops[VIT] == asked
