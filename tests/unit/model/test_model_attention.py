"""Attention and feed-forward against plain references."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.decoder import Attention
from symbiotic_titan.model.layers import FeedForward, RMSNorm
from symbiotic_titan.model.rope import frequencies, frequency_axes, rotary_tables, rotate


def random_module(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def rotary(args, length):
    num = args.rotary_dim // 2
    axes = frequency_axes(args.mrope, args.mrope_sections, num, torch.device("cpu"))
    positions = torch.arange(length).view(1, -1, 1).expand(2, -1, 3)
    return rotary_tables(positions, axes, frequencies(num, args.rope_theta, torch.device("cpu")))


def rms_normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def plain_attention(attention, args, x_BTD, tables, mask):
    """Head by head, scores written out."""
    group = args.num_heads // args.num_kv_heads
    outputs = []
    for head in range(args.num_heads):

        def project(linear, index):
            weight = linear.weight.unflatten(0, (-1, args.head_dim))[index]
            out = x_BTD @ weight.T
            if linear.bias is not None:
                out = out + linear.bias.unflatten(0, (-1, args.head_dim))[index]
            return out

        q, k = project(attention.wq, head), project(attention.wk, head // group)
        if args.qk_norm == "before":
            q, k = rms_normed(q, attention.q_norm), rms_normed(k, attention.k_norm)
        q, k = (rotate(a.unsqueeze(1), tables, args.rotary_interleaved).squeeze(1) for a in (q, k))
        if args.qk_norm == "after":
            q, k = rms_normed(q, attention.q_norm), rms_normed(k, attention.k_norm)
        scores = q @ k.transpose(1, 2) * args.head_dim**-0.5
        probabilities = scores.masked_fill(~mask.squeeze(1), -torch.inf).softmax(-1)
        outputs.append(probabilities @ project(attention.wv, head // group))
    out = torch.cat(outputs, dim=-1) @ attention.wo.weight.T
    return out if attention.wo.bias is None else out + attention.wo.bias


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "none", "qkv_bias": True, "o_bias": True},
        {"qk_norm": "after", "num_kv_heads": 1},
        {"num_kv_heads": 4, "rotary_interleaved": True},
        {"rotary_fraction": 0.5, "mrope": "chunked", "mrope_sections": (2, 1, 1), "head_dim": 16},
        {"head_dim": 12, "mrope": "none", "mrope_sections": (), "rotary_layout": "shared"},
    ],
)
def test_attention_equals_plain_heads_for_every_switch(make_args, changes):
    args = make_args(**changes)
    attention = random_module(Attention(args))
    x_BTD = torch.randn(2, 7, args.dim)
    mask = torch.ones(7, 7).tril().bool().expand(2, 1, 7, 7)
    tables = rotary(args, 7)
    expected = plain_attention(attention, args, x_BTD, tables, mask)
    torch.testing.assert_close(attention(x_BTD, tables, mask), expected, atol=1e-5, rtol=1e-5)


def test_norm_before_and_after_rotary_differ(make_args):
    x_BTD, mask = torch.randn(2, 7, 32), torch.ones(2, 1, 7, 7).tril().bool()
    outputs = []
    for qk_norm in ("none", "before", "after"):
        args = make_args(qk_norm=qk_norm)
        outputs.append(random_module(Attention(args))(x_BTD, rotary(args, 7), mask))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


def test_feed_forward_is_swiglu():
    ffn = random_module(FeedForward(8, 12))
    x = torch.randn(3, 8)
    gate = x @ ffn.w1.weight.T
    expected = (gate * gate.sigmoid() * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T
    torch.testing.assert_close(ffn(x), expected)


def test_norm_keeps_the_dtype_of_its_input_and_sums_in_float32():
    norm = RMSNorm(512, eps=1e-6)
    x = 30 * torch.randn(4, 512).bfloat16()
    got = norm(x)  # float32 weight, bfloat16 input: what autocast hands to every norm
    exact = F.rms_norm(x.float(), (512,), None, 1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16())
    assert isinstance(norm, nn.RMSNorm)
