"""SwiGLU of many experts over rows sorted by expert. The choice of kernel per device is made here alone.

The dispatcher pads each expert's rows with zeros to a multiple of ``row_multiple``; ``grouped_swiglu`` computes. CUDA devices that
support it use ``F.grouped_mm``. All others loop over the experts inside one autograd function, which avoids autograd's per-expert
gradients (indexing a stacked weight costs a full-size gradient of zeros each) and keeps intermediates in cache.

On a CPU every thread takes whole experts. An expert's matmuls are small: splitting each over the threads would cost a wake-up and a
barrier every 50 microseconds, while whole experts cost one start and one join per call. Measured on 2 cores, T=4096, D=F=512, E=128,
K=8, bf16: 16 ms instead of 21 ms for the matmuls of one pass. Results do not depend on the number of threads, because each matmul
runs on one thread. ``tools/bench/moe.py`` repeats the measurements.

Shape letters: sequence/shapes.py. N are rows sorted by expert, E the experts on this rank.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would compute a matmul of ``x``; ``x.dtype`` without autocast.

    Autocast does not cover grouped matmuls or our autograd functions, so their callers cast explicitly.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, or the parameter itself if it is not sharded. The gradient stays a shard."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# Multiply-adds per thread below which starting another thread costs more (50 to 100 us) than it saves.
_MIN_WORK_PER_THREAD = 1 << 26


def _ranges(costs: list[int], num_ranges: int) -> list[tuple[int, int]]:
    """(first, last) of consecutive tasks, split so that the ranges have nearly equal costs."""
    total, seen, first = sum(costs), 0, 0
    ranges: list[tuple[int, int]] = []
    for task, cost in enumerate(costs):
        seen += cost
        if seen * num_ranges >= total * (len(ranges) + 1) and len(ranges) < num_ranges - 1:
            ranges.append((first, task + 1))
            first = task + 1
    return [*ranges, (first, len(costs))]


def in_threads(work: Callable[[int, int], None], costs: list[int], device: torch.device) -> None:
    """Call ``work(first, last)`` for ranges that together cover every task once. ``costs``: multiply-adds of each task.

    On a CPU the ranges run concurrently on torch's number of threads, and torch uses one thread inside each.
    ``work`` must not record gradients. An exception in any range is raised here, after all ranges have ended.
    """
    if device.type != "cpu":
        return work(0, len(costs))
    threads = torch.get_num_threads()
    here, *elsewhere = _ranges(costs, min(threads, 1 + sum(costs) // _MIN_WORK_PER_THREAD))
    inference = torch.is_inference_mode_enabled()

    def run(first: int, last: int) -> None:
        # Both modes are thread-local, and a new thread starts with gradients enabled.
        with torch.inference_mode(inference), torch.no_grad():
            work(first, last)

    torch.set_num_threads(1)  # of this thread; threads that start now inherit it
    try:
        with ThreadPoolExecutor(max_workers=max(1, len(elsewhere))) as pool:
            futures = [pool.submit(run, *bounds) for bounds in elsewhere]
            run(*here)
        for future in futures:
            future.result()
    finally:
        torch.set_num_threads(threads)


# oneDNN compiles a kernel for every new row count of a bf16 matmul (3 to 8 ms each, 1024 are cached), and row counts change
# with every batch. Full tiles are also 1.3 times faster than partial ones. fp32 uses MKL, which has neither problem.
_CPU_TILE_ROWS = 32

# bf16 experts with equal counts share a batched matmul while their rows fit a core's cache. For small experts (64 rows, D = F = 256)
# call overhead equals compute time, and batching saves 15 %; large experts gain 2 %. Not in float32: it gains nothing there, and the
# last bit of an expert's result would depend on its neighbours' counts.
_RUN_ROWS = 1024


def row_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Each expert's number of rows must be a multiple of this."""
    return _CPU_TILE_ROWS if device.type == "cpu" and dtype.itemsize == 2 else 1


@torch.compiler.assume_constant_result
def _is_hopper_or_newer(device_index: int) -> bool:
    """Compute capability 9.0 or more. Constant under tracing, because a call into the driver would break the graph."""
    return torch.cuda.get_device_capability(device_index) >= (9, 0)


def _has_grouped_mm(rows_ND: Tensor, hidden_dim: int) -> bool:
    """Whether ``F.grouped_mm`` takes these operands: bf16, compute capability 9.0, rows that are multiples of 16 bytes."""
    return (
        rows_ND.device.type == "cuda"
        and rows_ND.dtype == torch.bfloat16
        and _is_hopper_or_newer(rows_ND.device.index)
        and rows_ND.shape[1] % 8 == 0
        and hidden_dim % 8 == 0
    )


def grouped_swiglu(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> Tensor:
    """(N, D): ``w2(silu(w1 x) * w3 x)`` with each expert's weights on its rows. Differentiable.

    All operands have the same dtype. ``counts_E``: int64, rows of each expert, multiples of ``row_multiple`` that sum to N. The
    gradient of an expert without rows is zero.
    """
    if _has_grouped_mm(rows_ND, w1_EFD.shape[1]):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        gate_NF = F.grouped_mm(rows_ND, w1_EFD.transpose(1, 2), offs=offsets_E)
        up_NF = F.grouped_mm(rows_ND, w3_EFD.transpose(1, 2), offs=offsets_E)
        return F.grouped_mm(F.silu(gate_NF) * up_NF, w2_EDF.transpose(1, 2), offs=offsets_E)
    return _LoopedSwiGLU.apply(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E)


class _LoopedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
    ) -> Tensor:
        out_ND, gate_NF, up_NF = swiglu_loop(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E)
        ctx.save_for_backward(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E, gate_NF, up_NF)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        # Frozen experts skip three of the six matmuls.
        weights_need_grad = any(ctx.needs_input_grad[1:4])
        grad_rows_ND, *grad_weights = swiglu_loop_backward(
            grad_ND.contiguous(), *ctx.saved_tensors, weights_need_grad
        )
        return grad_rows_ND, *(grad_weights if weights_need_grad else (None,) * 3), None


@dataclass(frozen=True)
class _Run:
    """Consecutive experts with the same number of rows: one batched matmul."""

    first: int
    last: int
    rows: int  # of each expert

    @property
    def total_rows(self) -> int:
        return (self.last - self.first) * self.rows

    @property
    def experts(self) -> int | slice:
        """Index into stacked weights; an int for a single expert, because ``mm`` is faster than a batched matmul of one."""
        return self.first if self.last == self.first + 1 else slice(self.first, self.last)


def _equal_runs(counts: list[int], dtype: torch.dtype) -> list[_Run]:
    """Runs in expert order; experts without rows are left out."""
    most_rows = _RUN_ROWS if dtype.itemsize == 2 else 0
    runs: list[_Run] = []
    for expert, rows in enumerate(counts):
        run = runs[-1] if runs else _Run(-1, -1, 0)
        if (run.last, run.rows) == (expert, rows) and run.total_rows + rows <= most_rows:
            runs[-1] = _Run(run.first, expert + 1, rows)
        elif rows:
            runs.append(_Run(expert, expert + 1, rows))
    return runs


def _by_run(x_ND: Tensor, runs: list[_Run]) -> list[Tensor]:
    """One view per run: (rows, D) for a single expert, else (experts of the run, rows, D)."""
    parts = x_ND.split([run.total_rows for run in runs])
    return [
        part if isinstance(run.experts, int) else part.unflatten(0, (-1, run.rows))
        for part, run in zip(parts, runs, strict=True)
    ]


def _scratch(like_NF: Tensor, runs: list[_Run]) -> Tensor:
    """A flat buffer for the (rows, F) intermediates of the largest of ``runs``."""
    most_rows = max((run.total_rows for run in runs), default=0)
    return like_NF.new_empty(most_rows * like_NF.shape[1])


# Custom ops, so that torch.compile sees one call instead of a data-dependent loop over experts and threads, and per-op activation
# checkpointing can save the result. The backward is its own op for the same reason.
@torch.library.custom_op("symbiotic_titan::swiglu_loop", mutates_args=())
def swiglu_loop(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (N, D), gate = w1 x (N, F), up = w3 x (N, F)); the last two are saved for the backward."""
    counts = counts_E.tolist()  # device sync, except on a CPU
    runs = _equal_runs(counts, rows_ND.dtype)
    out_ND = torch.empty_like(rows_ND)
    gate_NF = rows_ND.new_empty(rows_ND.shape[0], w1_EFD.shape[1])
    up_NF = torch.empty_like(gate_NF)
    per_run = list(
        zip(runs, *(_by_run(t, runs) for t in (rows_ND, out_ND, gate_NF, up_NF)), strict=True)
    )
    w1_EDF, w2_EFD, w3_EDF = (w.transpose(1, 2) for w in (w1_EFD, w2_EDF, w3_EFD))

    def work(first: int, last: int) -> None:
        # One scratch buffer per thread instead of one for all N rows: it stays in the core's cache.
        scratch = _scratch(gate_NF, runs[first:last])
        for run, x, out, gate, up in per_run[first:last]:
            experts = run.experts
            hidden = scratch[: gate.numel()].view_as(gate)
            torch.matmul(x, w1_EDF[experts], out=gate)
            torch.matmul(x, w3_EDF[experts], out=up)
            torch.ops.aten.silu.out(gate, out=hidden).mul_(up)
            torch.matmul(hidden, w2_EFD[experts], out=out)

    in_threads(work, [x.numel() * w1_EFD.shape[1] for _, x, *_ in per_run], rows_ND.device)
    return out_ND, gate_NF, up_NF


@swiglu_loop.register_fake
def _(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E):  # type: ignore[no-untyped-def]
    gate_NF = rows_ND.new_empty(rows_ND.shape[0], w1_EFD.shape[1])
    return torch.empty_like(rows_ND), gate_NF, torch.empty_like(gate_NF)


@torch.library.custom_op("symbiotic_titan::swiglu_loop_backward", mutates_args=())
def swiglu_loop_backward(
    grad_ND: Tensor,
    rows_ND: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    counts_E: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    weights_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, w1, w2 and w3; the last three are empty unless ``weights_need_grad``."""
    counts = counts_E.tolist()  # device sync, except on a CPU
    runs = _equal_runs(counts, rows_ND.dtype)
    grad_rows_ND = torch.empty_like(rows_ND)
    grad_weights = [
        torch.empty_like(w) if weights_need_grad else w.new_empty(0)
        for w in (w1_EFD, w2_EDF, w3_EFD)
    ]
    # Runs leave out experts without rows, so zero their part of the uninitialised gradients.
    for expert in [e for e, rows in enumerate(counts) if rows == 0 and weights_need_grad]:
        for grad_w in grad_weights:
            grad_w[expert].zero_()
    by_row = (grad_ND, rows_ND, grad_rows_ND, gate_NF, up_NF)
    per_run = list(zip(runs, *(_by_run(t, runs) for t in by_row), strict=True))

    def work(first: int, last: int) -> None:
        buffers = [_scratch(gate_NF, runs[first:last]) for _ in range(3)]
        for run, grad, x, grad_x, gate, up in per_run[first:last]:
            experts = run.experts
            activated, hidden, grad_hidden = (b[: gate.numel()].view_as(gate) for b in buffers)
            torch.matmul(grad, w2_EDF[experts], out=grad_hidden)
            torch.ops.aten.silu.out(gate, out=activated)
            if weights_need_grad:
                torch.mul(activated, up, out=hidden)
                torch.matmul(grad.mT, hidden, out=grad_weights[1][experts])
            # In place from here: the buffer ``activated`` becomes grad_up, and ``hidden`` grad_gate.
            grad_up = activated.mul_(grad_hidden)
            grad_gate = torch.ops.aten.silu_backward.grad_input(
                grad_hidden.mul_(up), gate, grad_input=hidden
            )
            if weights_need_grad:
                torch.matmul(grad_gate.mT, x, out=grad_weights[0][experts])
                torch.matmul(grad_up.mT, x, out=grad_weights[2][experts])
            torch.matmul(grad_gate, w1_EFD[experts], out=grad_x)
            # One kernel adds the second product in place instead of allocating (rows, D) for it.
            add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
            add_product(grad_x, grad_up, w3_EFD[experts], out=grad_x)

    in_threads(work, [2 * x.numel() * w1_EFD.shape[1] for _, _, x, *_ in per_run], rows_ND.device)
    return grad_rows_ND, grad_weights[0], grad_weights[1], grad_weights[2]


@swiglu_loop_backward.register_fake
def _(grad_ND, rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E, gate_NF, up_NF, weights_need_grad):  # type: ignore[no-untyped-def]
    grads = [
        torch.empty_like(w) if weights_need_grad else w.new_empty(0)
        for w in (w1_EFD, w2_EDF, w3_EFD)
    ]
    return torch.empty_like(rows_ND), *grads
