"""What determines the streams, and the state of each between two sequences, which checkpoints hold."""

from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.formats.shard import REASONS, Sample, Shard
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder


class MakesDocuments(Protocol):
    """What a stream needs of ``samples.DocumentMaker``."""

    def make(self, source: DataSource, sample: Sample, index: int) -> list[Document]:
        """The documents of the sample at ``index`` in the source's endless sequence; raises BadSample."""


@dataclass(frozen=True)
class PipelineSpec:
    """Everything, except its number, that determines a stream's sequences. Plain data: worker processes get a copy.

    listed: of each source, the samples that its ``skip_list`` names: see ``skip_list.read_skip_list``.
    sorts_all_shards: for a run that an older version began: see ``fingerprint.sorts_all_shards``.
    """

    config: Data
    sources: list[DataSource]
    shards: list[list[Shard]]
    listed: list[np.ndarray]
    num_streams: int
    tokenizer: str
    size: SequenceSize
    maker: MakesDocuments
    builder: SequenceBuilder
    sorts_all_shards: bool = False


class StreamState(TypedDict):
    """A stream's state between two sequences, JSON-able. Checkpoints contain its keys. Lists have one entry per source.

    rows:      sequences made so far.
    scheduled: good samples so far, which the mixture counts.
    read:      samples read so far, skipped ones included.
    skipped:   samples skipped so far, by reason. (States of older versions lack this and the next four.)
    in_a_row:  samples skipped since the last good one.
    truncated: samples cut to fit.
    tokens:    tokens of the good samples.
    ended:     the source whose end the stream has reached, else -1. Once no document waits, all further sequences are empty.
    waiting:   (source, index in its endless sequence, part) of each waiting document.
    """

    rows: int
    scheduled: list[int]
    read: list[int]
    skipped: list[dict[str, int]]
    in_a_row: list[int]
    truncated: list[int]
    tokens: list[int]
    ended: int
    waiting: list[tuple[int, int, int]]


def new_state(spec: PipelineSpec) -> StreamState:
    """State of a stream before its first sequence."""
    zeros = [0] * len(spec.sources)
    return {
        "rows": 0,
        "scheduled": zeros,
        "read": zeros,
        "skipped": [{} for _ in zeros],
        "in_a_row": zeros,
        "truncated": zeros,
        "tokens": zeros,
        "ended": -1,
        "waiting": [],
    }


def resumed(spec: PipelineSpec, saved: dict[str, Any]) -> StreamState:
    """``saved``, with zeros for keys that older versions lacked. A stream that ended goes on if its source now repeats."""
    state: StreamState = new_state(spec) | saved  # type: ignore[assignment, operator]
    if state["ended"] >= 0 and spec.sources[state["ended"]].at_end_of(spec.config) == "repeat":
        state["ended"] = -1
    return state


def ended_sources(spec: PipelineSpec, states: list[StreamState]) -> list[str]:
    """Names of the sources whose end the streams have reached; empty while any stream has a document left."""
    if any(state["ended"] < 0 or state["waiting"] for state in states):
        return []
    return [spec.sources[number].name for number in sorted({s["ended"] for s in states})]


def num_skipped(spec: PipelineSpec, states: list[StreamState]) -> list[int]:
    """Bad samples skipped so far, per source: read - scheduled, without those that ``skip_list`` or ``too_long = "skip"`` passes over."""
    return [
        sum(
            state["read"][number]
            - state["scheduled"][number]
            - state["skipped"][number].get("listed", 0)
            - (state["skipped"][number].get("too_long", 0) if passes_over else 0)
            for state in states
        )
        for number, passes_over in enumerate(
            source.too_long_of(spec.config) == "skip" for source in spec.sources
        )
    ]


def count_reasons(states: list[StreamState]) -> dict[str, int]:
    """Skipped samples by reason, and ``truncated`` samples, over all sources; 0 for a reason that did not occur."""
    counts = dict.fromkeys((*REASONS, "truncated"), 0)
    for state in states:
        for reasons in state["skipped"]:
            for reason, count in reasons.items():
                counts[reason] += count
        counts["truncated"] += sum(state["truncated"])
    return counts


def check_skipped(spec: PipelineSpec, states: list[StreamState], last: str = "") -> None:
    """Raise ValueError if the streams of ``states``, all of the run or some, show that the run has skipped too many bad samples.

    Some streams alone cannot exceed a share, whatever they skipped: the others may have read good samples.
    """
    if len(states) == spec.num_streams or not spec.config.max_bad_share:
        check_skip_counts(spec, skip_counts(spec, states), last)


def skip_counts(spec: PipelineSpec, states: list[StreamState]) -> list[int]:
    """Samples read so far, then ``num_skipped``; sums over ranks are the counts of the run."""
    return [sum(sum(state["read"]) for state in states), *num_skipped(spec, states)]


def check_skip_counts(spec: PipelineSpec, counts: list[int], last: str = "") -> None:
    """Raise ValueError if ``skip_counts`` exceed both data.max_bad_samples and data.max_bad_share."""
    config, (num_read, *skipped) = spec.config, counts
    if sum(skipped) <= max(config.max_bad_samples, config.max_bad_share * num_read):
        return
    named = ", ".join(
        f"{source.name}: {count}"
        for source, count in zip(spec.sources, skipped, strict=True)
        if count
    )
    limits, remedy = f"data.max_bad_samples = {config.max_bad_samples}", "raise the limit"
    if config.max_bad_share:
        limits += f" and than data.max_bad_share = {config.max_bad_share:g}"
    else:
        remedy += " or allow a share with data.max_bad_share"
    raise ValueError(
        f"skipped {sum(skipped)} bad samples ({named}) of {num_read} read, {sum(skipped) / num_read:.2%}, more than {limits}{last}; "
        f"list them with symbiotic check-data and repair the shards, or {remedy}"
    )
