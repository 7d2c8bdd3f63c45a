"""An evaluation target: a checkpoint with its config and an ablation, and the fingerprint and labels that identify it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.evaluation.ablation import NONE, masked_groups
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.weights.compatibility import check_is_model, tensors_of_model
from symbiotic_titan.weights.damage import (
    find_checkpoint,
    step_of,
)

# The parts of a config that change what a model computes.
_SECTIONS = ("model", "experts", "tokenizer", "latents", "data", "flow")
_TRAINING = ("seq_len", "dtype", "mixed_precision_param")
_SHORT = 8


@dataclass(frozen=True)
class Target:
    """``checkpoint`` is its folder; ``ablation`` one of ``evaluation.ablation``; ``weights`` "ema" for the average that its run kept."""

    config: JobConfig
    checkpoint: Path
    ablation: str = NONE
    weights: Weights = "trained"

    @classmethod
    def find(
        cls,
        config: JobConfig,
        path: Path,
        ablations: Sequence[str],
        weights: Sequence[Weights] = ("trained",),
    ) -> "list[Target]":
        """The checkpoint ``path``, or the newest complete one of the run ``path``, with each of ``weights`` under each of ``ablations``.

        Raises:
            ValueError: no complete checkpoint, one of another model or without such weights, or an ablation that the model does not
                have.
        """
        folder = find_checkpoint(path, config.checkpoint.folder)
        with torch.device("meta"):
            model = SymbioticModel(model_args(config))
        for which in weights:
            check_is_model(open_model(folder, which), tensors_of_model(model))
        for ablation in ablations:
            masked_groups(model, ablation)
        return [cls(config, folder, a, which) for which in weights for a in ablations]

    @property
    def label(self) -> str:
        """A short name: ``run/step-N``, or the folder's; with the weights and the ablation unless these are the defaults."""
        folder = self.checkpoint.absolute()
        name = folder.name
        if step_of(folder) is not None and folder.parent.name == self.config.checkpoint.folder:
            name = f"{folder.parent.parent.name}/{folder.name}"
        variants: list[str] = [self.weights] if self.weights != "trained" else []
        variants += [self.ablation] if self.ablation != NONE else []
        return " ".join([name, *variants])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the checkpoint's files (names, lengths, times), of the config's parts about the model, of the ablation and of the
        choice of weights."""
        sections = {name: asdict(getattr(self.config, name)) for name in _SECTIONS}
        sections["training"] = {name: getattr(self.config.training, name) for name in _TRAINING}
        of = [files_hash(self.checkpoint), sections, self.ablation]
        if self.weights != "trained":  # results from before there was a choice keep their folders
            of.append(self.weights)
        return sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """Name of a folder for results, different for any other checkpoint, config or ablation."""
        name = self.label.replace("/", "-").replace(" ", "-").replace(":", "-")
        return f"{name}-{self.fingerprint[:_SHORT]}"

    def description(self) -> dict[str, Any]:
        """JSON-able, for the readers of a result."""
        step = open_model(self.checkpoint).step
        return {
            "label": self.label,
            "checkpoint": str(self.checkpoint),
            "step": step_of(self.checkpoint.absolute()) if step is None else step,
            "flavor": self.config.model.flavor,
            "config": self.config.job.config_file,
            "probe": self.ablation,
            "weights": self.weights,
            "identity": self.fingerprint,
        }


def labelled(targets: Sequence[Target]) -> dict[str, Target]:
    """Targets by label; where two have the same, by the names of their folders, which differ."""
    labels = [target.label for target in targets]
    return {
        label if labels.count(label) == 1 else target.folder_name: target
        for label, target in zip(labels, targets, strict=True)
    }


def files_hash(path: Path) -> str:
    """Hash of a file, or of all files below a folder: names, lengths and times of the last change. Contents are not read."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    seen = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return sha256(repr(seen).encode()).hexdigest()
