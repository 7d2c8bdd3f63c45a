"""The fingerprint of a data state: what must be the same on resume, and the errors if it is not.

It covers the order of the samples of each source and the documents they become. It leaves out packing and look-ahead, workers and
ranks, ``at_end``, and the treatment of bad samples: a run that one of these stopped must be able to resume with a new setting. The
weights, the stages and the list of sources may change: they are saved because a resumed run must know what they were.
"""

import logging
from collections.abc import Sequence
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from symbiotic_titan.config.data import Data
from symbiotic_titan.data.order import LARGEST_SORTED
from symbiotic_titan.data.stream_state import PipelineSpec, StreamState, named_weights

# Key of the order of shards too large to be sorted.
LARGE_SHARDS = "order_of_large_shards"

# Settings of [data] that affect the documents made of a sample.
DOCUMENT_KEYS = (
    "vit_pixels",
    "vit_min_pixels",
    "vae_pixels",
    "max_aspect",
    "max_row_share",
    "condition_dropout",
)


def fingerprint_of(spec: PipelineSpec) -> dict[str, Any]:
    """The fingerprint, JSON-able. A file is identified by name, size and number of samples, so data may move to another folder.

    ``places`` leaves the sizes out: it stays the same where samples were repaired and kept their places.
    """
    files: dict[str, str] = {}
    places: dict[str, str] = {}
    for source, shards in zip(spec.sources, spec.shards, strict=True):
        found = [(PurePosixPath(s.path).name, s.num_bytes, s.num_samples) for s in shards]
        files[source.name] = _hash_files(found)
        places[source.name] = _hash_files([(name, samples) for name, _, samples in found])
    config = spec.config
    is_large = any(s.num_samples > LARGEST_SORTED for shards in spec.shards for s in shards)
    order = {LARGE_SHARDS: "feistel"} if is_large and not spec.sorts_all_shards else {}
    truncated = {s.name: s.truncated_images for s in spec.sources if s.truncated_images != "bad"}
    stages = [[stage.from_step, stage.weights] for stage in config.stages]
    return {
        **order,
        "data.seed": config.seed,
        "data.num_lanes": spec.num_streams,
        "data.mixture_by": config.mixture_by,
        "training.seq_len": spec.size.num_tokens,
        "tokenizer": spec.tokenizer,
        "sources": [source.name for source in spec.sources],
        "weights": [float(source.weight) for source in spec.sources],
        "files": files,
        "places": places,
        "tasks": {source.name: source.task for source in spec.sources},
        "keys": {source.name: dict(source.keys) for source in spec.sources},
        "too_long": {source.name: source.too_long_of(config) for source in spec.sources},
        # Left out where no source has it: states of older versions lack it.
        **({"truncated_images": truncated} if truncated else {}),
        **{f"data.{key}": getattr(config, key) for key in DOCUMENT_KEYS},
        **({"stages": stages} if stages else {}),
    }


def sorts_all_shards(saved: dict[str, Any]) -> bool:
    """Whether the run of the saved fingerprint has shards of more than ``LARGEST_SORTED`` samples in the order that older versions
    gave them, by sorting; it goes on with that. Where there are no such shards, there is no difference."""
    return LARGE_SHARDS not in saved


# Tables of the fingerprint with an entry per source.
_BY_SOURCE = ("files", "places", "tasks", "keys", "too_long", "truncated_images")


def with_absent(current: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """``current`` with the entries of the sources that ``saved`` has and this run does not read, for when they come back."""
    kept = {LARGE_SHARDS: saved[LARGE_SHARDS]} if LARGE_SHARDS in saved else {}
    tables = {key: saved.get(key, {}) | current.get(key, {}) for key in _BY_SOURCE}
    # A table that both lack stays out: the state of a run without changes is that of one that was never interrupted.
    return current | kept | {key: table for key, table in tables.items() if table}


def _hash_files(files: Sequence[tuple[str | int, ...]]) -> str:
    return sha256(repr(files).encode()).hexdigest()[:16]


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError if the state was saved with other data or settings.

    A key that an older version did not save counts as unchanged.
    """
    saved = {"data.mixture_by": "samples"} | saved
    document_keys = [f"data.{key}" for key in DOCUMENT_KEYS]
    for key in (
        "data.seed",
        "data.num_lanes",
        "data.mixture_by",
        "training.seq_len",
        *document_keys,
    ):
        if saved.get(key, current[key]) != current[key]:
            _refuse(f"{key} was {saved[key]}, now it is {current[key]}", f"set {key} back")
    tokenizer = saved.get("tokenizer", "bytes")  # states without the key are older than other kinds
    if tokenizer != current["tokenizer"]:
        _refuse(
            f"the tokenizer (file, special tokens and turns) was {tokenizer}, now it is {current['tokenizer']}",
            "set [tokenizer] and its file back",
        )
    _check_files(saved, current)
    _check_sources(saved, current)


def _check_files(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """The files of the sources. With other sizes only, samples were repaired, as the error that stopped the run advises."""
    for name, files in current["files"].items():
        if saved["files"].get(name, files) == files:
            continue
        if saved.get("places", {}).get(name) == current["places"][name]:
            logging.getLogger(__name__).warning(
                f"source {name!r}: files have other sizes than when the checkpoint was saved, but the same names and numbers of "
                "samples; the run goes on after the samples that it has read, as if some had been repaired in place"
            )
            continue
        _refuse(
            f"source {name!r} has other shards than when the checkpoint was saved (names or numbers of samples, or sizes)",
            "put the same shards back (a sample may be repaired, not removed)",
        )


def _check_sources(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Tasks, keys, ``truncated_images`` and ``too_long`` of the sources."""
    for what, key in (("tasks", "task"), ("keys", "keys")):
        for name, value in current[what].items():
            before = saved.get(what, {}).get(name, value)
            if before != value:
                _refuse(
                    f"the {key} of source {name!r} was {before}, now it is {value}",
                    "set it back",
                )
    # To decode from now on is the remedy for a truncated image that stopped the run.
    for name, value in saved.get("truncated_images", {}).items():
        if name in current["tasks"] and current.get("truncated_images", {}).get(name) != value:
            _refuse(
                f"truncated_images of source {name!r} was {value!r}, now it is 'bad'", "set it back"
            )
    for name, value in current["too_long"].items():
        # Changing to "truncate" is allowed: it lets a run go on after a sample that was too long, and changes no waiting document.
        if saved.get("too_long", {}).get(name) == "truncate" != value:
            _refuse(
                f"too_long of source {name!r} was 'truncate', now it is {value!r}",
                "set it back",
            )


def _refuse(what: str, remedy: str) -> None:
    raise ValueError(
        f"data state of the checkpoint: {what}; samples would be lost, repeated or changed. {remedy.capitalize()}, or start "
        'the data anew with checkpoint.exclude_from_loading = ["dataloader"]'
    )


def check_stages(saved: dict[str, Any], config: Data, step: int) -> None:
    """Raise ValueError if a stage that began in a step up to ``step``, the last one trained, was not in the run that saved the state."""
    trained = dict(saved.get("stages", []))
    for number, stage in enumerate(config.stages, start=1):
        before = trained.get(stage.from_step)
        if stage.from_step <= step and before != stage.weights:
            was = "without this stage" if before is None else f"with weights = {before} from there"
            raise ValueError(
                f"[[data.stages]] #{number}: from_step = {stage.from_step} is in the past: the run resumes after step {step}, and was "
                f"trained {was}; set from_step to {step + 1} or more, or change the weights of [[data.sources]], which holds from now on"
            )


def mixture_changes(
    spec: PipelineSpec, saved: dict[str, Any], state: StreamState, step: int
) -> list[str]:
    """What a run that goes on after ``step`` with a stream's ``state`` changes in the mixture and its sources; one line, if any."""
    names, config = [source.name for source in spec.sources], spec.config
    weights = config.weights_at(step)
    now = named_weights(names, [weights[name] for name in names])
    parts = []
    if now != state["weights"]:
        old, new = _shares(state["weights"]), _shares(now)
        shares = (
            f"{name} {old.get(name, 0):.4g} -> {new.get(name, 0):.4g}" for name in {**old, **new}
        )
        parts.append(f"shares of the {config.mixture_by} {', '.join(shares)}")
    known = saved["files"].keys()  # those of sources that are kept for later too
    for what, found in (
        ("new sources", [name for name in names if name not in known]),
        (
            "sources that go on where they were",
            [n for n in names if n in known and n not in saved["sources"]],
        ),
        ("sources kept for later", [n for n in saved["sources"] if n not in names]),
    ):
        if found:
            parts.append(f"{what}: {', '.join(found)}")
    return [f"the mixture changes after step {step}: {'; '.join(parts)}"] if parts else []


def _shares(weights: dict[str, int]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
