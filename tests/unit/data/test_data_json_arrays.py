"""Files that are one JSON array are read by row, like JSON lines; the index is compared with ``json.loads``."""

import io
import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data import readers
from symbiotic_titan.data.fields import Fields
from symbiotic_titan.data.formats.json_array import elements
from symbiotic_titan.data.formats.jsonl import lines
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.readers import Reader, index_source

WHERE = "[[data.sources]] #1 (s)"
ROWS = [{"text": 'a "quoted" [x], {y} \\'}, {"text": "ü\n", "more": [1, {"a": []}]}, {"text": "c"}]


def source(path, form="json"):
    return DataSource("s", "lm", form, str(path))


@pytest.fixture
def index(tmp_path):
    def index(content, form="json", name="a.json", **settings):
        (tmp_path / name).write_bytes(content)
        return index_source(source(tmp_path / name, form), WHERE, **settings)

    return index


def texts(shards):
    reader, values = Reader(shards), []
    for number, shard in enumerate(shards):
        for i in range(shard.num_samples):
            try:
                values.append(Fields(reader.read(number, i), {}).text("text"))
            except BadSample as error:
                values.append(error.reason)
    return values


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\[]{},: ü\n'), max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.sampled_from('a"\\]}'), max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.lists(json_values, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
)
@example(["\\", '\\\\"', '\\"'], None, True, 1)
def test_elements_are_those_of_json_loads_wherever_blocks_end(values, indent, ascii, block):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii).encode()
    ranges, damage = elements(io.BytesIO(data), 1, block)
    assert [json.loads(data[o : o + n]) for o, n in ranges.tolist()] == values and not damage


@settings(deadline=None, max_examples=200)
@given(st.lists(json_values, min_size=1, max_size=4), st.data())
def test_elements_before_the_place_where_a_file_breaks_off_stay(values, data):
    whole = json.dumps(values).encode()
    cut = data.draw(st.integers(1, len(whole) - 1))
    ranges, damage = elements(io.BytesIO(whole[:cut]), 1, 7)
    found = [json.loads(whole[o : o + n]) for o, n in ranges.tolist()]
    assert found == values[: len(found)] and f"breaks off in the array's row {len(found)}" in damage
    rest = whole[1 + sum(n + 1 for _, n in ranges.tolist()) : cut]
    with pytest.raises(ValueError):  # not one more whole row and its comma
        json.loads(b"[" + rest + b"0]" if rest.rstrip().endswith(b",") else rest + b"?")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([b"\n", b"a", b" ", b"\r", b"\x0b", b'{"a"}', b"\xff"])), st.data())
def test_lines_are_those_of_a_plain_loop_wherever_blocks_end(parts, data):
    content = b"".join(parts)
    expected, blanks, offset = [], [], 0
    for line in io.BytesIO(content):
        if line.strip():
            expected.append([offset, len(line)])
        else:
            blanks.append(len(expected))
        offset += len(line)
    ranges, found_blanks = lines(io.BytesIO(content), data.draw(st.integers(1, 20)))
    assert ranges.tolist() == expected
    # Only the blank lines before a sample matter: the last one may lack its line feed.
    assert found_blanks.tolist() in (blanks, blanks[:-1])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \n"])
def test_an_array_is_read_by_row_compact_or_pretty_printed(index, indent, before):
    shards = index(before + json.dumps(ROWS, indent=indent).encode() + b"\n")
    assert texts(shards) == [row["text"] for row in ROWS]
    assert [shards[0].key(i) for i in range(3)] == ["row 0", "row 1", "row 2"]
    fields = Fields(Reader(shards).read(0, 1), {"text": "more"})
    assert fields.get("text") == [1, {"a": []}]


def test_lines_and_arrays_are_recognised_under_either_name(index, caplog, tmp_path):
    array = json.dumps(ROWS).encode()
    as_lines = b"\n".join(json.dumps(row).encode() for row in ROWS)
    for form, content, note in (
        ("jsonl", array, 'is read as one JSON array, as with format = "json"'),
        ("json", as_lines, 'is read as JSON lines, as with format = "jsonl"'),
    ):
        for _ in range(2):  # the second time from the cache
            caplog.clear()
            with caplog.at_level("INFO", logger=readers.__name__):
                shards = index(content, form, form, cache_folder=str(tmp_path / "cache"))
            assert texts(shards) == [row["text"] for row in ROWS]
            assert [r.message for r in caplog.records] == [f"{WHERE}: {tmp_path}/{form} {note}"]


def test_elements_that_are_no_objects_are_bad_samples(index):
    content = (
        b'[{"text": "a"}, 7, "{", null, [{"text": "b"}], {"text": "c"},, {"a]b" 1}, {"text": "d"},]'
    )
    expected = ["a", "json", "json", "json", "json", "c", "json", "json", "d"]
    assert texts(index(content)) == expected


@pytest.mark.parametrize(
    ("content", "kept", "damage"),
    [
        (b'[{"text": "a"}, {"text": "b', ["a"], "breaks off in the array's row 1, which begins at"),
        (b'[{"text": "a"}, {"text": "b"}', ["a"], "breaks off in the array's row 1, which begins"),
        (b'[{"text": "a"}, {"text": [}, {"text": "b"}]', ["a"], "breaks off in the array's row 1"),
        (b'[{"text": "a"}] [{"text": "b"}]', ["a"], "goes on after byte 15, where its array ends"),
        (b'[{"text": "a"}]\x00', ["a"], "goes on after byte 15, where its array ends"),
        (b'{"data": [{"text": "a"}]}', [], "holds one JSON object, not rows; write the array"),
        (b'{\n "data": [{"text": "a"}]\n}', [], "holds one JSON object, not rows; write the"),
        (
            b"text,other\n",
            [],
            "begins with b'text,other\\n', not with a JSON array; write it again",
        ),
        (b" \n", [], "is blank, not with a JSON array"),
    ],
)
def test_damage_is_named_and_what_comes_before_it_is_kept(index, content, kept, damage):
    with pytest.raises(ValueError) as error:
        index(content)
    assert f"a.json {damage}" in str(error.value) and "\n" not in str(error.value)
    assert texts(index(content, tolerant=True)) == [*kept, "unreadable"]


def test_a_pretty_printed_object_is_no_jsonl(index):
    with pytest.raises(ValueError, match=r'holds one JSON object, .*jq -c "\.KEY\[\]" FILE > rows'):
        index(b'{\n "data": []\n}', "jsonl")


def test_a_first_line_that_breaks_off_is_one_bad_sample_of_jsonl(index):
    assert texts(index(b'{\n{"text": "b"}\n', "jsonl")) == ["json", "b"]


def test_an_empty_array_has_no_samples(index):
    for content in (b"[]", b" [ \n] "):
        with pytest.raises(ValueError, match=r"a\.json holds no samples"):
            index(content)


def test_memory_does_not_grow_with_the_file():
    row = json.dumps({"text": "word, " * 2000, "list": list(range(100))}).encode()

    def peak(count):
        content = io.BytesIO(b"[" + b",".join([row] * count) + b"]")
        tracemalloc.start()
        ranges, _ = elements(content, 1, 2**18)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(ranges) == count
        return size

    small, large = peak(50), peak(500)
    assert large < 1.3 * small
