"""Rotary positions of text and images: which axis of a position rotates which frequency, and how a head is rotated.

A position has three axes (temporal, height, width), see ``sequence.positions``. The R frequencies rotate pairs of channels of every
head. The variants of multimodal rotary differ only in the axis that each frequency reads, so a variant is a list of R axes.

Shape letters: sequence/shapes.py.
"""

from typing import Any, Literal, NamedTuple

import torch

Mrope = Literal["none", "chunked", "interleaved", "pairwise"]


class RotaryTables(NamedTuple):
    """Cosine and sine of every token's angles, (B, T, R) float32. Computed once per forward, shared by all layers."""

    cos: torch.Tensor
    sin: torch.Tensor


def frequencies(num: int, theta: float, device: torch.device) -> torch.Tensor:
    """(num,) float32 angles per position, from 1 down to almost 1 / theta (arXiv 2104.09864, section 3.2.2)."""
    exponents = torch.arange(num, dtype=torch.float32, device=device) / num
    return 1.0 / theta**exponents


def frequency_axes(
    kind: Mrope, sections: tuple[int, ...], num: int, device: torch.device
) -> torch.Tensor:
    """(num,) int64: the axis that each frequency reads. With sections (t, h, w) = (4, 2, 2):

    none         t t t t t t t t
    chunked      t t t t h h w w    arXiv 2409.12191
    interleaved  t h w t h w t t    arXiv 2511.21631: every axis sees high and low frequencies
    pairwise     h w h w t t t t    ERNIE 4.5 VL: time keeps the lowest frequencies
    """
    # Computed on the device, because a copy from the host would cost a sync per forward.
    i_R = torch.arange(num, device=device)
    if kind == "none":
        return torch.zeros_like(i_R)
    temporal, height, width = sections
    if kind == "chunked":
        return (i_R >= temporal).long() + (i_R >= temporal + height).long()
    if kind == "interleaved":
        is_height = (i_R % 3 == 1) & (i_R < 3 * height)
        is_width = (i_R % 3 == 2) & (i_R < 3 * width)
        return is_height.long() + 2 * is_width.long()
    return torch.where(i_R < height + width, 1 + i_R % 2, 0)


def rotary_tables(
    positions_BTA: torch.Tensor, axes_R: torch.Tensor, frequencies_R: torch.Tensor
) -> RotaryTables:
    """Tables in float32, also under autocast: bfloat16 cannot represent neighbouring positions beyond 256."""
    with torch.autocast(positions_BTA.device.type, enabled=False):
        angles_BTR = positions_BTA.index_select(-1, axes_R).float() * frequencies_R
        return RotaryTables(angles_BTR.cos(), angles_BTR.sin())


def rotate(x_BUTC: torch.Tensor, tables: RotaryTables, interleaved: bool) -> torch.Tensor:
    """``x`` with the first 2R of its C channels rotated, the others unchanged (partial rotary), in the dtype of ``x``.

    Channel i is paired with channel i + R; with ``interleaved``, channel 2i with 2i + 1.
    """
    cos, sin = tables.cos.unsqueeze(1), tables.sin.unsqueeze(1)
    return _Rotation.apply(x_BUTC, cos, sin, interleaved)


def _pairs(x: torch.Tensor, num: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channel of each of ``num`` pairs; views."""
    if interleaved:
        return x[..., 0 : 2 * num : 2], x[..., 1 : 2 * num : 2]
    return x[..., :num], x[..., num : 2 * num]


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    num = cos.shape[-1]
    # In float32, because bfloat16 cos and sin would not distinguish nearby positions.
    if torch.compiler.is_compiling():
        # Where a function writes into a copy of its argument, torch.compile of torch 2.11 takes its gradient for zero.
        first, second = _pairs(x.float(), num, interleaved)
        pairs = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
        return torch.cat((turned.to(x.dtype), x[..., 2 * num :]), -1)
    out = x.float() if x.dtype != torch.float32 else x.clone()
    first, second = _pairs(x, num, interleaved)
    out_first, out_second = _pairs(out, num, interleaved)
    # Rounded as in the released models' code: addcmul would round once where two products and a sum round three times.
    out_first.mul_(cos).sub_(second * sin)
    out_second.mul_(cos).add_(first * sin)
    return out.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: half the passes over memory that autograd needs for its parts."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin, ctx.interleaved), None, None, None
