from itertools import combinations
from random import Random

import pytest
import torch

from symbiotic_titan.config.data import PACKINGS
from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
    VaeSegment,
    VitSegment,
)
from symbiotic_titan.data.packing import (
    SequenceSize,
    check_choice,
    fullest,
    longest_first,
)
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import IGNORE_INDEX, NO_TASK, PADDING, TEXT, VAE, VIT

GEOMETRY = ImageGeometry(
    vit_patch=2, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=2
)
SPECIAL = ByteTokenizer().special


def text(length, trained=False):
    return TextSegment(list(range(1, length + 1)), trained)


def vit(rows, columns):
    patches = torch.randn(rows * columns * 4, 12)
    return VitSegment(patches, rows, columns, (2 * rows, 2 * columns))


def vae(rows, columns):
    return VaeSegment(torch.randn(rows * columns, 12), rows, columns)


def random_document(random, limit=40):
    """<bos>, then up to four segments of any kind."""
    segments = [TextSegment([SPECIAL.bos])]
    left = limit - 1
    for _ in range(random.randint(1, 4)):
        kind = random.choice([text, vit, vae])
        if kind is text and left:
            segments.append(text(random.randint(1, left), random.random() < 0.5))
        elif left:
            rows = random.randint(1, min(4, left))
            segments.append(kind(rows, random.randint(1, max(1, min(4, left // rows)))))
        left = limit - Document(0, tuple(segments)).num_tokens
    return Document(random.randrange(4), tuple(segments))


def build(documents, size, layout="shared"):
    return SequenceBuilder(size, GEOMETRY, layout, SPECIAL).build(documents)


@pytest.mark.parametrize("packing", [longest_first, fullest])
def test_chosen_documents_fit_and_the_oldest_always_goes(packing):
    random = Random(0)
    for _ in range(300):
        waiting = [random_document(random) for _ in range(random.randint(1, 12))]
        size = SequenceSize(random.randint(40, 120), random.randint(40, 60), random.randint(40, 60))
        chosen = packing(waiting, size)
        assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
        documents = [waiting[i] for i in chosen]
        assert sum(d.num_tokens for d in documents) <= size.num_tokens
        assert sum(d.num_vit_tokens for d in documents) <= size.num_vit_tokens
        assert sum(d.num_vae_tokens for d in documents) <= size.num_vae_tokens


@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        ((0, 1), "must be a list of different integers from 0 to 2"),
        ([1], "0 among them"),
        ([0, 0], "different integers"),
        ([0, 3], "from 0 to 2"),
        ([0, -1], "from 0 to 2"),
        ([0, 1.0], "integers"),
        ([0, 1, 2], "must fit into .*num_tokens=10,.* from number 2 on they do not"),
    ],
)
def test_a_choice_that_cannot_be_packed_is_refused_by_name(make_loader, chosen, rule):
    waiting = [Document(0, (text(4),)) for _ in range(3)]
    check_choice("mine", [0, 2], waiting, SequenceSize(10, 0, 0))
    with pytest.raises(ValueError, match=f"data.packing = 'mine' returned .*; .*{rule}"):
        check_choice("mine", chosen, waiting, SequenceSize(10, 0, 0))
    with (
        PACKINGS.temporarily(mine=lambda waiting, size: [1]),
        pytest.raises(ValueError, match=r"data.packing = 'mine' returned \[1\]"),
    ):
        next(iter(make_loader({"packing": "mine"})))


def test_longest_first_leaves_nothing_that_still_fits():
    random = Random(3)
    for _ in range(300):
        waiting = [random_document(random) for _ in range(random.randint(1, 12))]
        size = SequenceSize(random.randint(40, 120), random.randint(40, 60), random.randint(40, 60))
        chosen = longest_first(waiting, size)
        left = size
        for i in chosen:
            left = left.minus(waiting[i])
        assert not any(left.fits(d) for i, d in enumerate(waiting) if i not in chosen)


def test_fullest_fills_a_row_as_far_as_any_choice_does():
    """Against all subsets, where no limit on image tokens binds."""
    random = Random(4)
    better = 0
    for _ in range(100):
        waiting = [random_document(random) for _ in range(random.randint(1, 9))]
        size = SequenceSize(random.randint(40, 120), 200, 200)
        oldest, *lengths = [document.num_tokens for document in waiting]
        subsets = (c for n in range(len(lengths) + 1) for c in combinations(lengths, n))
        best = max(filled for c in subsets if (filled := oldest + sum(c)) <= size.num_tokens)
        chosen = fullest(waiting, size)
        assert sum(waiting[i].num_tokens for i in chosen) == best
        assert chosen == sorted(chosen)
        better += best > sum(waiting[i].num_tokens for i in longest_first(waiting, size))
    assert better > 10


def test_every_document_is_found_again_in_its_row_whole_and_alone():
    random = Random(1)
    for _ in range(60):
        documents = [random_document(random) for _ in range(3)]
        row = build(documents, SequenceSize(128, 100, 90))
        start, span = 0, 0
        for number, document in enumerate(documents):
            here = slice(start, start + document.num_tokens)
            assert (row.document[0, here] == number).all()
            assert (row.task[0, here] == document.task).all()
            at = start
            for segment in document.segments:
                if isinstance(segment, TextSegment):
                    assert row.tokens[0, at : at + len(segment.ids)].tolist() == segment.ids
                    assert (row.modality[0, at : at + len(segment.ids)] == TEXT).all()
                    assert (row.span[0, at : at + len(segment.ids)] == -1).all()
                    at += len(segment.ids)
                else:
                    check_image(row, segment, at, span)
                    at += segment.rows * segment.columns
                    span += 1
            start = at
        check_padding(row, start, 128)


def check_image(row, segment, at, span):
    count = segment.rows * segment.columns
    is_vit = isinstance(segment, VitSegment)
    values, image, index, coords = (
        (row.vit_patches, row.vit_image, row.vit_index, row.vit_coords)
        if is_vit
        else (row.latents, row.vae_image, row.vae_index, row.vae_coords)
    )
    here = slice(at, at + count)
    assert (row.tokens[0, here] == (SPECIAL.vit if is_vit else SPECIAL.vae)).all()
    assert (row.modality[0, here] == (VIT if is_vit else VAE)).all()
    assert (row.span[0, here] == span).all()
    mine = image[0] == span
    assert torch.equal(values[0, mine], segment.patches if is_vit else segment.latents)
    slots = (index[0] >= at) & (index[0] < at + count)
    assert index[0, slots].tolist() == list(range(at, at + count))
    # The values of a token lie where its index says.
    per_token = 4 if is_vit else 1
    assert torch.equal(slots.repeat_interleave(per_token), mine)
    side = 2 if is_vit else 1
    assert coords[0, mine].amax(0).tolist() == [segment.rows * side - 1, segment.columns * side - 1]


def check_padding(row, start, length):
    assert (row.tokens[0, start:] == SPECIAL.pad).all()
    assert (row.modality[0, start:] == PADDING).all() and (row.modality[0, :start] != PADDING).all()
    assert (row.document[0, start:] == -1).all() and (row.span[0, start:] == -1).all()
    assert (row.task[0, start:] == NO_TASK).all() and (row.labels[0, start:] == IGNORE_INDEX).all()
    assert (row.positions[0, start:] == 0).all()
    assert (row.vit_index[0] == length).sum() == 100 - (row.modality == VIT).sum()
    assert (row.vae_index[0] == length).sum() == 90 - (row.modality == VAE).sum()
    assert (row.vit_patches[0, row.vit_image[0] == -1] == 0).all()
    assert (row.latents[0, row.vae_image[0] == -1] == 0).all()


def test_labels_are_the_next_trained_tokens_and_never_placeholders():
    random = Random(2)
    for _ in range(60):
        documents = [random_document(random) for _ in range(3)]
        row = build(documents, SequenceSize(128, 128, 128))
        expected = []
        for document in documents:
            ids, trained = [], []
            for segment in document.segments:
                is_text = isinstance(segment, TextSegment)
                count = len(segment.ids) if is_text else segment.rows * segment.columns
                ids += segment.ids if is_text else [None] * count
                trained += [is_text and segment.trained] * count
            following = zip(ids[1:], trained[1:], strict=True)
            expected += [i if t else IGNORE_INDEX for i, t in following] + [IGNORE_INDEX]
        assert row.labels[0, : len(expected)].tolist() == expected
        assert not torch.isin(row.labels, torch.tensor([SPECIAL.vit, SPECIAL.vae])).any()


@pytest.mark.parametrize(
    "layout, image",
    [
        ("shared", [[2, 2, 2]] * 6 + [[3, 3, 3]]),
        ("sequence", [[n, n, n] for n in range(2, 9)]),
        ("grid", [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4], [5, 5, 5]]),
    ],
)
@pytest.mark.parametrize("kind", [vit, vae])
def test_positions_follow_the_layout_and_start_anew_in_every_document(layout, image, kind):
    document = Document(0, (text(2), kind(2, 3), text(1)))
    row = build([document, document], SequenceSize(20, 20, 20), layout)
    expected = [[0, 0, 0], [1, 1, 1], *image]
    assert row.positions[0].tolist() == expected * 2 + [[0, 0, 0]] * 2


def test_shapes_and_dtypes_do_not_depend_on_the_documents():
    size = SequenceSize(64, 32, 48)
    rows = [
        build([Document(0, (text(3),))], size),
        build([Document(1, (vit(2, 2), vae(3, 3)))], size),
    ]
    shapes = [
        {name: (value.shape, value.dtype) for name, value in row.tensors().items()} for row in rows
    ]
    assert shapes[0] == shapes[1]
    assert rows[0].vit_patches.shape == (1, 128, 12) and rows[0].latents.shape == (1, 48, 12)
