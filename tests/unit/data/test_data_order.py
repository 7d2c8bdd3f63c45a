import numpy as np
import pytest

from symbiotic_titan.data.order import SourceOrder, hash_fraction, hash_key, permutation


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
