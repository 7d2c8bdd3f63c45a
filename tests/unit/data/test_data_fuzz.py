"""Corrupted files by the thousand: the loader stays alive and every skip is counted. Everything follows from one seed."""

import io
import json
import tarfile
from random import Random

import numpy as np
import pytest
from PIL import Image

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


def tar_of(samples):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_with_damage(random, number):
    """Three samples of which one image, one JSON or the archive itself is corrupted."""
    samples = {
        f"{number}-{i}": {
            "png": image_bytes(random),
            "json": json.dumps(conversation(random)).encode(),
        }
        for i in range(3)
    }
    victim = random.choice(list(samples.values()))
    kind = random.choice(("png", "json", "tar"))
    if kind != "tar":
        victim[kind] = corrupted(victim[kind], random)
    whole = tar_of(samples)
    return corrupted(whole, random) if kind == "tar" else whole


def lines_with_damage(random):
    lines = [json.dumps({"text": f"text ü {random.random()}"}).encode() for _ in range(4)]
    at = random.randrange(4)
    lines[at] = corrupted(lines[at], random)
    return b"\n".join(lines) + b"\n"


def write_corrupted(folder, count, seed):
    """``count`` files with one corruption each, and a good one of each kind."""
    random = Random(seed)
    for number in range(count):
        if number % 4:
            (folder / f"{number:05d}.tar").write_bytes(tar_with_damage(random, number))
        else:
            (folder / f"{number:05d}.jsonl").write_bytes(lines_with_damage(random) or b"?")
    good = {"good": {"png": image_bytes(random), "json": json.dumps(conversation(random)).encode()}}
    (folder / "good.tar").write_bytes(tar_of(good))
    (folder / "good.jsonl").write_text('{"text": "good"}\n')
    names = {"image": "png", "messages": "messages"}
    return [
        {"name": "mmu", "task": "mmu", "format": "webdataset", "path": f"{folder}/*.tar", "keys": names},
        {"name": "lm", "task": "lm", "format": "jsonl", "path": f"{folder}/*.jsonl"},
    ]  # fmt: skip


def read_every_sample(make_loader, sources, num_workers):
    for row in sources:
        data = {"sources": [row], "bad_samples": "skip", "num_lanes": 2 * max(1, num_workers)}
        loader = make_loader(
            data | {"max_bad_samples": 10**9, "max_bad_in_a_row": 10**6},
            num_workers=num_workers,
            local_batch_size=8,
        )
        num_samples = sum(shard.num_samples for shard in loader.recipe.shards[0])
        for _ in loader:
            states = loader._states.values()
            read = sum(state["read"][0] for state in states)
            if min(state["read"][0] for state in states) * len(states) >= num_samples:
                break
        skipped = sum(state["read"][0] - state["scheduled"][0] for state in states)
        reasons = {k: n for k, n in loader.skip_reasons.items() if k != "truncated"}
        assert loader.num_skipped == skipped == sum(reasons.values())
        assert 0 < skipped < read
        yield row["name"], num_samples, read, {k: n for k, n in reasons.items() if n}


def test_corrupted_samples_are_skipped_and_counted(make_loader, tmp_path):
    sources = write_corrupted(tmp_path, 200, seed=0)
    found = {row[0]: row[3] for row in read_every_sample(make_loader, sources, 0)}
    assert {"unreadable", "json", "image"} <= found["mmu"].keys() and "json" in found["lm"]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ten_thousand_corruptions_end_no_worker(make_loader, tmp_path, num_workers):
    sources = write_corrupted(tmp_path, 10_000, seed=1)
    results = list(read_every_sample(make_loader, sources, num_workers))
    assert [name for name, *_ in results] == ["mmu", "lm"]
    for _, num_samples, read, reasons in results:
        assert read >= num_samples and reasons
