"""Distributed checkpoints, read and written tensor by tensor: the model is never whole in memory.

A checkpoint is a folder written by torch.distributed.checkpoint on any number of ranks. The model's tensors have their bare names
in it, whether or not it has training state too.
"""

import io
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, WriteItem
from torch.serialization import get_unsafe_globals_in_checkpoint

from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.weights.damage import read_metadata
from symbiotic_titan.weights.digests import DigestingWriter, in_order, read_sums, wrong_file
from symbiotic_titan.weights.metadata import REMEDY, UnsafeContent
from symbiotic_titan.weights.new_folder import new_folder
from symbiotic_titan.weights.reader import Entries, TensorSpec, total_bytes

# Prefixes of what a training checkpoint has besides the model.
_TRAINING_STATE = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.", "ema.")
AVERAGE = "ema.weights."  # of averaged weights, before their names


@contextmanager
def _single_process():
    """Silences torch's warning that a single process saves or loads, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


class SafePlanner(DefaultLoadPlanner):
    """Loads entries that are not tensors with ``weights_only``; upstream's planner unpickles them. Numbers and texts stay what they are:
    the state that is given says which.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded, before = torch.load(value, weights_only=True), self.state_dict[name]
        if type(before) in (int, str) and type(loaded) is not type(before):
            raise ValueError(f"a {type(loaded).__name__} in place of a {type(before).__name__}")
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


class SafeReader(FileSystemReader):
    """Reads what a ``SafePlanner`` asks for. Metadata come from ``load_metadata``, never from here.

    Raises:
        UnsafeContent: an entry names a function or class that ``weights_only`` does not allow; the message names file and entry.
        ValueError: an entry is damaged; as above.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        raise NotImplementedError

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        try:
            return super().read_data(plan, planner)
        except Exception:
            for item in plan.items:  # again one by one, to find the entry
                try:
                    super().read_data(replace(plan, items=[item]), planner)
                except Exception as error:
                    raise self._explained(item, error) from error
            raise

    def _explained(self, item: ReadItem, error: Exception) -> Exception:
        place = self.storage_data[item.storage_index]
        where = f"checkpoint {self.path}: {place.relative_path}"
        entry = f"its entry {item.storage_index.fqn}"
        if names := _unsafe_names(Path(self.path) / place.relative_path, place):
            text = ", ".join(names)[:100]
            return UnsafeContent(
                f"{where}: {entry} names {text!r}, which checkpoints have no use for: {REMEDY}"
            )
        return ValueError(
            f"{where} cannot be read, its bytes are damaged ({entry}, {type(error).__name__}); use another copy of the checkpoint"
        )


def cause_of(error: CheckpointException) -> BaseException:
    """What went wrong on one of the ranks, rather what a ``SafeReader`` explained."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, ValueError)), causes[0])


def _unsafe_names(file: Path, place: Any) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(place.offset)
            return get_unsafe_globals_in_checkpoint(io.BytesIO(stream.read(place.length)))
    except Exception:  # noqa: BLE001  whatever the disassembly of damaged bytes raises
        return []


class _CachedReader(SafeReader):
    """Has the metadata: a training checkpoint's can be large, and dcp.load reads it anew for every tensor."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class DistributedCheckpoint:
    """The model in a distributed checkpoint: a ``CheckpointReader``. A file is compared with its digest before the first read of it, as a
    whole, with the training state that it may hold.

    weights: "ema" reads the average that the run kept, see [ema], for the parameters that have one.

    Raises:
        ValueError: the folder is not a distributed checkpoint, or an incomplete one, or has no average.
    """

    def __init__(self, folder: Path, weights: Weights = "trained") -> None:
        if not folder.is_dir():
            raise ValueError(f"checkpoint {folder}: no such folder")
        metadata, damage = read_metadata(folder)
        if not (folder / ".metadata").is_file() and any(folder.glob("step-*")):
            damage = "it is a folder of checkpoints; name one of them"
        if metadata is None or damage is not None:
            raise ValueError(f"checkpoint {folder}: {damage}")
        self.folder = folder
        self._reader = _CachedReader(folder, metadata)
        self._sums = read_sums(folder) or {}
        self._files: dict[str, set[str]] = {}  # entry -> its files
        self._verified: set[str] = set()
        for index, place in (metadata.storage_data or {}).items():
            if place.relative_path in self._sums:
                self._files.setdefault(index.fqn, set()).add(place.relative_path)
        stored = {
            key: TensorSpec(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        # Our name -> the checkpoint's.
        self._keys = {key: key for key in stored if not key.startswith(_TRAINING_STATE)}
        self.averaged = {
            key.removeprefix(AVERAGE) for key in stored if key.startswith(AVERAGE)
        } & self._keys.keys()
        if weights == "ema":
            check_has_average(folder, self.averaged)
            self._keys |= {name: f"{AVERAGE}{name}" for name in self.averaged}
        self.tensors: Mapping[str, TensorSpec] = {
            name: stored[key] for name, key in self._keys.items()
        }

    def read(self, name: str) -> torch.Tensor:
        spec = self.tensors[name]
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype)}
        self.read_into(tensors)
        return tensors[name]

    def read_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See ``CheckpointReader``. Raises ValueError where a file's bytes are damaged, or name what may run code."""
        self._load({self._keys[name]: tensor for name, tensor in tensors.items()})

    @property
    def step(self) -> int | None:
        """The training step of the checkpoint; None if it has no training state."""
        return self._number("train_state.step")

    @property
    def num_updates(self) -> int | None:
        """How often the average in it was updated; None if it has none."""
        return self._number("ema.num_updates")

    def _number(self, key: str) -> int | None:
        if key not in self._reader.read_metadata().state_dict_metadata:
            return None
        state = {key: 0}
        self._load(state)
        return state[key]

    def _verify(self, names: Iterable[str]) -> None:
        """Raises ValueError if a file that has one of the entries ``names`` is damaged."""
        files = {file for name in names for file in self._files.get(name, ())}
        damage = wrong_file(self.folder, self._sums, in_order(files - self._verified))
        if damage is not None:
            raise ValueError(
                f"checkpoint {self.folder}: {damage}; use another copy of the checkpoint"
            )
        self._verified |= files

    def _load(self, state: dict[str, Any]) -> None:
        self._verify(state)
        try:
            with _single_process():
                dcp.load(state, storage_reader=self._reader, planner=SafePlanner(), no_dist=True)
        except CheckpointException as error:
            raise cause_of(error) from None


def check_has_average(
    folder: Path, averaged: Collection[str], key: str = "weights = 'ema'"
) -> None:
    """Pass if the checkpoint in ``folder`` has averages, which are those of the parameters ``averaged``.

    Raises:
        ValueError: it has none; the message names the ``key`` that asks for them.
    """
    if not averaged:
        raise ValueError(
            f"{key}: {folder} has no averaged weights; use 'trained', or a checkpoint of a run with ema.enable = true"
        )


def check_holds(folder: Path, saved: Entries, needed: Iterable[str]) -> None:
    """Pass if the checkpoint in ``folder``, with the entries ``saved``, has all those ``needed``.

    Raises:
        ValueError: names the first that is missing.
    """
    name = next((name for name in needed if name not in saved), None)
    if name is None:
        return
    if name.startswith("optimizer.state."):
        raise ValueError(
            f"optimizer.builder: checkpoint {folder} has no {name}, which the optimizer of this run keeps: another optimizer saved it; "
            "resume with the one it was saved with, or start another job.dump_folder with checkpoint.initial_load_path"
        )
    raise ValueError(
        f"checkpoint {folder} has no {name}, which this run would go on with; resume with the settings it was saved with, or start "
        "another job.dump_folder with checkpoint.initial_load_path"
    )


class _StreamingPlanner(DefaultSavePlanner):
    """Computes a tensor's values only when they are written: the state given to dcp.save has meta tensors."""

    def __init__(self, value: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._value = value

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.fqn is not None and write_item.tensor_data is not None
        tensor = self._value(write_item.index.fqn)
        assert tensor.shape == write_item.tensor_data.size
        assert tensor.dtype == write_item.tensor_data.properties.dtype
        return tensor


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError that caused ``error``, if any: torch.save raises another error while handling it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def write_model(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    value: Callable[[str], torch.Tensor],
    finish: Callable[[Path], None] = lambda folder: None,
    *,
    finish_bytes: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of ``tensors``; ``value(name)`` is called for each in order, just before it is written.

    ``finish`` adds its own files to the folder, about ``finish_bytes``. The folder gets its name only after the last write, so an
    interrupted one never looks complete.

    Raises:
        ValueError: ``folder`` exists, or the disk has no room for it.
        OSError: writing failed.
    """
    state = {name: spec.placeholder() for name, spec in tensors.items()}
    size = total_bytes(tensors.values()) + finish_bytes
    with new_folder(folder, overwrite=overwrite, num_bytes=size) as unfinished:
        # One file per tensor: torch keeps the tensors of a file in memory until the file is closed.
        writer = DigestingWriter(unfinished, single_file_per_rank=False, thread_count=1)
        planner = _StreamingPlanner(value)
        try:
            with _single_process():
                dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise _disk_error(cause) or cause from None
        finish(unfinished)
