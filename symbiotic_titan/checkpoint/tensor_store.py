"""Tensors of a distributed checkpoint, read one at a time and written one at a time: the model is never whole in memory.

A checkpoint is a folder that torch.distributed.checkpoint wrote on any number of ranks. The model's tensors lie in it under
their bare names, whether the folder holds a whole training state or the model alone.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from symbiotic_titan.checkpoint.resume import damage_of

# What a training checkpoint holds besides the model.
_TRAINING_STATE = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


@dataclass(frozen=True)
class TensorKind:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        return torch.Size(self.shape).numel()


@contextmanager
def _single_process():
    """torch warns when one process saves or loads by itself, which is what happens here on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


class _CachedReader(FileSystemReader):
    """Reads the metadata once; a training checkpoint's can be large, and every tensor's load asks for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class StoredModel:
    """The model part of a checkpoint.

    Raises:
        ValueError: the folder is no distributed checkpoint, or not a complete one.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"checkpoint {folder}: no such folder")
        damage = damage_of(folder)
        if not (folder / ".metadata").is_file() and any(folder.glob("step-*")):
            damage = "it is a folder of checkpoints; name one of them"
        if damage is None and not (folder / ".metadata").is_file():
            damage = "it is not a distributed checkpoint"
        if damage is not None:
            raise ValueError(f"checkpoint {folder}: {damage}")
        self.folder = folder
        self._reader = _CachedReader(folder)
        self.tensors = {
            name: TensorKind(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_TRAINING_STATE)
        }

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        kind = self.tensors[name]
        tensors = {name: torch.empty(kind.shape, dtype=kind.dtype)}
        self.read_into(tensors)
        return tensors[name]

    def read_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill ``tensors`` in place; a sharded one reads its own part. Not collective."""
        with _single_process():
            dcp.load(tensors, storage_reader=self._reader, no_dist=True)

    @property
    def step(self) -> int | None:
        """The training step it was saved at; None where it holds the model alone."""
        if "train_state.step" not in self._reader.read_metadata().state_dict_metadata:
            return None
        state = {"train_state": {"step": 0}}
        with _single_process():
            dcp.load(state, storage_reader=self._reader, no_dist=True)
        return state["train_state"]["step"]


class _StreamingPlanner(DefaultSavePlanner):
    """Asks for a tensor's values at the moment that they are written."""

    def __init__(self, value: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._value = value

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.fqn is not None and write_item.tensor_data is not None
        tensor = self._value(write_item.index.fqn)
        assert tensor.shape == write_item.tensor_data.size
        assert tensor.dtype == write_item.tensor_data.properties.dtype
        return tensor


def write_model(
    folder: Path,
    tensors: Mapping[str, TensorKind],
    value: Callable[[str], torch.Tensor],
    finish: Callable[[Path], None] = lambda folder: None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of ``tensors``; ``value(name)`` is called for each in order, just before it is written.

    It grows in ``<folder>.incomplete`` and is renamed when it is whole and ``finish`` has added its own files, so ``folder`` never
    looks complete before it is. One file per tensor: torch keeps a file's tensors in memory until the file is closed.

    Raises:
        ValueError: ``folder`` exists.
        OSError: the disk is full, or the like.
    """
    check_target(folder, overwrite=overwrite)
    unfinished = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)
    state = {
        name: torch.empty(kind.shape, dtype=kind.dtype, device="meta")
        for name, kind in tensors.items()
    }
    writer = FileSystemWriter(unfinished, single_file_per_rank=False, thread_count=1)
    unfinished.mkdir(parents=True)
    try:
        with _single_process():
            dcp.save(state, storage_writer=writer, planner=_StreamingPlanner(value), no_dist=True)
        finish(unfinished)
        _put_in_place(unfinished, folder)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, OSError):
            raise OSError(f"writing {folder} failed: {cause}; nothing of it was kept") from None
        raise cause from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Pass if a checkpoint may be written to ``folder``.

    Raises:
        ValueError: it exists and must not be overwritten, or is not a checkpoint.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise ValueError(f"{folder} exists; choose another --out, or replace it with --overwrite")
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is no checkpoint and is not overwritten; choose another --out")


def _put_in_place(finished: Path, folder: Path) -> None:
    if not folder.exists():
        finished.rename(folder)
        return
    old = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old)
