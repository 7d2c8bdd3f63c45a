"""Stages of the GPU check that need no trainer: what is installed, the machine's ceilings, what must be equal, and the MoE layer."""

import platform
import tomllib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_notes import Notes, Settings

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
BESIDES = ("datasets", "transformers")  # of torchtitan's trainer, and a contender


def missing_packages() -> list[str]:
    """The project's requirements that this Python lacks."""
    wanted = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    names = [requirement.partition("=")[0].rstrip("<>!~ ") for requirement in wanted]
    found = []
    for name in [*names, *BESIDES]:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(name)
    return found


def packages() -> dict[str, Any]:
    missing = missing_packages()
    versions = {
        n: metadata.version(n) for n in ("torch", "torchtitan", "torchao") if n not in missing
    }
    found = {"python": platform.python_version(), "packages": versions, "missing": missing}
    if missing:
        found["error"] = f"missing: {', '.join(missing)}; tools/gpu_check.sh --wheels .whl, elsewhere, makes wheels"  # fmt: skip
    return {**found, "passed": not missing}


def machine_facts(settings: Settings) -> dict[str, Any]:
    import torch
    from bench_timing import machine

    facts = machine()
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties()
        facts |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
        }
    return facts


def demo_data(settings: Settings) -> dict[str, Any]:
    """Writes the demo world below ``work`` unless it is there."""
    from symbiotic_titan.demo.write import WORLD_SIZES, WorldSize, write_world

    folder = settings.work / "demo_data"
    size = WorldSize(4, 8, 100, 60, train_shards=1) if settings.is_toy else WORLD_SIZES["debug"]
    if not folder.exists():
        write_world(folder, 0, size)
    return {"samples": size.num_samples}


def install(notes: Notes) -> None:
    """The packages, the machine, and the demo data."""
    notes.part("packages", packages)
    notes.part("machine", partial(machine_facts, notes.settings))
    notes.part("demo_data", partial(demo_data, notes.settings))


# ---- ceilings ---------------------------------------------------------------------------------------------------------


def copy_ceiling(settings: Settings) -> dict[str, Any]:
    """A copy within the device's memory; bytes read plus bytes written."""
    import torch
    from bench_timing import interleave, summary

    num_bytes = 2**20 if settings.is_toy else 2**31
    source = torch.randint(127, (num_bytes,), dtype=torch.int8, device=settings.device)
    target = torch.empty_like(source)
    row = summary(interleave({"copy": lambda: target.copy_(source)}, repeats=11)["copy"])
    return {**row, "terabytes_per_second": 2 * num_bytes / row["median_ms"] / 1e9}


def matmul_ceiling(settings: Settings, dtype: str) -> dict[str, Any]:
    """A product of two square matrices of random values."""
    import torch
    from bench_timing import interleave, summary

    size = 256 if settings.is_toy else 8192
    a, b = (torch.randn(size, size, device=settings.device) for _ in range(2))

    def rounded() -> None:
        torch.mm(a16, b16)

    def scaled() -> None:
        torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    a16, b16 = a.bfloat16(), b.bfloat16()
    one = torch.ones((), device=settings.device)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    run = scaled if dtype == "float8" else rounded
    row = summary(interleave({"matmul": run}, repeats=11)["matmul"])
    return {**row, "size": size, "teraflops": 2 * size**3 / row["median_ms"] / 1e9}


def ceilings(notes: Notes) -> None:
    settings = notes.settings
    notes.part("copy", partial(copy_ceiling, settings))
    notes.part("matmul_bfloat16", partial(matmul_ceiling, settings, "bfloat16"))
    if not settings.is_toy:  # one scale for each operand, which CPUs compute by plain loops
        notes.part("matmul_float8", partial(matmul_ceiling, settings, "float8"))


# ---- correctness ------------------------------------------------------------------------------------------------------


def correctness(notes: Notes) -> None:
    """What must be equal, and one training step with deterministic algorithms."""
    import gpu_equalities as equal
    from gpu_training import deterministic_step

    device = notes.settings.device
    notes.part("grouped_swiglu", lambda: equal.grouped_swiglu(device))
    notes.part("dispatch", lambda: equal.dispatch(device))
    notes.part("layer_twice", lambda: equal.layer_twice(device))
    for mask in ("sequence", "patches", "queries"):
        for width in (64, 72):  # the decoder's and the ViT's
            name = f"flex_{mask}_{width}"
            notes.part(name, partial(equal.flex_against_sdpa, device, mask, width))

    def several(compare: Callable[..., dict[str, dict[str, Any]]], *args: str) -> dict[str, Any]:
        found = compare(device, *args)
        return {**found, "passed": all(row["passed"] for row in found.values())}

    notes.part("float8_experts", partial(several, equal.float8_experts))
    for scaling in ("rowwise", "tensorwise"):
        notes.part(f"float8_linear_{scaling}", partial(several, equal.float8_linear, scaling))
    notes.part("deterministic_step", partial(deterministic_step, notes.settings))


# ---- the MoE layer ----------------------------------------------------------------------------------------------------


def moe_layer(settings: Settings, shape: str, num_experts: int, top_k: int) -> dict[str, Any]:
    """Forward and backward beside the other implementations, and the layer's phases."""
    import moe
    import torch
    from bench_timing import interleave, summary

    torch.manual_seed(0)
    case = moe.Case(moe.SHAPES[shape], torch.bfloat16, num_experts, top_k)
    repeats = 2 if settings.is_toy else 11
    times = interleave(moe.contenders(case, ["loop"], fresh=False), repeats=repeats)
    return {
        "times": {name: summary(seconds) for name, seconds in times.items()},
        "ratios": moe.ratios(times),
        "phases_ms": moe.phases(case, repeats),
    }


def moe_layers(notes: Notes) -> None:
    rows = {"1b": ("1b", 64, 6), "30b": ("30b", 128, 8)}
    if notes.settings.is_toy:
        rows = {name: ("toy", 16, 2) for name in ("1b",)}
    for name, row in rows.items():
        notes.part(name, partial(moe_layer, notes.settings, *row))
