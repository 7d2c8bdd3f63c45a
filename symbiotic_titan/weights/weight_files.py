"""Which files of a folder hold a model's tensors, as downloads and trainers leave them.

In this order: the files that an index names; ``model.safetensors``; a complete set of numbered files without an index; the only
safetensors file, whatever its name.
"""

import re
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SUFFIX = ".safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
# Weights of an adapter, which PEFT saves without those of the model.
_ADAPTER = "adapter_model"
ADAPTER_REMEDY = (
    "merge the adapter into its base model first (merge_and_unload of peft, then save_pretrained)"
)
# Formats that are not read, by the ends of their names.
_SAVE_AGAIN = (
    "load the model once with transformers and save_pretrained(FOLDER), which writes safetensors"
)
_OTHER_FORMATS = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), f"pickled tensors; {_SAVE_AGAIN}"),
    ".gguf": "a quantised format for inference; use the release in safetensors",
    **dict.fromkeys((".h5", ".msgpack"), f"weights of TensorFlow or JAX; {_SAVE_AGAIN}"),
    ".npz": f"arrays of numpy or MLX; {_SAVE_AGAIN}",
}
# States of optimizers and arguments of trainers have these formats too, but are no weights.
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` holds safetensors or an index of them."""
    return index_in(folder) is not None or bool(_safetensors(folder))


def index_in(folder: Path) -> Path | None:
    """The index of a folder's files: the usual one, or the only one (diffusers and others name theirs differently)."""
    if (folder / INDEX).is_file():
        return folder / INDEX
    if (folder / SINGLE).is_file():
        return None
    found = sorted(folder.glob(f"*{_SUFFIX}.index.json"))
    return found[0] if len(found) == 1 else None


def files_without_index(folder: Path) -> list[Path]:
    """The files with a model's tensors in a folder without an index.

    Raises:
        ValueError: there are none, some numbered ones are missing, or several belong to no set.
    """
    found = _safetensors(folder)
    if not found:
        raise ValueError(_nothing_to_read(folder))
    if folder / SINGLE in found:
        return [folder / SINGLE]
    numbered = {path: match for path in found if (match := _NUMBERED.fullmatch(path.name))}
    sets = {(match["stem"], match["count"]) for match in numbered.values()}
    if len(sets) == 1:
        _check_complete(folder, list(numbered.values()))
        return list(numbered)
    if len(found) == 1:
        return found
    names = ", ".join(path.name for path in found[:3])
    raise ValueError(
        f"{folder} has {len(found)} safetensors files ({names}..) and no {INDEX}, which says which of them are the model; keep the "
        "files of one model in the folder, or fetch the index"
    )


def _safetensors(folder: Path) -> list[Path]:
    """A model's files, without those of an adapter."""
    found = sorted(folder.glob(f"*{_SUFFIX}"))
    return [path for path in found if path.is_file() and not path.name.startswith(_ADAPTER)]


def _check_complete(folder: Path, matches: list[re.Match[str]]) -> None:
    """Pass if there is a file of every number in "NUMBER-of-COUNT"."""
    first = matches[0]
    has, count = {int(match["number"]) for match in matches}, int(first["count"])
    numbers = range(1, count + 1)
    # torchtitan and transformers count from 1, some writers from 0.
    missing = [n for n in (range(count) if 0 in has else numbers) if n not in has]
    if missing:
        width = len(first["number"])
        names = [f"{first['stem']}-{n:0{width}d}-of-{first['count']}{_SUFFIX}" for n in missing[:3]]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {count} files that its names count: {', '.join(names)}{more}; fetch them"
        )


def _nothing_to_read(folder: Path) -> str:
    """Why a folder without safetensors cannot be read, and what to do."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(name.startswith(_ADAPTER) for name in names) or "adapter_config.json" in names:
        return f"{folder} holds a LoRA adapter, not a model; {ADAPTER_REMEDY}"
    weights = [name for name in names if not name.startswith(_NO_WEIGHTS)]
    for suffix, what in _OTHER_FORMATS.items():
        if found := [name for name in weights if name.endswith(suffix)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"{folder} has no safetensors, only {found[0]}{more}: {what}"
    return f"{folder} has neither {INDEX} nor {SINGLE}; weights are read in the safetensors format only"
