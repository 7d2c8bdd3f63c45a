"""However a run is interrupted and on whatever ranks and workers it goes on: no sample is lost, none is repeated.

Hypothesis draws the legs of a run: where each stops, its ranks and workers, how far workers run ahead, the look-ahead, the
packing, and whether the end of a source stops it. What all legs delivered, together with what still waits, must be what the order
of the samples names, each once.
"""

import json
import pickle
from collections import Counter, deque
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from symbiotic_titan.data import loader as loader_module
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.tokenizer import ByteTokenizer

NUM_STREAMS, SEQ_LEN = 16, 48
# Source -> sizes of its shards. Every 5th sample of "long" is longer than a row and becomes three documents.
SHARDS = {"short": [37, 30, 24], "long": [20, 13]}
BAD = ("short", 1, 7)  # source, shard, sample
# A worker's number is set while it runs; outside of workers it is None.
RUNNING = SimpleNamespace(worker=None)
# The same examples every time. A failing one has four legs at most: it can be read without minutes of shrinking.
FIXED = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)


@dataclass(frozen=True)
class Leg:
    """A part of a run: ``num_batches`` batches on each of ``ranks`` ranks."""

    num_batches: int
    ranks: int = 1
    workers: int = 0
    ahead: int = 1
    lookahead: int = 4
    packing: str = "longest_first"
    local_batch_size: int = 1
    at_end: str = "repeat"
    mixture_by: str = "samples"


MIXTURES = st.sampled_from(["samples", "tokens"])
LEGS = st.lists(
    st.builds(
        Leg,
        num_batches=st.integers(0, 12),
        ranks=st.sampled_from([1, 2, 4]),
        workers=st.sampled_from([0, 2, 3, 5]),
        ahead=st.integers(1, 5),
        lookahead=st.integers(1, 9),
        packing=st.sampled_from(["longest_first", "fullest"]),
        local_batch_size=st.integers(1, 3),
        at_end=st.sampled_from(["repeat", "stop"]),
    ),
    min_size=1,
    max_size=4,
)


def parts_of(source, shard, sample):
    """Texts of the documents that a sample becomes."""
    name = f"{source} {shard}.{sample}"
    if source == "long" and sample % 5 == 0:
        whole = [f"{name} part {part} ".ljust(SEQ_LEN - 1, ".") for part in range(2)]
        return [*whole, f"{name} part 2"]
    return [name]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Rows of [[data.sources]], mixed 2 : 1."""
    folder = tmp_path_factory.mktemp("numbered")
    for source, sizes in SHARDS.items():
        for shard, size in enumerate(sizes):
            texts = ["".join(parts_of(source, shard, sample)) for sample in range(size)]
            lines = [json.dumps({"text": text}) for text in texts]
            if (source, shard) == BAD[:2]:
                lines[BAD[2]] = '{"text": 7}'
            (folder / f"{source}-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    row = {"task": "lm", "format": "jsonl"}
    return [
        {**row, "name": "short", "path": f"{folder}/short-*.jsonl", "weight": 2},
        {**row, "name": "long", "path": f"{folder}/long-*.jsonl", "weight": 1},
    ]


class WorkersInProcess:
    """What torch's DataLoader does with worker processes, without processes.

    Every worker iterates over its own copy of the dataset; items are handed out worker by worker, made ahead of that.
    """

    ahead = 1

    def __init__(self, dataset, *, num_workers, collate_fn, **settings):
        self.dataset, self.num_workers, self.collate_fn = dataset, num_workers, collate_fn

    def __iter__(self):
        copies = [iter(pickle.loads(pickle.dumps(self.dataset))) for _ in range(self.num_workers)]
        made = [deque() for _ in copies]
        while True:
            for number, rows in enumerate(copies):
                while len(made[number]) < self.ahead:
                    RUNNING.worker = SimpleNamespace(id=number, num_workers=self.num_workers)
                    made[number].append(self.collate_fn(next(rows)))
                    RUNNING.worker = None
                yield made[number].popleft()


def loaders_of(make_loader, sources, leg):
    """The loaders of all ranks of ``leg``."""
    loaders = []
    data = {
        "sources": sources,
        "num_lanes": NUM_STREAMS,
        "lookahead": leg.lookahead,
        "packing": leg.packing,
        "bad_samples": "skip",
        "at_end": leg.at_end,
        "mixture_by": leg.mixture_by,
    }
    for rank in range(leg.ranks):
        loader = make_loader(
            data,
            seq_len=SEQ_LEN,
            local_batch_size=leg.local_batch_size,
            global_batch_size=NUM_STREAMS,
            num_workers=leg.workers,
            dp_rank=rank,
            dp_world_size=leg.ranks,
            gather=lambda own: [loader._states for loader in loaders],
        )
        loaders.append(loader)
    return loaders


def texts_of(batch):
    tokenizer = ByteTokenizer()
    return [
        tokenizer.decode(tokens[document == number].tolist())
        for tokens, document in zip(batch.tokens, batch.document, strict=True)
        for number in range(int(document.max()) + 1)
    ]


def run(make_loader, sources, leg, state=None):
    """(texts of all documents that ``leg`` delivers when it begins at ``state``, state after it)."""
    delivered, loaders = Counter(), loaders_of(make_loader, sources, leg)
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader)
        for _ in range(leg.num_batches):
            delivered.update(texts_of(next(batches)))
        batches.close()
    states = [loader.state_dict() for loader in loaders]
    assert all(other == states[0] for other in states)
    return delivered, states[0]


def run_in_process(make_loader, sources, leg, state=None):
    """``run`` with workers in this process."""
    with (
        mock.patch.object(loader_module, "DataLoader", WorkersInProcess),
        mock.patch.object(loader_module, "get_worker_info", lambda: RUNNING.worker),
        mock.patch.object(WorkersInProcess, "ahead", leg.ahead),
    ):
        return run(make_loader, sources, leg, state)


def streams_of(state):
    return json.loads(state["state"])["lanes"]


def expected_texts(state):
    """What the streams have read, less what waits in them."""
    expected = Counter()
    for number, (source, sizes) in enumerate(SHARDS.items()):
        order = SourceOrder(0, source, sizes)
        for stream, saved in streams_of(state).items():
            waiting = {(index, part) for s, index, part in saved["waiting"] if s == number}
            for index in range(int(stream), saved["read"][number] * NUM_STREAMS, NUM_STREAMS):
                place = (source, *order.locate(index))
                texts = [] if place == BAD else parts_of(*place)
                expected.update(t for p, t in enumerate(texts) if (index, p) not in waiting)
    return expected


def has_finished_an_epoch(state):
    """Whether every sample of the first epoch of every source was delivered, going by the state."""
    return all(
        saved["read"][number] * NUM_STREAMS >= sum(sizes)
        and not any(s == number and index < sum(sizes) for s, index, _ in saved["waiting"])
        for saved in streams_of(state).values()
        for number, sizes in enumerate(SHARDS.values())
    )


def read_rest_of_the_epoch(make_loader, sources, delivered, state, mixture_by="samples"):
    """(delivered, state) after reading on until the first epoch has ended."""
    while not has_finished_an_epoch(state):
        leg = Leg(1, local_batch_size=NUM_STREAMS, mixture_by=mixture_by)
        part, state = run(make_loader, sources, leg, state)
        delivered += part
    return delivered, state


def good_texts():
    """Of every sample of an epoch but the bad one."""
    return {
        text
        for source, sizes in SHARDS.items()
        for shard, size in enumerate(sizes)
        for sample in range(size)
        if (source, shard, sample) != BAD
        for text in parts_of(source, shard, sample)
    }


def read_an_epoch_in_legs(make_loader, sources, legs, mixture_by):
    """(delivered, state) after ``legs`` and then the rest of the first epoch."""
    delivered, state = Counter(), None
    for leg in legs:
        leg = replace(leg, mixture_by=mixture_by)
        part, state = run_in_process(make_loader, sources, leg, state)
        delivered += part
        assert delivered == expected_texts(state)
    return read_rest_of_the_epoch(make_loader, sources, delivered, state, mixture_by)


@settings(FIXED, max_examples=8)
@given(legs=LEGS, mixture_by=MIXTURES)
def test_no_interruption_loses_or_repeats_a_sample(make_loader, sources, legs, mixture_by):
    delivered, state = read_an_epoch_in_legs(make_loader, sources, legs, mixture_by)
    assert delivered == expected_texts(state) and good_texts() <= delivered.keys()


@pytest.mark.slow
@settings(FIXED, max_examples=300)
@given(legs=LEGS, mixture_by=MIXTURES)
def test_no_interruption_of_many_loses_or_repeats_a_sample(make_loader, sources, legs, mixture_by):
    delivered, state = read_an_epoch_in_legs(make_loader, sources, legs, mixture_by)
    assert delivered == expected_texts(state) and good_texts() <= delivered.keys()


@pytest.mark.parametrize("local_batch_size", [1, 3])
def test_one_two_four_and_one_ranks_with_worker_processes(make_loader, sources, local_batch_size):
    delivered, state = Counter(), None
    for ranks, workers in ((1, 4), (2, 2), (4, 0), (1, 2)):
        leg = Leg(5, ranks, workers, local_batch_size=local_batch_size)
        part, state = run(make_loader, sources, leg, state)
        delivered += part
    delivered, state = read_rest_of_the_epoch(make_loader, sources, delivered, state)
    assert delivered == expected_texts(state) and good_texts() <= delivered.keys()


def test_workers_in_this_process_make_the_rows_that_worker_processes_make(make_loader, sources):
    leg = Leg(20, workers=4, ahead=3)
    assert run(make_loader, sources, leg) == run_in_process(make_loader, sources, leg)


def test_a_worker_with_fewer_streams_does_not_run_ahead(make_loader, sources):
    """Of 16 streams three workers have 6, 5 and 5. Rows that are made and not yet due wait in the main process."""
    num_made = mock.Mock(wraps=loader_module.SerializedRow.of)
    with mock.patch.object(loader_module.SerializedRow, "of", num_made):
        run_in_process(make_loader, sources, Leg(150, workers=3))
    assert 150 <= num_made.call_count <= 150 + 3  # one that each has made ahead


def test_state_stays_below_a_kilobyte_a_stream(make_loader, sources):
    """Whatever it has read: it names the documents that wait instead of holding them."""
    leg = Leg(60, lookahead=32, local_batch_size=NUM_STREAMS)
    _, state = run(make_loader, sources, leg)
    assert len(state["state"].encode()) < 1024 * NUM_STREAMS
