from contextlib import closing

import numpy as np
import pytest

from symbiotic_titan.data import fingerprint, order
from symbiotic_titan.data.order import (
    Bijection,
    SourceOrder,
    hash_fraction,
    hash_key,
    mix,
    permutation,
)


def test_permutation_holds_every_number_once_and_depends_on_the_key():
    first, second = permutation(1000, 1), permutation(1000, 2)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert (first != second).mean() > 0.9


def test_permutation_and_hash_never_change_between_versions():
    # A checkpoint names samples by their place in these orders.
    assert permutation(8, 12345).tolist() == [2, 6, 0, 3, 1, 5, 7, 4]
    assert hash_key("a", 1, "b") == 5373054458703164247


def test_hash_fraction_is_spread_evenly():
    values = np.array([hash_fraction("x", i) for i in range(4000)])
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] - 400).max() < 100


@pytest.mark.parametrize("num_streams", [1, 3, 8, 40])
def test_no_sample_is_lost_or_repeated_within_an_epoch_over_all_streams(num_streams):
    sizes = [5, 1, 9, 4]
    order = SourceOrder(0, "s", sizes)
    everything = {(shard, i) for shard, size in enumerate(sizes) for i in range(size)}
    reads_per_stream = 3 * sum(sizes)
    seen = sorted(
        (k * num_streams + stream, order.locate(k * num_streams + stream))
        for stream in range(num_streams)
        for k in range(reads_per_stream)
    )
    for epoch in range(reads_per_stream * num_streams // 19):
        places = [place for index, place in seen if index // 19 == epoch]
        assert len(places) == 19 and set(places) == everything


def test_an_epoch_reads_one_shard_after_the_other():
    order = SourceOrder(3, "s", [10, 20, 30])
    shards = [order.locate(g)[0] for g in range(60)]
    assert sum(a != b for a, b in zip(shards, shards[1:], strict=False)) == 2


def test_seed_source_and_epoch_each_give_another_order():
    def epoch(seed, name, number):
        order = SourceOrder(seed, name, [10, 20])
        return [order.locate(number * 30 + i) for i in range(30)]

    orders = [epoch(0, "s", 0), epoch(1, "s", 0), epoch(0, "t", 0), epoch(0, "s", 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize("length", [*range(1, 70), 127, 128, 129, 1000, 4096, 5000])
def test_a_bijection_holds_every_number_once(length):
    for key in (0, 2**64 - 1):
        order = Bijection(length, key)
        assert sorted(order[i] for i in range(length)) == list(range(length))


def test_a_bijection_never_changes_between_versions():
    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 with seed 0
    assert [Bijection(8, 12345)[i] for i in range(8)] == [3, 7, 0, 4, 6, 2, 5, 1]
    large = Bijection(10_000_000, 67890)
    assert [large[i] for i in (0, 1, 2, 5_000_000, 9_999_999)] == [
        4148119,
        7734672,
        7049331,
        5181386,
        2259637,
    ]


def test_a_bijection_spreads_numbers_evenly_and_depends_on_the_key():
    length, count = 3_000_000, 4000
    orders = [Bijection(length, key) for key in range(2)]
    places = np.array([[order[i] for i in range(count)] for order in orders])
    assert places.max() < length and (places[0] != places[1]).all()
    expected = count / 20
    for values in (
        places[0],
        places[1],
        np.array([Bijection(length, key)[7] for key in range(count)]),
    ):
        counts = np.histogram(values, 20, (0, length))[0]
        assert (
            (counts - expected) ** 2 / expected
        ).sum() < 45  # chi-square, 19 degrees: p = 0.0007
    # Neighbours do not stay near each other.
    steps = np.abs(np.diff(places[0])) / length
    assert (
        abs(steps.mean() - 1 / 3) < 0.02 and abs(np.corrcoef(places[0], range(count))[0, 1]) < 0.06
    )


def test_only_larger_shards_are_not_sorted(monkeypatch):
    monkeypatch.setattr(order, "LARGEST_SORTED", 20)
    sizes = [21, 20]

    def epoch(**settings):
        source = SourceOrder(0, "s", sizes, **settings)
        return [source.locate(i) for i in range(41)]

    new, old = epoch(), epoch(sorts_all=True)
    assert (
        sorted(new) == sorted(old) == [(s, i) for s, size in enumerate(sizes) for i in range(size)]
    )
    assert [place for place in new if place[0]] == [place for place in old if place[0]]
    assert [i for shard, i in new if not shard] != [i for shard, i in old if not shard]


def test_one_shard_of_ten_million_samples_is_shuffled_without_sorting_it(monkeypatch):
    monkeypatch.setattr(
        order, "permutation", lambda length, key: np.arange(length) if length < 9 else 1 / 0
    )
    source = SourceOrder(0, "s", [10_000_000])
    places = {source.locate(i) for i in range(2000)}
    assert len(places) == 2000 and max(i for _, i in places) > 9_900_000


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_that_an_older_version_began_keeps_its_order_of_large_shards(
    make_loader, monkeypatch, num_workers
):
    def rows_of(loader, count):
        with closing(iter(loader)) as rows:
            return [next(rows).tokens.tolist() for _ in range(count)]

    def limit(samples):
        monkeypatch.setattr(order, "LARGEST_SORTED", samples)
        monkeypatch.setattr(fingerprint, "LARGEST_SORTED", samples)

    sorted_run = rows_of(make_loader(), 16)
    loader = make_loader()
    rows_of(loader, 8)
    state = loader.state_dict()  # as an older version saved it, whatever the size of the shards
    assert fingerprint.LARGE_SHARDS not in state["state"]
    limit(3)
    new_run = rows_of(make_loader(), 16)
    assert new_run != sorted_run
    old = make_loader(num_workers=num_workers)
    old.load_state_dict(state)
    assert rows_of(old, 4) == sorted_run[8:12]
    again = make_loader()
    again.load_state_dict(old.state_dict())
    assert rows_of(again, 4) == sorted_run[12:]
    new = make_loader(num_workers=num_workers)
    rows_of(new, 8)
    assert fingerprint.LARGE_SHARDS in new.state_dict()["state"]
    resumed = make_loader()
    resumed.load_state_dict(new.state_dict())
    assert rows_of(resumed, 8) == new_run[8:]
