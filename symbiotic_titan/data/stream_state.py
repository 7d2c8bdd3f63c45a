"""What determines the streams, and the state of each between two sequences, which checkpoints hold."""

from collections import Counter
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast

import numpy as np

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.formats.shard import REASONS, Sample, Shard
from symbiotic_titan.data.mixture import integer_weights
from symbiotic_titan.data.packing import LEAST_FULL, Filling, SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder


class MakesDocuments(Protocol):
    """What a stream needs of ``samples.DocumentMaker``."""

    def make(self, source: DataSource, sample: Sample, index: int) -> list[Document]:
        """The documents of the sample at ``index`` in the source's endless sequence; raises BadSample."""


@dataclass(frozen=True)
class PipelineSpec:
    """Everything, except its number and where the run began to count, that determines a stream's sequences. Plain data: worker
    processes get a copy.

    sources:       those that are read at some step.
    listed:        of each source, the samples that its ``skip_list`` names: see ``skip_list.read_skip_list``.
    rows_per_step: rows of a global batch.
    sorts_all_shards: for a run that an older version began: see ``fingerprint.sorts_all_shards``.
    """

    config: Data
    sources: list[DataSource]
    shards: list[list[Shard]]
    listed: list[np.ndarray]
    num_streams: int
    rows_per_step: int
    tokenizer: str
    size: SequenceSize
    maker: MakesDocuments
    builder: SequenceBuilder
    sorts_all_shards: bool = False


class StreamState(TypedDict):
    """A stream's state between two sequences, JSON-able. Checkpoints contain its keys, apart from ``filling``, and from the three before it
    where they say nothing (``saved_form``). Lists have one entry per source.

    rows:      sequences made so far.
    scheduled: good samples so far, which the mixture counts.
    read:      samples read so far, skipped ones included.
    skipped:   samples skipped so far, by reason. (States of older versions lack this and the next four.)
    in_a_row:  samples skipped since the last good one.
    truncated: samples cut to fit.
    tokens:    tokens of the good samples.
    ended:     the source whose end the stream has reached, else -1. Once no document waits, all further sequences are empty.
    waiting:   (source, index in its endless sequence, part) of each waiting document.
    weights:   source -> its weight in the mixture so far, as the smallest integers, without those of weight 0.
    since:     what the mixture had counted when these weights began, which is where it counts from.
    absent:    source that this run does not read -> what the stream had read of it, for when it comes back.
    filling:   of the first sequences since this start.
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
    weights: dict[str, int]
    since: list[int]
    absent: dict[str, dict[str, Any]]
    filling: Filling


# Keys of the state that are lists with one entry per source, and the entry of a source that was not read yet.
PER_SOURCE: dict[str, Any] = {
    "scheduled": 0, "read": 0, "skipped": {}, "in_a_row": 0, "truncated": 0, "tokens": 0, "since": 0,
}  # fmt: skip


def named_weights(names: list[str], weights: list[float]) -> dict[str, int]:
    """Source -> weight, as the smallest integers; without sources of weight 0."""
    integers = integer_weights(weights)
    return {name: weight for name, weight in zip(names, integers, strict=True) if weight}


def new_state(spec: PipelineSpec) -> StreamState:
    """State of a stream before its first sequence."""
    names = [source.name for source in spec.sources]
    weights = [source.weight for source in spec.sources]
    return _empty_state(names, named_weights(names, weights))


def _empty_state(names: list[str], weights: dict[str, int]) -> StreamState:
    lists = {key: [copy(entry) for _ in names] for key, entry in PER_SOURCE.items()}
    state = {"rows": 0, "ended": -1, "waiting": [], "weights": weights, "absent": {}, **lists}
    state["filling"] = Filling()
    return cast(StreamState, state)


def resumed(
    spec: PipelineSpec, saved: dict[str, Any], names: list[str], weights: list[float]
) -> StreamState:
    """``saved``, by a run with sources ``names`` of ``weights``, as a state of the sources of ``spec``, which are matched by name.

    Keys that older versions lacked get their first values. A source that ``saved`` has not read begins at its beginning. A stream
    that ended goes on if its source now repeats or is gone.
    """
    before: dict[str, Any] = {**_empty_state(names, named_weights(names, weights)), **saved}
    held = before["absent"] | {name: _held(before, number) for number, name in enumerate(names)}
    numbers = {source.name: number for number, source in enumerate(spec.sources)}
    state = new_state(spec)
    for name in numbers.keys() & held.keys():
        number = numbers[name]
        for key in PER_SOURCE:
            state[key][number] = held[name][key]  # type: ignore[literal-required]
        if name not in before["weights"]:
            # It does not take part in the present mixture, whose counts must not see what it gave before.
            counted = "tokens" if spec.config.mixture_by == "tokens" else "scheduled"
            state["since"][number] = state[counted][number]  # type: ignore[literal-required]
    returned = [
        (numbers[name], index, part)
        for name, own in before["absent"].items()
        if name in numbers
        for index, part in own["waiting"]
    ]
    waiting = [(numbers.get(names[s], -1), index, part) for s, index, part in before["waiting"]]
    state["waiting"] = [*returned, *(place for place in waiting if place[0] >= 0)]
    state["absent"] = {name: own for name, own in held.items() if name not in numbers}
    state["rows"], state["weights"] = before["rows"], before["weights"]
    ended = numbers.get(names[before["ended"]], -1) if before["ended"] >= 0 else -1
    if ended >= 0 and spec.sources[ended].at_end_of(spec.config) == "stop":
        state["ended"] = ended
    return state


def _held(state: dict[str, Any], number: int) -> dict[str, Any]:
    """What a stream has read of one source, and the places of its waiting documents."""
    own: dict[str, Any] = {key: state[key][number] for key in PER_SOURCE}
    own["waiting"] = [(index, part) for s, index, part in state["waiting"] if s == number]
    return own


def saved_form(spec: PipelineSpec, state: StreamState) -> dict[str, Any]:
    """``state`` without what a run of the same sources and weights from beginning to end would say: so older versions' states and
    ours are the same."""
    weights = new_state(spec)["weights"]
    constant = state["weights"] == weights and not any(state["since"])
    left_out = {"filling", "weights", "since"} if constant else {"filling"}
    return {k: v for k, v in state.items() if k not in left_out and (v or k != "absent")}


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


def advice_on_filling(spec: PipelineSpec, states: list[StreamState]) -> str | None:
    """A line that names the setting that keeps most of the first sequences from being full, and what to do; None if they are full."""
    fillings, size = [state["filling"] for state in states], spec.size
    rows = sum(filling.rows for filling in fillings)
    used = sum(filling.tokens for filling in fillings) / max(rows * size.num_tokens, 1)
    limits = sum((filling.limits for filling in fillings), Counter[str]())
    if not rows or used >= LEAST_FULL or not limits:
        return None
    key, count = limits.most_common(1)[0]
    value, remedy = _value_and_remedy(key, spec.config, size)
    what = (
        "no other sample waited" if key == "data.lookahead" else "samples that waited were left out"
    )
    return (
        f"rows are {used:.0%} full in the first steps, the rest is padding. In {count} of {rows} rows {what} because of {key} = {value}: "
        f"{remedy}; symbiotic show-batch shows the effect"
    )


def _value_and_remedy(key: str, config: Data, size: SequenceSize) -> tuple[object, str]:
    if key == "training.seq_len":
        others = [f"data.lookahead = {config.lookahead}"]
        if config.packing == "longest_first":
            others.append("set data.packing = 'fullest'")
        return size.num_tokens, f"raise it, or {', or '.join(others)}"
    if key == "data.packing":
        return repr(config.packing), "choose another, such as 'fullest'"
    if key.startswith("data.max_row_share."):
        share = config.max_row_share[key.rpartition(".")[2]]
        return share, "raise it, or lower the weights of this task's sources"
    if key == "data.lookahead":
        return config.lookahead, "raise it, so that more samples wait"
    return getattr(config, key.removeprefix("data.")), "raise it, or set 0 for as many as fit"
