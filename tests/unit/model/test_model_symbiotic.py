"""Who influences whom, through the whole model."""

from dataclasses import replace

import pytest
import torch

from symbiotic_titan.model.symbiotic import add_tokens, read_tokens, write_tokens
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import PADDING

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
MIXED = [
    [("text", 3), ("vit", 1, 2), ("text", 4)],
    [("text", 4), ("vae", 2, 2), ("text", 3)],
    [("text", 2), ("vit", 2, 1), ("text", 1), ("vae", 1, 3), ("text", 2)],
]


@pytest.fixture
def model(args, make_model):
    return make_model(args)


def changed(output, other):
    """Positions whose logits differ, per row. An expert's matmul may round a token differently when other tokens join it."""
    differs_BT = (output.logits - other.logits).abs().amax(-1) > 1e-5
    return [row.nonzero().flatten().tolist() for row in differs_BT]


def test_a_document_reads_the_same_alone_and_packed(model, args, pack, forward):
    packed_batch = pack(MIXED, args)
    packed = forward(model, packed_batch, timestep=0.4)
    start = vae_start = 0
    for number, document in enumerate(MIXED):
        batch = pack([document], args, seed=number)
        alone = forward(model, batch, timestep=0.4)
        end, vae_end = start + (batch.document == 0).sum(), vae_start + (batch.vae_image >= 0).sum()
        torch.testing.assert_close(
            alone.logits[:, : end - start], packed.logits[:, start:end], **CLOSE
        )
        torch.testing.assert_close(
            alone.velocity[:, : vae_end - vae_start], packed.velocity[:, vae_start:vae_end], **CLOSE
        )
        start, vae_start = end, vae_end
    assert start == (packed_batch.document >= 0).sum() and vae_start == 7


@pytest.mark.parametrize("kind", ["plain", "deep", "queries"])
def test_one_sequence_without_unused_image_tokens_is_the_whole_batch(
    mixed_batch, pack, args, deep, query_args, make_model, kind
):
    """What a CPU computes against static shapes and dense masks: losses' inputs, records and the gradient of every parameter; also
    for a batch without images."""
    model = make_model({"plain": args, "deep": deep, "queries": query_args}[kind])
    no_images = stack_rows([pack([[("text", 9)]], args), pack([[("text", 20)]], args)])
    queried = pack([[("text", 3), ("vit", 4, 4), ("vae", 2, 2)], [("vit", 2, 2)]], query_args)
    images = stack_rows([queried, pack([[("text", 9)]], query_args)])
    for batch in (images if kind == "queries" else mixed_batch, no_images):
        used_BT, index_N = batch.document >= 0, torch.tensor([0, 3, 8, 52, 50, 2])
        timesteps_BL = torch.linspace(0.1, 0.9, batch.vae_image.numel()).view(batch.vae_image.shape)
        results = []
        for model.static_shapes in (False, True):
            inputs = (batch, batch.latents, timesteps_BL, torch.tensor(1.0))
            output, chosen = model(*inputs), model(*inputs, logit_index_N=index_N)
            loss = output.logits[used_BT].square().mean() + output.velocity.square().sum()
            loss += sum(share.square().sum() for r in output.records for share in r.prob_sum)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            counts = [r.counts for r in output.records]
            shapes = (output.logits.shape, output.velocity.shape, chosen.logits.shape)
            logits = (output.logits[used_BT], chosen.logits)
            results.append((shapes, [*logits, output.velocity, *counts, *gradients]))
        (shapes, got), (expected_shapes, expected) = results
        assert shapes == expected_shapes == ((2, 48, 272), batch.latents.shape, (6, 272))
        for some, others in zip(got, expected, strict=True):
            torch.testing.assert_close(some, others, atol=2e-5, rtol=1e-4)


def test_text_is_causal(model, args, pack, forward):
    batch = pack([[("text", 12)]], args)
    tokens = batch.tokens.clone()
    tokens[0, 5] = (tokens[0, 5] + 1) % 256
    changes = changed(forward(model, batch), forward(model, replace(batch, tokens=tokens)))
    assert changes == [list(range(5, 12))]


def test_a_noised_image_is_seen_by_itself_and_by_no_later_text(model, args, pack, forward):
    batch = pack([[("text", 4), ("vae", 2, 2), ("text", 5)]], args)
    latents = batch.latents.clone()
    latents[0, 3] += 1.0  # its last token
    before, after = forward(model, batch), forward(model, replace(batch, latents=latents))
    assert changed(before, after) == [[4, 5, 6, 7]]
    moved = (before.velocity != after.velocity).any(-1)
    assert moved[0].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_an_understood_image_is_seen_by_itself_and_all_later_text(model, args, pack, forward):
    batch = pack([[("text", 3), ("vit", 2, 2), ("text", 4)], [("text", 5)]], args)
    patches = batch.vit_patches.clone()
    patches[0, 4 * 3] += 1.0  # a patch of its last token
    changes = changed(forward(model, batch), forward(model, replace(batch, vit_patches=patches)))
    assert changes == [list(range(3, 11))]


def test_image_tokens_see_later_tokens_of_the_same_image_but_text_before_it_does_not(
    model, args, pack, forward
):
    batch = pack([[("text", 3), ("vae", 1, 3)]], args)
    latents = batch.latents.clone()
    latents[0, 2] += 1.0
    changes = changed(forward(model, batch), forward(model, replace(batch, latents=latents)))
    assert changes == [[3, 4, 5]]


def test_images_of_one_row_do_not_mix_in_the_encoder(model, args, pack, forward):
    batch = pack([[("vit", 1, 2), ("text", 3)], [("vit", 2, 1), ("text", 3)]], args)
    patches = batch.vit_patches.clone()
    patches[0, 0] += 1.0
    changes = changed(forward(model, batch), forward(model, replace(batch, vit_patches=patches)))
    assert changes == [list(range(5))]


def test_padding_has_no_influence(model, args, pack, forward):
    batch = pack(MIXED, args)
    used = int((batch.document >= 0).sum())
    tokens, patches, latents = (x.clone() for x in (batch.tokens, batch.vit_patches, batch.latents))
    tokens[:, used:] = 7
    patches[batch.vit_image < 0] = 3.0
    latents[batch.vae_image < 0] = 3.0
    before = forward(model, batch)
    after = forward(model, replace(batch, tokens=tokens, vit_patches=patches, latents=latents))
    assert torch.equal(before.logits[:, :used], after.logits[:, :used])
    assert torch.equal(before.velocity, after.velocity)
    assert torch.equal(before.records[0].counts, after.records[0].counts)


def test_unused_latent_tokens_have_zero_velocity(model, args, pack, forward):
    batch = pack(MIXED, args)
    velocity = forward(model, batch).velocity
    assert velocity[batch.vae_image >= 0].ne(0).any(-1).all()
    assert velocity[batch.vae_image < 0].eq(0).all()


def test_rows_do_not_influence_each_other(model, args, pack, forward):
    rows = [pack(MIXED, args), pack([[("text", 9)]], args, seed=5)]
    both = forward(model, stack_rows(rows))
    for i, row in enumerate(rows):
        torch.testing.assert_close(both.logits[i : i + 1], forward(model, row).logits, **CLOSE)


def test_a_timestep_moves_its_own_image_only(model, args, pack):
    batch = pack([[("text", 2), ("vae", 1, 2)], [("text", 2), ("vae", 1, 2)]], args)
    times = torch.full(batch.vae_image.shape, 0.5)
    other = times.clone()
    other[0, :2] = 0.6
    scale = torch.tensor(1.0)
    a, b = (model(batch, batch.latents, t, scale).velocity for t in (times, other))
    assert (a != b).any(-1)[0].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("grid", [True, False])
def test_latent_tokens_know_their_place(grid, model, args, pack, forward):
    """Two tokens of equal content give different velocities because of their coordinates (and rotary positions)."""
    batch = pack([[("text", 2), ("vae", 1, 2)]], args)
    latents = batch.latents.clone()
    latents[0, 1] = latents[0, 0]
    positions = batch.positions if grid else torch.zeros_like(batch.positions)
    batch = replace(batch, latents=latents, positions=positions)
    times = torch.full(batch.vae_image.shape, 0.5)
    velocity = model(batch, latents, times, torch.tensor(1.0)).velocity
    assert not torch.allclose(velocity[0, 0], velocity[0, 1])


def test_one_record_per_moe_layer_counts_top_k_of_every_token(
    make_args, make_model, forward, mixed_batch
):
    args = make_args(num_layers=3, num_dense_layers=1)
    records = forward(make_model(args), mixed_batch).records
    assert len(records) == 2
    tokens = mixed_batch.num_tokens()
    for record in records:
        assert torch.equal(record.counts.sum(-1), args.top_k * tokens)


def test_a_model_of_dense_layers_only_has_no_records(make_args, make_model, forward, mixed_batch):
    model = make_model(make_args(num_dense_layers=2))
    assert not any(block.moe_enabled for block in model.layers.values())
    assert forward(model, mixed_batch).records == ()


@pytest.mark.parametrize("args_name", ["args", "deep"])
@pytest.mark.parametrize("batch_name", ["mixed_batch", "text_batch"])
def test_every_parameter_gets_a_gradient_also_without_images(
    batch_name, args_name, make_model, forward, request
):
    model = make_model(request.getfixturevalue(args_name))
    output = forward(model, request.getfixturevalue(batch_name))
    loss = output.logits.square().mean() + output.velocity.square().sum()
    loss = loss + sum(p.sum() for record in output.records for p in record.prob_sum)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    images = [n for n in gradients if n.startswith(("vit.", "latent_embedding.", "flow_head."))]
    silent = [n for n in images if not gradients[n].any()]
    assert silent == (images if batch_name == "text_batch" else [])


def test_text_only_rows_give_finite_logits_and_no_velocity(model, forward, text_batch):
    output = forward(model, text_batch)
    assert output.logits.isfinite().all()
    assert not output.velocity.any()


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_low_precision_stays_near_float32(mode, model, args, make_model, forward, mixed_batch):
    used = mixed_batch.modality != PADDING
    with torch.no_grad():
        expected = forward(model, mixed_batch)
        if mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got = forward(model, mixed_batch)
        else:
            got = forward(make_model(args).bfloat16(), mixed_batch)
    assert got.logits.dtype == torch.bfloat16 and got.velocity.dtype == torch.float32
    # A rounding may send a token to another expert: compare the bulk, not the worst.
    error = (got.logits.float() - expected.logits)[used].abs().median()
    assert error < 0.03 * expected.logits[used].abs().median()


def test_two_forwards_are_bitwise_equal(model, forward, mixed_batch):
    assert torch.equal(forward(model, mixed_batch).logits, forward(model, mixed_batch).logits)


def test_tied_embeddings_are_one_parameter_after_initialisation(make_args, make_model):
    model = make_model(make_args(tie_embeddings=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())


@torch.no_grad()
def test_deepstack_features_reach_the_tokens_of_their_image_after_their_layer(
    deep, make_model, forward, pack
):
    """Their mergers moved: the first layer's input and other tokens' output of it do not change."""
    model, batch = make_model(deep), pack([[("text", 3), ("vit", 1, 2), ("text", 4)]], deep)
    seen = []
    for block in model.layers.values():
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    expected = forward(model, batch)
    model.vit.deepstack_mergers["0"].w2.bias += 1.0
    assert changed(expected, forward(model, batch)) == [list(range(3, 9))]
    model.vit.deepstack_mergers["1"].w2.bias += 1.0
    forward(model, batch)
    first, after_first, *moved = seen
    assert torch.equal(moved[0], first)
    difference = moved[1] - after_first
    torch.testing.assert_close(difference[0, 3:5], torch.ones(2, deep.dim), atol=1e-5, rtol=0)
    assert not difference[0, :3].any() and not difference[0, 5:].any()
    assert torch.equal(moved[3], moved[1])  # the second feature is added after the second layer


def test_added_tokens_land_at_their_positions_and_nowhere_else():
    h, tokens = torch.randn(1, 4, 3), torch.randn(1, 2, 3)
    added = add_tokens(h, torch.tensor([[2, 4]]), tokens)
    assert torch.equal(added[0, 2], h[0, 2] + tokens[0, 0])
    assert torch.equal(added[0, [0, 1, 3]], h[0, [0, 1, 3]])


def test_written_tokens_land_at_their_positions_and_nowhere_else():
    h = torch.zeros(2, 5, 3)
    tokens = torch.arange(1.0, 19.0).view(2, 3, 3).requires_grad_()
    index = torch.tensor([[4, 0, 5], [5, 5, 5]])
    written = write_tokens(h, index, tokens)
    assert torch.equal(written[0, 4], tokens[0, 0]) and torch.equal(written[0, 0], tokens[0, 1])
    assert not written[0, 1:4].any() and not written[1].any()
    written.sum().backward()
    assert tokens.grad.any(-1).tolist() == [[True, True, False], [False, False, False]]
    assert torch.equal(read_tokens(written, index)[0, 0], tokens[0, 0])
    assert not read_tokens(written, index)[1].any()
