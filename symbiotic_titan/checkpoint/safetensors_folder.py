"""A folder of safetensors files with an index, as released models come."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from symbiotic_titan.checkpoint.safetensors_file import Place, read_places, write_file
from symbiotic_titan.checkpoint.stored_model import TensorKind, some_of, total_bytes
from symbiotic_titan.config.rows import check_value

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def has_weights(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        ValueError: there is no such file, or it is not JSON, or no table.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a table, got {type(values).__name__}")
    return values


def places_in(folder: Path) -> dict[str, Place]:
    """All tensors of the folder: those that its index names, or those of its only file.

    Raises:
        ValueError: no weights in this format, a file that is missing or damaged, or a tensor that is not where the index says.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(
                f"{folder} has neither {INDEX} nor {SINGLE}; weights are read in the safetensors format only"
            )
        return read_places(folder / SINGLE)
    file_of = read_table(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map, which says where each tensor is")
    check_value(f"{folder / INDEX}: weight_map", file_of, dict[str, str])
    files = dict.fromkeys(file_of.values())
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names: {some_of(missing)}"
        )
    places = {name: read_places(folder / name) for name in files}
    absent = [name for name, file in file_of.items() if name not in places[file]]
    if absent:
        raise ValueError(
            f"{folder / INDEX} names {some_of(absent)}, but {file_of[absent[0]]} does not hold it"
        )
    return {name: places[file][name] for name, file in file_of.items()}


def fill(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Copy what ``read`` gives into ``tensors``; a sharded one takes its own part."""
    for name, target in tensors.items():
        full = read(name)
        if isinstance(target, DTensor):
            mesh, placements = target.device_mesh, target.placements
            full = full.to(device=mesh.device_type)
            full = distribute_tensor(full, mesh, placements, src_data_rank=None)
        target.detach().copy_(full)


class PlacedTensors:
    """Tensors under the names that they have in their files: ``StoredTensors``."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places
        self.tensors: Mapping[str, TensorKind] = {n: place.kind for n, place in places.items()}

    def read(self, name: str) -> Tensor:
        return self._places[name].read()


class SafetensorsModel(PlacedTensors):
    """A whole model under our names: a ``StoredModel``.

    Raises:
        ValueError: as ``places_in``.
    """

    step = None

    def __init__(self, folder: Path) -> None:
        super().__init__(places_in(folder))
        self.folder = folder

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        fill(tensors, self.read)


def write_folder(
    folder: Path,
    kinds: Mapping[str, TensorKind],
    value: Callable[[str], Tensor],
    shard_bytes: int,
) -> None:
    """Write files of at most ``shard_bytes`` (more where a single tensor has more) and, last, the index. ``value(name)`` is called
    once for each, just before it is written.

    Raises:
        OSError: the disk is full, or the like.
    """
    shards = list(_shards(kinds, shard_bytes))
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: kinds[name] for name in names}, value)
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes(kinds.values())}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(kinds: Mapping[str, TensorKind], shard_bytes: int) -> Iterator[list[str]]:
    """Names by file, in order."""
    names: list[str] = []
    size = 0
    for name, kind in kinds.items():
        if names and size + kind.num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += kind.num_bytes
    if names:
        yield names
