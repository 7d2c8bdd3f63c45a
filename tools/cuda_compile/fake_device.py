"""An H100 that compiles but does not compute: torch, Inductor and Triton see one device of capability 9.0.

Tensors on it are fake: they have a dtype, a shape and strides, and no values. ``compile_only`` is Inductor as a backend up to the
finished kernels, and starts none; what it returns runs the graph on fake tensors, operator by operator.
"""

import collections
import copy
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._subclasses.fake_tensor as fake_tensor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    is_integrated=False,
)


class Utils:
    """Triton's loader of kernels."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": PROPERTIES.shared_memory_per_block_optin,
            "max_num_regs": PROPERTIES.regs_per_multiprocessor,
            "multiprocessor_count": PROPERTIES.multi_processor_count,
            "warpSize": PROPERTIES.warp_size,
        }

    def load_binary(self, *kernel: Any) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads


class Driver:
    """Triton's driver of the device: its compiler runs as far as ptxas, its launcher does nothing."""

    utils, binary_ext = Utils(), "cubin"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def launcher_cls(self, *arguments: Any, **named: Any) -> Callable[..., None]:
        return lambda *a, **k: None


def install() -> None:
    """Make this process see the device, and let ``torch.compile`` compile for it. Once, after the project is imported."""
    from triton.runtime import driver

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *a, **k: value

    cuda: Any = torch.cuda
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "_get_device_properties": PROPERTIES,
        "get_device_capability": CAPABILITY,
        "current_stream": SimpleNamespace(cuda_stream=0),
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
    }.items():
        setattr(cuda, name, answer(value))
    for owner in (cuda, cuda.random):
        owner.get_rng_state = lambda *a, **k: torch.get_rng_state()
        owner.set_rng_state = owner._lazy_init = answer(None)
    torch._C._cuda_getCurrentRawStream = answer(0)  # type: ignore[method-assign]
    torch.accelerator.is_available = answer(False)  # type: ignore[assignment]
    fake_tensor.init_gpu_context = answer(None)  # type: ignore[assignment]
    interface: Any = device_interface.CudaInterface
    interface.Worker.get_device_properties = staticmethod(answer(PROPERTIES))
    interface.get_compute_capability = staticmethod(answer(90))
    joint_graph.lazy_init = post_grad.lazy_init = answer(None)  # type: ignore[assignment]
    # In this process, where the fakes are; and every graph anew, or a second run would check nothing.
    inductor_config.compile_threads, inductor_config.fx_graph_cache = 1, False
    inductor_config.joint_graph_constant_folding = False  # it would compute with the constants
    driver.set_active(Driver())
    torch.compile = functools.partial(_compile, torch.compile)  # type: ignore[assignment]


def _compile(original: Callable[..., Any], *model: Any, **options: Any) -> Any:
    return original(*model, **options | {"backend": compile_only})


# Graphs that Inductor compiled, and how often a forward or backward graph ran and each operator in it.
compiled: collections.Counter[str] = collections.Counter()
ran: collections.Counter[str] = collections.Counter()


def _inner(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """Compile ``graph`` to kernels; return a function that runs its operators on fake tensors."""
    kept = copy.deepcopy(graph)  # Inductor changes it
    compile_fx_inner(graph, inputs, **options)
    kind = "backward" if options.get("is_backward") else "forward"
    compiled[kind] += 1
    operators = [str(n.target) for n in kept.graph.nodes if n.op == "call_function"]

    def run(arguments: list[Any]) -> Any:
        ran.update([kind, *operators])
        return kept(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def compile_only(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Backend of ``torch.compile``."""
    return compile_fx(graph, inputs, inner_compile=_inner)
