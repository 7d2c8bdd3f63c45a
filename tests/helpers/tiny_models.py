"""Batches written by hand and models small enough for any test."""

from dataclasses import replace

import torch

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.model.vit_args import VitArgs
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import IGNORE_INDEX, PADDING, TEXT, VAE, VIT
from symbiotic_titan.sequence.positions import image_positions, text_positions

Segment = (
    tuple[str, int] | tuple[str, int, int]
)  # ("text", length) or ("vit" | "vae", height, width) in tokens; a vit image in patches where queries read it
Document = list[Segment]

LENGTH, NUM_VIT, NUM_VAE = 48, 8, 12


class HandMadeRow:
    """Documents laid one after the other, value by value; ``batch`` pads them to the sizes above."""

    def __init__(self, args: ModelArgs) -> None:
        self.args = args
        self.row = {name: [] for name in ("tokens", "modality", "document", "span", "positions")}
        self.vit = {name: [] for name in ("patches", "coords", "image", "index")}
        self.vae = {name: [] for name in ("latents", "coords", "image", "index")}
        self.num_spans = 0

    def add_document(
        self, segments: list[Segment], number: int, generator: torch.Generator
    ) -> None:
        start = 0
        for kind, *size in segments:
            if kind == "text":
                (num_tokens,) = size
                positions, start = text_positions(start, num_tokens)
                tokens = torch.randint(256, (num_tokens,), generator=generator).tolist()
                self.add_tokens(tokens, TEXT, number, -1, positions)
                continue
            if kind == "vit":
                tokens = self.args.geometry.vit_grid(*(n * self.args.vit.merge for n in size))
            else:
                tokens = tuple(size)
            positions, start = image_positions(start, *tokens, self.args.rotary_layout)
            if kind == "vit":
                self.add_vit_image(*size, generator)
            else:
                self.add_vae_image(*size, generator)
            modality = {"vit": VIT, "vae": VAE}[kind]
            self.add_tokens([256] * len(positions), modality, number, self.num_spans, positions)
            self.num_spans += 1

    def add_tokens(
        self, tokens: list[int], modality: int, document: int, span: int, positions: torch.Tensor
    ) -> None:
        self.row["tokens"] += tokens
        self.row["modality"] += [modality] * len(tokens)
        self.row["document"] += [document] * len(tokens)
        self.row["span"] += [span] * len(tokens)
        self.row["positions"] += positions.tolist()

    def add_vit_image(self, height: int, width: int, generator: torch.Generator) -> None:
        """Of ``height`` x ``width`` blocks of patches, which lie block by block: the patches of a token are neighbours."""
        merge, at = self.args.vit.merge, len(self.row["tokens"])
        self.vit["coords"] += [
            [row * merge + i, column * merge + j]
            for row in range(height)
            for column in range(width)
            for i in range(merge)
            for j in range(merge)
        ]
        num_values, num_patches = self.args.geometry.vit_patch_values, height * width * merge**2
        self.vit["patches"] += torch.randn(num_patches, num_values, generator=generator)
        self.vit["image"] += [self.num_spans] * num_patches
        rows, columns = self.args.geometry.vit_grid(height * merge, width * merge)
        self.vit["index"] += range(at, at + rows * columns)

    def add_vae_image(self, height: int, width: int, generator: torch.Generator) -> None:
        at, num_tokens = len(self.row["tokens"]), height * width
        num_values = self.args.geometry.vae_token_values
        self.vae["coords"] += [[i, j] for i in range(height) for j in range(width)]
        self.vae["latents"] += torch.randn(num_tokens, num_values, generator=generator)
        self.vae["image"] += [self.num_spans] * num_tokens
        self.vae["index"] += range(at, at + num_tokens)

    def batch(self, length: int) -> PackedBatch:
        row, vit, vae, geometry = self.row, self.vit, self.vae, self.args.geometry
        assert len(row["tokens"]) <= length
        num_patches = NUM_VIT * (4 if self.args.vit.queries else self.args.vit.merge**2)
        return PackedBatch(
            tokens=padded(row["tokens"], length, 0),
            modality=padded(row["modality"], length, PADDING),
            document=padded(row["document"], length, -1),
            span=padded(row["span"], length, -1),
            positions=padded(row["positions"], length, 0, 3),
            labels=torch.full((1, length), IGNORE_INDEX),
            task=torch.full((1, length), -1),
            vit_patches=padded(vit["patches"], num_patches, 0.0, geometry.vit_patch_values),
            vit_coords=padded(vit["coords"], num_patches, 0, 2),
            vit_image=padded(vit["image"], num_patches, -1),
            vit_index=padded(vit["index"], NUM_VIT, length),
            latents=padded(vae["latents"], NUM_VAE, 0.0, geometry.vae_token_values),
            vae_coords=padded(vae["coords"], NUM_VAE, 0, 2),
            vae_image=padded(vae["image"], NUM_VAE, -1),
            vae_index=padded(vae["index"], NUM_VAE, length),
        )


def padded(values: list, size: int, fill: float, *shape: int) -> torch.Tensor:
    """(1, size, *shape): ``values``, then ``fill``."""
    out = torch.full(
        (size, *shape), fill, dtype=torch.float32 if isinstance(fill, float) else torch.int64
    )
    for i, value in enumerate(values):
        out[i] = torch.as_tensor(value)
    return out.unsqueeze(0)


def pack_row(
    documents: list[Document], args: ModelArgs, seed: int = 0, length: int = LENGTH
) -> PackedBatch:
    """One row with random contents. The contents of document i depend on its segments and ``seed + i`` alone."""
    row = HandMadeRow(args)
    for number, segments in enumerate(documents):
        row.add_document(segments, number, torch.Generator().manual_seed(seed + number))
    return row.batch(length)


MIXED = [
    [("text", 3), ("vit", 1, 2), ("text", 4)],
    [("text", 4), ("vae", 2, 2), ("text", 3)],
    [("text", 2), ("vit", 2, 1), ("text", 1), ("vae", 1, 3), ("text", 2), ("vae", 2, 1)],
]
OTHER = [[("text", 5), ("vae", 2, 3), ("text", 1)], [("vit", 2, 2), ("text", 6)]]


def tiny_args(**changes: object) -> ModelArgs:
    args = ModelArgs(
        vocab_size=272,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_dense_layers=1,
        dense_hidden_dim=48,
        num_experts=8,
        top_k=2,
        expert_hidden_dim=24,
        shared_hidden_dim=24,
        rope_theta=10_000.0,
        mrope_sections=(4, 2, 2),
        vit=VitArgs(dim=16, num_layers=1, num_heads=2, hidden_dim=24, patch=2, merge=2),
        latent_channels=3,
        latent_stride=1,
        latent_patch=2,
        timestep_width=16,
    )
    return replace(args, **changes)


def deep_args() -> ModelArgs:
    """With every switch of the image encoder on: a table of positions, two frames, features for both layers of the decoder."""
    switches = {"temporal_patch": 2, "position_grid": 5, "deepstack": (0, 1), "activation": "gelu"}
    return tiny_args(vit=replace(tiny_args().vit, num_layers=3, **switches))


def tiny_model(args: ModelArgs) -> SymbioticModel:
    """On the CPU, initialised; the zero-initialised flow head gets values, so that its inputs matter."""
    with torch.device("meta"):
        model = SymbioticModel(args)
    model.to_empty(device="cpu")
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.flow_head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def run_model(
    model: SymbioticModel,
    batch: PackedBatch,
    timestep: float | None = None,
    shield_scale: float | torch.Tensor = 1.0,
) -> ModelOutput:
    """A forward on latents as they are, at one timestep or, without one, at timesteps that differ from token to token."""
    size, device = batch.vae_image.shape, batch.tokens.device
    timesteps_BL = torch.linspace(0.1, 0.9, size[1], device=device).expand(size)
    if timestep is not None:
        timesteps_BL = torch.full(size, timestep, device=device)
    return model(batch, batch.latents, timesteps_BL, torch.as_tensor(shield_scale, device=device))
