"""Reads released models in place, under our names. ``open_model`` opens a checkpoint in any format that we read."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.hf.architectures.base import (
    Architecture,
    Config,
    WeightMapping,
    architecture_of,
)
from symbiotic_titan.hf.converter import (
    ConverterStep,
    TensorConverter,
)
from symbiotic_titan.hf.quantised import (
    DequantizingReader,
    quantization_of,
    without_quantization,
)
from symbiotic_titan.hf.tensor_names import (
    check_merged,
    computed_from_config,
    names_by_architecture,
)
from symbiotic_titan.model import model_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.weights.compatibility import (
    absent_parts,
    part_of,
    tensors_of_model,
)
from symbiotic_titan.weights.dcp import DistributedCheckpoint, check_has_average
from symbiotic_titan.weights.reader import (
    CheckpointReader,
    PartialReader,
    PartReader,
    TensorSpec,
    some_of,
)
from symbiotic_titan.weights.safetensors import (
    SafetensorsModel,
    SliceReader,
    TensorSlice,
    copy_into,
    read_table,
    slices_in,
)
from symbiotic_titan.weights.weight_files import has_weights

CONFIG = "config.json"

# ``model_type`` of the models that an export writes whole. No other library knows it, so none loads one as something else.
OUR_MODEL_TYPE = "symbiotic_titan"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HuggingFaceModel:
    """The tensors of a released model under our names: a ``CheckpointReader``.

    args      what config.json describes. The latent parts are not in a release, so ``tensors`` lack them.
    unmapped  reader of the tensors without a counterpart in our network, under the release's names.
    layout    released tensor name -> shape, with the architecture's own prefixes and without the scales of FP8 weights.

    Raises:
        ValueError: an unknown architecture or an unsupported setting; weights that are missing, damaged, quantised in an unknown
            format or of shapes other than config.json implies; or tensors that are neither mapped nor known to be unmapped.
    """

    step = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stated = read_table(folder / CONFIG)
        self.config = without_quantization(stated)
        _check_is_release(folder, self.config)
        try:
            self.architecture: Architecture = architecture_of(self.config)
            quantization = quantization_of(stated)
            self.args: ModelArgs = self.architecture.model_args(self.config)
            slices = _under_architecture_names(slices_in(folder), self.architecture, self.args)
            stored = DequantizingReader(SliceReader(slices), quantization)
            names = _without_tied_output(stored, self.architecture, self.args)
            self.layout = {name: stored.tensors[name].shape for name in names}
            mappings = self.architecture.weight_map(self.args, self.layout)
            unmapped = dict.fromkeys(unmapped_names(self.architecture, self.args, names))
            self.unmapped = PartialReader(stored, unmapped)
            theirs = PartialReader(stored, [name for name in names if name not in unmapped])
            _check_theirs(theirs.tensors, mappings)
            steps = [ConverterStep(m.theirs, m.ours, m.load) for m in mappings]
            self._ours = TensorConverter(steps, theirs.tensors, theirs.read)
            self.tensors: Mapping[str, TensorSpec] = self._ours.specs
            _check_ours(self.tensors, self.args)
        except ValueError as error:
            where = str(folder)
            raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from None

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def z_loss(self) -> float:
        """Weight of the router z-loss in each layer of the release's training (``moe_z_loss_coeff``, as Megatron calls it); 0: none."""
        text = self.config.get("text_config")
        found = (text if isinstance(text, Mapping) else self.config).get("moe_z_loss_coeff")
        return float(found) if isinstance(found, (int, float)) and found > 0 else 0.0

    def read(self, name: str) -> Tensor:
        return self._ours(name)

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        # In the converter's order, so that every tensor of the files is read once.
        in_order = {name: tensors[name] for name in self.tensors if name in tensors}
        copy_into(in_order, self._ours.part)


def _check_is_release(folder: Path, config: Config) -> None:
    """Refuse a model that to-hf wrote whole."""
    if config.get("model_type") != OUR_MODEL_TYPE:
        return
    flavor = folder / model_config.FILE_NAME
    if not flavor.is_file():
        raise ValueError(
            f"{folder} was written by to-hf --part whole, but has no {flavor.name}; write or copy it again"
        )
    raise ValueError(
        f"{folder} was written by to-hf --part whole and needs no import: it is a checkpoint as it is, with model.flavor = "
        f'"{flavor}"'
    )


def unmapped_names(
    architecture: Architecture, args: ModelArgs, names: Collection[str]
) -> list[str]:
    """The released tensor ``names`` without a counterpart in our network, by ``Architecture.unmapped``."""
    patterns = architecture.unmapped(args, names)
    return [name for name in names if any(re.match(p, name) for p in patterns)]


def _under_architecture_names(
    slices: Mapping[str, TensorSlice], architecture: Architecture, args: ModelArgs
) -> dict[str, TensorSlice]:
    """The tensors of the files without those that are computed from the config. Names get the architecture's prefixes if they do not
    have what it asks for as they are."""
    check_merged(slices)
    shapes = {name: piece.spec.shape for name, piece in slices.items()}
    used = _names_of(architecture.weight_map(args, shapes))
    computed = set(computed_from_config(slices)) - used.keys()
    left = [name for name in slices if name not in computed]
    if used.keys() <= slices.keys():
        return {name: slices[name] for name in left}
    new = names_by_architecture(left, _names_of(architecture.weight_map(args, {})))
    return {new[name]: slices[name] for name in left}


def _without_tied_output(
    stored: PartReader, architecture: Architecture, args: ModelArgs
) -> list[str]:
    """The names of ``stored`` without a copy of the embedding table in the place of a tied output projection.

    Raises:
        ValueError: the output projection has values of its own.
    """
    names = list(stored.tensors)
    if not args.tie_embeddings:
        return names
    untied = architecture.weight_map(replace(args, tie_embeddings=False), _shapes(stored))
    their = {our: m.theirs[0] for m in untied for our in m.ours if len(m.ours) == 1}
    table, output = their.get("tok_embeddings.weight", ""), their.get("output.weight", "")
    if table not in stored.tensors or output not in stored.tensors:
        return names
    if not torch.equal(stored.read(output), stored.read(table)):
        raise ValueError(
            f"{CONFIG} ties the output projection to the embeddings (tie_word_embeddings), but {output} differs from {table}; set "
            "tie_word_embeddings = false if the projection was trained by itself, else remove the tensor"
        )
    return [name for name in names if name != output]


def _shapes(stored: PartReader) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in stored.tensors.items()}


def _names_of(mappings: Iterable[WeightMapping]) -> dict[str, None]:
    return dict.fromkeys(name for mapping in mappings for name in mapping.theirs)


def _check_theirs(specs: Mapping[str, TensorSpec], mappings: list[WeightMapping]) -> None:
    used = _names_of(mappings)
    missing = [name for name in used if name not in specs]
    more = [name for name in specs if name not in used]
    outputs = [m.theirs for m in mappings if m.ours == ("output.weight",)]
    if missing and (missing,) == tuple(map(list, outputs)):
        raise ValueError(
            f"lacks {missing[0]}, the output projection, although {CONFIG} does not tie it to the embeddings; set tie_word_embeddings "
            "= true if the embedding table serves as both"
        )
    if missing:
        instead = f"; it holds {some_of(more)}, which {CONFIG} does not ask for" if more else ""
        raise ValueError(f"lacks {some_of(missing)}, which {CONFIG} asks for{instead}")
    if more:
        raise ValueError(
            f"holds {some_of(more)}, which no part of our model corresponds to; without them it would be another model"
        )
    for name, spec in specs.items():
        if spec.dtype not in _FLOATS:
            raise ValueError(
                f"{name} is {str(spec.dtype).removeprefix('torch.')}, as in quantised models; use a release in bfloat16, float16 or "
                "float32"
            )


def _check_ours(specs: Mapping[str, TensorSpec], args: ModelArgs) -> None:
    with torch.device("meta"):
        expected = tensors_of_model(SymbioticModel(args))
    absent = absent_parts(specs)
    for name, spec in expected.items():
        if part_of(name) in absent:
            continue
        assert name in specs, f"no weight mapping of the architecture gives {name}"
        if specs[name].shape != spec.shape:
            raise ValueError(
                f"{name} has shape {specs[name].shape} in its files, {spec.shape} by {CONFIG}"
            )
    assert specs.keys() <= expected.keys(), "a weight mapping gives a tensor that the model lacks"


def open_model(folder: Path, weights: Weights = "trained") -> CheckpointReader:
    """A distributed checkpoint, a released model, or safetensors under our names, whichever the folder contains. Only the first can have
    other weights than "trained".

    Raises:
        ValueError: it contains none of them, lacks the ``weights``, or the model is damaged.
    """
    if not (folder / ".metadata").is_file():
        if weights == "ema" and (has_weights(folder) or (folder / CONFIG).is_file()):
            check_has_average(folder, ())
        if has_weights(folder) and (folder / model_config.FILE_NAME).is_file():
            return SafetensorsModel(folder)
        if has_weights(folder) or (folder / CONFIG).is_file():
            return HuggingFaceModel(folder)
    return DistributedCheckpoint(folder, weights)


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
