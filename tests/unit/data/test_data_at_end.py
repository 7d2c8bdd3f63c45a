"""at_end = "stop": every sample of the source once, then empty rows, the same on any ranks and workers."""

import json
from collections import Counter
from itertools import islice

import pytest

from symbiotic_titan.sequence.modality import NO_TASK, PADDING
from tests.unit.data.test_data_loader import assert_same, ranks_of
from tests.unit.data.test_data_streams import add_bad, states_of, texts_of, write_texts


def read_to_the_end(loader, limit=200):
    """Batches until the loader says that no row is left."""
    batches = []
    for batch in islice(loader, limit):
        batches.append(batch)
        if loader.ended_sources:
            return batches
    raise AssertionError("it does not end")


def texts_in(batches):
    return Counter(text for batch in batches for text in texts_of(batch))


@pytest.mark.parametrize("lookahead", [1, 2, 9])
@pytest.mark.parametrize("count", [2, 30, 33])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_sample_is_given_once_and_the_last_batch_is_known_as_such(
    make_loader, tmp_path, count, num_workers, lookahead
):
    row = {"name": "texts", **write_texts(tmp_path, count), "at_end": "stop"}
    data = {"sources": [row], "lookahead": lookahead}
    loader = make_loader(data, seq_len=48, local_batch_size=4, num_workers=num_workers)
    assert loader.can_end and loader.ended_sources == []
    batches = read_to_the_end(loader)
    assert loader.ended_sources == ["texts"]
    assert texts_in(batches) == Counter(f"text {i}" for i in range(count))
    assert (batches[-1].modality != PADDING).any()


def test_rows_behind_the_end_are_padding_alone_and_of_the_usual_shape(make_loader, tmp_path):
    row = {"name": "texts", **write_texts(tmp_path, 10)}
    loader = make_loader({"sources": [row], "at_end": "stop"}, seq_len=48)
    full = read_to_the_end(loader)[0]
    empty = next(iter(loader))
    for name, value in empty.tensors().items():
        assert (value.shape, value.dtype) == (getattr(full, name).shape, getattr(full, name).dtype)
    assert (empty.modality == PADDING).all() and (empty.task == NO_TASK).all()
    assert (empty.document == -1).all() and loader.ended_sources == ["texts"]


def test_only_the_source_that_says_so_ends_and_others_repeat(make_loader, tmp_path):
    rows = [
        {"name": "many", **write_texts(tmp_path, 40, "many"), "at_end": "stop"},
        {"name": "few", **write_texts(tmp_path, 5, "few")},
    ]
    loader = make_loader({"sources": rows}, seq_len=48)
    found = texts_in(read_to_the_end(loader))
    assert loader.ended_sources == ["many"]
    assert all(found[f"many {i}"] == 1 for i in range(40))
    assert min(found[f"few {i}"] for i in range(5)) > 1
    for state in states_of(loader).values():
        assert state["scheduled"][0] == 10 and abs(state["scheduled"][1] - 10) <= 1


def test_a_source_may_repeat_where_the_others_stop(make_loader, tmp_path):
    rows = [
        {"name": "few", **write_texts(tmp_path, 4, "few"), "at_end": "repeat"},
        {"name": "many", **write_texts(tmp_path, 24, "many")},
    ]
    loader = make_loader({"sources": rows, "at_end": "stop"}, seq_len=48)
    read_to_the_end(loader)
    assert loader.ended_sources == ["many"]


def test_ranks_end_together_only_when_the_last_of_them_has_no_row(make_loader, tmp_path):
    """Streams run out after different numbers of rows; a rank that is early gives empty batches."""
    texts = [json.dumps({"text": "x" * (1 + 7 * i % 40)}) for i in range(37)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts) + "\n")
    row = {"name": "a", "task": "lm", "format": "jsonl", "path": f"{tmp_path}/a.jsonl"}
    data = {"sources": [row], "at_end": "stop", "lookahead": 3}
    alone = read_to_the_end(make_loader(data, seq_len=48, local_batch_size=4))
    ranks = ranks_of(make_loader, 4, data=data, seq_len=48)
    iterators = [iter(loader) for loader in ranks]
    first_ends = []
    for step, expected in enumerate(alone, start=1):
        for number, batches in enumerate(iterators):
            assert (next(batches).tokens[0] == expected.tokens[number]).all()
        first_ends += [step] * any(loader.ended_sources for loader in ranks)
        assert all(loader.ended_sources for loader in ranks) == (step == len(alone))
    assert first_ends[0] < len(alone)


@pytest.mark.parametrize("stop", range(9))
def test_resume_near_the_end_goes_on_bitwise_and_ends_at_the_same_batch(
    make_loader, tmp_path, stop
):
    row = {"name": "texts", **write_texts(tmp_path, 21)}
    data = {"sources": [row], "at_end": "stop", "lookahead": 3}
    whole = read_to_the_end(make_loader(data, seq_len=48, local_batch_size=2))
    before = make_loader(data, seq_len=48, local_batch_size=2)
    stop = min(stop, len(whole))
    assert_same(list(islice(before, stop)), whole[:stop])
    after = make_loader(data, seq_len=48, local_batch_size=2)
    after.load_state_dict(before.state_dict())
    if stop == len(whole):
        assert after.ended_sources == ["texts"]
    else:
        assert_same(read_to_the_end(after), whole[stop:])


def test_a_run_that_ended_goes_on_into_the_second_epoch_where_its_source_now_repeats(
    make_loader, tmp_path
):
    row = {"name": "texts", **write_texts(tmp_path, 21)}
    before = make_loader({"sources": [row], "at_end": "stop"}, seq_len=48)
    found = texts_in(read_to_the_end(before))
    after = make_loader({"sources": [row]}, seq_len=48)
    after.load_state_dict(before.state_dict())
    assert after.ended_sources == [] and not after.can_end
    found += texts_in(islice(after, 40))
    assert min(found[f"text {i}"] for i in range(21)) >= 2


@pytest.mark.parametrize("bad", [{"0"}, {"18", "19"}, {str(i) for i in range(20)}])
def test_bad_samples_are_skipped_up_to_the_end(make_loader, tmp_path, bad):
    row = {"name": "texts", **add_bad(tmp_path, 20, bad)}
    data = {"sources": [row], "at_end": "stop", "bad_samples": "skip"}
    loader = make_loader(data, seq_len=48, local_batch_size=4)
    found = texts_in(read_to_the_end(loader))
    assert found == Counter(f"bad {i}" for i in range(20) if str(i) not in bad)
    assert loader.num_skipped == len(bad)


def test_tokens_in_the_state_are_those_of_all_documents(make_loader):
    loader = make_loader({"mixture_by": "tokens", "at_end": "stop"}, seq_len=256)
    given = sum(int((batch.modality != PADDING).sum()) for batch in read_to_the_end(loader, 400))
    assert given == sum(sum(state["tokens"]) for state in states_of(loader).values())
