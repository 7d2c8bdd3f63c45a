"""The ways in and out for images, each against itself written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.latents import (
    FlowHead,
    LatentEmbedding,
    grid_positions,
    sinusoids,
)
from symbiotic_titan.model.masks import dense_mask, patch_rule
from symbiotic_titan.model.vit import VisionTransformer, grid_sizes, patch_rotary, table_entries


def random_module(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def plain_normed(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        + norm.bias
    )


def plain_turned(x_PS, coords, theta):
    """One head: the first half of its pairs of channels turned by the patch's row, the second half by its column."""
    out = x_PS.clone()
    num = x_PS.shape[-1] // 4
    for p, place in enumerate(coords.tolist()):
        for i in range(2 * num):
            angle = place[i // num] * theta ** (-(i % num) / num)
            turned = complex(x_PS[p, i], x_PS[p, i + 2 * num]) * complex(
                math.cos(angle), math.sin(angle)
            )
            out[p, i], out[p, i + 2 * num] = turned.real, turned.imag
    return out


def plain_encoder(vit, args, patches_PQ, coords):
    """One image by itself: no mask, head by head."""
    x_PS = patches_PQ @ vit.patch_embedding.weight.T + vit.patch_embedding.bias
    for block in vit.layers.values():
        qkv = plain_normed(x_PS, block.attention_norm) @ block.wqkv.weight.T + block.wqkv.bias
        heads = []
        for q, k, v in zip(
            *(part.split(args.vit.head_dim, -1) for part in qkv.chunk(3, -1)), strict=True
        ):
            q, k = (plain_turned(a, coords, args.vit.rope_theta) for a in (q, k))
            heads.append((q @ k.T / args.vit.head_dim**0.5).softmax(-1) @ v)
        x_PS = x_PS + torch.cat(heads, -1) @ block.wo.weight.T + block.wo.bias
        hidden = plain_normed(x_PS, block.ffn_norm) @ block.w1.weight.T + block.w1.bias
        x_PS = x_PS + nn.GELU("tanh")(hidden) @ block.w2.weight.T + block.w2.bias
    merger, window = vit.merger, args.vit.merge**2
    normed = plain_normed(x_PS, merger.norm)
    joined = torch.stack(
        [torch.cat(list(normed[i : i + window])) for i in range(0, len(normed), window)]
    )
    return (
        nn.GELU()(joined @ merger.w1.weight.T + merger.w1.bias) @ merger.w2.weight.T
        + merger.w2.bias
    )


@torch.no_grad()
def test_encoder_equals_each_image_by_itself_written_out(args, pack):
    vit = random_module(VisionTransformer(args))
    batch = pack([[("vit", 2, 2), ("text", 3), ("vit", 1, 3)]], args)
    mask = dense_mask(patch_rule(batch.vit_image), batch.vit_image.shape, torch.device("cpu"))
    sizes = grid_sizes(batch.vit_coords, batch.vit_image)
    got = vit(batch.vit_patches, batch.vit_coords, sizes, mask).tokens
    window = args.vit.merge**2
    for image, tokens in ((0, slice(0, 4)), (1, slice(4, 7))):
        patches = slice(tokens.start * window, tokens.stop * window)
        assert (batch.vit_image[0, patches] == image).all()
        expected = plain_encoder(
            vit, args, batch.vit_patches[0, patches], batch.vit_coords[0, patches]
        )
        torch.testing.assert_close(got[0, tokens], expected, atol=1e-4, rtol=1e-4)


def test_rows_and_columns_turn_different_channels():
    coords = torch.tensor([[[0, 0], [3, 0], [0, 3]]])
    cos = patch_rotary(coords, 16, 10_000.0).cos[0]
    assert (cos[0] == 1).all()
    assert (cos[1, :4] != 1).all() and (cos[1, 4:] == 1).all()
    assert (cos[2, :4] == 1).all() and (cos[2, 4:] != 1).all()


def test_grid_sizes_are_those_of_each_patch_s_image():
    """Of equal images side by side as well, whatever their numbers, and with or without unused patches after them."""
    grids = [(4, 6), (6, 2), (6, 2), (2, 2)]
    coords = [torch.cartesian_prod(*map(torch.arange, size)) for size in grids]
    order = torch.Generator().manual_seed(0)
    coords_1PA = torch.cat([p[torch.randperm(len(p), generator=order)] for p in coords])[None]
    counts = torch.tensor([len(p) for p in coords])
    image_1P = torch.tensor([2, 90, 4, 2]).repeat_interleave(counts)[None]
    expected = torch.tensor(grids).repeat_interleave(counts, dim=0)[None]
    assert torch.equal(grid_sizes(coords_1PA, image_1P), expected)
    padded_1PA, padded_1P = F.pad(coords_1PA, (0, 0, 0, 3)), F.pad(image_1P, (0, 3), value=-1)
    assert torch.equal(grid_sizes(padded_1PA, padded_1P)[:, :-3], expected)
    assert grid_sizes(coords_1PA[:, :0], image_1P[:, :0]).shape == (1, 0, 2)


@pytest.mark.parametrize("size", [(4, 6), (5, 5), (2, 12), (1, 3)])
def test_table_is_resampled_corner_on_corner(size):
    side = 5
    table_1SNN = torch.randn(1, 7, side, side, generator=torch.Generator().manual_seed(0))
    coords_1PA = torch.cartesian_prod(*map(torch.arange, size)).unsqueeze(0)
    entries, weights = table_entries(coords_1PA, torch.tensor(size).expand_as(coords_1PA), side)
    rows_NS = table_1SNN[0].flatten(1).T
    got = (rows_NS[entries[0]] * weights[0].unsqueeze(-1)).sum(1)
    expected = F.interpolate(table_1SNN, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(got, expected[0].flatten(1).T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, len(got)))


@torch.no_grad()
def test_a_patch_kernel_of_two_frames_reads_the_image_twice(deep, pack):
    """As a 3-D convolution does over a film of two equal frames."""
    vit = random_module(VisionTransformer(deep))
    batch = pack([[("vit", 2, 2)]], deep)
    patches_PQ, geometry = batch.vit_patches[0, :16], deep.geometry
    film = patches_PQ.view(16, 3, 1, geometry.vit_patch, geometry.vit_patch).repeat(1, 1, 2, 1, 1)
    kernel = vit.patch_embedding.weight.view(-1, *film.shape[1:])
    expected = F.conv3d(film, kernel, vit.patch_embedding.bias).flatten(1)
    vit.position_embedding.weight.zero_()
    sizes = grid_sizes(batch.vit_coords, batch.vit_image)
    got = vit._embed(batch.vit_patches, batch.vit_coords, sizes)
    torch.testing.assert_close(got[0, :16], expected, atol=1e-5, rtol=1e-5)


def test_sinusoids_written_out():
    got = sinusoids(torch.tensor([0.0, 2.5]), 6)
    angles = [2.5 * 10_000 ** (-i / 3) for i in range(3)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert got[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert got[1].tolist() == pytest.approx(expected, abs=1e-6)


def test_every_place_of_a_grid_has_its_own_position():
    coords = torch.cartesian_prod(torch.arange(16), torch.arange(16)).unsqueeze(0)
    positions = grid_positions(coords, 32)[0]
    distances = torch.cdist(positions, positions) + torch.eye(256) * 10
    assert distances.min() > 0.3
    assert torch.equal(
        positions[0, 16:], positions[16, 16:]
    )  # (0, 0) and (1, 0) share the column's half


def test_latent_embedding_is_patch_plus_place_plus_time(args):
    embedding = random_module(LatentEmbedding(args))
    noised_BLZ, coords = torch.randn(1, 3, 12), torch.tensor([[[0, 0], [0, 1], [2, 5]]])
    timesteps_BL = torch.tensor([[0.0, 0.3, 1.0]])
    tokens, condition = embedding(noised_BLZ, coords, timesteps_BL)
    hidden = embedding.timestep_w1(sinusoids(1000 * timesteps_BL, args.timestep_width))
    time_BLD = embedding.timestep_w2(hidden * hidden.sigmoid())
    torch.testing.assert_close(condition, time_BLD)
    expected = embedding.patch_embedding(noised_BLZ) + grid_positions(coords, args.dim) + time_BLD
    torch.testing.assert_close(tokens, expected)


def test_neighbouring_timesteps_stay_apart_in_bfloat16(args):
    """0.500 and 0.501 are one number in bfloat16: the sinusoids must be taken before the cast."""
    embedding = random_module(LatentEmbedding(args)).bfloat16()
    timesteps_BL = torch.tensor([[0.5, 0.501]])
    assert timesteps_BL.bfloat16().unique().numel() == 1
    _, condition = embedding(torch.zeros(1, 2, 12), torch.zeros(1, 2, 2).long(), timesteps_BL)
    assert condition.dtype == torch.bfloat16
    assert not torch.equal(condition[0, 0], condition[0, 1])


def test_flow_head_is_a_norm_scaled_and_shifted_by_time_and_one_linear(args):
    head = random_module(FlowHead(args))
    h_BLD, condition_BLD = torch.randn(2, 1, 3, args.dim)
    normed = h_BLD / (h_BLD.square().mean(-1, keepdim=True) + args.norm_eps).sqrt()
    scale, shift = head.modulation(F.silu(condition_BLD)).split(args.dim, dim=-1)
    expected = head.output(normed * head.norm.weight * (1 + scale) + shift)
    torch.testing.assert_close(head(h_BLD, condition_BLD), expected)
    assert head.bfloat16()(h_BLD.bfloat16(), condition_BLD.bfloat16()).dtype == torch.float32
