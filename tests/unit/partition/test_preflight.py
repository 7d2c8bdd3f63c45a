"""Pre-flight checks: an output never touches what is read, and sources are what they are taken for."""

import math
import re

import pytest
import torch

from symbiotic_titan.commands.convert_release import check_release
from symbiotic_titan.hf.model import check_holds_tensors, open_model
from symbiotic_titan.partition.apply import check_original, partition_checkpoint
from symbiotic_titan.weights.dcp import write_model
from symbiotic_titan.weights.new_folder import check_apart, new_folder
from symbiotic_titan.weights.reader import CastingReader
from symbiotic_titan.weights.safetensors import write_folder
from tests.helpers.stored_models import BIMODAL, make_model, plan_for, save, tiny_args


@pytest.mark.parametrize(
    ("out", "relation"),
    [
        ("model", "is"),
        ("other/../model", "is"),
        ("link", "is"),
        (".", "holds"),
        ("model/split", "lies in"),
        ("link/split", "lies in"),
        ("other/split", None),
        ("model-2", None),
    ],
)
def test_targets_that_touch_a_source_are_refused(tmp_path, monkeypatch, out, relation):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("model")
    sources = [None, "elsewhere/plan.json", str(tmp_path / "model")]
    if relation is None:
        check_apart(tmp_path / out, sources)
        return
    with pytest.raises(ValueError, match=f"--out: .* {relation} .*, which this command reads"):
        check_apart(tmp_path / out, sources)


def test_releases_that_are_no_folder_are_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_release(tmp_path)
    with pytest.raises(ValueError, match="--hf: Qwen/Qwen3-VL: no such folder; give the local fol"):
        check_release(type(tmp_path)("Qwen/Qwen3-VL"))
    with pytest.raises(ValueError, match="config.json: is a file; give the local folder"):
        check_release(tmp_path / "config.json")


@pytest.mark.parametrize("tensors", [".metadata", "model.safetensors", None])
def test_a_shape_alone_is_no_checkpoint(tmp_path, tensors):
    (tmp_path / "model.json").write_text("{}")
    if tensors is not None:
        (tmp_path / tensors).touch()
        check_holds_tensors(tmp_path, "--checkpoint")
        return
    with pytest.raises(ValueError, match="--checkpoint: .* holds a shape only; name the released"):
        check_holds_tensors(tmp_path, "--checkpoint")


def test_the_original_of_another_model_is_refused(tmp_path):
    vlm, stranger = (
        save(make_model(tiny_args(), seed=seed).state_dict(), tmp_path / f"vlm-{seed}")
        for seed in (7, 8)
    )
    partition_checkpoint(vlm, tiny_args(groups=BIMODAL), plan_for(vlm), tmp_path / "split")
    check_original(tmp_path / "split", vlm)
    with pytest.raises(
        ValueError, match="plan of .*split is of another model: its routers have hash .* those of"
    ):
        check_original(tmp_path / "split", stranger)
    check_original(vlm, stranger)  # it has no record of what it was made from


def halved(folder, value: float) -> CastingReader:
    """A checkpoint with ``value`` in it, as it is written in float16."""
    state = make_model(tiny_args()).state_dict()
    state["norm.weight"][3] = value
    return CastingReader(open_model(save(state, folder)), torch.float16)


@pytest.mark.parametrize("value", [65504.0, -65519.0, torch.inf, torch.nan])
def test_values_are_cast_that_a_dtype_can_hold(tmp_path, value):
    """float16 ends at 65504; up to 65520 numbers are rounded down to it."""
    cast = halved(tmp_path / "vlm", value).read("norm.weight")
    assert cast.dtype == torch.float16
    expected = max(min(value, 65504.0), -65504.0) if math.isfinite(value) else value
    assert str(float(cast[3])) == str(expected)


@pytest.mark.parametrize("value", [65520.0, -1e6])
@pytest.mark.parametrize("how", ["checkpoint", "safetensors"])
def test_values_that_would_become_infinite_are_refused_and_nothing_is_kept(tmp_path, value, how):
    stored = halved(tmp_path / "vlm", value)
    message = f"norm.weight holds values up to {abs(value):g}, which are infinite in float16"
    with pytest.raises(ValueError, match=re.escape(message)):
        if how == "checkpoint":
            write_model(tmp_path / "out", stored.tensors, stored.read)
        else:
            with new_folder(tmp_path / "out", overwrite=False, num_bytes=0) as folder:
                write_folder(folder, stored.tensors, stored.read, 10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]
