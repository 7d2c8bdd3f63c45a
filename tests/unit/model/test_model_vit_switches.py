"""The image encoder's switches, each against torch's own function for it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from symbiotic_titan.model.vit import Resampler, VitBlock, table_entries
from symbiotic_titan.model.vit_args import VitArgs


@pytest.mark.parametrize("rows, columns", [(2, 8), (6, 2), (1, 1), (5, 5), (14, 11)])
def test_bicubic_reading_of_the_table_is_that_of_grid_sample(rows, columns):
    side, generator = 5, torch.Generator().manual_seed(0)
    table = torch.randn(side**2, 3, generator=generator)
    coords = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).unsqueeze(0)
    sizes = torch.tensor([rows, columns]).expand_as(coords)
    entries, weights = table_entries(coords, sizes, side, "bicubic")
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    found = (table[entries] * weights.unsqueeze(-1)).sum(-2)
    at = ((coords + 0.5) / sizes * 2 - 1).flip(-1).unsqueeze(1)
    expected = F.grid_sample(
        table.view(1, side, side, 3).permute(0, 3, 1, 2),
        at,
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    torch.testing.assert_close(found[0], expected[0, :, 0].T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "switches",
    [
        {"norm": "rms", "bias": False, "outer_norms": True},
        {"activation": "swiglu"},
        {"position_grid": 3, "position_reading": "bicubic"},
        {"projector_hidden_dim": 20},
        {"activation": "quick_gelu", "last_norm": True, "patch_bias": False, "resampled_frames": 2},
    ],
    ids=lambda switches: "-".join(switches),
)
def test_every_parameter_of_the_encoder_gets_a_gradient(
    switches, args, make_args, make_model, forward, mixed_batch
):
    model = make_model(make_args(vit=replace(args.vit, **switches)))
    forward(model, mixed_batch).logits.square().sum().backward()
    for name, parameter in model.vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_without_biases_no_block_has_one(args, make_args, make_model):
    model = make_model(make_args(vit=replace(args.vit, norm="rms", bias=False)))
    assert not [name for name, _ in model.vit.layers.named_parameters() if name.endswith("bias")]


def test_quick_gelu_is_that_of_transformers(args):
    torch.manual_seed(0)
    vit = replace(args.vit, activation="quick_gelu")
    block, x_BPS = VitBlock(vit), torch.randn(1, 4, vit.dim)
    torch.nn.init.zeros_(block.wo.weight)
    torch.nn.init.zeros_(block.wo.bias)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    hidden = ACT2FN["quick_gelu"](block.w1(block.ffn_norm(x_BPS)))
    torch.testing.assert_close(block(x_BPS, None, mask), x_BPS + block.w2(hidden))


def test_the_resampler_reads_an_image_as_a_video_of_equal_frames():
    """Against the plain chain: patches of a token side by side, two layers, the frames side by side, two layers, one layer."""
    vit = VitArgs(
        dim=8, num_layers=1, num_heads=1, hidden_dim=8, patch=2, merge=2, resampled_frames=3
    )
    torch.manual_seed(0)
    resampler = Resampler(vit, dim=12, eps=1e-5)
    x_BPS = torch.randn(1, 3 * 4, 8)
    frames = []
    for _ in range(3):
        joined = torch.stack([x_BPS[0, 4 * i : 4 * i + 4].flatten() for i in range(3)])
        frames.append(resampler.spatial(joined))
    assert resampler.temporal.w1.in_features == 3 * resampler.spatial.w2.out_features
    expected = resampler.last_norm(resampler.project(resampler.temporal(torch.cat(frames, -1))))
    torch.testing.assert_close(resampler(x_BPS)[0], expected)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"outer_norms": True, "last_norm": True}, "vit.last_norm: has no effect with vit.outer"),
        (
            {"projector_hidden_dim": 8, "resampled_frames": 2},
            "vit.resampled_frames: must be 0 with",
        ),
        ({"resampled_frames": -1}, "vit.resampled_frames: must be zero or positive, got -1"),
    ],
    ids=["norms", "projectors", "frames"],
)
def test_switches_that_exclude_each_other_are_named(args, switches, message):
    with pytest.raises(ValueError, match=message):
        replace(args.vit, **switches)
