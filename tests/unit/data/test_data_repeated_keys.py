"""Shards that were appended to each other: no member is ever paired with one of another shard, and none is lost without a word."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.fields import Fields
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.formats.webdataset import is_data
from symbiotic_titan.data.readers import Reader, index_source
from tests.helpers.tar_files import tar_bytes

WHERE = "[[data.sources]] #1 (s)"
# Two shards, both numbered from 0.
FIRST = [("0.png", b"red"), ("0.txt", b"A0"), ("1.png", b"red1"), ("1.txt", b"A1")]
SECOND = [("0.png", b"blue"), ("0.txt", b"B0"), ("1.png", b"blue1"), ("1.txt", b"B1")]


@pytest.fixture
def samples_of(tmp_path):
    """(key, members) of every sample of a tar file with the given members."""

    def samples(members, **settings):
        (tmp_path / "s.tar").write_bytes(tar_bytes(members))
        row = DataSource("s", "t2i", "webdataset", str(tmp_path / "s.tar"))
        shards = index_source(row, WHERE, **settings)
        count = sum(shard.num_samples for shard in shards)
        found = [Reader(shards).read(0, i) for i in range(count)]
        return [(sample.key, sample.members) for sample in found]

    return samples


@pytest.mark.parametrize("cached", [False, True])
def test_two_appended_shards_give_the_samples_of_both_and_one_warning(
    samples_of, tmp_path, caplog, cached
):
    settings = {"cache_folder": str(tmp_path / "cache")} if cached else {}
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert samples_of(FIRST + SECOND, **settings) == [
            ("0", {"png": b"red", "txt": b"A0"}),
            ("1", {"png": b"red1", "txt": b"A1"}),
            ("0", {"png": b"blue", "txt": b"B0"}),
            ("1", {"png": b"blue1", "txt": b"B1"}),
        ]
        [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert record.message == (
            f"{WHERE}: {tmp_path}/s.tar holds '0.png' twice, as appended shards do; only consecutive members of one key are "
            "taken as a sample"
        )


def test_a_source_of_many_such_files_gives_one_warning(tmp_path, caplog):
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(tar_bytes(FIRST + SECOND))
    index_source(DataSource("s", "t2i", "webdataset", f"{tmp_path}/*.tar"), WHERE)
    [record] = caplog.records
    assert "0.tar holds" in record.message and "with 2 more files" in record.message


@pytest.mark.parametrize("missing", range(8))
def test_a_sample_without_its_text_or_image_is_bad_and_takes_nothing_of_another_shard(
    samples_of, missing
):
    members = FIRST + SECOND
    left = members[:missing] + members[missing + 1 :]
    good, bad = [], []
    for key, found in samples_of(left):
        (good if len(found) == 2 else bad).append((key, found))
    assert len(good) == 3 and len(bad) == 1
    pairs = {b"red": b"A0", b"red1": b"A1", b"blue": b"B0", b"blue1": b"B1"}
    assert all(pairs[found["png"]] == found["txt"] for _, found in good)


def test_the_image_that_lost_its_caption_is_reported_as_missing_it(tmp_path):
    members = FIRST + [m for m in SECOND if m[0] != "0.txt"]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    row = DataSource("s", "t2i", "webdataset", str(tmp_path / "s.tar"))
    fields = Fields(Reader(index_source(row, WHERE)).read(0, 2), {})
    assert fields.named("png") == b"blue"
    with pytest.raises(BadSample) as error:
        fields.text("caption")
    assert error.value.reason == "missing"


def test_incomplete_neighbours_of_one_key_stand_alone(samples_of):
    """The first shard's only sample lacks its image: the second's image must not get its text."""
    found = samples_of([("0.txt", b"A"), ("0.png", b"blue"), ("0.txt", b"B")])
    assert found == [("0", {"txt": b"A"}), ("0", {"png": b"blue"}), ("0", {"txt": b"B"})]
    whole = samples_of([("0.png", b"red"), ("0.txt", b"A"), ("0.png", b"blue"), ("0.txt", b"B")])
    assert whole == [
        ("0", {"png": b"red", "txt": b"A"}), ("0", {"png": b"blue", "txt": b"B"}),
    ]  # fmt: skip


def test_members_need_not_be_adjacent_where_no_name_comes_twice(samples_of, caplog):
    members = [("0.png", b"0"), ("1.png", b"1"), ("1.txt", b"one"), ("0.txt", b"zero")]
    assert samples_of(members) == [
        ("0", {"png": b"0", "txt": b"zero"}), ("1", {"png": b"1", "txt": b"one"}),
    ]  # fmt: skip
    assert not caplog.records


def reference(members):
    """The rule, in plain words: groups of members."""
    names = [name for name, _ in members]
    if len(set(names)) == len(names):
        groups = {}
        for name, data in members:
            groups.setdefault(name.partition(".")[0], []).append((name, data))
        return list(groups.values())
    runs = []
    for name, data in members:
        if not runs or runs[-1][0][0].partition(".")[0] != name.partition(".")[0]:
            runs.append([])
        runs[-1].append((name, data))
    groups = []
    for run in runs:
        names = [name for name, _ in run]
        size = len(set(names))
        if all(names[i : i + size] == names[:size] for i in range(0, len(run), size)):
            groups += [run[i : i + size] for i in range(0, len(run), size)]
        else:
            groups += [[member] for member in run]
    return groups


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from("01"), st.sampled_from(["png", "txt", "json"])),
        min_size=1,
        max_size=9,
    )
)
def test_any_file_gives_the_groups_of_the_plain_rule(tmp_path_factory, names):
    members = [(f"{key}.{kind}", b"%d" % i) for i, (key, kind) in enumerate(names)]
    path = tmp_path_factory.getbasetemp() / "repeated.tar"
    path.write_bytes(tar_bytes(members))
    shards = index_source(DataSource("s", "t2i", "webdataset", str(path)), WHERE)
    found = [Reader(shards).read(0, i).members for i in range(shards[0].num_samples)]
    expected = [{n.partition(".")[2]: d for n, d in group} for group in reference(members)]
    assert found == expected


def test_members_that_are_no_data_are_left_out(samples_of):
    extra = ["._0.png", ".DS_Store", "__MACOSX/._0.png", "__MACOSX/0.txt", "__index__", "a/._0.txt"]
    extra += [".ipynb_checkpoints/0.txt", "./.hidden"]
    members = [(name, b"?") for name in extra[:4]] + FIRST + [(name, b"?") for name in extra[4:]]
    assert [key for key, _ in samples_of(members)] == ["0", "1"]
    assert not any(map(is_data, extra))
    assert all(map(is_data, ["0.png", "./0.png", "../a/0.png", "__a/0.png", "a/__b__.txt"]))
