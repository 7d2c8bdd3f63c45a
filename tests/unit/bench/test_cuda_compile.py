"""tools/cuda_compile.py where it cannot run, and the libraries that stand in for CUDA's. Its result needs torch's CUDA build."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "cuda_compile.py"


def run(*arguments):
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA libraries")
def test_without_cuda_libraries_it_says_in_one_line_what_is_missing():
    ended = run()
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert "cannot compile for CUDA here: " in last and "torch's CUDA build" in last


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
@pytest.mark.parametrize(
    "source, function", [("runtime.c", "cudaGetDeviceCount"), ("driver.c", "cuDeviceGetAttribute")]
)
def test_the_libraries_answer_without_a_device(tmp_path, source, function):
    library = tmp_path / "library.so"
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", library, TOOL.with_suffix("") / source]
    subprocess.run(command, check=True)
    answer = ctypes.c_int(-1)
    assert getattr(ctypes.CDLL(str(library)), function)(ctypes.byref(answer)) == 0
    assert answer.value == {"runtime.c": 1, "driver.c": 232448}[source]
