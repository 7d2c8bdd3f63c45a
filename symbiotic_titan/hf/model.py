"""Reads released models in place, under our names. ``open_model`` opens a checkpoint in any format that we read."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from symbiotic_titan.hf.architectures.base import (
    Architecture,
    WeightMapping,
    architecture_of,
)
from symbiotic_titan.hf.converter import (
    ConverterStep,
    TensorConverter,
)
from symbiotic_titan.model import model_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.weights.compatibility import (
    absent_parts,
    part_of,
    tensors_of_model,
)
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from symbiotic_titan.weights.reader import (
    CheckpointReader,
    TensorSpec,
    some_of,
)
from symbiotic_titan.weights.safetensors import (
    SafetensorsModel,
    SliceReader,
    copy_into,
    has_weights,
    read_table,
    slices_in,
)

CONFIG = "config.json"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HuggingFaceModel:
    """The tensors of a released model under our names: a ``CheckpointReader``.

    args      what config.json describes. The latent parts are not in a release, so ``tensors`` lack them.
    unmapped  reader of the tensors without a counterpart in our network, under the release's names.
    layout    released tensor name -> shape.

    Raises:
        ValueError: an unknown architecture or an unsupported setting; weights that are missing, damaged, quantised or of shapes other
            than config.json implies; or tensors that are neither mapped nor known to be unmapped.
    """

    step = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_table(folder / CONFIG)
        try:
            self.architecture: Architecture = architecture_of(self.config)
            self.args: ModelArgs = self.architecture.model_args(self.config)
            slices = slices_in(folder)
            self.layout = {name: piece.spec.shape for name, piece in slices.items()}
            mappings = self.architecture.weight_map(self.args, self.layout)
        except ValueError as error:
            where = str(folder)
            raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from None
        unmapped = unmapped_names(self.architecture, self.args, slices)
        self.unmapped = SliceReader({name: slices.pop(name) for name in unmapped})
        theirs = SliceReader(slices)
        _check_theirs(folder, theirs.tensors, mappings)
        steps = [ConverterStep(mapping.theirs, mapping.ours, mapping.load) for mapping in mappings]
        try:
            self._ours = TensorConverter(steps, theirs.tensors, theirs.read)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        self.tensors: Mapping[str, TensorSpec] = self._ours.specs
        _check_ours(folder, self.tensors, self.args)

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    def read(self, name: str) -> Tensor:
        return self._ours(name)

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        # In the converter's order, so that every tensor of the files is read once.
        in_order = {name: tensors[name] for name in self.tensors if name in tensors}
        copy_into(in_order, self.read)


def unmapped_names(
    architecture: Architecture, args: ModelArgs, names: Collection[str]
) -> list[str]:
    """The released tensor ``names`` without a counterpart in our network, by ``Architecture.unmapped``."""
    patterns = architecture.unmapped(args, names)
    return [name for name in names if any(re.match(p, name) for p in patterns)]


def _check_theirs(
    folder: Path, specs: Mapping[str, TensorSpec], mappings: list[WeightMapping]
) -> None:
    used = dict.fromkeys(name for mapping in mappings for name in mapping.theirs)
    missing = [name for name in used if name not in specs]
    if missing:
        raise ValueError(f"{folder} lacks {some_of(missing)}, which {CONFIG} asks for")
    more = [name for name in specs if name not in used]
    if more:
        raise ValueError(
            f"{folder} holds {some_of(more)}, which no part of our model corresponds to; without them it would be another model"
        )
    for name, spec in specs.items():
        if spec.dtype not in _FLOATS:
            raise ValueError(
                f"{folder}: {name} is {str(spec.dtype).removeprefix('torch.')}, as in quantised models; use a release in "
                "bfloat16, float16 or float32"
            )


def _check_ours(folder: Path, specs: Mapping[str, TensorSpec], args: ModelArgs) -> None:
    with torch.device("meta"):
        expected = tensors_of_model(SymbioticModel(args))
    absent = absent_parts(specs)
    for name, spec in expected.items():
        if part_of(name) in absent:
            continue
        assert name in specs, f"no weight mapping of the architecture gives {name}"
        if specs[name].shape != spec.shape:
            raise ValueError(
                f"{folder}: {name} has shape {specs[name].shape} in its files, {spec.shape} by {CONFIG}"
            )
    assert specs.keys() <= expected.keys(), "a weight mapping gives a tensor that the model lacks"


def open_model(folder: Path) -> CheckpointReader:
    """A distributed checkpoint, a released model, or safetensors under our names, whichever the folder contains.

    Raises:
        ValueError: it contains none of them, or the model is damaged.
    """
    if not (folder / ".metadata").is_file():
        if has_weights(folder) and (folder / model_config.FILE_NAME).is_file():
            return SafetensorsModel(folder)
        if has_weights(folder) or (folder / CONFIG).is_file():
            return HuggingFaceModel(folder)
    return DistributedCheckpoint(folder)


def check_holds_tensors(folder: Path, option: str) -> None:
    """Pass unless a folder has a model config and no tensors, as ``from-hf --shape-only`` writes.

    Raises:
        ValueError: it has no tensors; the message names ``option``, which gave the folder.
    """
    has_tensors = (folder / ".metadata").is_file() or has_weights(folder)
    if not has_tensors and (folder / model_config.FILE_NAME).is_file():
        raise ValueError(
            f"{option}: {folder} holds a shape only; name the released folder, where the tensors are"
        )
