"""Corrupted files by the thousand: the loader stays alive and every skip is counted. Everything follows from one seed.

What is bad is first found by reading each sample by itself. Then the loader reads all of them, and its counts by reason have to be
exactly those of the samples that its streams came by.
"""

import io
import json
from collections import Counter
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.readers import Reader
from tests.helpers.tar_files import tar_bytes

FORMS = ("PNG", "JPEG", "WEBP")


def image_bytes(random):
    noise = np.random.default_rng(random.getrandbits(32))
    pixels = noise.integers(0, 256, (random.randint(1, 24), random.randint(1, 24), 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, random.choice(FORMS))
    return buffer.getvalue()


def conversation(random):
    turns = [("user", "look <image>\nwhat?"), ("assistant", "ä picture"), ("user", "and?")]
    turns = [*turns, ("assistant", "no more")][: random.choice((2, 4))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def corrupted(data, random):
    """``data`` with bytes flipped, cut off, cut out, zeroed, repeated or put in between."""
    out = bytearray(data)
    at = random.randrange(len(out))
    length = random.randint(1, max(1, len(out) // 4))
    match random.randrange(6):
        case 0:
            for _ in range(random.randint(1, 8)):
                out[random.randrange(len(out))] ^= 1 << random.randrange(8)
        case 1:
            del out[at:]
        case 2:
            del out[at : at + length]
        case 3:
            out[at : at + length] = bytes(len(out[at : at + length]))
        case 4:
            out[at:at] = out[at : at + length]
        case 5:
            out[at:at] = random.randbytes(length)
    return bytes(out)


# Each writes file number ``number`` with one corruption into ``folder`` and returns the keys of the samples that it may have
# touched, or None where that may be any of them.


def damaged_tar(folder, number, random):
    """Three samples of which one image, one JSON or the archive itself is corrupted."""
    keys = [f"{number}-{i}" for i in range(3)]
    members = []
    for key in keys:
        members += [(f"{key}.png", image_bytes(random))]
        members += [(f"{key}.json", json.dumps(conversation(random)).encode())]
    victim = random.randrange(-3, 6)
    if victim >= 0:
        members[victim] = (members[victim][0], corrupted(members[victim][1], random))
    whole = tar_bytes(members)
    data = whole if victim >= 0 else corrupted(whole, random)
    (folder / f"{number:05d}.tar").write_bytes(data or b"?")
    return {keys[victim // 2]} if victim >= 0 else None


def damaged_lines(folder, number, random):
    """Four texts in lines, one of which is corrupted; it may become several or join its neighbour."""
    lines = [json.dumps({"text": f"text ü {random.random()}"}).encode() for _ in range(4)]
    at = random.randrange(4)
    lines[at] = corrupted(lines[at], random)
    (folder / f"{number:05d}.jsonl").write_bytes(b"\n".join(lines) + b"\n" or b"?")


def damaged_folder(folder, number, random):
    """Two lines that name images beside them; one line, or one image, is corrupted."""
    lines = []
    for i in range(2):
        lines.append(json.dumps({"file": f"i/{number}-{i}", "caption": "ein Bild"}).encode())
        (folder / "i" / f"{number}-{i}").write_bytes(image_bytes(random))
    at, in_image = random.randrange(2), random.random() < 0.5
    if in_image:
        path = folder / "i" / f"{number}-{at}"
        path.write_bytes(corrupted(path.read_bytes(), random))
    else:
        lines[at] = corrupted(lines[at], random)
    (folder / f"{number:05d}.jsonl").write_bytes(b"\n".join(lines))
    return {f"line {at + 1}"} if in_image else None


def damaged_table(folder, number, random):
    """Four rows in two row groups; one image, one text or the file itself is corrupted."""
    images = [image_bytes(random) for _ in range(4)]
    texts = [f"caption ü {i}".encode() for i in range(4)]
    at, part = random.randrange(4), random.choice(("image", "text", "file", "file"))
    if part == "image":
        images[at] = corrupted(images[at], random)
    elif part == "text":
        texts[at] = corrupted(texts[at], random)
    path = folder / f"{number:05d}.parquet"
    captions = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(
        pa.table({"image": images, "caption": captions}),
        path,
        row_group_size=2,
        compression=random.choice(("none", "snappy", "zstd")),
        write_page_checksum=random.random() < 0.5,
    )
    if part == "file":
        path.write_bytes(corrupted(path.read_bytes(), random) or b"?")
    return None if part == "file" else {f"row {at}"}


# Name -> what writes its files, and its row in the config.
SOURCES = {
    "mmu": (
        damaged_tar,
        {"task": "mmu", "format": "webdataset", "keys": {"image": "png", "messages": "messages"}},
    ),
    "lm": (damaged_lines, {"task": "lm", "format": "jsonl"}),
    "beside": (damaged_folder, {"task": "t2i", "format": "jsonl", "keys": {"image": "file"}}),
    "table": (damaged_table, {"task": "t2i", "format": "parquet"}),
}
ENDINGS = {"webdataset": "tar", "jsonl": "jsonl", "parquet": "parquet"}


def write_corrupted(folder, count, seed):
    """Name -> row of the config and what may be bad: path -> keys, of ``count`` files with one corruption each."""
    written = {}
    for name, (write, row) in SOURCES.items():
        (folder / name / "i").mkdir(parents=True)
        ending, random = ENDINGS[row["format"]], Random(f"{seed} {name}")
        suspects = {
            f"{folder / name}/{number:05d}.{ending}": write(folder / name, number, random)
            for number in range(count // len(SOURCES))
        }
        path = f"{folder / name}/*.{ending}"
        written[name] = ({"name": name, "path": path, **row}, suspects)
    return written


def verdicts_of(spec, suspects):
    """Reason or None of each sample, shard by shard, when it is read by itself; samples out of suspicion are good."""
    [source], [shards] = spec.sources, spec.shards
    reader, verdicts = Reader(shards), []
    for number, shard in enumerate(shards):
        verdicts.append([])
        for sample in range(shard.num_samples):
            reason = None
            try:
                spec.maker.make(source, reader.read(number, sample), 0)
            except BadSample as error:
                reason = error.reason
                touched = suspects[shard.path]
                assert touched is None or shard.key(sample) in touched, str(error)
            verdicts[-1].append(reason)
    return verdicts


def read_all(loader):
    """Read until every sample of the only source was reached; how many samples each stream has read then."""
    num_samples = sum(shard.num_samples for shard in loader.spec.shards[0])
    for _ in loader:
        reads = {stream: state["read"][0] for stream, state in loader._states.items()}
        if min(reads.values()) * len(reads) >= num_samples:
            return reads
    raise AssertionError("the loader ended")


def check_counts(make_loader, row, suspects, num_workers):
    """Samples by verdict, after the loader skipped and counted exactly the bad ones."""
    data = {"sources": [row], "bad_samples": "skip", "num_lanes": 2 * max(1, num_workers)}
    limits = {"max_bad_samples": 10**9, "max_bad_in_a_row": 10**6}
    loader = make_loader(data | limits, num_workers=num_workers, local_batch_size=8)
    spec = loader.spec
    verdicts = verdicts_of(spec, suspects)
    reads = read_all(loader)
    order = SourceOrder(spec.config.seed, row["name"], [len(shard) for shard in verdicts])
    expected = Counter()
    for stream, read in reads.items():
        for k in range(read):
            shard, sample = order.locate(k * len(reads) + stream)
            expected[verdicts[shard][sample]] += 1
    counted = {reason: n for reason, n in loader.skip_reasons.items() if n}
    assert counted == {reason: n for reason, n in expected.items() if reason}
    assert loader.num_skipped == sum(counted.values()) and expected[None] > 0
    return Counter(reason for shard in verdicts for reason in shard)


def test_corrupted_samples_are_skipped_and_counted(make_loader, tmp_path):
    written = write_corrupted(tmp_path, 160, seed=0)
    found = {name: check_counts(make_loader, *written[name], 0) for name in written}
    assert {"unreadable", "json", "image"} <= found["mmu"].keys() and "json" in found["lm"]
    assert {"unreadable", "encoding", "image"} <= found["table"].keys()
    assert {"json", "image"} <= found["beside"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ten_thousand_corruptions_end_no_worker(make_loader, tmp_path, num_workers):
    found = {}
    for name, (row, suspects) in write_corrupted(tmp_path, 10_000, seed=1).items():
        found[name] = check_counts(make_loader, row, suspects, num_workers)
        print(f"{name}: {len(suspects)} corruptions, {dict(found[name])}")
    assert all(verdicts[None] and len(verdicts) > 1 for verdicts in found.values())
