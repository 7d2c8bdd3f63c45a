"""The loader benchmark compares like with like: its bare loop and this project's readers give the same samples."""

import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.latents import Latents
from symbiotic_titan.data.loader import build_loader
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from tools.bench import loader


def write_tar(path, numbers):
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            file = io.BytesIO()
            Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(file, "PNG")
            caption = json.dumps({"caption": f"picture {number}"}).encode()
            for extension, data in (("png", file.getvalue()), ("json", caption)):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two tar files of three pictures each and a file of six texts, mixed 1 : 1."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        write_tar(folder / f"t2i-{shard}.tar", range(3 * shard, 3 * shard + 3))
    lines = [json.dumps({"text": f"text {number}"}) for number in range(6)]
    (folder / "lm.jsonl").write_text("\n".join(lines) + "\n")
    sources = [
        {"name": "t2i", "task": "t2i", "format": "webdataset", "path": f"{folder}/t2i-*.tar"},
        {"name": "lm", "task": "lm", "format": "jsonl", "path": f"{folder}/lm.jsonl"},
    ]
    return build_loader(
        Data(sources=sources, lookahead=4, vae_pixels=256),
        latents=Latents(),
        geometry=ImageGeometry(4, 2, 3, 3, 1, 4),
        rotary_layout="shared",
        tokenizer=ByteTokenizer(),
        seq_len=96,
        local_batch_size=1,
        global_batch_size=2,
    ).recipe


def content(sample):
    """Something comparable: the pixels of an image, everything else as text."""
    image = sample.get("png")
    rest = {name: value for name, value in sample.items() if name != "png"}
    return json.dumps(rest, sort_keys=True), np.array(image).tolist() if image else None


def test_the_bare_loop_and_our_readers_give_the_same_samples(recipe):
    bare = [content(s) for s in islice(loader.loop_of(recipe, loader.bare_tar), 12)]
    ours = [content(s) for s in islice(loader.read_samples(recipe), 12)]
    assert sorted(bare, key=str) == sorted(ours, key=str) and bare != ours
    assert len({str(sample) for sample in bare}) == 12


def test_every_contender_goes_on_without_end(recipe):
    """More is asked of each than the sources have, and every round reads as much as the one before."""
    entries = loader.contenders(recipe, 8)
    assert {"bare", "read", "documents", "rows"} <= entries.keys()
    for run in entries.values():
        run()
        run()
    samples = loader.loop_of(recipe, loader.bare_tar), loader.read_samples(recipe)
    assert [sum(1 for _ in islice(endless, 100)) for endless in samples] == [100, 100]
    lane = loader.one_lane(recipe)
    for round_number in (1, 2):
        loader.make_rows(lane, 100)
        assert loader.samples_read(lane) >= 100 * round_number


def test_rows_are_made_until_enough_samples_are_read(recipe):
    lane = loader.one_lane(recipe)
    loader.make_rows(lane, 10)
    assert 10 <= loader.samples_read(lane) < 20


def test_memory_is_taken_at_ten_points(recipe):
    points = loader.memory_points(recipe, 50)
    if loader.resident_mib() is None:
        assert points == []
    else:
        assert len(points) == 10 and all(size > 10 for _, size in points)
        assert [n for n, _ in points] == sorted({n for n, _ in points})


def test_too_few_samples_for_a_row_are_pointed_out(recipe):
    assert set(loader.packing_milliseconds(recipe, 12)) == {"choose_ms", "build_ms"}
    with pytest.raises(ValueError, match="--samples 2: too few for a row"):
        loader.packing_milliseconds(recipe, 2)
