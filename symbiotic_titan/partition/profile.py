"""Expert profiles: how often the tokens of each modality choose each expert. Partitions are planned from them.

Statistics as in the paper's expert role analysis (arXiv 2604.07753): imbalance, deviation, and which experts text and ViT share.
"""

import re
from dataclasses import dataclass, field
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
from symbiotic_titan.partition.pools import pool_columns
from symbiotic_titan.sequence.modality import MODALITY_NAMES, TEXT, VIT
from symbiotic_titan.weights.reader import CheckpointReader

KIND = "expert profile"

# With fewer choices per expert, ranks are mostly noise: a count of 100 has a standard error of 10 %.
ENOUGH_PER_EXPERT = 100


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was profiled.

    routers  hash of all router weights and selection biases.
    groups   group -> number of experts, in the model's order; an unpartitioned model has one group, ``all``.
    top_ks   group -> experts per token, of groups that have a top_k of their own.
    """

    flavor: str
    step: int | None
    routers: str
    groups: dict[str, int]
    top_k: int
    top_ks: dict[str, int] = field(default_factory=dict)

    def top_k_of(self, group: str) -> int:
        """Experts per token of a group."""
        return self.top_ks.get(group, self.top_k)

    @classmethod
    def of_values(cls, values: Any) -> "ModelIdentity":
        """The inverse of ``vars``; ValueError where a key is missing or of another type."""
        identity = row_from_dict(cls, values, "model")
        numbers = {"top_k": identity.top_k, **identity.groups}
        numbers |= {f"top_ks.{name}": top_k for name, top_k in identity.top_ks.items()}
        for key, number in numbers.items():
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
    counts (Y, M, E) int64   choices per layer, modality and expert; every token makes its group's top_k.
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
    read = {MODALITY_NAMES[m]: profile.tokens.get(MODALITY_NAMES[m], 0) for m in (TEXT, VIT)}
    warnings = [
        f"no {name} tokens were read, so experts rank without them, and those of a group of {name} alone are arbitrary: profile with "
        "sources that have some"
        for name, num_tokens in read.items()
        if not num_tokens
    ]
    few: dict[tuple[int, int], list[str]] = {}
    for m in (TEXT, VIT):
        number = read[MODALITY_NAMES[m]]
        for group in _groups_in_use(profile, m):
            size, top_k = profile.model.groups[group], profile.model.top_k_of(group)
            needed = -(-ENOUGH_PER_EXPERT * size // top_k)
            if 0 < number < needed:
                few.setdefault((size, needed), []).append(f"{number:,} {MODALITY_NAMES[m]}")
    warnings += [
        f"only {', '.join(tokens)} tokens were read; ranks of {size} experts are noisy with fewer than {needed:,} "
        f"({ENOUGH_PER_EXPERT} choices per expert): use more --batches"
        for (size, needed), tokens in few.items()
    ]
    return "; ".join(warnings) or None


def _groups_in_use(profile: Profile, modality: int) -> list[str]:
    """The groups that chose experts for tokens of ``modality``, in the model's order; all of them if there were no tokens."""
    columns = pool_columns(profile.model.groups)
    in_use = [g for g, e in columns.items() if profile.counts[:, modality, e].any()]
    return in_use or list(columns)


def layer_statistics(profile: Profile) -> list[dict[str, Any]]:
    """Per layer: imbalance ratio and relative standard deviation of text's and ViT's counts over the experts of their groups, and how
    many experts are among the most (least) used of both, see ``top_overlap``. None where a modality has no tokens or the two share no
    group."""
    names, columns = MODALITY_NAMES, pool_columns(profile.model.groups)
    groups = {m: _groups_in_use(profile, m) for m in (TEXT, VIT)}
    use = {
        m: torch.cat([profile.counts[:, m, columns[g]] for g in groups[m]], dim=-1)
        for m in (TEXT, VIT)
    }
    together = groups[TEXT] == groups[VIT]
    k = overlap_size(use[TEXT].shape[-1])
    most_Y = top_overlap(use[TEXT], use[VIT], k) if together else None
    least_Y = top_overlap(-use[TEXT], -use[VIT], k) if together else None
    rows = []
    for i, layer in enumerate(profile.layers):
        measured = {m: bool(use[m][i].any()) for m in (TEXT, VIT)}
        row: dict[str, Any] = {"layer": layer}
        for m in (TEXT, VIT):
            imbalance, deviation = imbalance_ratio(use[m][i]), relative_deviation(use[m][i])
            row[f"imbalance_{names[m]}"] = float(imbalance) if measured[m] else None
            row[f"deviation_{names[m]}"] = float(deviation) if measured[m] else None
        both = all(measured.values())
        row[f"top_{k}_in_both"] = float(most_Y[i]) if both and most_Y is not None else None
        row[f"bottom_{k}_in_both"] = float(least_Y[i]) if both and least_Y is not None else None
        rows.append(row)
    return rows
