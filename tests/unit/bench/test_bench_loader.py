"""The loader benchmark compares like with like: its bare loop and this project's readers give the same samples."""

import io
import json
import tarfile
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.pipeline import build_loader
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from tools.bench import loader

# The package webdataset, where it is installed, leaves a file open when its loop is left.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


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
def make_loader(tmp_path_factory):
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
    return partial(
        build_loader,
        Data(sources=sources, lookahead=4, vae_pixels=256),
        latents=Latents(),
        geometry=ImageGeometry(4, 2, 3, 3, 1, 4),
        rotary_layout="shared",
        tokenizer=ByteTokenizer(),
        seq_len=96,
        local_batch_size=1,
        global_batch_size=2,
    )


@pytest.fixture(scope="module")
def spec(make_loader):
    return make_loader().spec


def content(sample):
    """Something comparable: the pixels of an image, everything else as text; the loops' own names left out."""
    image = sample.get("png")
    rest = {name: value for name, value in sample.items() if name != "png" and name[:2] != "__"}
    rest = rest.get("json", rest)
    return str(rest), np.array(image).tolist() if image else None


def test_every_loop_that_is_installed_gives_the_samples_of_our_readers(spec):
    ours = [content(s) for s in islice(loader.read_samples(spec, decode=True), 12)]
    assert len({str(sample) for sample in ours}) == 12
    for name in (
        "bare",
        "datasets",
    ):  # webdataset leaves files open where it is not read to its end
        try:
            theirs = [content(s) for s in islice(loader.loop_of(spec, name, decode=True), 12)]
        except ImportError:
            assert name != "bare"
            continue
        assert sorted(theirs, key=str) == sorted(ours, key=str) and theirs != ours, name


def test_without_decoding_images_stay_bytes_on_both_sides(spec):
    for stream in (
        loader.read_samples(spec, decode=False),
        loader.loop_of(spec, "bare", decode=False),
    ):
        images = [sample["png"] for sample in islice(stream, 12) if "png" in sample]
        assert len(images) == 6 and all(isinstance(image, bytes) for image in images)


def test_a_format_that_a_loop_cannot_read_is_named(spec):
    table = replace(spec, sources=[replace(s, format="parquet") for s in spec.sources])
    with pytest.raises(ValueError, match="it reads webdataset, jsonl, not parquet"):
        loader.loop_of(table, "bare", decode=True)


def test_every_contender_goes_on_without_end(spec):
    """More is asked of each than the sources have, and every round reads as much as the one before."""
    entries = loader.contenders(spec, 8)
    names = {"bare", "bare_decoded", "read", "read_decoded", "documents", "rows"}
    assert names <= entries.keys()
    for run in entries.values():
        run()
        run()
    stream = loader.one_stream(spec)
    for round_number in (1, 2):
        loader.make_rows(stream, 100)
        assert loader.samples_read(stream) >= 100 * round_number


def test_timers_count_the_time_of_inner_functions_once(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    timers = loader.Timers()
    inner = timers.around("inner", lambda: None)
    timers.around("outer", inner)()
    assert timers.seconds == {"inner": 3.0, "outer": 7.0}


def test_every_stage_of_a_row_takes_time_and_nothing_stays_patched(spec):
    before = loader.DocumentMaker.make, loader.SequenceBuilder.build
    times = loader.stage_times(spec, 20)
    stages = {"read", "decode", "resize", "tokenise", "documents", "choose", "build", "flatten"}
    assert times.keys() == stages and all(value > 0 for value in times.values())
    assert (loader.DocumentMaker.make, loader.SequenceBuilder.build) == before


def test_the_loader_is_measured_with_and_without_workers(make_loader):
    speeds = loader.worker_speeds(lambda n: make_loader(num_workers=n), num_rows=4, repeats=1)
    assert speeds.keys() == {"0", "1", "2"}
    assert all(value["rows_per_second"] > 0 for value in speeds.values())


def test_photos_fill_the_rows_they_are_made_for(tmp_path):
    loader.write_photos(tmp_path, shards=1, photos=4)
    spec = loader.loader_of_photos(tmp_path, num_workers=0).spec
    documents = [d for made in islice(loader.make_documents(spec), 8) for d in made]
    assert sum(d.num_vit_tokens > 40 for d in documents) == 4
    assert sum(d.num_vae_tokens > 180 for d in documents) == 4


def test_quotients_are_medians_over_the_rounds():
    times = {"theirs": [2.0, 3.0, 40.0], "ours": [1.0, 2.0, 10.0]}
    assert loader.quotients(times, ["theirs"], "ours") == {"theirs": [2.0, 1.75, 3.0]}


def test_rows_are_made_until_enough_samples_are_read(spec):
    stream = loader.one_stream(spec)
    loader.make_rows(stream, 10)
    assert 10 <= loader.samples_read(stream) < 20


def test_memory_is_taken_at_ten_points(spec):
    points = loader.memory_points(spec, 50)
    if loader.resident_mib() is None:
        assert points == []
    else:
        assert len(points) == 10 and all(size > 10 for _, size in points)
        assert [n for n, _ in points] == sorted({n for n, _ in points})
