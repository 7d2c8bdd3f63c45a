"""Pinned memory, as far as a machine without an accelerator can show it: who pins what, and how it is copied."""

import os
from dataclasses import fields
from itertools import islice

import pytest
import torch

from symbiotic_titan.sequence.batch import PackedBatch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_batch_is_pinned_once_and_by_the_main_process(make_loader, monkeypatch, num_workers):
    pinned = []

    def pin(batch):
        pinned.append((os.getpid(), batch))
        return batch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(PackedBatch, "pin_memory", pin)
    settings = {"num_workers": num_workers, "local_batch_size": 2}
    batches = list(islice(make_loader(pin_memory=True, **settings), 3))
    assert {pid for pid, _ in pinned} == {os.getpid()}
    assert [id(batch) for _, batch in pinned] == [id(batch) for batch in batches]
    list(islice(make_loader(pin_memory=False, **settings), 3))
    assert len(pinned) == 3


def test_all_tensors_are_pinned_and_the_pinned_ones_are_given_on(make_loader, monkeypatch):
    """What is pinned is memory of its own, not a view of what a worker sent: pinning copies no more than the batch."""
    batch = next(iter(make_loader(num_workers=2)))
    made = {}

    def pin(tensor):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        made[id(tensor)] = tensor.clone()
        return made[id(tensor)]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    copy = batch.pin_memory()
    for f in fields(PackedBatch):
        assert getattr(copy, f.name) is made[id(getattr(batch, f.name))]


def test_copies_to_the_device_do_not_block(make_loader, monkeypatch):
    batch, calls = next(iter(make_loader())), []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *a, **k: calls.append((id(tensor), a, k)) or tensor
    )
    batch.to("cuda")
    expected = [
        (id(getattr(batch, f.name)), ("cuda",), {"non_blocking": True}) for f in fields(batch)
    ]
    assert calls == expected
