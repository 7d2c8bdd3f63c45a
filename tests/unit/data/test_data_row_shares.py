"""data.max_row_share: no task takes more than its part of a row, and every batch holds the mixture."""

from itertools import islice
from random import Random

import pytest

from symbiotic_titan.config.data import Data
from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
)
from symbiotic_titan.data.packing import SequenceSize, fullest, longest_first
from symbiotic_titan.sequence.modality import PADDING
from symbiotic_titan.sequence.tasks import task_number
from tests.unit.data.test_data_packing import random_document

# Shares of the tokens: images to be generated dominate.
WEIGHTS = {"t2i": 5, "t2i_long": 2, "lm": 2, "mmu": 1}
BUDGETS = {"t2i": 0.6, "t2i_long": 0.3, "lm": 0.3, "mmu": 0.2}


def shares_of(batch):
    return {task: (batch.task == task_number(task)).float().mean().item() for task in WEIGHTS}


@pytest.fixture(scope="module")
def batches(make_loader, demo_config):
    """First batches of four rows of 1024."""

    def read(number, **data):
        sources = [{**vars(s), "weight": WEIGHTS[s.name]} for s in demo_config.sources]
        data = {"sources": sources, "mixture_by": "tokens", "packing": "fullest"} | data
        # A part bounds a task from above alone: with seeds 0 and 1 one of 20 batches has less than a third of what is meant of mmu.
        data |= {"lookahead": 32, "seed": 2}
        loader = make_loader(data, seq_len=1024, local_batch_size=4)
        return list(islice(loader, number))

    return read


@pytest.fixture(scope="module")
def limited(batches):
    return batches(20, max_row_share=BUDGETS)


@pytest.mark.parametrize("packing", [longest_first, fullest])
def test_packings_keep_within_the_part_of_every_task(packing):
    random, bound = Random(5), 0
    for _ in range(300):
        waiting = [random_document(random) for _ in range(random.randint(1, 12))]
        parts = {task: random.randint(40, 60) for task in random.sample(range(4), 3)}
        size = SequenceSize(random.randint(60, 160), 100, 100, parts)
        chosen = packing(waiting, size)
        assert chosen[0] == 0
        documents = [waiting[i] for i in chosen]
        assert sum(d.num_tokens for d in documents) <= size.num_tokens
        for task, part in parts.items():
            assert sum(d.num_tokens for d in documents if d.task == task) <= part
        bound += chosen != packing(waiting, SequenceSize(size.num_tokens, 100, 100))
    assert bound > 50


@pytest.mark.parametrize("packing", [longest_first, fullest])
def test_room_that_one_task_may_not_take_goes_to_another(packing):
    def text(task, length):
        return Document(task, (TextSegment([1] * length),))

    waiting = [text(0, 30), text(0, 40), text(1, 35), text(0, 5), text(1, 25)]
    assert sorted(packing(waiting, SequenceSize(100, 0, 0, {0: 40}))) == [0, 2, 3, 4]


def test_every_batch_holds_every_task_within_bounds_where_images_dominate(batches, limited):
    """Not only the average over many batches, which the mixture gives without parts too."""
    limited = [shares_of(batch) for batch in limited]
    free = [shares_of(batch) for batch in batches(20)]
    for shares in limited:
        for task, weight in WEIGHTS.items():
            assert weight / 10 / 3 < shares[task] <= BUDGETS[task]
    assert min(shares["lm"] for shares in free) < WEIGHTS["lm"] / 10 / 3
    assert max(shares["t2i"] for shares in free) > 0.6
    for runs in (limited, free):
        assert sum(shares["t2i"] for shares in runs) / len(runs) == pytest.approx(0.5, abs=0.02)


def test_no_row_holds_more_of_a_task_than_its_part_and_rows_stay_full(limited):
    rows = [batch.task[row] for batch in limited for row in range(4)]
    for row in rows:
        for task, share in BUDGETS.items():
            assert (row == task_number(task)).float().mean() <= share
    assert sum((row >= 0).float().mean() for row in rows) / len(rows) > 0.97


def test_a_part_below_the_share_of_the_mixture_costs_fill(batches):
    """By samples nobody can tell beforehand. All waiting documents are images after a while."""
    data = {"mixture_by": "samples", "max_row_share": {"t2i": 0.25, "t2i_long": 0.25}}
    fill = [(batch.modality != PADDING).float().mean() for batch in batches(20, **data)]
    assert 0.4 < sum(fill[12:]) / 8 < 0.85 < fill[0]


def test_texts_are_split_to_their_part_and_other_long_samples_are_named(make_loader, demo_config):
    data = {"max_row_share": {"lm": 0.25}, "lookahead": 32}
    loader = make_loader(data, seq_len=1024)
    lengths = [
        int(((batch.document == n) & (batch.task == 0)).sum())
        for batch in islice(loader, 12)
        for n in range(int(batch.document.max()) + 1)
    ]
    assert max(lengths) == 256
    with pytest.raises(
        ValueError, match=r"tokens, a row holds 79 of t2i_long \(data.max_row_share"
    ):
        list(islice(make_loader({"max_row_share": {"t2i_long": 0.31}}), 10))


ROW = {"format": "jsonl", "path": "x"}
ROWS = [{**ROW, "name": t, "task": t, "weight": w} for t, w in WEIGHTS.items()]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"max_row_share": {"interleaved": 0.5}},
            "data.max_row_share.interleaved: no source has this task; there are t2i, t2i_long, lm, mmu",
        ),
        (
            {"max_row_share": {"lm": 0.0}},
            "data.max_row_share.lm: must lie in (0, 1]",
        ),
        (
            {"max_row_share": {"lm": 1.5}},
            "data.max_row_share.lm: must lie in (0, 1]",
        ),
        (
            {"max_row_share": {"lm": 0.3, "mmu": 0.3, "t2i": 0.1, "t2i_long": 0.2}},
            "the tasks may take 0.9 of a row together, so none could be filled; let the shares sum to 1 or more",
        ),
        (
            {"max_row_share": {"t2i": 0.4}, "mixture_by": "tokens"},
            "data.max_row_share.t2i: 0.4 is less than the task's share of the tokens, 0.5: rows would",
        ),
    ],
)
def test_parts_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        Data(sources=ROWS, **settings)
    assert message in str(error.value)


def test_parts_that_sum_to_one_but_for_rounding_are_fine():
    shares = {"lm": 0.7, "mmu": 0.1, "t2i": 0.1, "t2i_long": 0.1}
    assert 0.7 + 0.1 + 0.1 + 0.1 < 1.0
    assert Data(sources=ROWS, max_row_share=shares).max_row_share == shares


@pytest.mark.parametrize(
    "task, share, message",
    [
        (
            "mmu",
            0.09,
            "data.max_row_share.mmu: 23 of 256 positions are too few for one image of 16 tokens + 8 of text; raise it to at "
            "least 0.094, or lower data.vit_pixels",
        ),
        ("t2i", 0.2, "data.max_row_share.t2i: 51 of 256 positions are too few for one image of 64"),
        ("lm", 0.004, "data.max_row_share.lm: 1 of 256 positions are too few for any text"),
    ],
)
def test_parts_that_hold_no_sample_are_refused_before_training(make_loader, task, share, message):
    with pytest.raises(ValueError) as error:
        make_loader({"max_row_share": {task: share}})
    assert message in str(error.value)
