"""The image encoder's switches, each against torch's own function for it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from symbiotic_titan.model.vit import table_entries


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
