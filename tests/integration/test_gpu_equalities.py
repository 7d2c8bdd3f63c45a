"""What must be equal on a GPU, by the functions of the GPU check; on a CPU the same functions, where it has the kernels."""

import gpu_check
import gpu_equalities as equal
import pytest
import torch
from gpu_notes import Settings

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
by_device = pytest.mark.parametrize("device", DEVICES)


@by_device
@pytest.mark.parametrize("claim", ["grouped_swiglu", "dispatch", "layer_twice"])
def test_the_moe_layer_is_that_of_the_plain_reference(claim, device):
    found = getattr(equal, claim)(device)
    assert found["passed"], found


@by_device
@pytest.mark.parametrize("mask", ["sequence", "patches", "queries"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attends_as_sdpa_does_over_every_mask(mask, device):
    for head_dim in (64, 72) if device == "cuda" else (64,):
        found = equal.flex_against_sdpa(device, mask, head_dim)
        assert found["passed"], found
        assert len(found["errors"]) == (4 if device == "cuda" else 1)


@by_device
def test_float8_experts_are_within_the_rounding_of_float8(device):
    found = equal.float8_experts(device)
    assert all(row["passed"] for row in found.values()), found
    assert ("kernel_against_emulation" in found) == equal.has_float8_kernels(device)


def test_a_wrong_value_and_nan_do_not_pass():
    good = torch.ones(4)
    for found, passed in ((good, True), (good + 0.1, False), (good / torch.zeros(4), False)):
        assert equal.compare(["x"], [found], [good], 0.02)["passed"] is passed
    assert not equal.compare(["x"], [good * float("nan")], [good], 0.02)["passed"]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["correctness", "debug_gpu"])
def test_training_on_a_gpu_repeats_and_resumes_bit_by_bit(stage, tmp_path):
    settings = Settings("cuda", tmp_path, tmp_path)
    assert gpu_check.run([stage], settings, 0) == {stage: "passed"}, settings.lines.read_text()
