#!/usr/bin/env python3
"""Compile the shipped GPU configs for an H100 on a machine without a GPU: forward and backward of each, by Inductor, Triton and ptxas.

Example: tools/cuda_compile.py --out compiled.json

Shows errors of kernels, dtypes and shapes, graph breaks and recompilations; computes nothing and measures no time. Tensors are fake
(``cuda_compile/fake_device.py``), and two small libraries stand in for the CUDA runtime and driver. It needs Linux, gcc, and a Python
with torch's CUDA build (the ordinary index's, about 5 GB), Triton and this project's other packages; minutes for each config. CI
has no such Python and runs none of it.

graphs                    that Dynamo captured in the first of three batches; kernel_graphs: that Inductor compiled
breaks, recompilations    of graphs; recompilations are graphs that the second and third batch added
host_reads_per_moe_layer  times that the host waits in a layer for numbers of the device, those of its recomputation included
residual                  dtypes of the decoder blocks' outputs
forward_graphs_again,     compiled forward graphs, and attention in any graph, that a backward ran: what checkpointing recomputes
attention_again

The last line is JSON.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path(__file__).with_suffix("")
CONFIGS = ("debug_gpu", "1b_a0.3b", "30b_a3b", "qwen3_vl_30b_a3b", "aria_25b")
# Source -> the library that it becomes.
LIBRARIES = {"runtime.c": "libcudart_stand_in.so", "driver.c": "libcuda.so.1"}


def missing() -> str | None:
    """What this machine lacks, in one line; None if nothing."""
    if platform.system() != "Linux":
        return f"it preloads libraries, which needs Linux; this is {platform.system()}"
    if shutil.which("gcc") is None:
        return "gcc is not installed; it builds the stand-ins for the CUDA libraries"
    for module in ("torch", "triton", "torchtitan", "torchao"):
        if find_spec(module) is None:
            return f"{sys.executable} has no {module}; use an environment with torch's CUDA build"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} has no CUDA libraries; use an environment with torch's CUDA build"
    return None


def build_libraries(folder: Path) -> None:
    for source, library in LIBRARIES.items():
        flags = ("-shared", "-fPIC", "-w")
        subprocess.run(["gcc", *flags, "-o", folder / library, SOURCES / source], check=True)


def compile_config(config: Path, arguments: list[str], libraries: Path) -> dict[str, Any]:
    """The row of ``config``, from a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": str(libraries / LIBRARIES["runtime.c"]),
        "LD_LIBRARY_PATH": str(libraries),
    }
    command = [sys.executable, SOURCES / "compile_config.py", config, *arguments]
    child = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    sys.stderr.write(child.stderr)
    last = [line for line in child.stderr.splitlines() if line.strip()][-1:]
    return {"errors": last or [f"ended with status {child.returncode}"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", type=Path, help="default: the shipped GPU configs")
    parser.add_argument(
        "--fsdp-weights",
        action="store_true",
        help="bfloat16, as FSDP gives them, instead of autocast",
    )
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options, overrides = parser.parse_known_args()
    lacking = missing()
    if lacking is not None:
        parser.error(f"cannot compile for CUDA here: {lacking}")
    configs = options.configs or [ROOT / "train_configs" / f"{name}.toml" for name in CONFIGS]
    for config in configs:
        if not config.is_file():
            parser.error(f"{config}: no such file; name a config of train_configs/")
    arguments = ["--fsdp-weights"] if options.fsdp_weights else []
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        build_libraries(Path(folder))
        for config in configs:
            rows[config.stem] = compile_config(
                config.resolve(), [*arguments, *overrides], Path(folder)
            )
            print(config.stem, json.dumps(rows[config.stem]), file=sys.stderr, flush=True)
    line = json.dumps(rows)
    if options.out is not None:
        options.out.write_text(line + "\n")
    print(line)
    if any(row["errors"] for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
