"""What is evaluated: a checkpoint under a config and a probe, and how two of them are told apart."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from symbiotic_titan.build import model_args
from symbiotic_titan.checkpoint.resume import step_of
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.evaluation.ablation import (
    NONE,
    masked_groups,
)
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.inference.generator import find_checkpoint
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.weights.compatibility import (
    check_is_model,
    tensors_of_model,
)

# What of a config changes what a model does.
_SECTIONS = ("model", "experts", "tokenizer", "latents", "data", "flow")
_TRAINING = ("seq_len", "dtype", "mixed_precision_param")
_SHORT = 8


@dataclass(frozen=True)
class Subject:
    """``checkpoint`` is its folder; ``probe`` one of ``evaluation.probe``."""

    config: JobConfig
    checkpoint: Path
    probe: str = NONE

    @classmethod
    def find(cls, config: JobConfig, path: Path, probes: Sequence[str]) -> "list[Subject]":
        """The checkpoint ``path``, or the newest complete one of the run ``path``, under each of ``probes``.

        Raises:
            ValueError: there is no complete checkpoint, it is of another model, or the model does not know a probe.
        """
        folder = find_checkpoint(path, config.checkpoint.folder)
        stored = open_model(folder)
        with torch.device("meta"):
            model = SymbioticModel(model_args(config))
        check_is_model(stored, tensors_of_model(model))
        for probe in probes:
            masked_groups(model, probe)
        return [cls(config, folder, probe) for probe in probes]

    @property
    def label(self) -> str:
        """A short name: ``run/step-N``, or the folder's; with the probe if there is one."""
        folder = self.checkpoint.absolute()
        name = folder.name
        if step_of(folder) is not None and folder.parent.name == self.config.checkpoint.folder:
            name = f"{folder.parent.parent.name}/{folder.name}"
        return name if self.probe == NONE else f"{name} {self.probe}"

    @cached_property
    def identity(self) -> str:
        """Hash of the checkpoint's files (by name, length and time), of what the config says about the model, and of the probe."""
        sections = {name: asdict(getattr(self.config, name)) for name in _SECTIONS}
        sections["training"] = {name: getattr(self.config.training, name) for name in _TRAINING}
        of = [files_hash(self.checkpoint), sections, self.probe]
        return sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """Name of a folder for results: no other checkpoint, config or probe has the same."""
        name = self.label.replace("/", "-").replace(" ", "-").replace(":", "-")
        return f"{name}-{self.identity[:_SHORT]}"

    def description(self) -> dict[str, Any]:
        """JSON-able, for the readers of a result."""
        return {
            "label": self.label,
            "checkpoint": str(self.checkpoint),
            "step": open_model(self.checkpoint).step,
            "flavor": self.config.model.flavor,
            "config": self.config.job.config_file,
            "probe": self.probe,
            "identity": self.identity,
        }


def files_hash(path: Path) -> str:
    """Of a file, or of all files below a folder: names, lengths and times of the last change. Contents are not read."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    seen = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return sha256(repr(seen).encode()).hexdigest()
