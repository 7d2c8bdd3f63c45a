"""Exports checkpoints as safetensors: the part for text and ViT tokens as a regular model of its released architecture, or the whole
model under our names.

In the former, the experts of one group become all experts of the released architecture: the same network with fewer experts. The
architecture's weight mappings turn our tensors into the release's, and unmapped tensors are written back unchanged. Each tensor is
written as soon as it is read; the folder appears once it is complete.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.hf.architectures.base import (
    WeightMapping,
    architecture_of,
)
from symbiotic_titan.hf.converter import (
    ConverterStep,
    TensorConverter,
)
from symbiotic_titan.hf.fold import (
    Folding,
    FoldingReader,
    check_foldable,
    folded,
)
from symbiotic_titan.hf.model import (
    CONFIG,
    OUR_MODEL_TYPE,
    unmapped_names,
)
from symbiotic_titan.hf.quantised import without_quantization
from symbiotic_titan.hf.release_files import (
    RELEASE_FILES,
    copy_release_files,
    read_layout,
    release_files_bytes,
    release_files_of,
    unmapped_tensors,
)
from symbiotic_titan.hf.tokenizer_files import (
    RunTokenizer,
    files_of_export,
    named_class,
    tokenizer_note,
)
from symbiotic_titan.model import model_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import MODALITY_NAMES, TEXT, VIT
from symbiotic_titan.weights.compatibility import (
    check_is_model,
    tensors_of_model,
)
from symbiotic_titan.weights.new_folder import new_folder
from symbiotic_titan.weights.reader import (
    CastingReader,
    CheckpointReader,
    ProgressCallback,
    TensorReader,
    TensorSpec,
    no_progress,
    reporting_progress,
    some_of,
    total_bytes,
)
from symbiotic_titan.weights.safetensors import (
    read_table,
    write_folder,
)

WHOLE_REMEDY = "--part whole writes any model, for our own loader"

# A decoder layer, and the setting of config.json that counts those which this network does not run, after the last that it does.
_LAYER = re.compile(r".*\blanguage_model\.layers\.\d+\.")
# (part, pool, the rest) of the name of a tensor of experts or routers.
_POOL = re.compile(r"(layers\.\d+\.moe\.(?:router|experts)\.)(\w+)(\..*)")
_NUM_FURTHER_LAYERS = "num_nextn_predict_layers"
# An embedding table and an output projection that such a layer has for itself.
_TABLES = (".embed_tokens.", ".shared_head.head.")


@dataclass(frozen=True)
class Export:
    """What was written.

    written   tensors by their names in the files.
    left_out  our tensors that were not written.
    missing   unmapped tensors of the release that were not written: the checkpoint lacks them, or their layer has another number
              of experts, or wider ones.
    note      what a user must know of the written tokenizer; None: nothing.
    folding   how the shared expert was folded into the routed experts; None if it was not.
    """

    written: Mapping[str, TensorSpec]
    left_out: Mapping[str, TensorSpec]
    missing: list[str]
    note: str | None = None
    folding: Folding | None = None


def find_release_files(checkpoint: Path, flavor: str, *others: Path) -> Path:
    """Where the files of a checkpoint's release are: with the checkpoint, beside the model.json that ``flavor`` names, or with one of
    ``others``.

    Raises:
        ValueError: there is none: the model does not come from a release.
    """
    parents = [checkpoint, *([Path(flavor).parent] if flavor.endswith(".json") else []), *others]
    for found in map(release_files_of, parents):
        if found is not None:
            return found
    raise ValueError(
        f"no {RELEASE_FILES}/{CONFIG} in {' or '.join(map(str, parents))}: nothing says which released architecture the model has. "
        f"Name the release, or a checkpoint made from it, with --release; {WHOLE_REMEDY}"
    )


def understanding_group(groups: tuple[ExpertGroup, ...]) -> ExpertGroup:
    """The group that both text and ViT tokens are routed to.

    Raises:
        ValueError: they are routed to different groups.
    """
    text, vit = (next(group for group in groups if m in group.modalities) for m in (TEXT, VIT))
    if text != vit:
        raise ValueError(
            f"text tokens route in the group {text.name} and ViT tokens in {vit.name}; a regular model has one pool of experts for "
            f"both, so there is none to write; {WHOLE_REMEDY}"
        )
    return text


def exported_groups(args: ModelArgs, released: ModelArgs) -> dict[str, ExpertGroup]:
    """Pool of experts of the ``released`` architecture -> group of the model ``args`` that is written as it: the group of both text and
    ViT tokens as a single pool; where the release has a pool for each, the groups with the names of these pools.

    Raises:
        ValueError: the model has no such groups; or there are several, and their experts have another width or top_k.
    """
    if len(released.groups) == 1:
        return {released.groups[0].name: understanding_group(args.groups)}
    out = {}
    for m in (TEXT, VIT):
        group, pool = (next(g for g in a.groups if m in g.modalities) for a in (args, released))
        if group.name != pool.name:
            raise ValueError(
                f"{MODALITY_NAMES[m]} tokens route in the group {group.name}, in the released model in {pool.name}; only a group of "
                f"that name can be written back; {WHOLE_REMEDY}"
            )
        out[pool.name] = group
    for pool in released.groups:
        has, needs = _sizes(args, out[pool.name]), _sizes(released, pool)
        if has != needs:
            raise ValueError(
                f"the group {out[pool.name].name} has {has}, but config.json of the released model has {needs}; {WHOLE_REMEDY}"
            )
    return out


def _sizes(args: ModelArgs, group: ExpertGroup) -> dict[str, int]:
    """Width and top_k of a group of ``args``."""
    index, moe = args.groups.index(group), args.moe_args
    return {"hidden_dim": moe.hidden_dims[index], "top_k": moe.top_ks[index]}


def export_understanding(
    reader: CheckpointReader,
    args: ModelArgs,
    release_files: Path,
    out: Path,
    *,
    shard_bytes: int,
    tokenizer: RunTokenizer | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> Export:
    """Write the part of the model ``args`` for text and ViT tokens as a model of its released architecture, with its release files.
    An unpartitioned model is written unchanged. A shared expert that was made for a release without one is folded into the routed
    experts, see ``hf.fold``.

    tokenizer  of the run; None: as in the release.
    dtype      of all tensors; None: as stored.

    Raises:
        ValueError: ``reader`` reads another model, the architecture has no such model, or ``out`` exists.
        OSError: writing failed.
    """
    check_is_model(reader, _tensors(args))
    # Of a quantised release too, the tensors are written in full.
    old_config = without_quantization(read_table(release_files / CONFIG))
    architecture = architecture_of(old_config)
    released = architecture.model_args(old_config)
    groups = exported_groups(args, released)
    args = _of_pools(args, released, groups)
    try:
        source, args, folding = _without_shared(reader, args, released, groups)
        config = architecture.config(old_config, args)
    except ValueError as error:
        raise ValueError(f"{error}; {WHOLE_REMEDY}") from None
    layout = architecture.export_layout(read_layout(release_files))
    # The layout tells by the release's shapes how its files hold the experts; wider experts are then held likewise.
    as_released = replace(args, expert_hidden_dim=released.expert_hidden_dim)
    mappings = architecture.weight_map(as_released, layout)
    converted, used = _to_theirs(source, reader.folder, mappings, groups, dtype)
    unmapped = CastingReader(unmapped_tensors(reader, release_files), dtype)
    names = unmapped_names(architecture, args, layout)
    left = _other_layers(released, args, names)
    back = [name for name in names if name in unmapped.tensors and not name.startswith(left)]
    missing = [name for name in names if name not in back]
    if any(_LAYER.match(name) for name in missing):
        _set_everywhere(config, _NUM_FURTHER_LAYERS, 0)
    specs = converted.specs | {name: unmapped.tensors[name] for name in back}

    def value(name: str) -> Tensor:
        return converted(name) if name in converted.specs else unmapped.read(name)

    with new_folder(out, overwrite=overwrite, num_bytes=total_bytes(specs.values())) as folder:
        files = files_of_export(release_files, tokenizer)
        _write_files(folder, files)
        _write_config(folder / CONFIG, config, converted.specs)
        write_folder(folder, specs, reporting_progress(value, specs, progress), shard_bytes)
    left_out = {name: spec for name, spec in source.tensors.items() if name not in used}
    return Export(specs, left_out, missing, tokenizer_note(files, tokenizer), folding)


def _without_shared(
    reader: CheckpointReader,
    args: ModelArgs,
    released: ModelArgs,
    groups: Mapping[str, ExpertGroup],
) -> tuple[TensorReader, ModelArgs, Folding | None]:
    """``reader`` and ``args`` with the shared expert folded into the routed experts of ``groups`` where the released architecture has
    none; unchanged where it has one, or the model has none.

    Raises:
        ValueError: it cannot be folded.
    """
    if not args.shared_hidden_dim or released.shared_hidden_dim:
        return reader, args, None
    check_foldable(args)
    source = FoldingReader(reader, [group.name for group in groups.values()], args.route_scale)
    return source, folded(args), source.folding


def _to_theirs(
    reader: TensorReader,
    folder: Path,
    mappings: Iterable[WeightMapping],
    groups: Mapping[str, ExpertGroup],
    dtype: torch.dtype | None,
) -> tuple[TensorConverter, set[str]]:
    """(converter to the release's tensors with the experts of ``groups``, names of our tensors that it reads).

    Raises:
        ValueError: ``reader`` lacks some of these tensors.
    """
    steps = [
        ConverterStep(tuple(_in_group(name, groups) for name in m.ours), m.theirs, m.save)
        for m in mappings
    ]
    used = {name for step in steps for name in step.inputs}
    if lacking := sorted(used - reader.tensors.keys()):
        raise ValueError(f"checkpoint {folder} lacks {some_of(lacking)}; {WHOLE_REMEDY}")
    cast = CastingReader(reader, dtype)
    return TensorConverter(steps, cast.tensors, cast.read), used


def _other_layers(released: ModelArgs, args: ModelArgs, unmapped: Iterable[str]) -> tuple[str, ...]:
    """Name prefixes of unmapped layers whose experts would differ in number or width, or whose embeddings in number, from those of the
    layers before them."""
    experts = (args.num_experts, args.expert_hidden_dim)
    other: tuple[str, ...] = ()
    if experts != (released.num_experts, released.expert_hidden_dim):
        other = (".experts.",)
    if args.vocab_size != released.vocab_size:
        other += _TABLES
    found = [_LAYER.match(name) for name in unmapped if any(part in name for part in other)]
    return tuple({match[0] for match in found if match})


def _set_everywhere(config: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key`` in ``config`` and its nested tables, in each that already has it."""
    for table in _tables(config):
        if key in table:
            table[key] = value


def _tables(config: dict[str, Any]) -> list[dict[str, Any]]:
    """``config`` and every table within it."""
    inner = [table for table in config.values() if isinstance(table, dict)]
    return [config, *(table for one in inner for table in _tables(one))]


def export_whole(
    reader: CheckpointReader,
    args: ModelArgs,
    out: Path,
    *,
    shard_bytes: int,
    release_files: Path | None = None,
    tokenizer: RunTokenizer | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> Export:
    """Write all tensors under our names, with model.json; ``open_model`` reads the folder. Tokenizer and processor are written as
    other libraries read them, and a config.json of a type that only we know.

    release_files  see ``release_files_of``; None: with the checkpoint, if anywhere.
    tokenizer      of the run; None: as in the release.

    Raises:
        ValueError, OSError: as ``export_understanding``.
    """
    check_is_model(reader, _tensors(args))
    cast = CastingReader(reader, dtype)
    specs = cast.tensors
    release_files = release_files or release_files_of(reader.folder)
    files = files_of_export(release_files, tokenizer)
    config = {
        "model_type": OUR_MODEL_TYPE,
        "architectures": [SymbioticModel.__name__],
        "dtype": _main_dtype(specs),
        **model_config.values_of(args),
    }
    size = total_bytes(specs.values()) + release_files_bytes(reader, release_files)
    with new_folder(out, overwrite=overwrite, num_bytes=size) as folder:
        model_config.write_model_config(folder / model_config.FILE_NAME, args)
        copy_release_files(reader, folder, release_files)
        if release_files is not None:
            _write_files(folder / RELEASE_FILES, files)
        _write_files(folder, named_class(files))
        _write_json(folder / CONFIG, config)
        write_folder(folder, specs, reporting_progress(cast.read, specs, progress), shard_bytes)
    return Export(specs, {}, [], tokenizer_note(files, tokenizer))


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """The dtype that most parameters have."""
    sizes: dict[torch.dtype, int] = {}
    for spec in specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_values
    return str(max(sizes, key=lambda d: sizes[d])).removeprefix("torch.")


def _write_config(path: Path, config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> None:
    """Write config.json with the dtype that most parameters have."""
    dtype = _main_dtype(specs)
    for table in _tables(config):
        for key in ("dtype", "torch_dtype"):  # the latter before transformers 5
            if key in table or (table is config and key == "dtype" and "torch_dtype" not in config):
                table[key] = dtype
    _write_json(path, config)


def _tensors(args: ModelArgs) -> dict[str, TensorSpec]:
    with torch.device("meta"):
        return tensors_of_model(SymbioticModel(args))


def _of_pools(args: ModelArgs, released: ModelArgs, groups: Mapping[str, ExpertGroup]) -> ModelArgs:
    """The model ``args`` with ``groups`` alone, as the pools of the ``released`` model. A single pool has no width or top_k of its
    own: they are the model's."""
    pools = tuple(
        replace(pool, num_experts=groups[pool.name].num_experts) for pool in released.groups
    )
    sizes = _sizes(args, groups[pools[0].name]) if len(pools) == 1 else {}
    return replace(
        args,
        num_experts=sum(pool.num_experts for pool in pools),
        groups=pools,
        expert_hidden_dim=sizes.get("hidden_dim", args.expert_hidden_dim),
        top_k=sizes.get("top_k", args.top_k),
    )


def _in_group(name: str, groups: Mapping[str, ExpertGroup]) -> str:
    """Rename a tensor of a pool of the released model to one of the group that is written as this pool."""
    match = _POOL.fullmatch(name)
    return f"{match[1]}{groups[match[2]].name}{match[3]}" if match else name
