"""Sizes that the host knows from the batch: the same layer, without waiting for the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from symbiotic_titan.moe.dispatch import LocalDispatcher
from symbiotic_titan.moe.kernels import has_grouped_kernel
from symbiotic_titan.sequence.modality import NUM_MODALITIES, PADDING, TEXT, VAE, VIT
from tests.helpers.moe_reference import (
    GROUPS,
    POOL,
    UNEQUAL,
    assert_close_with_gradients,
    make_args,
    make_layer,
    make_tokens,
)

NO_SHIELD = torch.tensor(1.0)
BATCHES = {
    "all": (TEXT, VIT, VAE, PADDING),
    "no padding": (TEXT, VAE, VIT),
    "one group without tokens": (TEXT, PADDING),
    "padding only": (PADDING,),
}


def counts_of(modality_T):
    return tuple(torch.bincount(modality_T, minlength=PADDING + 1)[:NUM_MODALITIES].tolist())


@pytest.mark.parametrize("groups", [GROUPS, POOL, UNEQUAL], ids=["two", "one", "unequal"])
@pytest.mark.parametrize(
    ("batch", "num_tokens"), [*((name, 40) for name in BATCHES), ("no padding", 1)]
)
def test_layer_with_counts_of_the_host_equals_the_layer_without(groups, batch, num_tokens):
    layer = make_layer(make_args(groups))
    x_TD, _ = make_tokens(num_tokens)
    modality_T = torch.tensor(BATCHES[batch]).repeat(num_tokens)[:num_tokens]
    out_TD, _ = layer(x_TD, modality_T, NO_SHIELD, modality_counts=counts_of(modality_T))
    expected_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
    assert_close_with_gradients(out_TD, expected_TD, layer, x_TD)


def test_layer_in_bfloat16_has_the_same_output_with_counts_of_the_host():
    layer = make_layer(make_args(), torch.bfloat16)
    x_TD, modality_T = make_tokens(dtype=torch.bfloat16)
    out_TD, _ = layer(x_TD, modality_T, NO_SHIELD, modality_counts=counts_of(modality_T))
    assert torch.equal(out_TD, layer(x_TD, modality_T, NO_SHIELD)[0])


@pytest.mark.parametrize("block_rows", [0, 16])
@pytest.mark.parametrize("counts", [[9, 0, 18, 2, 1], [0, 27, 0, 0, 3], [16, 11, 0, 3, 0]])
def test_number_of_rows_does_not_depend_on_the_router(counts, block_rows):
    """Zero rows that no expert needs belong to the last one, so counts sum to the number of rows."""
    experts_TK = torch.repeat_interleave(torch.arange(5), torch.tensor(counts)).unsqueeze(1)
    group_T = (experts_TK[:, 0] >= 3).long()
    x_TD = torch.arange(1.0, 31).unsqueeze(1)
    dispatched, layouts = LocalDispatcher().dispatch(
        x_TD, experts_TK, group_T, torch.tensor(counts), (3, 2), (1, 1), block_rows, (27, 3)
    )
    rows = [(16 + 3 * 16, 2 * 16), (27 + 3, 3 + 2)][block_rows == 0]
    assert tuple(map(len, dispatched.rows)) == rows
    assert tuple(c.sum().item() for c in dispatched.counts) == rows
    for counts_e, tokens in zip(dispatched.counts, (counts[:3], counts[3:]), strict=True):
        assert (counts_e >= torch.tensor(tokens)).all()
        assert block_rows == 0 or (counts_e % block_rows == 0).all()
    for rows_ND, layout in zip(dispatched.rows, layouts, strict=True):
        assert rows_ND[layout.row_n, 0].equal(layout.source_n + 1.0)
        assert rows_ND[layout.zero_z].count_nonzero() == 0
        assert len(layout.zero_z) + len(layout.row_n) == len(rows_ND)
        assert not set(layout.zero_z.tolist()) & set(layout.row_n.tolist())


def test_counts_of_more_tokens_than_there_are_belong_to_another_batch():
    x_TD, modality_T = make_tokens(8)
    with pytest.raises(AssertionError, match="not those of this batch"):
        make_layer(make_args())(x_TD, modality_T, NO_SHIELD, modality_counts=(5, 4, 0))


needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="this torch knows no CUDA tensors, not even fake ones",
)


@pytest.mark.parametrize("groups", [GROUPS, UNEQUAL], ids=["two", "unequal"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda_build)])
def test_layer_reads_nothing_from_the_device(groups, device, monkeypatch):
    """On tensors without values, of which a read by the host is an error. No kernel is launched, so this needs no GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    layer = make_layer(make_args(groups, shared_hidden_dim=8), torch.bfloat16)
    # A backward on CUDA needs a driver, even for fake tensors.
    differentiates = device == "cpu" or torch.cuda.is_available()
    with FakeTensorMode(), torch.set_grad_enabled(differentiates):
        for module in layer.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    module._parameters[name] = torch.nn.Parameter(empty)
        x_TD = torch.empty(40, 16, dtype=torch.bfloat16, device=device)
        modality_T = torch.empty(40, dtype=torch.int64, device=device)
        scale = torch.ones((), device=device)
        out_TD, record = layer(x_TD, modality_T, scale, modality_counts=(20, 10, 8))
        assert out_TD.shape == x_TD.shape and {out_TD.device, record.counts.device} == {x_TD.device}
        if differentiates:
            out_TD.sum().backward()
            assert all(p.grad.shape == p.shape for p in layer.parameters())
        with pytest.raises(DataDependentOutputException):
            layer(x_TD, modality_T, scale)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((10, 3), True), ((12, 0), False)],
)  # fmt: skip
def test_grouped_matmul_is_chosen_where_torch_has_a_kernel(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert has_grouped_kernel(0) is expected
