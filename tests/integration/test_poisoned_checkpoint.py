"""Checkpoints whose pickles call a function: whatever opens one refuses it in one line, and calls nothing.

The payload makes a folder. It stands in ``.metadata``, or, with clean metadata, in every entry that is not a tensor and in one that is.
"""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from symbiotic_titan import cli
from symbiotic_titan.checkpoint.load import load
from symbiotic_titan.checkpoint.start import entries_of, find_start
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.training.train_spec import register
from symbiotic_titan.weights.damage import damage_of, find_checkpoint
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from symbiotic_titan.weights.metadata import UnsafeContent, load_metadata
from tests.helpers.launch import ROOT
from tests.integration.test_older_run import copy_run, resume

TENSOR = "tok_embeddings.weight"
NAMED = "names 'posix.mkdir', which checkpoints have no use for: nothing of it was run; remove"


class Poison:
    """Makes the folder ``marker`` where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def poison_metadata(step: Path, marker: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Metadata({"a": Poison(marker)})))


def poison_entries(step: Path, marker: Path) -> None:
    """Appends a payload to the file, and lets the metadata, which stay clean, say that entries lie there."""
    metadata = FileSystemReader(step).read_metadata()
    entries = entries_of(metadata)
    with io.BytesIO() as buffer:
        torch.save(Poison(marker), buffer)
        payload = buffer.getvalue()
    for index, place in metadata.storage_data.items():
        if entries[index.fqn] is None or index.fqn == TENSOR:
            place.offset = (step / place.relative_path).stat().st_size
            place.length = len(payload)
            with (step / place.relative_path).open("ab") as file:
                file.write(payload)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture(scope="module", params=[poison_metadata, poison_entries])
def run(request, tmp_path_factory) -> Path:
    """The folder of a run; its payload makes the folder ``marker`` beside it."""
    folder = copy_run(tmp_path_factory.mktemp("poisoned") / "run")
    request.param(folder / "checkpoint" / "step-3", folder.parent / "marker")
    return folder


@pytest.fixture
def marker(run, monkeypatch) -> Path:
    monkeypatch.chdir(ROOT)  # the config names its data relative to it
    register()
    return run.parent / "marker"


def has_poisoned_metadata(run: Path) -> bool:
    return b"posix" in (run / "checkpoint" / "step-3" / ".metadata").read_bytes()


def test_the_payload_works_where_torch_reads_it(run, marker):
    step = run / "checkpoint" / "step-3"
    if has_poisoned_metadata(run):
        FileSystemReader(step).read_metadata()
    else:
        dcp.load({"train_state": {"step": 0}}, checkpoint_id=step)
    assert marker.is_dir()
    marker.rmdir()


def commands(run: Path, out: Path) -> list[list[object]]:
    config, step = run / "config.toml", run / "checkpoint" / "step-3"
    new = ["--out", out / "new"]
    text = ["text", "--prompt", "a", *new]
    return [
        ["generate", *text, "--run", run],
        ["generate", *text, "--checkpoint", step],
        ["generate", *text, "--config", config, "--job.dump_folder", run],
        ["evaluate", run, "--suite", "demo_world", *new],
        ["profile-experts", "--config", config, "--checkpoint", step, "--batches", 1, *new],
        ["convert", "to-hf", "--checkpoint", step, "--part", "whole", *new],
        ["convert", "check", "--config", config, "--checkpoint", step, "--batches", 1],
        # Ends before it reads a tensor: the checkpoint is partitioned already.
        *([["convert", "partition", "--config", config, "--checkpoint", step, *new]])
        * has_poisoned_metadata(run),
    ]


def test_every_command_refuses_it_in_one_line(run, marker, tmp_path, capsys):
    for words in commands(run, tmp_path):
        assert cli.main([*map(str, words)]) == 2, words
        error = capsys.readouterr().err.strip()
        assert NAMED in error and "Traceback" not in error, (words, error)
        assert len([line for line in error.splitlines() if "posix" in line]) == 1, error
        assert not marker.exists() and not (tmp_path / "new").exists(), words


def test_a_list_of_checkpoints_names_it(run, marker, capsys):
    # Entries are bytes to it, which it does not load.
    assert cli.main(["check-checkpoint", str(run)]) == has_poisoned_metadata(run)
    assert (NAMED in capsys.readouterr().out) == has_poisoned_metadata(run)
    assert not marker.exists()


def calls(run: Path):
    """What a program of one's own would call."""
    step = run / "checkpoint" / "step-3"
    yield lambda: Generator.load(run)
    yield lambda: Generator.load(run / "config.toml", step)
    yield lambda: DistributedCheckpoint(step).read(TENSOR)
    yield lambda: DistributedCheckpoint(step).step
    if has_poisoned_metadata(run):  # these read no more
        yield lambda: load_metadata(step)
        yield lambda: damage_of(step)
        yield lambda: find_checkpoint(run, "checkpoint")


def config_of(run: Path, *options: object):
    words = ["--job.config_file", run / "config.toml", *options]
    return load_job_config([*map(str, words)])


def starts(run: Path, fresh: Path):
    """Runs that begin with it: resumed, at the newest step and at a given one, and new ones from its weights and from its state."""
    begin = ["--job.dump_folder", fresh, "--checkpoint.initial_load_path"]
    begin += [run / "checkpoint" / "step-3"]
    resumed = "--job.dump_folder", run
    yield config_of(run, *resumed)
    yield config_of(run, *resumed, "--checkpoint.load_step", 3)
    yield config_of(run, *begin)
    yield config_of(run, *begin, "--checkpoint.no_initial_load_model_only")


def read_all(config) -> None:
    """What the trainer reads of the checkpoint that it begins with, one entry at a time."""
    start = find_start(config)
    for name, shape in start.entries.items():
        if shape is None or name == TENSOR:
            value = 0 if shape is None else torch.zeros(shape)
            with pytest.raises(UnsafeContent, match=f"__0_0.distcp: its entry {name} {NAMED}"):
                load({name: value}, start.folder, start.entries, start.metadata)
    raise UnsafeContent(NAMED)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_programs_and_runs_that_begin_with_it_refuse_it(run, marker, tmp_path):
    for call in calls(run):
        with pytest.raises(UnsafeContent, match=NAMED):
            call()
    for config in starts(run, tmp_path / "fresh"):
        with pytest.raises(UnsafeContent, match=NAMED):
            read_all(config)
    assert not marker.exists()


def test_training_ends_with_one_line(run, marker):
    ended = resume(run)
    assert ended.status == 2 and not marker.exists()
    assert NAMED in ended.text and "Traceback" not in ended.text
    # It is the newest: not passed over, and left as it was found.
    assert (run / "checkpoint" / "step-3").is_dir()


def test_the_older_run_itself_has_nothing_that_is_refused(tmp_path):
    step = copy_run(tmp_path / "run") / "checkpoint" / "step-3"
    stored = DistributedCheckpoint(step)
    assert stored.step == 3 and stored.read(TENSOR).any()
