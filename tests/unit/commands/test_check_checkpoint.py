"""check-checkpoint lists what a run saved, names every damaged file, and its exit status says whether there was one."""

import json
import re
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp

from symbiotic_titan.commands import check_checkpoint
from symbiotic_titan.weights.digests import DigestingWriter
from symbiotic_titan.weights.reader import TensorSpec
from symbiotic_titan.weights.safetensors import write_folder

TENSORS = {f"t{i}": torch.full((200, 300), float(i)) for i in range(3)}


def save(folder, state, digests=True):
    writer = {"storage_writer": DigestingWriter(folder)} if digests else {"checkpoint_id": folder}
    dcp.save(state, no_dist=True, **writer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("run")
    full = TENSORS | {"train_state": {"step": 5}}
    for name, state in (("step-9", full), ("step-10", full), ("step-11", TENSORS)):
        save(folder / "checkpoint" / name, state)
    save(folder / "checkpoint" / "step-8", full, digests=False)
    (folder / "checkpoint" / "damaged-7").mkdir()
    kinds = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    (folder / "export").mkdir()
    write_folder(folder / "export", kinds, TENSORS.__getitem__, shard_bytes=300_000)
    return folder


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def reports(capsys, *arguments):
    status = check_checkpoint.main([*map(str, arguments), "--json"])
    return status, {r["path"].rpartition("/")[2]: r for r in json.loads(capsys.readouterr().out)}


def test_a_whole_run_is_listed_by_its_steps(run, capsys):
    status, found = reports(capsys, run, run / "export")
    assert status == 0
    assert list(found) == ["step-8", "step-9", "step-10", "step-11", "damaged-7", "export"]
    states = [(r["holds"], r["state"]) for r in found.values()]
    assert states == [
        ("full", "no digests"),
        ("full", "whole"),
        ("full", "whole"),
        ("model only", "whole"),
        ("?", "renamed"),
        ("model only", "whole"),
    ]
    assert found["step-9"]["step"] == 9 and found["step-9"]["files"] == 3
    on_disk = sum(path.stat().st_size for path in (run / "checkpoint/step-9").iterdir())
    assert found["step-9"]["bytes"] == on_disk > 700_000


def test_damage_is_named_whatever_is_damaged(run, tmp_path, capsys):
    for name in ("step-9", "step-10", "step-11"):
        (tmp_path / name).mkdir()
        for path in (run / "checkpoint" / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    flip(tmp_path / "step-9/__0_0.distcp")
    flip(tmp_path / "step-10/.metadata")
    (tmp_path / "step-11/.metadata").unlink()
    assert check_checkpoint.main([str(tmp_path), "--fast"]) == check_checkpoint.DAMAGED
    assert re.search("step-9 +full .*not verified", capsys.readouterr().out)
    status, found = reports(capsys, tmp_path)
    assert status == check_checkpoint.DAMAGED
    assert [report["state"] for report in found.values()] == ["damaged"] * 3
    assert [report["damage"] for report in found.values()] == [
        ["the bytes of its file __0_0.distcp are damaged (another SHA-256 than in SHA256SUMS)"],
        ["the bytes of its file .metadata are damaged (another SHA-256 than in SHA256SUMS)"],
        ["it has no .metadata: the save did not finish"],
    ]


def test_files_of_an_export_are_verified(run, tmp_path, capsys):
    for path in (run / "export").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        flip(tmp_path / name)
    assert check_checkpoint.main([str(tmp_path)]) == check_checkpoint.DAMAGED
    text = capsys.readouterr().out
    assert "00001-of-00003.safetensors are damaged" in text and "00002" not in text
    assert "00003-of-00003.safetensors are damaged" in text


@pytest.mark.parametrize("folder", ["checkpoint/step-9", "export"])
def test_the_program_sha256sum_reads_the_digests(run, folder):
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=run / folder, capture_output=True, text=True)
    assert done.returncode == 0 and "FAILED" not in done.stdout and ": OK" in done.stdout


@pytest.mark.parametrize(("name", "message"), [("x", "no such folder"), ("", "no checkpoint")])
def test_a_folder_without_checkpoints_is_a_mistake(tmp_path, capsys, name, message):
    assert check_checkpoint.main([str(tmp_path / name)]) == 2
    assert message in (told := capsys.readouterr().err) and told.count("\n") == 1
