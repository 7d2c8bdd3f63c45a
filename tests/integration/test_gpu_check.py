"""The GPU check: every stage runs without a GPU at toy size, and a stage that fails or hangs costs no other stage its results."""

import json
import os
import subprocess
import sys
import time
from types import ModuleType

import gpu_check
import gpu_measures
import gpu_page
import gpu_training
import pytest
from gpu_notes import Settings

from tests.helpers.structure import ROOT

SCRIPT = ROOT / "tools" / "gpu_check.sh"


def run_script(folder, *arguments):
    environment = {**os.environ, "SYMBIOTIC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"OUT": str(folder / "out"), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def lines_of(file):
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_every_stage_runs_without_a_gpu_and_the_page_has_its_figures(tmp_path):
    done = run_script(tmp_path, "--cpu")
    lines = lines_of(tmp_path / "out" / "gpu_check.jsonl")
    assert done.returncode == 0, (done.stdout, done.stderr, lines)
    statuses = {line["stage"]: line["status"] for line in lines if "status" in line}
    assert statuses == dict.fromkeys(gpu_check.STAGES, "passed")
    assert f"passed: {', '.join(statuses)}; not passed: none" in done.stdout.splitlines()[-1]
    parts = {(line["stage"], line["part"]): line for line in lines if "part" in line}
    assert all(values.get("passed", True) for values in parts.values())
    of_masks = [name for stage, name in parts if name.startswith("flex_")]
    assert len(of_masks) == 6
    resumed = parts["debug_gpu", "stop_and_resume"]
    assert resumed["steps_before"] + resumed["steps_after"] == 4 and resumed["steps_after"] > 0
    for variant in ("ac_none", "ac_none_float8", "ac_full", "eager_ac_none", "eager_ac_op"):
        assert parts["1b", variant]["tokens_per_second"] > 0
    profile = parts["1b", "ac_none"]["profile"]
    assert profile["trace_kept"] and (tmp_path / "out" / "trace.json.gz").stat().st_size > 1000
    assert sum(profile["kernel_ms_by_class"].values()) > 0
    [page] = (tmp_path / "out").glob("gpu_cpu-*.md")
    text = page.read_text()
    assert "On one device communication (NCCL), expert parallelism" in text
    assert "ac_none_float8" in text and "largest_change_of_a_loss" in text
    again = run_script(tmp_path, "--cpu")
    assert again.returncode == 2 and "holds the results of an earlier check" in again.stderr


def test_without_a_gpu_one_line_says_what_to_do(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "there is no NVIDIA GPU here; --cpu runs every stage" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_script(tmp_path, "--wheels")
    assert done.returncode == 2 and "--wheels needs one folder" in done.stderr


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next_and_keeps_its_parts(
    tmp_path, monkeypatch
):
    module = ModuleType("stages_of_a_test")

    def fails(notes):
        notes.part("first", lambda: {"value": float("nan")})
        notes.part("second", lambda: {}["missing"])

    def hangs(notes):
        notes.part("before", lambda: {"value": 1})
        time.sleep(60)

    module.fails, module.hangs = fails, hangs
    module.ends = lambda notes: os._exit(7)
    module.fine = lambda notes: notes.part("only", lambda: {"passed": True})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    limits = {"fails": 10, "hangs": 1, "ends": 10, "fine": 10}
    stages = {name: (f"{module.__name__}:{name}", limit) for name, limit in limits.items()}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "SHARED", ())
    monkeypatch.setattr(gpu_check, "PATIENCE", 1)
    settings = Settings("cpu", tmp_path, tmp_path)
    found = gpu_check.run(list(stages), settings, 0)
    assert list(found.values()) == ["failed", "timed out", "ended with status 7", "passed"]
    lines = lines_of(settings.lines)
    parts = {line["part"]: line for line in lines if "part" in line}
    assert parts["first"]["value"] is None and parts["before"]["value"] == 1
    assert parts["second"]["error"] == "KeyError: 'missing'" and parts["only"]["passed"]
    assert [line["stage"] for line in lines if "status" in line] == list(stages)
    page = gpu_page.write_page(settings.lines, tmp_path)
    assert page.name.startswith("gpu_an-unknown-device_") and "timed out" in page.read_text()


def test_missing_packages_are_named_with_their_remedy(monkeypatch):
    wheels = SCRIPT.read_text().partition("\nwheels=(")[2].partition(")")[0]
    assert not gpu_measures.missing_packages()
    real = gpu_measures.metadata.version

    def version(name):
        if name in ("torchtitan", "tyro"):
            raise gpu_measures.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(gpu_measures.metadata, "version", version)
    found = gpu_measures.packages()
    assert found["missing"] == ["torchtitan", "tyro"] and not found["passed"]
    assert "missing: torchtitan, tyro; tools/gpu_check.sh --wheels .whl" in found["error"]
    assert all(name in wheels for name in found["missing"])


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_tem_fused_flex_attention_backward_3", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("void at::native::bf16bf16_grouped_gemm_impl_sm90", "grouped matmul"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("void at::native::cunn_whatever", "other"),
    ],
)
def test_kernels_are_counted_by_class(kernel, kind):
    assert gpu_training.kernel_class(kernel) == kind
