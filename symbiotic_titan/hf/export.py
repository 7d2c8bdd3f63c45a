"""Stored models as safetensors: what understands as a regular model of the backbone, or the whole under our names.

(1) A group's experts take the place of all the backbone's experts: the same network with fewer of them. (2) The backbone's links
arrange our tensors as its own, a link at a time; what the release has besides goes back as it came. (3) Files are written as the
tensors come; the folder appears when all are there.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.hf.architectures.base import Link
from symbiotic_titan.hf.architectures.registry import backbone_of
from symbiotic_titan.hf.model import (
    CONFIG,
    SOURCE,
    Arranged,
    Recipe,
    keep_source,
    left_behind_of,
    read_layout,
    small_files,
    source_bytes,
    unused_names,
)
from symbiotic_titan.model import model_config as shape_file
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import TEXT, VIT
from symbiotic_titan.weights.compatibility import (
    check_is_model,
    tensors_of_model,
)
from symbiotic_titan.weights.new_folder import new_folder
from symbiotic_titan.weights.reader import (
    InDtype,
    StoredModel,
    TensorKind,
    Watch,
    nobody,
    some_of,
    total_bytes,
    watched,
)
from symbiotic_titan.weights.safetensors import (
    read_table,
    write_folder,
)

WHOLE_REMEDY = "--part whole writes any model, for our own loader"

# Layers of a decoder beyond those that this network runs; a setting of config.json says how many there are.
_LAYER = re.compile(r".*\blanguage_model\.layers\.\d+\.")
_NUM_FURTHER_LAYERS = "num_nextn_predict_layers"


@dataclass(frozen=True)
class Export:
    """What was written: tensors by their names in the files; those of ours that were left out; and what the release had and the
    folder has not: it has no part in our model, and either nobody kept it or it is a layer with another number of experts."""

    written: Mapping[str, TensorKind]
    left_out: Mapping[str, TensorKind]
    missing: list[str]


def find_source(checkpoint: Path, flavor: str) -> Path:
    """The folder with what the released model had besides tensors: in the checkpoint, or beside the model.json that the flavor is.

    Raises:
        ValueError: the model does not come from a released one.
    """
    beside = [checkpoint, *([Path(flavor).parent] if flavor.endswith(".json") else [])]
    for folder in beside:
        if (folder / SOURCE / CONFIG).is_file():
            return folder / SOURCE
    raise ValueError(
        f"no {SOURCE}/{CONFIG} in {' or '.join(map(str, beside))}: nothing says which released architecture the model has. Use the "
        f"model.json of symbiotic convert from-hf as model.flavor; {WHOLE_REMEDY}"
    )


def understanding_group(groups: tuple[ExpertGroup, ...]) -> ExpertGroup:
    """The group in which both text and ViT tokens route.

    Raises:
        ValueError: they have a group each.
    """
    text, vit = (next(group for group in groups if m in group.modalities) for m in (TEXT, VIT))
    if text != vit:
        raise ValueError(
            f"text tokens route in the group {text.name} and ViT tokens in {vit.name}; a regular model has one pool of experts for "
            f"both, so there is none to write; {WHOLE_REMEDY}"
        )
    return text


def export_understanding(
    stored: StoredModel,
    args: ModelArgs,
    source: Path,
    out: Path,
    *,
    shard_bytes: int,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    watch: Watch = nobody,
) -> Export:
    """Write what text and ViT tokens use of ``stored``, which ``args`` shape, as a model of its backbone, with what the release had
    besides. An unpartitioned one is written as it came. ``dtype``: of all tensors (None: as stored).

    Raises:
        ValueError: ``stored`` is of another model, the backbone has no such model, or ``out`` exists.
        OSError: the disk is full, or the like.
    """
    check_is_model(stored, _tensors(args))
    group = understanding_group(args.groups)
    as_backbone = replace(args, num_experts=group.num_experts, groups=())
    old_config = read_table(source / CONFIG)
    backbone = backbone_of(old_config)
    try:
        config = backbone.config(old_config, as_backbone)
    except ValueError as error:
        raise ValueError(f"{error}; {WHOLE_REMEDY}") from None
    layout = read_layout(source)
    links = backbone.links(as_backbone, layout)
    values, used = _as_theirs(stored, links, group.name, dtype)
    besides = InDtype(left_behind_of(stored, source), dtype)
    unused = unused_names(backbone, as_backbone, layout)
    other_experts = as_backbone.num_experts != backbone.model_args(old_config).num_experts
    gone = _expert_layers(unused) if other_experts else ()
    back = [n for n in unused if n in besides.tensors and not n.startswith(gone)]
    missing = [name for name in unused if name not in back]
    if any(_LAYER.match(name) for name in missing):
        _set_everywhere(config, _NUM_FURTHER_LAYERS, 0)
    kinds = values.kinds | {name: besides.tensors[name] for name in back}
    value = _first_of((values.kinds, values), (besides.tensors, besides.read))
    with new_folder(out, overwrite=overwrite, num_bytes=total_bytes(kinds.values())) as folder:
        for path in small_files(source):
            shutil.copyfile(path, folder / path.name)
        _write_config(folder / CONFIG, config, values.kinds)
        write_folder(folder, kinds, watched(value, kinds, watch), shard_bytes)
    left_out = {name: kind for name, kind in stored.tensors.items() if name not in used}
    return Export(kinds, left_out, missing)


def _as_theirs(
    stored: StoredModel, links: Iterable[Link], group: str, dtype: torch.dtype | None
) -> tuple[Arranged, set[str]]:
    """(the backbone's tensors with the experts of ``group``, the names of ours that they are made of).

    Raises:
        ValueError: ``stored`` lacks some.
    """
    recipes = [
        Recipe(tuple(_in_group(name, group) for name in link.ours), link.theirs, link.save)
        for link in links
    ]
    used = {name for recipe in recipes for name in recipe.parts}
    if lacking := sorted(used - stored.tensors.keys()):
        raise ValueError(f"checkpoint {stored.folder} lacks {some_of(lacking)}; {WHOLE_REMEDY}")
    as_asked = InDtype(stored, dtype)
    return Arranged(recipes, as_asked.tensors, as_asked.read), used


def _expert_layers(names: Iterable[str]) -> tuple[str, ...]:
    """How the names of those layers begin that have experts."""
    found = [_LAYER.match(name) for name in names if ".experts." in name]
    return tuple({match[0] for match in found if match})


def _set_everywhere(config: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key`` in ``config`` and its tables where it is stated."""
    for table in _tables(config):
        if key in table:
            table[key] = value


def _tables(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(table for table in config.values() if isinstance(table, dict))]


def _first_of(
    *sources: tuple[Mapping[str, TensorKind], Callable[[str], Tensor]],
) -> Callable[[str], Tensor]:
    """Reads a name from the first that has it."""
    return lambda name: next(read for kinds, read in sources if name in kinds)(name)


def export_whole(
    stored: StoredModel,
    args: ModelArgs,
    out: Path,
    *,
    shard_bytes: int,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    watch: Watch = nobody,
) -> Export:
    """Write all of ``stored`` under our names, with its shape; ``open_model`` reads it.

    Raises:
        ValueError, OSError: as ``export_understanding``.
    """
    check_is_model(stored, _tensors(args))
    values = InDtype(stored, dtype)
    kinds = values.tensors
    size = total_bytes(kinds.values()) + source_bytes(stored)
    with new_folder(out, overwrite=overwrite, num_bytes=size) as folder:
        shape_file.write_model_config(folder / shape_file.NAME, args)
        keep_source(stored, folder)
        write_folder(folder, kinds, watched(values.read, kinds, watch), shard_bytes)
    return Export(kinds, {}, [])


def _write_config(path: Path, config: dict[str, Any], kinds: Mapping[str, TensorKind]) -> None:
    """Write config.json with the dtype that most numbers have."""
    sizes: dict[torch.dtype, int] = {}
    for kind in kinds.values():
        sizes[kind.dtype] = sizes.get(kind.dtype, 0) + kind.num_values
    dtype = str(max(sizes, key=lambda d: sizes[d])).removeprefix("torch.")
    for table in _tables(config):
        for key in ("dtype", "torch_dtype"):  # the latter before transformers 5
            if key in table or (table is config and key == "dtype" and "torch_dtype" not in config):
                table[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensors(args: ModelArgs) -> dict[str, TensorKind]:
    with torch.device("meta"):
        return tensors_of_model(SymbioticModel(args))


def _in_group(name: str, group: str) -> str:
    """Our name of a tensor of one pool, in a model where ``group`` is that pool."""
    for part in (".moe.router.", ".moe.experts."):
        name = name.replace(f"{part}all.", f"{part}{group}.")
    return name
