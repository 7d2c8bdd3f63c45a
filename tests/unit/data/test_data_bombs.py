"""Small files that would be gigabytes once they are read: each is refused, or costs no more than the limits say.

Every case is measured in a process of its own, with a ceiling on its memory.
"""

import gzip
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.config.files import InputLimits
from symbiotic_titan.data.decoding import BAND, DECODE_ERRORS, decode_image
from symbiotic_titan.data.formats import json_array, shard
from symbiotic_titan.data.formats.shard import BadSample, Reader
from symbiotic_titan.data.images import ImageSizeError
from symbiotic_titan.data.readers import index_source
from symbiotic_titan.process import DiskFull
from tests.helpers.memory import cost_of
from tests.helpers.read_documents import document_of
from tests.helpers.released_data import picture
from tests.helpers.tar_files import tar_bytes

WHERE = "[[data.sources]] #1 (s)"
MB = 2**20


def read_all(path, form, task="lm", cache="", **limits):
    """Verdict of each sample: its size, or the reason why it is bad and the message."""
    source = DataSource("s", task, form, str(path))
    folder = {"cache_folder": str(cache)} if cache else {}
    shards = index_source(source, WHERE, tolerant=True, limits=InputLimits(**limits), **folder)
    reader, verdicts = Reader(shards), []
    for number, one in enumerate(shards):
        for sample in range(min(one.num_samples, 3)):
            try:
                verdicts.append(len(reader.read(number, sample).members))
            except BadSample as error:
                verdicts.append((error.reason, str(error)))
    return verdicts


# ---- images ---------------------------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, channels=4, extra=b"", depth=8):
    """Of zeros: transparent black."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    line = bytes(1 + width * channels * depth // 8)
    pack = zlib.compressobj(9)
    pixels = b"".join([*(pack.compress(line) for _ in range(height)), pack.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def decoded(data, max_pixels=10**8):
    try:
        return decode_image(data, max_pixels).size
    except (*DECODE_ERRORS, ImageSizeError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("channels", "depth"), [(4, 8), (2, 8), (1, 16)], ids=["transparent", "grey", "16 bits"]
)
def test_an_image_takes_8_bytes_for_each_pixel(channels, depth):
    data = png(2500, 2500, channels, depth=depth)
    assert len(data) < 30_000
    small = png(8, 8, channels, depth=depth)
    cost = cost_of(decoded, data, before=lambda: decoded(small))
    assert cost.result == (2500, 2500)
    assert 4 * 6.25e6 < cost.peak < 8 * 6.25e6 + 70 * MB


def test_an_image_is_converted_in_parts_as_it_is_as_a_whole(monkeypatch):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (37, 50, 4), np.uint8)
    grey = random.integers(0, 2**16, (37, 50)).astype(np.uint16)
    images = [
        (Image.fromarray(pixels), {}),
        (Image.fromarray(pixels[..., :2].copy(), "LA"), {}),
        (Image.fromarray(pixels[..., 0].copy()), {"transparency": 7}),
        (Image.fromarray(pixels).quantize(40), {}),
        (Image.fromarray(pixels[..., :3].copy()).quantize(9), {"transparency": 3}),
        (Image.fromarray(grey), {}),
        (Image.fromarray(pixels[..., 0] > 99), {}),
    ]
    for image, options in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        whole = decode_image(buffer.getvalue())
        monkeypatch.setattr("symbiotic_titan.data.decoding.BAND", 150)
        assert decode_image(buffer.getvalue()).tobytes() == whole.tobytes(), image.mode
        monkeypatch.setattr("symbiotic_titan.data.decoding.BAND", BAND)


ZEROS = zlib.compress(bytes(2**25), 9)
IMAGES = {
    "profiles": (png(8, 8, extra=chunk(b"iCCP", b"a\0\0" + ZEROS) * 40), "several colour profiles"),
    "texts": (png(8, 8, extra=chunk(b"zTXt", b"a\0\0" + ZEROS) * 40), "Too much memory"),
    "declared": (png(1, 1).replace(struct.pack(">II", 1, 1), struct.pack(">II", 9999, 9999)), ""),
    "more than allowed": (png(1, 1).replace(struct.pack(">II", 1, 1), struct.pack(">II", 2**30, 2**30)), ""),
    "scans": (b"\xff\xd8\xff\xe0" + b"\xff\xda\0\2" * 300, "more than 200 scans"),
    "fits": (b"SIMPLE  =                    T", "FITS"),
}  # fmt: skip


def test_what_an_image_claims_or_carries_is_bounded():
    for name, (data, message) in IMAGES.items():
        cost = cost_of(decoded, data)
        assert isinstance(cost.result, str) and message in cost.result, (name, cost.result)
        assert cost.peak < 250 * MB and cost.seconds < 3, (name, cost)


def test_an_icon_is_as_large_as_the_image_in_it():
    inner = png(300, 300)
    directory = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + directory + inner
    assert decoded(icon, 90_000) in ((300, 300), (16, 16))
    assert "data.max_image_pixels = 89999" in decoded(icon, 89_999)


def test_frames_and_pages_after_the_first_cost_nothing(tmp_path):
    many = [Image.new("P", (100, 100), i % 250) for i in range(300)]
    for form in ("GIF", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        many[0].save(buffer, form, save_all=True, append_images=many[1:])
        cost = cost_of(decoded, buffer.getvalue())
        assert cost.result == (100, 100) and cost.seconds < 0.5, form
    buffer = io.BytesIO()
    page = Image.new("RGB", (1000, 1000))
    page.save(buffer, "TIFF", save_all=True, append_images=[page] * 3, compression="packbits")
    row = {"tiff": buffer.getvalue(), "texts": [None] * 4, "images": list("abcd")}
    with pytest.raises(BadSample, match="pages of its TIFF have more bytes than") as error:
        document_of("interleaved", row, max_record_bytes=10**7)
    assert error.value.reason == "too_large"
    with pytest.raises(BadSample, match="its TIFF has the wrong size"):
        document_of("interleaved", row, max_image_pixels=10**6 - 1)
    with pytest.raises(BadSample, match="its TIFF has more than 3 pages for 3 places"):
        document_of("interleaved", row | {"texts": [None] * 3, "images": list("abc")})


def test_many_large_images_of_a_sample_are_refused():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"images": [png(64, 64)] * 11, "messages": turns}
    assert document_of("mmu", row, max_image_pixels=64 * 64 + 410).count("<see") == 11
    with pytest.raises(BadSample, match="its images have more than 10 x data.max_image_pixels"):
        document_of("mmu", row, max_image_pixels=64 * 64)


# ---- text -----------------------------------------------------------------------------------------------------------------


def text_verdict(data):
    try:
        return document_of("lm", {"json": data})
    except BadSample as error:
        assert len(str(error)) < 500
        return error.reason


def test_json_is_bounded_in_depth_numbers_and_values():
    nested = [b"[" * 100_000, b'{"text":' * 100_000, b'{"text":' + b"[" * 990 + b"]" * 990 + b"}"]
    tables = [b'{"text":"a","video":' + b'{"a":' * n + b"1" + b"}" * (n + 1) for n in (300, 600, 900, 950, 990)]  # fmt: skip
    for data in (*nested, *tables):
        assert text_verdict(data) in ("json", "wrong_type", "too_large", "[a<eos>]"), data[:30]
    assert text_verdict(b'{"text": ' + b"9" * 10**6 + b"}") == "json"
    assert text_verdict(b'{"text": "a", "x": "' + b"y" * 30 * MB + b'"}') == "[a<eos>]"
    many = b'{"text": "a", "x": [' + b"[]," * 10 * MB + b"1]}"
    cost = cost_of(text_verdict, many)
    assert cost.result == "too_large" and cost.peak < 100 * MB


def test_a_text_has_at_most_so_many_bytes():
    for text, size in (("a" * 100, 100), ("ä" * 50, 100), ("\udcff" * 100, 100)):
        assert document_of("lm", {"text": text}, max_text_bytes=size)
        with pytest.raises(BadSample, match="a text of it has 100 bytes, more than data.max_text"):
            document_of("lm", {"text": text}, max_text_bytes=size - 1)
    with pytest.raises(BadSample, match="max_text_bytes"):
        document_of("t2i", {"caption": "a" * 9, "image": picture("red")}, max_text_bytes=8)


# ---- files ----------------------------------------------------------------------------------------------------------------


def test_lines_and_rows_of_nothing_make_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "MANY_ROWS", 10_000)
    for form, content in (
        ("jsonl", b"\n" * MB),
        ("jsonl", b"1\n" * MB),
        ("json", b"[" + b"1," * MB + b"1]"),
        ("json", b"[" + b"," * MB),
    ):
        path = tmp_path / "rows"
        path.write_bytes((b'{"text": "a"}\n' if form == "jsonl" else b"") + content)
        [(reason, message)] = read_all(path, form)
        assert reason == "unreadable" and "rows or blank lines in its first" in message
    rows = b'{"a":1}\n' * 12_000
    (tmp_path / "good.jsonl").write_bytes(rows)
    assert read_all(tmp_path / "good.jsonl", "jsonl") == [1, 1, 1]


def test_a_record_is_measured_before_it_is_read(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": "%s"}' % (b"b" * 1000), b'{"text": "c"}']
    (tmp_path / "l.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "t.tar").write_bytes(tar_bytes([("0.txt", b"a" * 20), ("1.txt", b"b" * 999)]))
    pq.write_table(pa.table({"text": ["a", "b" * 999]}), tmp_path / "p.parquet")
    for name, form in (("l.jsonl", "jsonl"), ("t.tar", "webdataset"), ("p.parquet", "parquet")):
        good, (reason, message), *_ = read_all(tmp_path / name, form, max_record_bytes=40)
        assert good == 1 and reason == "too_large" and "data.max_record_bytes = 40" in message


def odd_tar(path, number=1500):
    """Good members around a member with as many headers, a link, a device, a sparse file and a header of a terabyte."""
    good = tar_bytes([("0.txt", b"a")])[:1024]
    info = tarfile.TarInfo("x" * 200)
    one = info.tobuf(tarfile.GNU_FORMAT)[:1024]
    path.write_bytes(good + one * number + tar_bytes([("1.txt", b"b")]))


def test_archives_of_chained_and_huge_headers_are_damaged_not_endless(tmp_path):
    odd_tar(tmp_path / "chained.tar")
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 2**40
    start = tar_bytes([("0.txt", b"a")])[:1024]
    with (tmp_path / "huge.tar").open("wb") as file:
        file.write(start + huge.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**41)
    for name in ("chained.tar", "huge.tar"):
        cost = cost_of(read_all, tmp_path / name, "webdataset")
        good, (reason, message) = cost.result
        assert good == 1 and reason == "unreadable" and "cannot be read as a tar file" in message
        assert cost.peak < 100 * MB


def test_of_an_archive_only_regular_files_are_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, target in (
            ("0.txt", tarfile.SYMTYPE, "/etc/passwd"),
            ("1.txt", tarfile.LNKTYPE, "/etc/passwd"),
            ("2.txt", tarfile.CHRTYPE, ""),
            ("3.txt", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.devmajor, info.devminor = kind, target, 1, 5
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("4.txt"))
    os.truncate(tmp_path / "a.tar", 5 * 512)
    sparse = tarfile.TarInfo("5.txt")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (2**32 - 512, 512)
    header[483:495] = b"%011o\0" % 2**32
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(header + b"s" * 512 + tar_bytes([("6.txt", b"b")]))
    cost = cost_of(read_all, tmp_path / "a.tar", "webdataset")
    assert cost.result == [1, 1] and cost.peak < 100 * MB


def test_a_compressed_shard_unpacks_to_at_most_so_many_bytes_and_a_full_disk_is_one_line(tmp_path):
    path, cache = tmp_path / "rows.jsonl.gz", tmp_path / "cache"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b" " * 50 * MB))
    assert path.stat().st_size < 60_000
    with pytest.raises(ValueError, match=r"unpacks to more than data.max_unpacked_bytes = 9999999"):
        read_all(path, "jsonl", cache=cache, max_unpacked_bytes=9_999_999)
    assert not list(cache.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.open", lambda self, mode: open("/dev/full", mode))
        with pytest.raises(DiskFull, match=r"cache_folder: .* cannot be written .No space left") as error:  # fmt: skip
            read_all(path, "jsonl", cache=cache)
    assert "\n" not in str(error.value)
    assert not list(cache.iterdir())
    assert read_all(path, "jsonl", cache=cache, max_unpacked_bytes=60 * MB) == [1]


# ---- Parquet --------------------------------------------------------------------------------------------------------------


def test_a_row_group_is_measured_before_it_is_decoded(tmp_path):
    schema = pa.schema([("text", pa.binary())])
    zeros = pa.record_batch([pa.array([bytes(MB)] * 8)], schema=schema)
    plain = {"use_dictionary": False, "compression": "zstd"}
    with pq.ParquetWriter(tmp_path / "zeros.parquet", schema, **plain) as writer:
        writer.write_table(pa.Table.from_batches([zeros] * 8))
    assert (tmp_path / "zeros.parquet").stat().st_size < 20_000
    cost = cost_of(read_all, tmp_path / "zeros.parquet", "parquet", "lm", "")
    assert cost.result[0] == 1 and cost.peak > 60 * MB  # within the limits, it is read
    limits = tmp_path / "zeros.parquet", "parquet", 20 * MB
    cost = cost_of(read_limited, *limits)
    assert cost.peak < 20 * MB and "data.max_row_group_bytes = 20971520" in cost.result[0][1]


def read_limited(path, form, limit):
    return read_all(path, form, max_row_group_bytes=limit)


def test_entries_of_a_dictionary_are_not_written_out(tmp_path):
    entries = pa.array([0] * 3000 + [1], pa.int32()), pa.array(["x" * MB, "y"])
    dictionary = pa.DictionaryArray.from_arrays(*entries)
    lists = pa.ListArray.from_arrays(pa.array([*range(3000), 3001], pa.int32()), dictionary)
    row = pa.ListArray.from_arrays(pa.array([0, 3001], pa.int32()), dictionary)
    option = {"dictionary_pagesize_limit": 2**24, "store_schema": False}
    for column in (dictionary, lists, row):
        pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet", **option)
        assert (tmp_path / "d.parquet").stat().st_size < 60_000
        cost = cost_of(read_limited, tmp_path / "d.parquet", "parquet", 2**31)
        assert cost.peak < 100 * MB
        many = len(column) == 1
        assert cost.result[0] == 1 or (many and cost.result[0][0] == "too_large")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62], pa.duration("ns")),
        pa.array([2**62], pa.duration("s")),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([2**62], pa.timestamp("ns", "No/Where")),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([[1.5]], pa.list_(pa.float16())),
        pa.array([None], pa.null()),
        pa.array([[{"a": 2**62}]], pa.list_(pa.struct([("a", pa.duration("s"))]))),
    ],
    ids=lambda column: str(column.type),
)
def test_a_type_that_cannot_be_converted_makes_a_bad_sample(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
    [verdict] = read_all(tmp_path / "t.parquet", "parquet")
    assert verdict == 1 or (verdict[0] == "wrong_type" and "\n" not in verdict[1])


def test_lists_of_many_values_are_counted_before_they_become_objects(tmp_path, monkeypatch):
    bits = pa.array([[True] * 2000, [False]], pa.list_(pa.bool_()))
    pairs = pa.array([[("a", 1)] * 1000, []], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": bits, "caption": pairs}), tmp_path / "v.parquet")
    monkeypatch.setattr(shard, "MAX_VALUES", 1000)
    for task in ("lm", "t2i"):
        (reason, message), good = read_all(tmp_path / "v.parquet", "parquet", task)
        assert reason == "too_large" and "more than 1000 values" in message and good == 1


def test_a_row_of_a_table_is_json_that_ends(tmp_path):
    nested = json.dumps([[["a"]]])
    pq.write_table(pa.table({"messages": [nested, "[" * 100_000]}), tmp_path / "j.parquet")
    assert read_all(tmp_path / "j.parquet", "parquet", "mmu") == [1, 1]
    for value in (nested, "[" * 100_000):
        with pytest.raises(BadSample) as error:
            document_of("mmu", {"messages": value})
        assert error.value.reason in ("json", "wrong_type", "conversation")
