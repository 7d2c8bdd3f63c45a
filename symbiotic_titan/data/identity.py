"""What a saved data state is tied to, and what to tell a user who resumes with something else."""

from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from symbiotic_titan.data.lanes import LaneRecipe


def identity_of(recipe: LaneRecipe) -> dict[str, Any]:
    """JSON-able. Files count by name, size and number of samples, so that data may move to another folder."""
    files = {
        source.name: _hash_files(
            [(PurePosixPath(s.path).name, s.num_bytes, s.num_samples) for s in shards]
        )
        for source, shards in zip(recipe.sources, recipe.shards, strict=True)
    }
    return {
        "data.seed": recipe.config.seed,
        "data.num_lanes": recipe.num_lanes,
        "training.seq_len": recipe.size.num_tokens,
        "tokenizer": recipe.tokenizer,
        "sources": [source.name for source in recipe.sources],
        "weights": [float(source.weight) for source in recipe.sources],
        "files": files,
    }


def _hash_files(files: list[tuple[str, int, int]]) -> str:
    return sha256(repr(files).encode()).hexdigest()[:16]


def check_identity(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError when the state was saved with other data or settings than the current ones."""
    for key in ("data.seed", "data.num_lanes", "training.seq_len"):
        if saved[key] != current[key]:
            _refuse(f"{key} was {saved[key]}, now it is {current[key]}", f"set {key} back")
    tokenizer = saved.get("tokenizer", "bytes")  # states without the key are older than other kinds
    if tokenizer != current["tokenizer"]:
        _refuse(
            f"the tokenizer (file, special tokens and turns) was {tokenizer}, now it is {current['tokenizer']}",
            "set [tokenizer] and its file back",
        )
    for key in ("sources", "weights"):
        if saved[key] != current[key]:
            _refuse(
                f"the {key} of [[data.sources]] were {saved[key]}, now they are {current[key]}",
                "set them back",
            )
    for name, files in saved["files"].items():
        if files != current["files"][name]:
            _refuse(
                f"source {name!r} has other shards than when the checkpoint was saved (names, sizes or numbers of samples)",
                "put the same shards back",
            )


def _refuse(what: str, remedy: str) -> None:
    raise ValueError(
        f"data state of the checkpoint: {what}; samples would be lost or repeated. {remedy.capitalize()}, or start "
        'the data anew with checkpoint.exclude_from_loading = ["dataloader"]'
    )
