"""Images in every form in which data sets hold or name them, and in every format that is decoded."""

import base64
import io
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.decoding import decode_image, other_formats
from symbiotic_titan.data.fields import Fields
from symbiotic_titan.data.fingerprint import check_fingerprint, fingerprint_of
from symbiotic_titan.data.formats.shard import BadSample, Sample
from symbiotic_titan.data.image_files import ImageFiles
from tests.helpers.read_documents import document_of
from tests.helpers.released_data import picture

RED, BLUE = picture("red"), picture("blue")
TEXT = base64.b64encode(RED).decode()
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
SCENE = NOISE.resize((128, 128))


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def made(image, **settings):
    """The document of a t2i sample with ``image``."""
    return document_of("t2i", {"caption": "c", "image": image}, **settings)


# ---- forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        RED,
        [RED],
        TEXT,
        TEXT.encode(),
        "\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)),
        TEXT.rstrip("="),
        f"data:image/png;base64,{TEXT}",
        f"data:image/png;base64,{quote(TEXT)}",
        f"data:image/png,{quote(RED)}",
        {"bytes": RED, "path": "no.png"},
        {"bytes": None, "path": TEXT},
        {"url": f"data:image/png;base64,{TEXT}"},
        {"image_url": {"url": f"data:image/png;base64,{TEXT}"}},
        {"source": {"type": "base64", "media_type": "image/png", "data": TEXT}},
        {"image_base64": TEXT},
        {"bytes": [RED], "path": [None]},
    ],
    ids=lambda value: str(value)[:30],
)
def test_every_form_of_an_image_is_read(value):
    assert made(value) == "<user>[c]<assistant><make red>[<eos>]"


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{TEXT}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{TEXT}"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{TEXT}"},
        {"type": "image", "source": {"type": "base64", "data": TEXT}},
    ],
)
def test_items_of_the_interfaces_of_others_are_images(item):
    turns = [
        {"role": "user", "content": [item, {"type": "input_text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
    ]
    assert document_of("mmu", {"messages": turns}) == "<user><see red>q<assistant>[a<eos>]"


def test_relative_paths_begin_in_the_folder_of_images(tmp_path):
    for folder, data in (("images", RED), ("shards", BLUE)):
        (tmp_path / folder / "a b").mkdir(parents=True)
        (tmp_path / folder / "a b" / "1.png").write_bytes(data)
    shard = f"{tmp_path}/shards/s.tar"
    folder = {"image_folder": f"{tmp_path}/images"}
    for path in ("a b/1.png", "a%20b/1.png", "./a b/1.png"):
        assert "<make blue>" in made(path, shard=shard)
        assert "<make red>" in made(path, shard=shard, options=folder)
    whole = f"{tmp_path}/shards/a b/1.png"
    assert "<make blue>" in made(whole, shard=shard, options=folder)
    assert "<make blue>" in made(f"file://{whole}", shard=shard, options=folder)
    (tmp_path / "images" / "a%20b").mkdir()
    (tmp_path / "images" / "a%20b" / "1.png").write_bytes(BLUE)
    assert "<make blue>" in made("a%20b/1.png", options=folder)


def test_a_folder_of_images_that_is_not_there_is_refused_before_anything_is_built(
    make_loader, demo_world
):
    row = {
        "name": "s",
        "task": "t2i",
        "format": "webdataset",
        "path": f"{demo_world}/train/t2i/*.tar",
    }
    for folder, message in (
        (
            f"{demo_world}/none",
            "image_folder '.*none' is no folder; name the one in which the paths",
        ),
        ("no-such-system://x", "image_folder 'no-such-system://x' cannot be opened"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make_loader({"sources": Data(sources=[row | {"image_folder": folder}]).sources})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"image_folder": "x"}, {"truncated_images": "decode"}])
def test_options_of_images_are_refused_for_a_task_without_images(option):
    row = {"name": "s", "task": "lm", "format": "jsonl", "path": "x"}
    with pytest.raises(ValueError, match="has no effect, samples of the task lm have no images"):
        Data(sources=[row | option])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("A" * 300_000, "image ...AAAA"),
        (TEXT * 100 + "!", "the base64 text of its image is damaged"),
        ("data:image/png;base64", "the data URI of its image has no content"),
        ("https://example.invalid/a.png", "image https://example.invalid/a.png is a URL"),
        ({"bytes": None, "path": "x" * 9999}, "cannot be read"),
        (7, "an image must be bytes or a path, got 7"),
        ({"what": "x" * 9999}, "an image must be bytes or a path, got {'what'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_message_about_an_image_is_one_short_line(value, message):
    with pytest.raises(BadSample) as error:
        made(value, shard="/a/long/folder" * 50 + "/s.tar")
    text = str(error.value)
    assert message in text and "s.tar: sample '0': " in text
    assert len(text) <= 500 and "\n" not in text


def test_no_value_makes_a_message_about_a_sample_long():
    for values in (
        {"text": ["x"] * 99_999},
        {"messages": "[" + "x" * 99_999},
        {f"n{i}": 1 for i in range(999)},
    ):
        with pytest.raises(BadSample) as error:
            document_of("lm", values, shard="s" * 999)
        assert len(str(error.value)) <= 500 and "\n" not in str(error.value)


def test_null_images_are_none_and_some_null_images_are_bad():
    read = [
        Fields(Sample("s", "0", {"images": value}), {}, files=ImageFiles()).images()
        for value in (None, [], [None, None])
    ]
    assert read == [[], [], []]


# ---- formats --------------------------------------------------------------------------------------------------------------


FORMS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS",
         "QOI", "ICNS", "MPO", "DIB", "XBM"]  # fmt: skip


@pytest.mark.parametrize("form", [*FORMS, *(["AVIF"] if "AVIF" in other_formats() else [])])
def test_every_format_is_decoded_whatever_its_name_says(form):
    image = SCENE.convert("1") if form == "XBM" else SCENE
    shown = decode_image(encoded(image, form))
    assert shown.mode == "RGB"
    right, found = (np.asarray(i.convert("L").resize((8, 8)), int) for i in (image, shown))
    assert np.abs(right - found).mean() < 12


def test_of_several_frames_the_first_is_decoded():
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    for form in ("GIF", "TIFF", "WEBP", "PNG", "MPO"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        red, _, blue = decode_image(data).getpixel((4, 4))
        assert red > 200 and blue < 60


def test_grey_of_twelve_and_sixteen_bits_in_a_tiff_is_scaled():
    ramp = np.array([[0, 256 * 7, 65535]], dtype=np.uint16)
    assert np.asarray(decode_image(encoded(Image.fromarray(ramp), "TIFF")))[0, :, 0].tolist() == [
        0,
        7,
        255,
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty; load it again"),
        (b"%PDF-1.7 ...", "it is a PDF; render its pages as PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "it is PostScript; convert"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "it is HEIC; convert it to PNG or JPEG"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00", "it is a video (MP4, brand 'isom'); video is not"),
        (b"\xff\x0a" + bytes(20), "it is JPEG XL; convert"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "it is an SVG drawing; render it as PNG"),
        (b"<!DOCTYPE html><html>404</html>", "it is an HTML page; its download failed"),
        (b'{"error": "403"}', "it is JSON text; its download failed"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer; get the files wi"),
        (b"nothing known", "its format is not known, it begins with b'nothing '"),
        (encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"), "floating-point numbers without a range"),
        (encoded(Image.fromarray(np.ones((4, 4), dtype=np.int32)), "TIFF"), "32 bit numbers without a range"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_is_no_image_is_told_by_its_content(data, message):
    with pytest.raises(BadSample) as error:
        document_of("t2i", {"caption": "c", "png": data})
    assert message in str(error.value) and error.value.reason == "image"


@pytest.mark.parametrize("zipped", [False, True])
def test_a_png_with_a_long_text_is_decoded(zipped):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "x" * 2_000_000, zip=zipped)
    assert decode_image(encoded(SCENE, "PNG", pnginfo=info)).tobytes() == SCENE.tobytes()


# ---- files that break off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_file_that_breaks_off_is_bad_unless_the_source_keeps_it(form, make_loader, demo_config):
    data = encoded(SCENE, form)
    for cut in (2 if form == "JPEG" else 40, len(data) // 2):
        with pytest.raises(BadSample, match='set truncated_images = "decode" for this source'):
            made(data[:-cut])
        assert "<make" in made(data[:-cut], options={"truncated_images": "decode"})
    whole, kept = decode_image(data), decode_image(data[: len(data) // 2], keep_truncated=True)
    assert np.array_equal(np.asarray(kept)[:32], np.asarray(whole)[:32])
    with pytest.raises(OSError, match="truncated"):  # the switch is off again
        decode_image(data[: len(data) // 2])


def test_a_resumed_run_may_keep_truncated_images_from_now_on_but_not_drop_them(
    make_loader, demo_config
):
    def spec(value):
        rows = [{**vars(source)} for source in demo_config.sources]
        rows[0]["truncated_images"] = value
        return fingerprint_of(make_loader({"sources": Data(sources=rows).sources}).spec)

    bad, decode = spec("bad"), spec("decode")
    assert "truncated_images" not in bad
    check_fingerprint(bad, decode)
    with pytest.raises(
        ValueError, match="truncated_images of source 't2i' was 'decode', now it is"
    ):
        check_fingerprint(decode, bad)


def test_the_choice_for_truncated_images_is_checked():
    row = vars(DataSource("s", "t2i", "parquet", "x")) | {"truncated_images": "keep"}
    with pytest.raises(ValueError, match="truncated_images: must be one of 'bad', 'decode'"):
        Data(sources=[row])
