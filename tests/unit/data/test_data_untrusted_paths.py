"""Which files the samples of a stranger may name: regular ones in the folders of their source, and nothing else of the machine."""

import os
from base64 import b64encode

import fsspec
import pytest

from symbiotic_titan.commands.generate import open_image
from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data import image_files
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.readers import index_source
from symbiotic_titan.evaluation.files import opened
from tests.helpers.read_documents import document_of
from tests.helpers.released_data import picture

RED, BLUE = picture("red"), picture("blue")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with links and a FIFO among its images, beside a folder of others."""
    root = tmp_path_factory.mktemp("untrusted")
    folder, others = root / "set", root / "others"
    (folder / "images").mkdir(parents=True)
    others.mkdir()
    (folder / "images" / "red.png").write_bytes(RED)
    (others / "blue.png").write_bytes(BLUE)
    for name, target in {
        "inside.png": "images/red.png",
        "outside.png": others / "blue.png",
        "elsewhere": others,
        "zeros": "/dev/zero",
        "nowhere.png": folder / "images" / "none.png",
        "loop": "loop",
    }.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "fifo.png")
    return folder


def made(data, image, config=None, **options):
    return document_of(
        "t2i",
        {"caption": "c", "image": image},
        shard=f"{data}/rows.jsonl",
        options=options,
        **(config or {}),
    )


def refusal(data, image, config=None, **options):
    """(reason, message) of a bad sample."""
    with pytest.raises(BadSample) as error:
        made(data, image, config, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return error.value.reason, str(error.value)


OUTSIDE = [
    "/etc/passwd",
    "/dev/zero",
    "zeros",
    "../others/blue.png",
    "images/../../others/blue.png",
    "outside.png",
    "elsewhere/blue.png",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "s3://bucket/a.png",
    "gs://bucket/a.png",
    "http://127.0.0.1:9/a.png",
    "https://127.0.0.1:9/a.png",
    "zip://a::/etc/passwd",
    "reference://a",
    "simplecache::file:///etc/passwd",
    "simplecache::s3://bucket/a.png",
    "memory://a.png",
    "github://a:b@main/c.png",
    "%2e%2e/others/blue.png",
    "/proc/self/environ",
    "..",
]
UNREADABLE = [
    *("fifo.png", "images", ".", "", "nowhere.png", "loop", "none.png", "a\0b", "x" * 5000, "a/" * 3000),
    *("file://", "simplecache::/etc/passwd", "~/a.png", "$HOME/a.png", "-", "\udcff.png"),
]  # fmt: skip


def test_no_other_file_of_the_machine_is_read_and_none_is_waited_for(data):
    for value in OUTSIDE:
        for image in (value, {"path": value}, {"bytes": None, "path": value}):
            assert refusal(data, image)[0] == "outside", value
    for value in UNREADABLE:
        assert refusal(data, value)[0] in ("unreadable", "missing", "wrong_type"), value
    assert "is a FIFO, a socket or a device, not a regular file" in refusal(data, "fifo.png")[1]
    assert "is a folder, not a regular file" in refusal(data, "images")[1]
    for value in ("images/red.png", "inside.png", f"{data}/images/red.png"):
        assert "<make red>" in made(data, value)


def test_a_refusal_says_how_to_allow_it(data, monkeypatch):
    others = data.parent / "others"
    monkeypatch.setattr(image_files, "LONGEST_ROOT", 200)
    for value in ("outside.png", "../others/blue.png", f"{others}/blue.png"):
        message = refusal(data, value)[1]
        named = "lies outside of its source's folders; to allow it, set image_roots = [\""
        assert named in message
        assert "<make blue>" in made(data, value, image_roots=[str(others)])
        assert "<make blue>" in made(data, value, image_roots=["/"])
    assert "<make blue>" in made(data, f"file://{others}/blue.png", image_folder=str(others))
    wrong = {"image_roots": [f"{others}/none", f"{others}-2"]}
    assert refusal(data, f"{others}/blue.png", **wrong)[0] == "outside"
    assert refusal(data, "/data/coco/train2017/1.jpg")[1].endswith(
        'to allow it, set image_roots = ["/data/coco/train2017"]'
    )
    assert refusal(data, "https://example.org/a/b.png")[1].endswith(
        'load it down, or allow it for its source: image_roots = ["https://example.org/"]'
    )


def test_a_folder_may_be_a_link_and_that_of_the_hub_leads_to_its_blobs(data, tmp_path):
    (tmp_path / "linked").symlink_to(data)
    assert "<make red>" in made(tmp_path / "linked", "images/red.png")
    assert "<make red>" in made(tmp_path, "red.png", image_folder=f"{tmp_path}/linked/images")
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0f"
    (snapshot / "images").mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "12").write_bytes(RED)
    (snapshot / "images" / "0.png").symlink_to("../../../blobs/12")
    (snapshot / "images" / "1.png").symlink_to("/etc/passwd")
    assert "<make red>" in made(snapshot, "images/0.png")
    assert "<make red>" in made(tmp_path, "0.png", image_folder=f"{snapshot}/images")
    assert refusal(snapshot, "images/1.png")[0] == "outside"


def test_a_file_that_is_exchanged_while_it_is_opened_is_not_read(data, monkeypatch):
    monkeypatch.setattr(image_files.os.path, "realpath", lambda path, **_: str(path))
    assert refusal(data, f"{data}/outside.png")[0] == "outside"
    assert "<make red>" in made(data, f"{data}/images/red.png")


def test_urls_are_read_below_a_root_that_the_source_names(data):
    for name in ("a/0.png", "b/0.png"):
        with fsspec.open(f"memory://{name}", "wb") as file:
            file.write(BLUE)
    allowed = {"image_roots": ["memory://a"]}
    assert "<make blue>" in made(data, "memory://a/0.png", **allowed)
    assert "<make blue>" in made(data, "0.png", image_folder="memory://a")
    assert "<make blue>" in made("memory://a", "0.png")
    for url in ("memory://b/0.png", "memory://ab/0.png", "memory://a/../b/0.png", "memory://a/%2e%2e/b/0.png"):  # fmt: skip
        assert refusal(data, url, **allowed)[0] == "outside", url
    for name in ("../b/0.png", "..%2fb/0.png", "0.png::file:///etc/passwd", "a::/etc/passwd"):
        assert refusal(data, name, image_folder="memory://a")[0] == "outside", name
    assert refusal("memory://a", "/etc/passwd")[0] == "outside"
    assert refusal(data, "memory://a/none.png", **allowed)[0] == "unreadable"
    assert refusal(data, "no-such-system://a/0.png", image_roots=["no-such-system://"])[0] == "unreadable"  # fmt: skip


def test_an_image_has_at_most_so_many_bytes_in_every_form(data):
    size = len(RED)
    text = b64encode(RED).decode()
    forms = ["images/red.png", RED, text, text.encode(), f"data:image/png;base64,{text}"]
    for image in forms:
        assert "<make red>" in made(data, image, {"max_image_bytes": size})
        reason, message = refusal(data, image, {"max_image_bytes": size - 1})
        assert reason == "too_large" and f"data.max_image_bytes = {size - 1}" in message
    text = "A" * 10**6
    assert refusal(data, f"data:image/png,{text}", {"max_image_bytes": 9})[0] == "too_large"
    with fsspec.open("memory://large/0.png", "wb") as file:
        file.write(RED)
    assert refusal("memory://large", "0.png", {"max_image_bytes": size - 1})[0] == "too_large"


def test_a_sample_that_names_many_files_reads_at_most_so_many_bytes(data):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    row = {"images": ["images/red.png"] * 5, "messages": turns}
    shard = f"{data}/rows.jsonl"
    limit = 5 * len(RED)
    assert document_of("mmu", row, shard=shard, max_record_bytes=limit).count("<see red>") == 5
    with pytest.raises(BadSample, match="and those before it have more bytes than data.max_record_bytes") as error:  # fmt: skip
        document_of("mmu", row, shard=shard, max_record_bytes=limit - 1)
    assert error.value.reason == "too_large"


def test_escapes_in_a_data_uri_are_read_part_by_part(data, monkeypatch):
    whole = f"data:image/png,{''.join(f'%{byte:02x}' for byte in RED)}"
    for part in (3, 4, 5, 64):
        monkeypatch.setattr(image_files, "PART", part)
        assert "<make red>" in made(data, whole)


def test_a_path_of_the_config_that_cannot_be_read_is_one_line(data):
    paths = ("zip://a::/etc/passwd", "zip://", "zip://a.jsonl::/none.zip", "tar://x::/etc/passwd", "reference://x", "github://",
        "simplecache::/tmp/none.jsonl", "memory://none", "cached://", "dir://x", "data:,x", "/dev/zero", str(data / "fifo.png"),
        "/proc/self/mem", "no-such-system://a")  # fmt: skip
    for path in paths:
        with pytest.raises(ValueError) as error:
            index_source(DataSource("s", "lm", "jsonl", path), "[[data.sources]] #1 (s)")
        message = str(error.value)
        assert message.startswith("[[data.sources]] #1 (s): ") and path in message
        assert "\n" not in message and len(message) < 400


def test_a_picture_that_a_user_names_is_a_regular_file(data):
    assert opened(f"{data}/inside.png").size == opened(f"{data.parent}/others/blue.png").size
    for name, message in (
        ("fifo.png", "is a FIFO, a socket or a device"),
        ("images", "is a folder"),
        ("zeros", "is a FIFO, a socket or a device"),
        ("none.png", "No such file"),
        ("loop", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            opened(f"{data}/{name}")
        assert str(error.value).startswith(f"{data}/{name}: cannot be read (")
        with pytest.raises(ValueError, match=f"--image .*{name}: cannot be read as an image"):
            open_image(data / name)


def test_roots_and_limits_are_checked():
    row = {"name": "s", "task": "t2i", "format": "jsonl", "path": "x"}
    for key, value, message in (
        ("image_roots", [""], r"image_roots\[0\]: must be a path"),
        ("image_roots", "x", "image_roots"),
        ("image_roots", [1], "image_roots"),
    ):
        with pytest.raises(ValueError, match=message):
            Data(sources=[row | {key: value}])
    with pytest.raises(ValueError, match="samples of the task lm have no images; remove it"):
        Data(sources=[row | {"task": "lm", "image_roots": ["/"]}])
    for key in vars(Data().limits):
        assert getattr(Data(**{key: 1}).limits, key) == 1
        with pytest.raises(ValueError, match=f"data.{key}: must be .* 1.*, got 0"):
            Data(**{key: 0})
