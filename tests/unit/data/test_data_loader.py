"""Ranks, workers and resume: the rows must be the same whatever their numbers are."""

import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from symbiotic_titan.data.loader import SerializedRow, StreamDataset
from symbiotic_titan.sequence.batch import PackedBatch

ROWS = 26


def assert_equal(left, right):
    for name, tensor in left.tensors().items():
        assert torch.equal(tensor, getattr(right, name)), name


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert_equal(a, b)


def ranks_of(make_loader, num_ranks, **settings):
    """Loaders of all ranks in one process; ``gather`` shows each the states of all."""
    loaders = []

    def gather(own):
        return [loader._states for loader in loaders]

    for rank in range(num_ranks):
        loaders.append(
            make_loader(dp_rank=rank, dp_world_size=num_ranks, gather=gather, **settings)
        )
    return loaders


@pytest.fixture(scope="module")
def uninterrupted(make_loader):
    """Global rows 0, 1, 2 ... in the order of one process without workers."""
    return list(islice(make_loader(), ROWS))


def test_same_config_gives_the_same_rows_and_another_seed_gives_others(make_loader, uninterrupted):
    assert_same(list(islice(make_loader(), ROWS)), uninterrupted)
    other = next(iter(make_loader({"seed": 1})))
    assert not torch.equal(other.tokens, uninterrupted[0].tokens)


@pytest.mark.parametrize("num_workers", [1, 3, 9])  # of four streams
def test_rows_do_not_depend_on_the_number_of_workers(make_loader, uninterrupted, num_workers):
    assert_same(list(islice(make_loader(num_workers=num_workers), ROWS)), uninterrupted)


def test_one_rank_with_accumulation_reads_in_order_what_two_ranks_read(make_loader):
    one = iter(make_loader(local_batch_size=2))
    two = [iter(loader) for loader in ranks_of(make_loader, 2, local_batch_size=2)]
    for _ in range(5):
        micro_batches = [next(one), next(one)]
        assert_same(micro_batches, [next(two[0]), next(two[1])])


@pytest.mark.parametrize("workers_before, workers_after", [(0, 0), (0, 3), (3, 0), (2, 1)])
@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_resume_at_any_row_goes_on_bitwise(
    make_loader, uninterrupted, stop, workers_before, workers_after
):
    before = make_loader(num_workers=workers_before)
    assert_same(list(islice(before, stop)), uninterrupted[:stop])
    after = make_loader(num_workers=workers_after)
    after.load_state_dict(before.state_dict())
    assert_same(list(islice(after, ROWS - stop)), uninterrupted[stop:])


@pytest.mark.parametrize("ranks_before, ranks_after", [(2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("workers", [0, 1])
def test_resume_on_other_ranks_goes_on_bitwise(
    make_loader, uninterrupted, ranks_before, ranks_after, workers
):
    steps, streams = 3, 4
    before = ranks_of(make_loader, ranks_before, local_batch_size=streams // ranks_before)
    for loader in before:
        list(islice(loader, steps))
    states = [loader.state_dict() for loader in before]
    assert all(state == states[0] for state in states)
    after = ranks_of(make_loader, ranks_after, num_workers=workers)
    for loader in after:
        loader.load_state_dict(states[0])
    batches = [iter(loader) for loader in after]
    for step in range(steps, ROWS // streams):
        rows = [row for b in batches for row in islice(b, streams // ranks_after)]
        assert_same(rows, uninterrupted[step * streams : (step + 1) * streams])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_in_the_middle_of_a_round_on_fewer_ranks_loses_and_repeats_nothing(
    make_loader, uninterrupted, workers
):
    """Two ranks stop after three rows each: streams 0, 1, 0 and 2, 3, 2. Streams 1 and 3 come first, then all in turn."""
    before = ranks_of(make_loader, 2)
    for loader in before:
        list(islice(loader, 3))
    after = make_loader(num_workers=workers)
    after.load_state_dict(before[0].state_dict())
    expected = [uninterrupted[5], uninterrupted[7], *uninterrupted[8:]]
    assert_same(list(islice(after, ROWS - 6)), expected)


def test_a_new_iterator_goes_on_behind_the_last_batch(make_loader, uninterrupted):
    loader = make_loader(num_workers=2)
    rows = [*islice(loader, 3), *islice(loader, 4)]
    assert_same(rows, uninterrupted[:7])


def test_rows_made_ahead_by_workers_are_not_in_the_state(make_loader):
    states = []
    for workers in (0, 2):
        loader = make_loader(num_workers=workers, prefetch_factor=8)
        list(islice(loader, 5))
        states.append(loader.state_dict())
    assert states[0] == states[1]


def test_fresh_state_can_be_saved_and_loaded(make_loader, uninterrupted):
    loader = make_loader()
    loader.load_state_dict(make_loader().state_dict())
    assert_same(list(islice(loader, 3)), uninterrupted[:3])


def test_state_is_small_and_survives_a_checkpoint(make_loader, uninterrupted, tmp_path):
    import torch.distributed.checkpoint as dcp

    before, after = make_loader(), make_loader()
    list(islice(before, 9))
    assert len(before.state_dict()["state"]) < 4 * 1024
    dcp.save({"dataloader": before}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"dataloader": after}, checkpoint_id=tmp_path, no_dist=True)
    assert_same(list(islice(after, ROWS - 9)), uninterrupted[9:])


def test_state_of_other_data_or_settings_is_refused(make_loader, demo_config, demo_world, tmp_path):
    state = make_loader().state_dict()

    def refused(message, data=None, **settings):
        with pytest.raises(ValueError) as error:
            make_loader(data, **settings).load_state_dict(state)
        assert message in str(error.value)
        assert "start the data anew with checkpoint.exclude_from_loading" in str(error.value)

    refused("data.seed was 0, now it is 7", {"seed": 7})
    refused("data.num_lanes was 4, now it is 8", {"num_lanes": 8})
    refused("training.seq_len was 256, now it is 320", seq_len=320)
    text = demo_world / "train" / "lm" / "lm-0000.jsonl"
    (tmp_path / "lm-0000.jsonl").write_bytes(text.read_bytes())
    moved = [{**vars(s)} for s in demo_config.sources]
    moved[2]["path"] = f"{tmp_path}/*.jsonl"
    refused("source 'lm' has other shards than when the checkpoint was saved", {"sources": moved})


def test_shards_may_move_to_another_folder(make_loader, demo_config, demo_world, tmp_path):
    (tmp_path / "moved").symlink_to(demo_world / "train" / "lm")
    moved = [{**vars(s)} for s in demo_config.sources]
    moved[2]["path"] = f"{tmp_path}/moved/*.jsonl"
    at_home = make_loader()
    next(iter(at_home))
    elsewhere = make_loader({"sources": moved})
    elsewhere.load_state_dict(at_home.state_dict())
    assert elsewhere.state_dict() == at_home.state_dict()


def test_streams_that_do_not_divide_the_global_batch_are_pointed_out(make_loader, caplog):
    with caplog.at_level("WARNING"):
        make_loader({"num_lanes": 3})
    assert "data.num_lanes: 3 does not divide the global batch size 4" in caplog.text


def test_work_of_a_worker_can_be_sent_to_a_new_interpreter(make_loader):
    loader = make_loader()
    dataset = pickle.loads(pickle.dumps(StreamDataset(loader._spec, loader._states)))
    _, row, _ = next(iter(dataset))
    assert_equal(row, next(iter(loader)))


def test_a_serialized_row_is_one_tensor_and_holds_all_fields(uninterrupted):
    row = uninterrupted[0]
    serialized = SerializedRow.of(row)
    assert serialized.buffer.dtype == torch.uint8
    assert_equal(serialized.row(), row)


def test_workers_outlive_signals_to_the_process_group(make_loader, uninterrupted):
    batches = iter(make_loader(num_workers=2))
    rows = [next(batches), next(batches)]  # one of each: both have begun, and ignore signals
    workers = [int(p) for p in _children(os.getpid())]
    assert len(workers) >= 2
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    rows += list(islice(batches, ROWS - 2))
    assert_same(rows, uninterrupted)


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


PROGRAM = """
import sys
from symbiotic_titan.config.data import Data
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.pipeline import build_loader
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry

row = {"name": "lm", "task": "lm", "format": "jsonl", "path": sys.argv[1]}
loader = build_loader(
    Data(sources=[row]), latents=Latents(), geometry=ImageGeometry(4, 2, 3, 3, 1, 4),
    rotary_layout="shared", tokenizer=ByteTokenizer(), seq_len=64, local_batch_size=2,
    global_batch_size=4, num_workers=2,
)
batches = iter(loader)
next(batches)
raise ValueError("the trainer stops")
"""


def test_a_run_that_fails_does_not_wait_for_its_workers(demo_world):
    root = str(Path(__file__).parents[3])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{demo_world}/train/lm/*.jsonl"],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("ValueError: the trainer stops")


def test_reading_leaves_the_global_random_numbers_alone(make_loader):
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(iter(make_loader(num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_pinning_without_an_accelerator_is_pointed_out(make_loader, caplog, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with caplog.at_level("WARNING"):
        next(iter(make_loader(pin_memory=True)))
    assert "training.dataloader.pin_memory: ignored" in caplog.text


def test_state_names_every_stream(make_loader):
    loaders = ranks_of(make_loader, 2)
    streams = json.loads(loaders[1].state_dict()["state"])["lanes"]
    assert sorted(streams) == ["0", "1", "2", "3"]


# ---- pinned memory, as far as a machine without an accelerator can show it ----------------------------------------------------


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
    for name, tensor in batch.tensors().items():
        assert getattr(copy, name) is made[id(tensor)]


def test_copies_to_the_device_do_not_block(make_loader, monkeypatch):
    batch, calls = next(iter(make_loader())), []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *a, **k: calls.append((id(tensor), a, k)) or tensor
    )
    moved = batch.to("cuda")
    expected = [(id(t), ("cuda",), {"non_blocking": True}) for t in batch.tensors().values()]
    assert calls == expected
    assert moved.modality_counts == tuple(batch.num_tokens().tolist())  # counted before the copy
