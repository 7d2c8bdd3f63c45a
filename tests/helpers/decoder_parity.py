"""Tiny random models of transformers, saved as it saves them, and the same tensors in our network."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from symbiotic_titan.hf.architectures.base import Architecture
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import TEXT, VIT

Shapes = dict[str, tuple[int, ...]]


def make_random(model: nn.Module, seed: int = 0, gain: float = 1.5) -> nn.Module:
    """No value left at what a fresh model has: norms around 1, biases large enough to change what is chosen. ``gain``: deviation of
    a matrix in units of 1 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim >= 2:
                tensor.normal_(std=gain * tensor.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.uniform_(-0.4, 0.4, generator=generator)
    return model.eval()


def saved(model: nn.Module, folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(config.json, tensors) as transformers writes them."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def loaded(
    architecture: Architecture,
    args: ModelArgs,
    tensors: Mapping[str, Tensor],
    new: tuple[str, ...] = (),
) -> SymbioticModel:
    """Our network with ``tensors``. Every one of ours that is neither latent nor in a ``new`` part is given a value, once."""
    with torch.device("meta"):
        model = SymbioticModel(args)
    model.to_empty(device="cpu")
    model.init_weights()
    state = {}
    for mapping in architecture.weight_map(args, shapes_of(tensors)):
        values = mapping.load([tensors[name] for name in mapping.theirs])
        for name, tensor in zip(mapping.ours, values, strict=True):
            assert name not in state, f"{name} is given twice"
            state[name] = tensor
    rest = model.load_state_dict(state, strict=False)
    assert not rest.unexpected_keys
    parts = {name.split(".")[0] for name in rest.missing_keys}
    assert parts <= {"latent_embedding", "flow_head", *new}, rest.missing_keys
    return model.eval()


def stored(architecture: Architecture, model: SymbioticModel, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors on disk that our network's are."""
    state, out = model.state_dict(), {}
    for mapping in architecture.weight_map(model.args, shapes):
        values = mapping.save([state[name] for name in mapping.ours])
        for name, tensor in zip(mapping.theirs, values, strict=True):
            assert name not in out, f"{name} is written twice"
            out[name] = tensor
    return out


def text_row(args: ModelArgs, tokens_BT: Tensor) -> PackedBatch:
    """Rows of one document of text each, without any image."""
    rows, length = tokens_BT.shape
    none = torch.zeros(rows, 0, dtype=torch.int64)
    geometry = args.geometry
    return PackedBatch(
        tokens=tokens_BT,
        modality=torch.full_like(tokens_BT, TEXT),
        document=torch.zeros_like(tokens_BT),
        span=torch.full_like(tokens_BT, -1),
        positions=torch.arange(length).view(1, -1, 1).expand(rows, -1, 3),
        labels=torch.full_like(tokens_BT, -100),
        task=torch.zeros_like(tokens_BT),
        vit_patches=torch.zeros(rows, 0, geometry.vit_patch_values),
        vit_coords=none.unsqueeze(-1).expand(-1, -1, 2),
        vit_image=none,
        vit_index=none,
        latents=torch.zeros(rows, 0, geometry.vae_token_values),
        vae_coords=none.unsqueeze(-1).expand(-1, -1, 2),
        vae_image=none,
        vae_index=none,
    )


def run(model: SymbioticModel, batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
    """((B, T, vocabulary) logits, (B * T, K) sorted experts of every MoE layer)."""
    choices = []
    hooks = [
        block.moe.router.register_forward_hook(
            lambda module, inputs, routing: choices.append(routing.experts_TK.sort(-1).values)
        )
        for block in model.layers.values()
        if block.moe_enabled
    ]
    timesteps_BL = torch.zeros(batch.vae_image.shape)
    with torch.no_grad():
        out = model(batch, batch.latents, timesteps_BL, torch.tensor(1.0))
    for hook in hooks:
        hook.remove()
    return out.logits, choices


def run_released(
    model: nn.Module,
    routers: type[nn.Module] | tuple[type[nn.Module], ...],
    inputs: Mapping[str, Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The same of transformers' model. ``routers``: its routers return (logits, weights, indices)."""
    choices = []
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, out: choices.append(out[2].sort(-1).values)
        )
        for module in model.modules()
        if isinstance(module, routers)
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, choices


def of_all_pools(choices: list[Tensor], row: PackedBatch, first: int) -> list[Tensor]:
    """The choices of a model of transformers that has a router for text and then one for images in every layer, as ``run`` gives ours:
    (B * T, K) by layer, with the experts of images numbered from ``first``."""
    is_vit_T = row.modality.flatten() == VIT
    if not is_vit_T.any():
        return choices
    out = []
    for text_TK, vit_TK in zip(choices[::2], choices[1::2], strict=True):
        both_TK = torch.empty(len(is_vit_T), text_TK.shape[1], dtype=torch.int64)
        both_TK[~is_vit_T], both_TK[is_vit_T] = text_TK, vit_TK + first
        out.append(both_TK)
    return out


def moved_by(model: SymbioticModel, batch: PackedBatch, **changes: object) -> float:
    """How far the logits go when switches of a model are set otherwise and its tensors stay."""
    with torch.device("meta"):
        other = SymbioticModel(replace(model.args, **changes))
    other.to_empty(device="cpu")
    other.init_weights()
    other.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name in other.state_dict()},
        strict=False,
    )
    return (run(other.eval(), batch)[0] - run(model, batch)[0]).abs().max().item()
