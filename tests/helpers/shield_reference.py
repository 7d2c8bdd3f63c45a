"""The shield written with explicit detach and nothing but autograd, and how far two sets of gradients are apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symbiotic_titan.moe.experts import SharedExpert
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

MODES = ("output", "weights")
# What float32 leaves of 1e-6 after several layers or many small terms: up to 3e-6 was measured.
DEEP = 5e-6
# Every set of modalities, the empty one too.
SETS = ((), (TEXT,), (VIT,), (VAE,), (TEXT, VIT), (TEXT, VAE), (VIT, VAE), (TEXT, VIT, VAE))


def partly_detached(value: Tensor, scale: float) -> Tensor:
    """``value``, of whose gradient ``scale`` is left."""
    return scale * value + (1 - scale) * value.detach()


def plain_shared_expert(
    expert: SharedExpert,
    mode: str,
    shielded_T: Tensor,
    x_TD: Tensor,
    scale: float,
) -> Tensor:
    """The shared expert's output. ``output``: detached (scaled) for shielded tokens; ``weights``: the shielded tokens meet
    weights that are."""

    def linear(layer: nn.Linear, y: Tensor) -> Tensor:
        full_TF = F.linear(y, layer.weight)
        if mode == "output":
            return full_TF
        blocked_TF = F.linear(y, partly_detached(layer.weight, scale))
        return torch.where(shielded_T.unsqueeze(-1), blocked_TF, full_TF)

    out_TD = linear(expert.w2, F.silu(linear(expert.w1, x_TD)) * linear(expert.w3, x_TD))
    if expert.gate is not None:
        out_TD = out_TD * linear(expert.gate, x_TD).sigmoid()
    if mode == "weights":
        return out_TD
    return torch.where(shielded_T.unsqueeze(-1), partly_detached(out_TD, scale), out_TD)


def use_plain_shield(model: nn.Module, mode: str, modalities: tuple[int, ...]) -> None:
    """Every shared expert of ``model`` becomes the reference above."""

    def forward_of(expert: SharedExpert):
        def forward(x_TD: Tensor, modality_T: Tensor, shield_scale: Tensor) -> Tensor:
            shielded_T = torch.isin(modality_T, torch.tensor(modalities))
            return plain_shared_expert(expert, mode, shielded_T, x_TD, float(shield_scale))

        return forward

    for module in model.modules():
        if isinstance(module, SharedExpert):
            module.forward = forward_of(module)


def assert_within_1e6(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-6
) -> None:
    """Every entry of every gradient within 1e-6 + ``relative`` x the largest entry, and the norm of the error within
    ``relative`` of the gradient's. A gradient of zeros is met exactly."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error, largest = found[name] - gradient, gradient.abs().max()
        assert error.abs().max() <= 1e-6 + relative * largest, (
            f"{name}: {error.abs().max():.1e} where the largest is {largest:.1e}"
        )
        assert error.norm() <= relative * gradient.norm(), (
            f"{name}: {error.norm():.1e} of {gradient.norm():.1e}"
        )
