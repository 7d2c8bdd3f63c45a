"""The tables count what rows hold, and tell of each image what was cut off it and how much it was scaled."""

from dataclasses import replace
from itertools import islice

import pytest
from PIL import Image

from symbiotic_titan.data.documents import VaeSegment, VitSegment
from symbiotic_titan.data.images import resize_and_crop
from symbiotic_titan.data.statistics import (
    ImageUse,
    Table,
    fill_table,
    image_uses,
    size_table,
    tables_of,
    token_table,
)
from symbiotic_titan.data.stream_state import new_state
from symbiotic_titan.data.streams import OpenSource, Stream, open_mixture
from symbiotic_titan.sequence.modality import MODALITY_NAMES, PADDING


@pytest.fixture(scope="module")
def read(make_loader):
    """A loader with one stream and the rows that it gave."""
    loader = make_loader({"num_lanes": 1})
    return loader, list(islice(loader, 12))


def test_a_table_is_aligned_text():
    table = Table("a & b", ("x", "long head"), [("<1>", "2"), ("wide cell", "3")])
    assert table.text() == [
        "a & b",
        "          x  long head",
        "        <1>          2",
        "  wide cell          3",
    ]


def test_fill_and_tokens_are_those_of_the_rows(read):
    _, rows = read
    [(count, least, _, mean, most)] = fill_table(rows).lines
    fills = [(row.modality != PADDING).float().mean().item() for row in rows]
    assert (count, mean) == ("12", f"{sum(fills) / 12:.1%}")
    assert (least, most) == (f"{min(fills):.1%}", f"{max(fills):.1%}")
    tokens = {
        line[0]: [int(cell.replace(",", "")) for cell in line[1:5]]
        for line in token_table(rows).lines
    }
    by_modality = sum(row.num_tokens() for row in rows).tolist()
    assert tokens["all"] == [*by_modality, sum(by_modality)]
    parts = [tokens[task] for task in tokens if task != "all"]
    assert [sum(column) for column in zip(*parts, strict=True)] == tokens["all"]
    assert (
        tokens["lm"][MODALITY_NAMES.index("vae")] == 0 < tokens["t2i"][MODALITY_NAMES.index("vae")]
    )


def test_every_image_of_the_rows_and_of_what_waits_is_counted_once(read, geometry):
    loader, rows = read
    spec = loader.spec
    sources = [OpenSource(spec, i) for i in range(len(spec.sources))]
    mixture = open_mixture(spec)
    stream = Stream(spec, sources, mixture, 0, new_state(spec))
    for _ in rows:
        stream.next_row()
    waiting = [s for w in stream._waiting for s in w.document.segments]
    uses = list(image_uses(loader, geometry))
    for is_target, name, kind in (
        (True, "vae_image", VaeSegment),
        (False, "vit_image", VitSegment),
    ):
        in_rows = sum(len(getattr(row, name)[getattr(row, name) >= 0].unique()) for row in rows)
        expected = in_rows + sum(isinstance(segment, kind) for segment in waiting)
        assert sum(use.is_target == is_target for use in uses) == expected > 0
    assert all(use.original for use in uses)


def test_images_that_queries_read_have_the_size_of_their_patches(make_loader, geometry):
    """The longer side has 32 pixels, the other one whole patches; tokens say nothing of it."""
    read = {"vit_merge": 1, "vit_resize": "aria", "vit_queries": (5,), "vit_query_sides": (8,)}
    geometry = replace(geometry, **read)
    loader = make_loader({"num_lanes": 1}, geometry=geometry, rotary_layout="sequence")
    rows = list(islice(loader, 12))
    seen = [use for use in image_uses(loader, geometry) if not use.is_target]
    assert len(seen) > 3 and len({use.fitted for use in seen}) > 1
    for use in seen:
        height, width = use.original
        shorter = -(-int(min(height, width) * 32 / max(height, width)) // 4) * 4
        assert sorted(use.fitted) == sorted((shorter, 32))
    tokens = sum(int((row.vit_index < 256).sum()) for row in rows)
    assert tokens == 5 * sum(len(row.vit_image[row.vit_image >= 0].unique()) for row in rows) > 0


@pytest.mark.parametrize(
    ("original", "fitted", "scale", "cut"),
    [
        ((10, 40), (10, 20), 1.0, 0.5),
        ((64, 64), (32, 32), 0.5, 0.0),
        ((30, 20), (60, 30), 2.0, 0.25),
    ],
)
def test_scale_and_cut_are_those_of_the_crop(original, fitted, scale, cut):
    use = ImageUse(True, original, fitted)
    assert (use.scale, use.cut) == (pytest.approx(scale), pytest.approx(cut))
    kept_whole = ImageUse(False, original, fitted)
    assert kept_whole.cut == 0.0


def test_cut_is_what_the_resizing_leaves_out():
    """An image whose left and right quarters are black: a crop of the middle half shows none of them."""
    image = Image.new("RGB", (40, 10))
    image.paste((255, 255, 255), (10, 0, 30, 10))
    assert resize_and_crop(image, 10, 20).getextrema() == ((255, 255),) * 3
    assert ImageUse(True, (10, 40), (10, 20)).cut == 0.5


def test_sizes_are_listed_by_how_many_have_them():
    uses = [ImageUse(True, (8, 8), (4, 4))] * 3 + [ImageUse(True, (8, 16), (4, 4))]
    uses += [ImageUse(True, None, (4, 8))]
    lines = size_table("t", uses).lines
    assert lines[0] == ("4 x 4", "4", "80.0%", "12.5%", "0.50", "0.50", "0.50")
    assert lines[1] == ("8 x 4", "1", "20.0%", "", "", "", "")
    assert lines[2][:3] == ("all", "5", "100.0%")
    many = [ImageUse(False, (n, n), (n, n)) for n in range(1, 30)]
    assert [line[0] for line in size_table("t", many).lines][-2:] == ["others", "all"]


def test_images_of_which_only_latents_are_there_have_no_scale(read, geometry, monkeypatch):
    loader, rows = read
    monkeypatch.setattr("symbiotic_titan.data.statistics.images_of", lambda *_: [])
    tables = tables_of(loader, geometry, rows)
    assert [table.title for table in tables][2:] == [
        "Target images",
        "Input images",
    ]
    assert tables[2].lines[-1][3:] == ("", "", "", "")
