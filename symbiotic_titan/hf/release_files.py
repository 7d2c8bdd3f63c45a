"""What a released model has besides the tensors that we map: tokenizer, processor, licence, unmapped tensors.

A checkpoint made from a release keeps them in a subfolder, so that an export can write them back.
"""

import shutil
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value
from symbiotic_titan.hf.model import CONFIG, HuggingFaceModel
from symbiotic_titan.model import model_config
from symbiotic_titan.weights.reader import CheckpointReader, TensorReader, total_bytes
from symbiotic_titan.weights.safetensors import (
    SliceReader,
    read_slices,
    write_file,
)
from symbiotic_titan.weights.weight_files import has_weights

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


def release_files_of(folder: Path) -> Path | None:
    """The folder with the release files of ``folder``'s model: ``RELEASE_FILES`` inside it, or itself if it is a release; None if it
    has none."""
    if (folder / RELEASE_FILES / CONFIG).is_file():
        return folder / RELEASE_FILES
    if (folder / model_config.FILE_NAME).is_file():  # the config.json is ours
        return None
    return folder if (folder / CONFIG).is_file() and has_weights(folder) else None


def copy_release_files(
    reader: CheckpointReader, out: Path, release_files: Path | None = None
) -> None:
    """Copy the release files of ``reader``'s model into the checkpoint ``out``, if the model is, or came from, a release.
    ``release_files``: where they are, see ``release_files_of``; None: with the checkpoint, if anywhere."""
    source = _release(reader, release_files)
    if isinstance(source, Path):
        if source.is_dir():
            shutil.copytree(source, out / RELEASE_FILES)
        return
    reader = source
    (out / RELEASE_FILES).mkdir()
    for path in small_files(reader.folder):
        shutil.copyfile(path, out / RELEASE_FILES / path.name)
    shapes = {name: list(shape) for name, shape in reader.layout.items()}
    write_json(out / RELEASE_FILES / LAYOUT, _LAYOUT_KIND, {"shapes": shapes})
    if reader.unmapped.tensors:
        write_file(out / RELEASE_FILES / UNMAPPED, reader.unmapped.tensors, reader.unmapped.read)


def release_files_bytes(reader: CheckpointReader, release_files: Path | None = None) -> int:
    """How many bytes ``copy_release_files`` writes, without the small files."""
    source = _release(reader, release_files)
    if isinstance(source, HuggingFaceModel):
        return total_bytes(source.unmapped.tensors.values())
    kept = source / UNMAPPED
    return kept.stat().st_size if kept.is_file() else 0


def _release(reader: CheckpointReader, release_files: Path | None) -> HuggingFaceModel | Path:
    """The release, or the folder of a checkpoint that its files are kept in."""
    if isinstance(reader, HuggingFaceModel):
        return reader
    if release_files is None:
        return reader.folder / RELEASE_FILES
    return release_files if _is_kept(release_files) else HuggingFaceModel(release_files)


def _is_kept(release_files: Path) -> bool:
    """Whether they were kept with a checkpoint; else they are a release, with its tensors."""
    return (release_files / LAYOUT).is_file() or not has_weights(release_files)


def unmapped_tensors(reader: CheckpointReader, release_files: Path) -> TensorReader:
    """The unmapped tensors of the release that ``reader`` reads, or else those with ``release_files``, see ``release_files_of``.
    Older versions kept none in a checkpoint."""
    source = _release(reader, release_files)
    if isinstance(source, HuggingFaceModel):
        return source.unmapped
    kept = source / UNMAPPED
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
    """Released tensor name -> shape, of the release with these files, see ``release_files_of``.

    Raises:
        ValueError: the file is missing or damaged.
    """
    if not _is_kept(release_files):
        return dict(HuggingFaceModel(release_files).layout)
    path = release_files / LAYOUT
    shapes: dict[str, Any] = read_json(path, _LAYOUT_KIND, ("shapes",))["shapes"]
    check_value(f"{_LAYOUT_KIND}: {path}: shapes", shapes, dict[str, list[int]])
    return {name: tuple(shape) for name, shape in shapes.items()}
