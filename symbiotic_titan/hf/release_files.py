"""What a released model has besides the tensors that we map: tokenizer, processor, licence, unmapped tensors.

A checkpoint made from a release keeps them in a subfolder, so that an export can write them back.
"""

import shutil
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.weights.reader import CheckpointReader, TensorReader, total_bytes
from symbiotic_titan.weights.safetensors import (
    SliceReader,
    read_slices,
    write_file,
)

# The folder inside a checkpoint.
RELEASE_FILES = "hugging_face"
LAYOUT = "layout.json"
# The name is from before the tensors were called unmapped; checkpoints on disk have it.
UNMAPPED = "left_behind.safetensors"
_LAYOUT_KIND = "layout of a released model"

# Tokenizers, processors, chat templates, terms of use, up to LARGEST bytes each. Code and weights in other formats are not copied.
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_NAMES = ("LICENSE", "NOTICE")
LARGEST = 64 * 2**20


def copy_release_files(reader: CheckpointReader, out: Path) -> None:
    """Copy the release files of ``reader``'s model into the checkpoint ``out``, if the model is, or came from, a release."""
    if not isinstance(reader, HuggingFaceModel):
        if (reader.folder / RELEASE_FILES).is_dir():
            shutil.copytree(reader.folder / RELEASE_FILES, out / RELEASE_FILES)
        return
    (out / RELEASE_FILES).mkdir()
    for path in small_files(reader.folder):
        shutil.copyfile(path, out / RELEASE_FILES / path.name)
    shapes = {name: list(shape) for name, shape in reader.layout.items()}
    write_json(out / RELEASE_FILES / LAYOUT, _LAYOUT_KIND, {"shapes": shapes})
    if reader.unmapped.tensors:
        write_file(out / RELEASE_FILES / UNMAPPED, reader.unmapped.tensors, reader.unmapped.read)


def release_files_bytes(reader: CheckpointReader) -> int:
    """How many bytes ``copy_release_files`` writes, without the small files."""
    if isinstance(reader, HuggingFaceModel):
        return total_bytes(reader.unmapped.tensors.values())
    kept = reader.folder / RELEASE_FILES / UNMAPPED
    return kept.stat().st_size if kept.is_file() else 0


def unmapped_tensors(reader: CheckpointReader, release_files: Path) -> TensorReader:
    """The unmapped tensors of the release that ``reader`` reads, or else those kept in ``release_files``, a checkpoint's folder
    ``RELEASE_FILES``. Older versions kept none there."""
    if isinstance(reader, HuggingFaceModel):
        return reader.unmapped
    kept = release_files / UNMAPPED
    return SliceReader(read_slices(kept) if kept.is_file() else {})


def small_files(folder: Path) -> list[Path]:
    """The files of a released model other than weights and code."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in _SUFFIXES or path.stem in _NAMES)
        and not path.name.endswith(".index.json")
        and path.name != LAYOUT
        and path.stat().st_size <= LARGEST
    ]


def read_layout(release_files: Path) -> dict[str, tuple[int, ...]]:
    """Released tensor name -> shape, as a checkpoint's folder ``RELEASE_FILES`` has them.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = release_files / LAYOUT
    shapes: dict[str, Any] = read_json(path, _LAYOUT_KIND, ("shapes",))["shapes"]
    check_value(f"{_LAYOUT_KIND}: {path}: shapes", shapes, dict[str, list[int]])
    return {name: tuple(shape) for name, shape in shapes.items()}
