"""The device seam: decides what device this process trains on, and gives torchtitan what it expects of an accelerator.

``stub_triton_kernels()`` runs when the package is imported and lets torchtitan be imported without Triton. ``prepare()`` must
run before torchtitan's trainer, metrics or distributed helpers are imported; on a machine with an accelerator it changes
nothing. Without one it tells torchtitan's two early modules that the device is the CPU, and hands it an object with the
functions that torch.cuda has and torch.cpu lacks. torch itself is never patched.
"""

import importlib.util
import os
import resource
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

# Modules of torchtitan that copy the device at import; preparing after them would have no effect.
_BOUND_AT_IMPORT = (
    "torchtitan.train",
    "torchtitan.components.metrics",
    "torchtitan.distributed.utils",
    "torchtitan.tools.profiling",
)


def has_accelerator() -> bool:
    """Whether torch sees a device other than the CPU that torchtitan can train on."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def device_type() -> str:
    """``cuda``, ``xpu`` or ``cpu``."""
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if torch.xpu.is_available() else "cpu"


def supports_flex_attention() -> bool:
    """Whether FlexAttention has a backward on this device (on CPU it raises)."""
    return torch.cuda.is_available()


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of this process's CUDA device; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def process_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CpuDeviceModule:
    """What torchtitan asks of ``torch.cuda``, answered for a CPU. Memory is this process's peak resident memory."""

    @staticmethod
    def set_device(device: Any) -> None:
        torch.cpu.set_device(device)

    @staticmethod
    def current_device() -> int:
        return 0  # an index: gloo's barrier accepts [0], torch.cpu would return the string "cpu"

    @staticmethod
    def synchronize(device: Any = None) -> None:
        return None

    @staticmethod
    def empty_cache() -> None:
        return None

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        return None

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "CPU"

    @staticmethod
    def get_device_properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        peak = process_memory_bytes()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }


def stub_triton_kernels() -> None:
    """Stand in for torchtitan's Triton kernels where there is no Triton; they are never called by this project."""
    name = "torchtitan.models.moe.kernels"
    if name in sys.modules or importlib.util.find_spec("triton") is not None:
        return

    def generate_permute_indices(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torchtitan's Triton kernels need the package triton and a GPU")

    stub = ModuleType(name)
    stub.generate_permute_indices = generate_permute_indices  # type: ignore[attr-defined]
    sys.modules[name] = stub


def prepare() -> None:
    """Make torchtitan importable and usable on this machine. Idempotent.

    Raises:
        RuntimeError: a torchtitan module that copies the device was imported before.
    """
    if has_accelerator():
        return
    import torchtitan.distributed.parallel_dims as parallel_dims
    import torchtitan.tools.utils as utils

    if getattr(utils, "device_module", None) is CpuDeviceModule:
        return
    early = [name for name in _BOUND_AT_IMPORT if name in sys.modules]
    if early:
        raise RuntimeError(
            f"symbiotic_titan.device.prepare() must run before {', '.join(early)} is imported"
        )
    utils.device_type, utils.device_module = "cpu", CpuDeviceModule  # type: ignore[assignment]
    utils.get_device_info = lambda: ("cpu", CpuDeviceModule)  # type: ignore[assignment, return-value]
    # A CPU has no listed peak: utilisation is left out of the metrics there.
    utils.get_peak_flops = lambda device_name: float("nan")
    parallel_dims.device_type = "cpu"
