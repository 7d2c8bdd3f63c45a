"""The device seam: which device this process uses, and what torchtitan expects of an accelerator.

``prepare()`` runs when the package is imported, so the order of imports does not matter. On a machine with an accelerator it
changes nothing. Without one, torchtitan sees the CPU as its device, through an object with the functions that torch.cuda has and
torch.cpu lacks. torch itself is never patched.

torch is imported where it is used: this module belongs to the package, and ``symbiotic --help`` must not wait for torch.
"""

import importlib
import importlib.util
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_UTILS = "torchtitan.tools.utils"
_PROFILING = "torchtitan.tools.profiling"
_ATTENTION = "torchtitan.models.attention"


def has_accelerator() -> bool:
    """Whether torch sees a device other than the CPU that torchtitan can train on."""
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


def device_type() -> str:
    """``cuda``, ``xpu`` or ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if torch.xpu.is_available() else "cpu"


def supports_flex_attention() -> bool:
    """Whether FlexAttention has a backward on this device (on CPU it raises)."""
    import torch

    return torch.cuda.is_available()


def has_slow_bfloat16() -> bool:
    """Whether a CPU multiplies matrices much faster in float32: 7 times on one with AVX2, whose kernels for bfloat16 are plain loops."""
    import torch

    if device_type() != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of this process's CUDA device; None without one."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def copy_from_host(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """``tensor``, which lies on the host, on ``device``. The host does not wait for the copy."""
    # From memory that is not pinned the copy would wait for what the device has to do before it.
    if device.type != "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def process_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CpuDeviceModule:
    """What torchtitan asks of ``torch.cuda``, answered for a CPU. Memory is this process's peak resident memory."""

    @staticmethod
    def set_device(device: Any) -> None:
        import torch

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


@contextmanager
def profiling_on_cpu(
    profiling_config: Any, *, global_step: int = 0, base_folder: str = "", leaf_folder: str = ""
) -> Iterator[Any]:
    """torchtitan's ``maybe_enable_profiling``, whose list of what to profile torch refuses without an accelerator."""
    if not profiling_config.enable_profiling:
        yield None
        return
    import torch

    logger, rank = logging.getLogger(), torch.distributed.get_rank()
    folder = Path(base_folder, profiling_config.save_traces_folder)
    warmup, active = profiling_config.profiler_warmup, profiling_config.profiler_active

    def write(profiler: torch.profiler.profile) -> None:
        path = folder / f"iteration_{profiler.step_num}" / leaf_folder / f"rank{rank}_trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info(f"profiler: wrote {path}")

    logger.info(f"profiler: traces are written to {folder}")
    cycle = torch.profiler.schedule(
        wait=profiling_config.profile_freq - warmup - active, warmup=warmup, active=active
    )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        schedule=cycle,
        on_trace_ready=write,
        record_shapes=True,
    ) as profiler:
        profiler.step_num = global_step
        yield profiler


def stub_triton_kernels() -> None:
    """Replace torchtitan's Triton kernels by stubs where Triton is missing; this project never calls them."""
    name = "torchtitan.models.moe.kernels"
    if name in sys.modules or importlib.util.find_spec("triton") is not None:
        return

    def generate_permute_indices(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torchtitan's Triton kernels need the package triton and a GPU")

    stub = ModuleType(name)
    stub.generate_permute_indices = generate_permute_indices  # type: ignore[attr-defined]
    sys.modules[name] = stub


def _tell_cpu() -> None:
    """Set the CPU as the device in every loaded module of torchtitan, since several copy it on import."""
    answers = {
        "device_type": "cpu",
        "device_module": CpuDeviceModule,
        "get_device_info": lambda: ("cpu", CpuDeviceModule),
        # A CPU has no listed peak, so metrics leave utilisation out.
        "get_peak_flops": lambda device_name: float("nan"),
        "maybe_enable_profiling": profiling_on_cpu,
    }
    for name, module in list(sys.modules.items()):
        if module is not None and name.split(".")[0] == "torchtitan":
            for copied in answers.keys() & vars(module).keys():
                setattr(module, copied, answers[copied])


@contextmanager
def _without_compiler() -> Iterator[None]:
    """``torch.compile`` changes nothing meanwhile. Called while a module is imported, it would load Inductor: 1.1 s."""
    importlib.import_module("torch._dynamo")  # its own settings are read before the variable is set

    name = "TORCHDYNAMO_DISABLE"  # read at every call
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _then_tell_cpu() -> Iterator[None]:
    yield
    _tell_cpu()


# Modules that are loaded differently on a machine without an accelerator -> what surrounds their execution. The attention module
# compiles kernels that need one.
_ON_CPU: Mapping[str, Callable[[], AbstractContextManager[None]]] = MappingProxyType(
    {
        _UTILS: _then_tell_cpu,
        _PROFILING: _then_tell_cpu,
        _ATTENTION: _without_compiler,
    }
)


class _CpuFinder(MetaPathFinder):
    """Import hook: corrects torchtitan's device module before any other module copies from it, and keeps the compiler unloaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in _ON_CPU or has_accelerator():
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_on_cpu(module: ModuleType) -> None:
            with _ON_CPU[name]():
                execute(module)

        spec.loader.exec_module = execute_on_cpu  # type: ignore[method-assign]
        return spec


def prepare() -> None:
    """Make torchtitan usable on this machine whenever it is imported (here that would take 4 s). Idempotent.

    Runs when the package is imported. With an accelerator it only provides stubs for a missing Triton.
    """
    stub_triton_kernels()
    if _UTILS in sys.modules:
        if not has_accelerator():
            _tell_cpu()
    elif not any(isinstance(finder, _CpuFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CpuFinder())
