"""The page of show_batch shows what is in the row: its text, labels, pictures and mask, and lets no text act as HTML."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from symbiotic_titan.commands import show_batch
from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
    VaeSegment,
)
from symbiotic_titan.data.images import vit_patches
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.statistics import Table
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.model.masks import build_dense_mask
from symbiotic_titan.sequence.geometry import ImageGeometry, patchify
from symbiotic_titan.sequence.modality import IGNORE_INDEX, VIT

ROOT = Path(__file__).parents[3]
GEOMETRY = ImageGeometry(
    vit_patch=2, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=2,
    vit_mean=(0.48, 0.46, 0.41), vit_std=(0.27, 0.26, 0.28),
)  # fmt: skip
TOKENIZER = ByteTokenizer()
HOSTILE = '</td><script>alert("1")</script><img src=http://a.b/c onerror=x> & \x07 \u202e abc'


def random_image(height, width):
    pixels = np.random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")


SEEN, MADE = random_image(8, 12), random_image(6, 4)


def make_row(layout="shared"):
    """mmu: a hostile question about SEEN with the answer 'yes'; t2i: the caption 'cat', then MADE."""
    special = TOKENIZER.special
    cells = torch.from_numpy(np.array(MADE)).permute(2, 0, 1) / 127.5 - 1.0
    question = Document(
        1,
        (
            TextSegment([special.bos, special.vit_start]),
            vit_patches(SEEN, 8 * 12, GEOMETRY),
            TextSegment([special.vit_end, *TOKENIZER.encode(HOSTILE)]),
            TextSegment([*TOKENIZER.encode("yes"), special.eos], trained=True),
        ),
    )
    picture = Document(
        2,
        (
            TextSegment([special.bos]),
            TextSegment([*TOKENIZER.encode("cat"), special.vae_start], trained=True),
            VaeSegment(patchify(cells, 2), 3, 2),
        ),
    )
    builder = SequenceBuilder(SequenceSize(140, 10, 10), GEOMETRY, layout, special)
    return builder.build([question, picture])


class Structure(HTMLParser):
    """Tags with their attributes, and all text; complains about tags that do not match."""

    VOID = {"meta", "img"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(row):
    table = Table("a & b", ("x", "long head"), [("<1>", "2"), ("wide cell", "3")])
    return show_batch.page("a <b> config", ["a summary"], [table], [(3, row)], TOKENIZER, GEOMETRY)


def images_of(page):
    """Alternative text -> picture."""
    found = re.findall(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]*)"', page)
    return {label: Image.open(io.BytesIO(base64.b64decode(data))) for label, data in found}


def test_a_token_around_an_image_is_shown_as_text_also_where_it_is_routed_with_the_image():
    row = make_row()
    special = TOKENIZER.special
    is_around = (row.tokens == special.vit_start) | (row.tokens == special.vit_end)
    own = replace(row, modality=row.modality.masked_fill(is_around, VIT))
    assert is_around.sum() == 2
    assert images_of(page_of(own)).keys() == images_of(page_of(row)).keys()
    assert "<vit_start>" in Structure(page_of(own)).text


def test_no_text_of_a_sample_acts_as_html():
    page = page_of(make_row())
    structure = Structure(page)
    assert HOSTILE.replace("\x07", "\u2407") in structure.text
    assert not {"script", "b"} & {tag for tag, _ in structure.tags}
    for tag, attributes in structure.tags:
        assert "onerror" not in attributes and "href" not in attributes
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/png;base64,")
    assert "default-src 'none'" in page
    assert "<h3>a &amp; b</h3>" in page and "<td>&lt;1&gt;</td>" in page


def test_exactly_the_tokens_that_are_trained_are_marked():
    page = page_of(make_row())
    runs = re.findall(r'<span class="run([^"]*)">(.*?)</span>', page)
    assert [text for kinds, text in runs if "trained" in kinds] == [
        "yes",
        "&lt;eos&gt;",
        "cat",
        "&lt;vae_start&gt;",
    ]


def test_images_are_shown_as_they_entered():
    pictures = images_of(page_of(make_row()))
    assert np.array_equal(np.array(pictures["vit"]), np.array(SEEN))
    assert np.array_equal(np.array(pictures["vae"]), np.array(MADE))


def test_pixels_that_an_autoencoder_will_encode_are_shown_as_pixels():
    row = make_row()
    pixels = ((row.latents + 1) * 127.5).round().byte()
    picture, shown = show_batch.vae_picture(replace(row, latents=pixels), 1, GEOMETRY)
    assert np.array_equal(np.array(picture), np.array(MADE)) and shown == "pixels, 2 x 3 tokens"


def test_the_mask_has_the_keys_colour_where_the_model_sees():
    row = make_row()
    picture = np.array(show_batch.mask_picture(row))
    cells = picture[show_batch.EDGE :, show_batch.EDGE :]
    is_open = torch.from_numpy((cells != 255).any(-1))
    assert torch.equal(is_open, build_dense_mask(row)[0, 0])
    colour = tuple(int(show_batch.COLOURS[2][i : i + 2], 16) for i in (1, 3, 5))
    generated = int(row.vae_index[0, 0])
    assert tuple(cells[generated, generated]) == colour
    assert tuple(picture[0, show_batch.EDGE + generated]) == colour


def test_segments_name_document_task_range_and_positions():
    row = make_row("grid")
    segments = show_batch.segments_of(row)
    lines = [(s.document, s.task, s.modality, show_batch.positions_text(row, s)) for s in segments]
    num_text = len(TOKENIZER.encode(HOSTILE)) + 5
    assert lines == [
        (0, "mmu", 0, "0..1"),
        (0, "mmu", 1, "2, 2..3, 2..4"),
        (0, "mmu", 0, f"5..{4 + num_text}"),
        (1, "t2i", 0, "0..4"),
        (1, "t2i", 2, "5, 5..7, 5..6"),
    ]
    assert all(a.end == b.start for a, b in zip(segments, segments[1:], strict=False))


def test_summary_counts_documents_tokens_and_wrong_labels():
    row = make_row()
    lines = show_batch.summary_of([row, row])
    total = 2 * int((row.modality != 3).sum())
    assert lines[0].startswith(f"2 batches, 2 rows of 140: {total / 280:.1%} full")
    assert lines[1].startswith("mmu: 2 documents (50.0%)")
    assert lines[2] == f"t2i: 2 documents (50.0%), 22 tokens ({22 / total:.1%})"
    assert lines[3] == "16 labels; 0 of them are not the next token"
    first = int((row.labels[0] != IGNORE_INDEX).nonzero()[0])
    labels = row.labels.clone()
    labels[0, first] += 1
    broken = replace(row, labels=labels)
    assert show_batch.num_wrong_labels(broken) == 1
    assert "1 labels are not the next token" in page_of(broken)


def test_a_users_mistake_ends_with_status_2_and_one_line(capsys, tmp_path):
    out = str(tmp_path / "batch.html")
    assert show_batch.main([str(tmp_path / "nowhere.toml"), "--out", out]) == 2
    assert capsys.readouterr().err.startswith("error: job.config_file: no such file: ")
    assert show_batch.main(["train_configs/debug.toml", "--out", str(tmp_path)]) == 2
    assert f"--out: {tmp_path} cannot be written" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--row 2: there are rows 0 to 1; read more with"):
        show_batch.rows_to_show([make_row(), make_row()], 2)
    assert [n for n, _ in show_batch.rows_to_show([make_row(), make_row()], 1)] == [1]


def test_the_folder_of_the_page_need_not_exist(monkeypatch, tmp_path):
    row = make_row()
    monkeypatch.setattr(show_batch, "load_job_config", lambda arguments: None)
    monkeypatch.setattr(show_batch, "open_data", lambda config: ([row], TOKENIZER, GEOMETRY))
    monkeypatch.setattr(show_batch, "tables_of", lambda *parts: [])
    out = tmp_path / "outputs/batch.html"
    assert show_batch.main(["a.toml", "--out", str(out)]) == 0
    assert Structure(out.read_text()).text.count("Row 0") == 1


def test_an_image_that_queries_read_is_shown_with_its_patches_and_their_number():
    geometry = replace(
        GEOMETRY, vit_merge=1, vit_resize="aria", vit_queries=(3, 5), vit_query_sides=(2, 6)
    )
    special, cut = TOKENIZER.special, vit_patches(SEEN, 12 * 12, geometry)
    document = Document(1, (TextSegment([special.bos]), cut))
    size = SequenceSize(10, 5, 0, num_vit_patches=36)
    row = SequenceBuilder(size, geometry, "sequence", special).build([document])
    picture, label = show_batch.vit_picture(row, 0, geometry)
    assert (picture.height, picture.width) == tuple(2 * n for n in cut.grid)
    assert label == f"pixels, {cut.grid[1]} x {cut.grid[0]} patches, read by 5 queries"
