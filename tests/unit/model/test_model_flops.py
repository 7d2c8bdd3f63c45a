from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.flops import model_cost, visible_pairs
from symbiotic_titan.model.masks import build_dense_mask, dense_mask, patch_rule, query_rule
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT


def cost(args, seq_len=64, **options):
    with torch.device("meta"):
        return model_cost(SymbioticModel(args), args, seq_len, **options)


def test_active_parameters_counted_by_hand(make_args):
    groups = (ExpertGroup("understanding", (TEXT, VIT), 6), ExpertGroup("generation", (VAE,), 2))
    args = make_args(groups=groups)
    got = cost(args)
    expert = 3 * 32 * 24
    attention = 32 * 64 * 2 + 32 * 32 * 2 + 2 * 16
    trunk = 2 * attention + 5 * 32 + 3 * 32 * 48 + expert  # norms, dense layer, shared expert
    text = trunk + 2 * expert + 6 * 32 + 2 * 272 * 32
    latent_in = 12 * 32 + 32 + 16 * 32 + 32 + 32 * 32 + 32
    latent_out = 32 + 32 * 64 + 64 + 32 * 12 + 12
    assert got.active[TEXT] == text
    assert got.active[VAE] == trunk + 2 * expert + 2 * 32 + latent_in + latent_out


def test_a_token_pays_for_the_width_and_top_k_of_its_group(make_args):
    groups = (
        ExpertGroup("understanding", (TEXT, VIT), 6, top_k=3),
        ExpertGroup("generation", (VAE,), 2, hidden_dim=8, top_k=1),
    )
    equal = (ExpertGroup("understanding", (TEXT, VIT), 6), ExpertGroup("generation", (VAE,), 2))
    found, before = cost(make_args(groups=groups)), cost(make_args(groups=equal))
    wide, narrow = 3 * 32 * 24, 3 * 32 * 8
    more = {TEXT: wide, VIT: wide, VAE: narrow - 2 * wide}
    for modality, parameters in more.items():
        assert found.active[modality] - before.active[modality] == parameters
        assert found.forward_flops[modality] - before.forward_flops[modality] == 2 * parameters
    assert found.parameters - before.parameters == 2 * (narrow - wide)


def test_a_vit_token_pays_for_all_its_patches(make_args):
    """One block more in the encoder, without what patches cost that see each other."""
    one, two = (make_args(vit=replace(make_args().vit, num_layers=n)) for n in (1, 2))
    block = 3 * 16 * 16 + 3 * 16 + 16 * 16 + 16 + 2 * 16 * 24 + 16 + 24 + 4 * 16
    difference = (
        cost(two, image_patches=0).forward_flops[VIT]
        - cost(one, image_patches=0).forward_flops[VIT]
    )
    assert difference == 2 * block * 4


def test_deepstack_mergers_run_once_per_token_and_a_table_of_positions_is_no_product(
    make_args, deep
):
    vit = replace(deep.vit, position_grid=0, deepstack=())
    plain, full = cost(make_args(vit=vit)), cost(deep)
    joined, table = 16 * 4, 25 * 16
    merger = 2 * joined + joined * joined + joined + joined * 32 + 32
    assert full.active[VIT] - plain.active[VIT] == 2 * merger + table
    assert full.forward_flops[VIT] - plain.forward_flops[VIT] == 2 * 2 * merger
    assert full.forward_flops[TEXT] == plain.forward_flops[TEXT]


def test_attention_grows_with_the_row_and_encoder_with_the_image(make_args):
    args = make_args()
    short, long = cost(args, 64), cost(args, 128)
    per_key = 4 * 2 * 4 * 16  # layers, heads, channels
    assert [b - a for a, b in zip(short.forward_flops, long.forward_flops, strict=True)] == [
        per_key * 64
    ] * 3
    small, large = cost(args, image_patches=16), cost(args, image_patches=32)
    assert large.forward_flops[VIT] - small.forward_flops[VIT] == 4 * 16 * 16 * 4
    assert large.forward_flops[TEXT] == small.forward_flops[TEXT]


def test_training_flops_are_three_forwards_weighted_by_the_tokens(make_args):
    got = cost(make_args())
    assert got.training_flops_per_token((1.0, 0.0, 0.0)) == 3 * got.forward_flops[TEXT]
    assert got.training_flops_per_token() == pytest.approx(sum(got.forward_flops), abs=1)


@pytest.mark.parametrize("vit_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("has_delimiters", [False, True])
def test_visible_pairs_are_those_of_the_masks(mixed_batch, vit_attention, has_delimiters):
    if has_delimiters:  # routed as an input image's tokens are, outside of every image
        is_text = (mixed_batch.modality == TEXT) & (mixed_batch.document >= 0)
        modality = mixed_batch.modality.masked_fill(is_text, VIT)
        mixed_batch = replace(mixed_batch, modality=modality)
    decoder, encoder, queries = visible_pairs(mixed_batch, vit_attention).tolist()
    is_used = mixed_batch.document >= 0
    dense = build_dense_mask(mixed_batch, vit_attention).squeeze(1)
    assert decoder == dense[is_used].sum() > 0
    patch_image = mixed_batch.vit_image
    of_patches = dense_mask(patch_rule(patch_image), patch_image.shape, patch_image.device)
    assert encoder == of_patches.squeeze(1)[patch_image >= 0].sum() > 0
    token_image = torch.cat([mixed_batch.span, torch.full((2, 1), -1)], dim=1)
    token_image = token_image.gather(1, mixed_batch.vit_index)
    rule = query_rule(token_image, patch_image)
    read = dense_mask(
        rule, token_image.shape, patch_image.device, num_keys=patch_image.shape[1]
    ).squeeze(1)
    assert queries == read[token_image >= 0].sum() > 0


def test_flops_by_pairs_are_those_of_whole_rows_where_all_pairs_are_seen(make_args):
    """Of a row of 64 tokens that all see each other, in which an image of 32 patches has 8 tokens."""
    got = cost(make_args(), 64, image_patches=32)
    tokens, labels = (40.0, 8.0, 16.0), 30.0
    full = got.training_flops_per_token(tokens, labels) * 64
    assert got.visible_training_flops(tokens, labels, (64**2, 32**2, 0)) == pytest.approx(full)
    less = got.visible_training_flops(tokens, labels, (64 * 65 / 2, 32**2, 0))
    assert full - less == pytest.approx(3 * 4 * 2 * 4 * 16 * 64 * 63 / 2)


def test_text_without_a_label_pays_for_no_logits(make_args):
    got = cost(make_args())
    head = 2 * 272 * 32
    assert got.training_flops_per_token((1.0, 0.0, 0.0), 1.0) == 3 * got.forward_flops[TEXT]
    assert got.training_flops_per_token((1.0, 0.0, 0.0), 0.0) == 3 * (
        got.forward_flops[TEXT] - head
    )
    everything = 300 * got.forward_flops[TEXT] + 500 * got.forward_flops[VAE]
    expected = 3 * (everything - 180 * head) / 800
    assert got.training_flops_per_token((300.0, 0.0, 500.0), 120.0) == round(expected)


def test_flops_agree_with_the_matrix_products_that_torch_counts(
    make_args, make_model, forward, pack
):
    """On a row full of text. torch does not count SDPA on CPU: that part is written out. Norms are not products."""
    args = make_args(num_dense_layers=2)
    model, batch = make_model(args), pack([[("text", 48)]], args)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(model, batch)
    counts = counter.get_flop_counts()
    products = sum(
        sum(counts[f"SymbioticModel.{part}"].values())
        for part in ("layers.0", "layers.1", "output")
    )
    attention = 2 * 2 * args.num_layers * args.num_heads * 48 * 48 * args.head_dim
    assert cost(args, 48).forward_flops[TEXT] * 48 == pytest.approx(products + attention, rel=0.01)


def test_tied_embeddings_pay_for_the_output_once_more(make_args):
    untied, tied = cost(make_args()), cost(make_args(tie_embeddings=True))
    assert untied.parameters - tied.parameters == 272 * 32
    assert untied.forward_flops == tied.forward_flops


@pytest.mark.parametrize(
    ("flavor", "total", "active"),
    [
        ("debug", (0.5e6, 3e6), (0.2e6, 1e6)),
        ("mini", (20e6, 40e6), (4e6, 10e6)),
        ("1B-A0.3B", (0.9e9, 1.2e9), (0.25e9, 0.4e9)),
        ("30B-A3B", (29e9, 33e9), (3e9, 4e9)),
        ("Qwen3-VL-30B-A3B", (31e9, 31.2e9), (3e9, 4e9)),
        ("GLM-4.5V", (107e9, 108e9), (12e9, 13.5e9)),
        ("Hunyuan-A13B", (80e9, 81e9), (12.5e9, 13.5e9)),
        ("Aria", (25e9, 25.6e9), (3.5e9, 4.2e9)),
    ],
)
def test_flavors_have_the_size_their_name_says(flavor, total, active):
    args = FLAVORS[flavor]
    with torch.device("meta"):
        model = SymbioticModel(args)
    got = model_cost(model, args, 4096)
    assert total[0] <= got.parameters <= total[1]
    assert active[0] <= got.active[TEXT] <= active[1]
    assert args.get_nparams_and_flops(model, 4096) == (
        got.parameters,
        got.training_flops_per_token(),
    )
