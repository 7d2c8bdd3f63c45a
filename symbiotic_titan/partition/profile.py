"""Expert profiles: how often the tokens of each modality choose each expert. Partitions are planned from them.

Statistics as in the paper's expert role analysis (arXiv 2604.07753): imbalance, deviation, and which experts text and ViT share.
"""

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value, row_from_dict
from symbiotic_titan.moe.routing_metrics import (
    imbalance_ratio,
    overlap_size,
    relative_deviation,
    top_overlap,
)
from symbiotic_titan.sequence.modality import MODALITY_NAMES, TEXT, VIT
from symbiotic_titan.weights.reader import CheckpointReader

KIND = "expert profile"

# With fewer choices per expert, ranks are mostly noise: a count of 100 has a standard error of 10 %.
ENOUGH_PER_EXPERT = 100


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was profiled.

    routers  hash of all router weights and selection biases.
    groups   group -> number of experts; an unpartitioned model has one group, ``all``.
    """

    flavor: str
    step: int | None
    routers: str
    groups: dict[str, int]
    top_k: int

    @classmethod
    def of_values(cls, values: Any) -> "ModelIdentity":
        """The inverse of ``vars``; ValueError where a key is missing or of another type."""
        identity = row_from_dict(cls, values, "model")
        for key, number in {"top_k": identity.top_k, **identity.groups}.items():
            if number < 1:
                raise ValueError(f"model: {key} must be at least 1, got {number}")
        return identity


def check_layer_names(names: Any) -> None:
    """Pass if ``names`` are distinct names of layers; ValueError otherwise."""
    check_value("layers", names, list[str])
    wrong = [name for name in names if not re.fullmatch(r"layers\.\d+", name)]
    if wrong or len(set(names)) < len(names):
        raise ValueError(f"layers: must be names such as layers.3, each once, got {names}")


@dataclass(frozen=True)
class Profile:
    """Expert counts of a model over data.

    layers (Y,)              names of the MoE layers, as in parameter names.
    counts (Y, M, E) int64   choices per layer, modality and expert; every token makes top_k.
    tokens                   modality -> number of tokens that were read.
    data                     description of the data, for readers of the file.
    """

    model: ModelIdentity
    layers: tuple[str, ...]
    counts: Tensor
    tokens: dict[str, int]
    data: dict[str, Any]

    def save(self, path: Path) -> None:
        write_json(
            path,
            KIND,
            {
                "model": vars(self.model),
                "data": self.data,
                "tokens": self.tokens,
                "modalities": list(MODALITY_NAMES),
                "layers": list(self.layers),
                "counts": self.counts.tolist(),
            },
        )

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Raises ValueError where the file is missing, damaged or of another kind."""
        values = read_json(path, KIND, ("model", "data", "tokens", "layers", "counts"))
        try:
            model = ModelIdentity.of_values(values["model"])
            check_layer_names(values["layers"])
            check_value("tokens", values["tokens"], dict[str, int])
            check_value("data", values["data"], dict[str, Any])
            check_value("counts", values["counts"], list[list[list[int]]])
            counts = torch.tensor(values["counts"], dtype=torch.int64)
            if counts.lt(0).any():
                raise ValueError("counts: must be at least 0")
        except (RuntimeError, ValueError) as error:  # torch: a number that is too large
            raise ValueError(
                f"{KIND}: {path} is damaged ({error}); profile the model anew"
            ) from None
        expected = (len(values["layers"]), len(MODALITY_NAMES), sum(model.groups.values()))
        if tuple(counts.shape) != expected:
            raise ValueError(
                f"{KIND}: {path} holds counts of shape {tuple(counts.shape)} for {expected} (layers, modalities, experts); "
                "profile the model anew"
            )
        return cls(model, tuple(values["layers"]), counts, values["tokens"], values["data"])


def router_hash(reader: CheckpointReader) -> str:
    """A hash of router weights and selection biases. It differs between models with different experts, and reads few bytes."""
    digest = sha256()
    for name in sorted(name for name in reader.tensors if ".moe.router." in name):
        digest.update(name.encode())
        digest.update(reader.read(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def too_few_tokens(profile: Profile) -> str | None:
    """A warning if the profile has no, or too few, text or ViT tokens to rank experts; else None."""
    num_experts = profile.counts.shape[-1]
    needed = -(-ENOUGH_PER_EXPERT * num_experts // profile.model.top_k)
    read = {MODALITY_NAMES[m]: profile.tokens.get(MODALITY_NAMES[m], 0) for m in (TEXT, VIT)}
    warnings = [
        f"no {name} tokens were read, so experts rank without them, and those of a group of {name} alone are arbitrary: profile with "
        "sources that have some"
        for name, num_tokens in read.items()
        if not num_tokens
    ]
    few = [f"{number:,} {name}" for name, number in read.items() if 0 < number < needed]
    if few:
        warnings.append(
            f"only {', '.join(few)} tokens were read; ranks of {num_experts} experts are noisy with fewer than {needed:,} "
            f"({ENOUGH_PER_EXPERT} choices per expert): use more --batches"
        )
    return "; ".join(warnings) or None


def layer_statistics(profile: Profile) -> list[dict[str, Any]]:
    """Per layer: imbalance ratio and relative standard deviation of text's and ViT's counts, and how many experts are among the most
    (least) used of both. None where a modality has no tokens."""
    counts_YME, names = profile.counts, MODALITY_NAMES
    k = overlap_size(counts_YME.shape[-1])
    imbalance_YM, deviation_YM = imbalance_ratio(counts_YME), relative_deviation(counts_YME)
    text_YE, vit_YE = counts_YME[:, TEXT], counts_YME[:, VIT]
    most_Y, least_Y = top_overlap(text_YE, vit_YE, k), top_overlap(-text_YE, -vit_YE, k)
    rows = []
    for i, layer in enumerate(profile.layers):
        measured = {m: bool(counts_YME[i, m].any()) for m in (TEXT, VIT)}
        row: dict[str, Any] = {"layer": layer}
        for m in (TEXT, VIT):
            row[f"imbalance_{names[m]}"] = float(imbalance_YM[i, m]) if measured[m] else None
            row[f"deviation_{names[m]}"] = float(deviation_YM[i, m]) if measured[m] else None
        both = all(measured.values())
        row[f"top_{k}_in_both"] = int(most_Y[i]) if both else None
        row[f"bottom_{k}_in_both"] = int(least_Y[i]) if both else None
        rows.append(row)
    return rows
