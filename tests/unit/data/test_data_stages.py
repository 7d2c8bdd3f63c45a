"""A mixture that changes, by [[data.stages]] or on resume: its bounds hold from each change on, and every source goes on where it was.

Hypothesis draws stages, weights, sources that leave and return, and the legs of a run: where each stops, its ranks and workers.
"""

import json
from collections import Counter
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data import loader as loader_module
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.pipeline import build_loader
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from tests.unit.data.test_data_resume_properties import (
    FIXED,
    RUNNING,
    Leg,
    WorkersInProcess,
)

GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)
NUM_STREAMS, GLOBAL_BATCH, SEQ_LEN = 4, 8, 48
SIZES = {"a": [9, 14], "b": [31], "c": [12, 5]}
NAMES = list(SIZES)
TEXTS = {name: [f"{name}{n} ".ljust(6 + n % 17, ".") for n in range(sum(SIZES[name]))] for name in SIZES}  # fmt: skip
FEW = settings(FIXED, max_examples=10)
LONGEST = 6 + 16 + 2  # tokens of a text, with those before and after it
WEIGHT = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
WEIGHTS = st.fixed_dictionaries(dict.fromkeys(NAMES, WEIGHT)).filter(lambda w: any(w.values()))
STAGES = st.dictionaries(st.integers(2, 12), WEIGHTS, max_size=3)
LEGS = st.lists(
    st.builds(
        Leg,
        num_batches=st.integers(0, 5),
        ranks=st.sampled_from([1, 2, 4]),
        workers=st.sampled_from([0, 1]),
        ahead=st.integers(1, 5),
        local_batch_size=st.sampled_from([1, 2]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """Settings of [data] with these weights; only the sources that have one."""
    folder = tmp_path_factory.mktemp("abc")
    for name, sizes in SIZES.items():
        texts = iter(TEXTS[name])
        for shard, size in enumerate(sizes):
            lines = [json.dumps({"text": next(texts)}) + "\n" for _ in range(size)]
            (folder / f"{name}-{shard}.jsonl").write_text("".join(lines))

    def make(weights, stages=None, **options):
        row = {"task": "lm", "format": "jsonl"}
        sources = [
            {**row, "name": name, "path": f"{folder}/{name}-*.jsonl", "weight": weight}
            for name, weight in weights.items()
        ]
        stages = sorted((stages or {}).items())
        rows = [{"from_step": first, "weights": weights} for first, weights in stages]
        return {"sources": sources, "stages": rows, "num_lanes": NUM_STREAMS, "lookahead": 4} | options  # fmt: skip

    return make


def loader_of(data, **options):
    defaults = {
        "latents": Latents(),
        "geometry": GEOMETRY,
        "rotary_layout": "shared",
        "tokenizer": ByteTokenizer(),
        "seq_len": SEQ_LEN,
        "global_batch_size": GLOBAL_BATCH,
    }
    return build_loader(Data(**data), **(defaults | options))


def train(data, num_steps, state=None, step=0, leg=None, **options):
    """(sorted rows of each of ``num_steps`` steps, state after them) of a run that goes on after ``step``."""
    leg, loaders = leg or Leg(0, local_batch_size=2), []
    with ExitStack() as stack:
        for patch in (
            mock.patch.object(loader_module, "DataLoader", WorkersInProcess),
            mock.patch.object(loader_module, "get_worker_info", lambda: RUNNING.worker),
            mock.patch.object(WorkersInProcess, "ahead", leg.ahead),
        ):
            stack.enter_context(patch)
        for rank in range(leg.ranks):
            loader = loader_of(
                data,
                local_batch_size=leg.local_batch_size,
                num_workers=leg.workers,
                dp_rank=rank,
                dp_world_size=leg.ranks,
                gather=lambda own: [loader._states for loader in loaders],
                **options,
            )
            loaders.append(loader)
            if state is not None:
                loaders[-1].load_state_dict(state)
            loaders[-1].start_at(step)
        batches = [iter(loader) for loader in loaders]
        micro = options.get("global_batch_size", GLOBAL_BATCH) // (leg.ranks * leg.local_batch_size)
        steps = [[next(own) for own in batches for _ in range(micro)] for _ in range(num_steps)]
        states = [loader.state_dict() for loader in loaders]
    assert all(other == states[0] for other in states)
    return [sorted(row for batch in s for row in rows_of(batch)) for s in steps], states[0]


def rows_of(batch):
    """The texts of each row."""
    decode = ByteTokenizer().decode
    return [
        [decode(tokens[document == n].tolist()) for n in range(int(document.max()) + 1)]
        for tokens, document in zip(batch.tokens, batch.document, strict=True)
    ]


def lanes_of(state):
    return json.loads(state["state"])["lanes"].values()


def out_of_bounds(state, weights, by):
    """(source, lead over its share) where a stream breaks the bounds of ``data/mixture.py`` for what it counts since the present
    weights began."""
    found = []
    names = json.loads(state["state"])["identity"]["sources"]
    total = sum(Fraction(str(weight)) for weight in weights.values())
    for lane in lanes_of(state):
        counted = lane["tokens" if by == "tokens" else "scheduled"]
        given = [c - s for c, s in zip(counted, lane.get("since", [0] * len(names)), strict=True)]
        for name, count in zip(names, given, strict=True):
            share = Fraction(str(weights.get(name, 0))) / total
            ahead = count - sum(given) * share
            holds = (
                abs(ahead) < 1
                if by == "samples"
                else -LONGEST * Fraction(3, 2) <= ahead <= (1 - share) * LONGEST
            )
            if not holds:
                found.append((name, ahead))
    return found


@FEW
@given(first=WEIGHTS, stages=STAGES, by=st.sampled_from(["samples", "tokens"]))
def test_bounds_hold_from_the_beginning_of_every_stage(data_of, first, stages, by):
    loader = loader_of(data_of(first, stages, mixture_by=by), local_batch_size=GLOBAL_BATCH)
    for step, _ in enumerate(islice(loader, 14), start=1):
        begun = [
            weights
            for begin, weights in {1: first, **dict(sorted(stages.items()))}.items()
            if begin <= step
        ]
        assert not out_of_bounds(loader.state_dict(), begun[-1], by)


@FEW
@given(first=WEIGHTS, stages=STAGES, legs=LEGS, by=st.sampled_from(["samples", "tokens"]))
def test_a_run_in_legs_gives_the_rows_of_an_undisturbed_one(data_of, first, stages, legs, by):
    data, state, step, rows = data_of(first, stages, mixture_by=by), None, 0, []
    whole, last = train(data, sum(leg.num_batches for leg in legs))
    for leg in legs:
        part, state = train(data, leg.num_batches, state, step, leg)
        rows += part
        step += leg.num_batches
    assert rows == whole and state == last


STATIONS = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(NAMES), WEIGHT, min_size=1).filter(
            lambda w: any(w.values())
        ),
        st.permutations(NAMES),
        st.integers(0, 4),
        st.sampled_from([1, 2, 4]),
    ),
    min_size=2,
    max_size=6,
)


def read_by(state):
    """Texts that the streams of ``state`` have read and that no longer wait, of present and absent sources."""
    read = Counter()
    identity = json.loads(state["state"])["identity"]
    for stream, lane in enumerate(lanes_of(state)):
        held = {name: own["waiting"] for name, own in lane.get("absent", {}).items()}
        counts = {name: own["read"] for name, own in lane.get("absent", {}).items()}
        for number, name in enumerate(identity["sources"]):
            counts[name] = lane["read"][number]
            held[name] = [(index, part) for s, index, part in lane["waiting"] if s == number]
        for name, count in counts.items():
            order = SourceOrder(0, name, SIZES[name])
            waiting = {index for index, _ in held[name]}
            for index in range(stream, count * NUM_STREAMS, NUM_STREAMS):
                if index not in waiting:
                    shard, sample = order.locate(index)
                    read[TEXTS[name][sum(SIZES[name][:shard]) + sample]] += 1
    return read


@FEW
@given(stations=STATIONS, by=st.sampled_from(["samples", "tokens"]))
def test_nothing_is_lost_or_repeated_where_sources_leave_return_and_change_places(
    data_of, stations, by
):
    delivered, state, step = Counter(), None, 0
    for weights, names, num_steps, ranks in stations:
        weights = {name: weights[name] for name in names if name in weights}
        data = data_of(weights, mixture_by=by)
        part, state = train(data, num_steps, state, step, Leg(0, ranks))
        delivered += Counter(text for rows in part for row in rows for text in row)
        step += num_steps
        assert delivered == read_by(state)
        if num_steps:
            assert not out_of_bounds(state, weights, by)


def test_each_stage_is_read_from_its_first_row_on_and_each_source_goes_on(data_of):
    """With one document waiting at most, samples of a stage stand in its rows but for one a stream."""
    data = data_of({"a": 1, "b": 0}, {3: {"b": 1, "a": 0}, 5: {"a": 1, "b": 0}}, lookahead=1)
    steps, _ = train(data, 6)
    sources = [Counter(text[0] for row in rows for text in row) for rows in steps]
    assert [set(counts) for counts in sources] == [{"a"}, {"a"}, {"a", "b"}, {"b"}, {"a", "b"}, {"a"}]  # fmt: skip
    assert sources[2]["a"] <= NUM_STREAMS and sources[4]["b"] <= NUM_STREAMS
    alone, _ = train(data_of({"a": 1}, lookahead=1), 6)
    read = [text for rows in steps for row in rows for text in row if text[0] == "a"]
    order = Counter(text for rows in alone for row in rows for text in row)
    assert set(read) <= set(order) and (len(set(read)) == len(read) or len(read) > 23)


def test_a_stage_begins_at_its_step_whatever_the_global_batch_size_was(data_of):
    data = data_of({"a": 1, "b": 0}, {6: {"a": 0, "b": 1}}, lookahead=1)
    _, state = train(data, 3)
    steps, _ = train(data, 4, state, 3, Leg(0, 2), global_batch_size=4)
    # The row of each stream in step 6 is the document that waited.
    assert [{text[0] for row in rows for text in row} for rows in steps] == [{"a"}, {"a"}, {"a"}, {"b"}]  # fmt: skip


def test_data_that_starts_anew_in_the_middle_of_a_run_has_the_weights_of_that_step(data_of):
    data = data_of({"a": 1, "b": 0}, {3: {"a": 0, "b": 1}})
    steps, _ = train(data, 2, step=5)
    assert {text[0] for rows in steps for row in rows for text in row} == {"b"}


def test_the_state_of_a_run_without_changes_has_no_new_keys(data_of):
    _, state = train(data_of({"a": 1, "b": 2}), 2)
    saved = json.loads(state["state"])
    assert "stages" not in saved["identity"]
    assert all({"weights", "since", "absent"}.isdisjoint(lane) for lane in saved["lanes"].values())


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_a_source_that_was_left_out_by_mistake_comes_back_as_if_nothing_had_been(data_of, by):
    data = data_of({"a": 1, "b": 2, "c": 1}, mixture_by=by, lookahead=1)
    _, state = train(data, 3)
    whole, last = train(data, 3, state, 3)
    _, without = train(data_of({"a": 1, "b": 2}, mixture_by=by, lookahead=1), 0, state, 3)
    part, after = train(data, 3, without, 3)
    assert sum((Counter(map(str, rows)) for rows in part), Counter()).keys() and after == last
    assert Counter(t for rows in part for r in rows for t in r) == Counter(t for rows in whole for r in rows for t in r)  # fmt: skip


def test_a_stream_at_the_end_of_a_source_goes_on_where_a_stage_no_longer_reads_it(data_of):
    data = data_of({"a": 1, "b": 0}, {30: {"a": 0, "b": 1}}, at_end="stop", lookahead=1)
    loader = loader_of(data, local_batch_size=GLOBAL_BATCH)
    batches = iter(loader)
    while not loader.ended_sources:
        next(batches)
    state = loader.state_dict()
    changed = loader_of(data_of({"a": 0, "b": 1}, at_end="stop"), local_batch_size=GLOBAL_BATCH)
    changed.load_state_dict(state)
    assert changed.ended_sources == []
    assert {text[0] for row in rows_of(next(iter(changed))) for text in row} == {"b"}


def test_a_change_is_told_in_one_line(data_of, caplog):
    _, state = train(data_of({"a": 1, "b": 1, "c": 2}), 2)
    with caplog.at_level("INFO"):
        train(data_of({"a": 1, "b": 1, "c": 2}), 0, state, 2)
        assert not caplog.messages
        _, state = train(data_of({"b": 3, "a": 1}), 1, state, 2)
        assert caplog.messages.pop() == (
            "the mixture changes after step 2: shares of the samples a 0.25 -> 0.25, b 0.25 -> 0.75, c 0.5 -> 0; "
            "sources kept for later: c"
        )
        train(data_of({"b": 3, "a": 1, "c": 1}), 0, state, 3)
    assert caplog.messages.pop().endswith("c 0 -> 0.2; sources that go on where they were: c")


def test_a_source_that_returns_is_still_the_same_one(data_of, tmp_path):
    _, state = train(data_of({"a": 1, "b": 1}), 2)
    _, state = train(data_of({"a": 1}), 2, state, 2)
    other = data_of({"a": 1, "b": 1})
    other["sources"][1]["path"] = other["sources"][0]["path"]
    with pytest.raises(ValueError, match="source 'b' has other shards than when the checkpoint"):
        train(other, 0, state, 4)


@pytest.mark.parametrize(
    "stages, message",
    [
        (
            {2: {"a": 2}, 4: {"a": 3}},
            "[[data.stages]] #2: from_step = 4 is in the past: the run resumes after step 5, and was trained without this stage; "
            "set from_step to 6 or more",
        ),
        (
            {2: {"a": 3}},
            "[[data.stages]] #1: from_step = 2 is in the past: the run resumes after step 5, and was trained with weights = "
            "{'a': 2} from there",
        ),
        ({2: {"a": 2}, 6: {"a": 3}}, None),
        ({}, None),
    ],
)
def test_a_stage_in_the_past_is_refused_unless_it_was_trained(data_of, stages, message):
    weights = {"a": 1, "b": 1}
    _, state = train(data_of(weights, {2: {"a": 2}, 9: {"b": 5}}), 5)
    if message is None:
        _, state = train(data_of(weights, stages), 2, state, 5)
        assert not out_of_bounds(state, {"a": 3, "b": 1} if stages else weights, "samples")
        return
    with pytest.raises(ValueError) as error:
        train(data_of(weights, stages), 0, state, 5)
    assert message in str(error.value)
