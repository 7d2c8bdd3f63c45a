"""Rotary tables and rotation against plain references."""

import math

import pytest
import torch

from symbiotic_titan.model.rope import (
    RotaryTables,
    frequencies,
    frequency_axes,
    rotary_tables,
    rotate,
)

CPU = torch.device("cpu")


def plain_axes(kind, sections, num):
    """Which axis each frequency reads, spelled out."""
    t, h, w = sections
    if kind == "chunked":
        return [0] * t + [1] * h + [2] * w
    if kind == "pairwise":
        return [1, 2] * h + [0] * t
    axes = [0] * num
    axes[1 : 3 * h : 3] = [1] * h
    axes[2 : 3 * w : 3] = [2] * w
    return axes


def plain_rotation(x_C, position, axes_R, theta, interleaved):
    """One head of one token, channel by channel, as complex numbers."""
    num = len(axes_R)
    out = list(x_C)
    for i, axis in enumerate(axes_R):
        angle = position[axis] * theta ** (-i / num)
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + num)
        turned = complex(x_C[first], x_C[second]) * complex(math.cos(angle), math.sin(angle))
        out[first], out[second] = turned.real, turned.imag
    return out


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("chunked", (4, 2, 2)),
        ("chunked", (2, 3, 3)),
        ("interleaved", (4, 2, 2)),
        ("interleaved", (6, 5, 5)),
        ("interleaved", (24, 20, 20)),
        ("pairwise", (4, 2, 2)),
        ("pairwise", (20, 22, 22)),
    ],
)
def test_each_frequency_reads_the_axis_of_the_backbone(kind, sections):
    num = sum(sections)
    axes = frequency_axes(kind, sections, num, CPU).tolist()
    assert axes == plain_axes(kind, sections, num)
    assert [axes.count(axis) for axis in range(3)] == list(sections)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 12])  # of 8 rotated channels: all, and two thirds
def test_rotation_equals_plain_complex_product(interleaved, width):
    axes, theta = [0, 1, 2, 0], 100.0
    positions_BTA = torch.randint(0, 50, (2, 5, 3))
    x_BUTC = torch.randn(2, 3, 5, width)
    tables = rotary_tables(positions_BTA, torch.tensor(axes), frequencies(4, theta, CPU))
    got = rotate(x_BUTC, tables, interleaved)
    for b in range(2):
        for h in range(3):
            for t in range(5):
                expected = plain_rotation(
                    x_BUTC[b, h, t].tolist(), positions_BTA[b, t].tolist(), axes, theta, interleaved
                )
                torch.testing.assert_close(got[b, h, t].tolist(), expected, atol=1e-4, rtol=1e-4)


def test_partial_rotary_leaves_the_other_channels_untouched():
    x_BUTC = torch.randn(1, 2, 6, 16)
    positions = torch.arange(6).view(1, 6, 1).expand(1, 6, 3)
    tables = rotary_tables(
        positions, torch.zeros(4, dtype=torch.long), frequencies(4, 10_000.0, CPU)
    )
    got = rotate(x_BUTC, tables, interleaved=False)
    assert torch.equal(got[..., 8:], x_BUTC[..., 8:])
    assert not torch.equal(got[..., 1:, :8], x_BUTC[..., 1:, :8])


def test_scores_depend_on_the_difference_of_positions_alone():
    q_C, k_C = torch.randn(2, 16)
    axes_R = frequency_axes("interleaved", (4, 2, 2), 8, CPU)

    def score(q_position, k_position):
        positions = torch.tensor([[q_position, k_position]])
        tables = rotary_tables(positions, axes_R, frequencies(8, 10_000.0, CPU))
        q, k = rotate(torch.stack([q_C, k_C])[None, None], tables, interleaved=False)[0, 0]
        return q @ k

    torch.testing.assert_close(score((7, 9, 4), (2, 3, 4)), score((107, 59, 14), (102, 53, 14)))
    assert not torch.isclose(score((7, 9, 4), (2, 3, 4)), score((7, 9, 4), (2, 4, 4)))


def test_text_does_not_notice_the_kind_of_mrope():
    positions = torch.arange(9).view(1, 9, 1).expand(1, 9, 3)
    f_R = frequencies(8, 10_000.0, CPU)
    kinds = ("none", "chunked", "interleaved", "pairwise")
    sections = {kind: () if kind == "none" else (4, 2, 2) for kind in kinds}
    tables = [
        rotary_tables(positions, frequency_axes(kind, sections[kind], 8, CPU), f_R)
        for kind in kinds
    ]
    assert all(torch.equal(t.cos, tables[0].cos) for t in tables)


def test_tables_keep_float32_under_autocast_and_for_bfloat16_heads():
    positions = torch.tensor([[[1001, 1001, 1001], [1002, 1002, 1002]]])
    with torch.autocast("cpu", torch.bfloat16):
        tables = rotary_tables(
            positions, torch.zeros(2, dtype=torch.long), frequencies(2, 10.0, CPU)
        )
    assert isinstance(tables, RotaryTables) and tables.cos.dtype == torch.float32
    assert tables.cos[0, 0, 0].item() == pytest.approx(math.cos(1001), abs=1e-4)
    assert rotate(torch.randn(1, 1, 2, 4).bfloat16(), tables, False).dtype == torch.bfloat16
