"""SwiGLU of many experts over rows sorted by expert. The choice of kernel per device is made here alone.

The dispatcher pads each expert's rows with zeros to a multiple of ``row_multiple``; ``grouped_swiglu`` computes. Where ``F.grouped_mm``
is one kernel, which never waits for the host, it is used: bf16 on compute capability 9.x and 10.x. All others, such as Ampere, Ada and
consumer Blackwell, loop over the experts inside one autograd function, which avoids autograd's per-expert gradients (indexing a
stacked weight costs a full-size gradient of zeros each) and keeps intermediates in cache.

On a CPU every thread takes whole experts. An expert's matmuls are small: splitting each over the threads would cost a wake-up and a
barrier every 50 microseconds, while whole experts cost one start and one join per call. Measured on 2 cores, T=4096, D=F=512, E=128,
K=8, bf16: 16 ms instead of 21 ms for the matmuls of one pass. Results do not depend on the number of threads, because each matmul
runs on one thread. ``tools/bench/moe.py`` repeats the measurements.

Shape letters: sequence/shapes.py. N are rows sorted by expert, E the experts on this rank.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


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

# Elements of a (rows, F) intermediate that several small experts share: three of 128 KiB in float32 fit a core's cache.
_BLOCK_ELEMENTS = 1 << 15

# A multiple of what every CPU's vectorised kernels compute at once: two vectors of 64 bytes, at least 2 bytes an element.
_VECTOR_ELEMENTS = 64


def row_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Each expert's number of rows must be a multiple of this."""
    return _CPU_TILE_ROWS if device.type == "cpu" and dtype.itemsize == 2 else 1


@torch.compiler.assume_constant_result
def has_grouped_kernel(device_index: int) -> bool:
    """Compute capability 9.x or 10.x: torch 2.11's condition for the kernel of ``F.grouped_mm`` (``_grouped_mm_cuda`` in its
    GroupedBlas.cpp). Elsewhere it copies the offsets to the host and loops. Constant under tracing, because a call into the driver would
    break the graph."""
    return torch.cuda.get_device_capability(device_index)[0] in (9, 10)


def _has_grouped_mm(rows_ND: Tensor, hidden_dim: int) -> bool:
    """Whether the kernel of ``F.grouped_mm`` takes these operands: bf16, and rows that are multiples of 16 bytes."""
    return (
        rows_ND.device.type == "cuda"
        and rows_ND.dtype == torch.bfloat16
        and has_grouped_kernel(rows_ND.device.index)
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
        from symbiotic_titan.moe.grouped_mm import swiglu_by_grouped_mm

        return swiglu_by_grouped_mm(rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E)
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
    def is_single(self) -> bool:
        """One expert, whose operands are matrices: ``mm`` is faster than a batched matmul of one."""
        return self.last == self.first + 1

    @property
    def total_rows(self) -> int:
        return (self.last - self.first) * self.rows


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


def _blocks(runs: list[_Run], hidden_dim: int) -> list[list[_Run]]:
    """Consecutive runs whose intermediates fit a core's cache together, so that elementwise kernels are called once for all of them."""
    # Vectorised kernels compute the elements that do not fill their last vectors with other, scalar code. Where an expert can have
    # such elements, it is a block of its own, or bits would depend on its neighbours.
    most_rows = _BLOCK_ELEMENTS // hidden_dim if hidden_dim % _VECTOR_ELEMENTS == 0 else 0
    blocks: list[list[_Run]] = []
    rows = 0
    for run in runs:
        if blocks and rows + run.total_rows <= most_rows:
            blocks[-1].append(run)
            rows += run.total_rows
        else:
            blocks.append([run])
            rows = run.total_rows
    return blocks


def _by_run(x_ND: Tensor, runs: list[_Run]) -> list[Tensor]:
    """One view per run: (rows, D) for a single expert, else (experts of the run, rows, D)."""
    parts = x_ND.split_with_sizes([run.total_rows for run in runs])
    return [
        part if run.is_single else part.unflatten(0, (-1, run.rows))
        for part, run in zip(parts, runs, strict=True)
    ]


def _of_run(w_EFD: Tensor, runs: list[_Run]) -> list[Tensor]:
    """Stacked weights, one view per run: (F, D) for a single expert, else (experts of the run, F, D)."""
    experts = w_EFD.unbind(0)  # all at once: indexing a tensor from Python takes microseconds
    return [experts[r.first] if r.is_single else w_EFD[r.first : r.last] for r in runs]


def _block_rows(blocks: list[list[_Run]]) -> list[int]:
    return [sum(run.total_rows for run in block) for block in blocks]


def _per_block(
    blocks: list[list[_Run]],
    before: tuple[list[Tensor], ...],
    after: tuple[list[Tensor], ...],
    *whole_NF: Tensor,
) -> list[tuple[Any, ...]]:
    """(runs, operands of each run before its block's elementwise pass, those after it, the block's rows of each of ``whole_NF``)."""

    def cut(columns: tuple[list[Tensor], ...]) -> list[list[tuple[Tensor, ...]]]:
        runs = zip(*columns, strict=True)
        return [list(islice(runs, len(block))) for block in blocks]

    rows = _block_rows(blocks)
    split = (t_NF.split_with_sizes(rows) for t_NF in whole_NF)
    return list(zip(blocks, cut(before), cut(after), *split, strict=True))


def _weight_gradients(weights: tuple[Tensor, ...], counts: list[int]) -> list[Tensor]:
    """Uninitialised, but for the zeros of experts without rows: no run computes those."""
    grads = [torch.empty_like(w) for w in weights]
    for expert in [e for e, rows in enumerate(counts) if rows == 0]:
        for grad_w in grads:
            grad_w[expert].zero_()
    return grads


# Custom ops, so that torch.compile sees one call instead of a data-dependent loop over experts and threads, and per-op activation
# checkpointing can save the result. The backward is its own op for the same reason.
@torch.library.custom_op("symbiotic_titan::swiglu_loop", mutates_args=())
def swiglu_loop(
    rows_ND: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (N, D), gate = w1 x (N, F), up = w3 x (N, F)); the last two are saved for the backward."""
    counts = counts_E.tolist()  # device sync, except on a CPU
    out_ND = torch.empty_like(rows_ND)
    gate_NF = rows_ND.new_empty(rows_ND.shape[0], w1_EFD.shape[1])
    up_NF = torch.empty_like(gate_NF)
    runs = _equal_runs(counts, rows_ND.dtype)
    blocks = _blocks(runs, gate_NF.shape[1])
    rows = _block_rows(blocks)
    x, gate, up, out = (_by_run(t, runs) for t in (rows_ND, gate_NF, up_NF, out_ND))
    w1, w2, w3 = (_of_run(w.mT, runs) for w in (w1_EFD, w2_EDF, w3_EFD))
    per_block = _per_block(blocks, (x, gate, up, w1, w3), (w2, out), gate_NF, up_NF)

    def work(first: int, last: int) -> None:
        # One scratch buffer per thread instead of one for all N rows: it stays in the core's cache.
        scratch = gate_NF.new_empty(max(rows[first:last], default=0), gate_NF.shape[1])
        for block, before, after, gate_nF, up_nF in per_block[first:last]:
            for x, gate, up, w1, w3 in before:
                torch.matmul(x, w1, out=gate)
                torch.matmul(x, w3, out=up)
            hidden_nF = scratch[: gate_nF.shape[0]]
            torch.ops.aten.silu.out(gate_nF, out=hidden_nF).mul_(up_nF)
            for hidden, (w2, out) in zip(_by_run(hidden_nF, block), after, strict=True):
                torch.matmul(hidden, w2, out=out)

    in_threads(work, [n * rows_ND.shape[1] * gate_NF.shape[1] for n in rows], rows_ND.device)
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
    grad_rows_ND = torch.empty_like(rows_ND)
    weights = (w1_EFD, w2_EDF, w3_EFD)
    if weights_need_grad:
        grad_weights = _weight_gradients(weights, counts)
    else:
        grad_weights = [w.new_empty(0) for w in weights]
    runs = _equal_runs(counts, rows_ND.dtype)
    blocks = _blocks(runs, gate_NF.shape[1])
    rows = _block_rows(blocks)
    grad, x, grad_x = (_by_run(t, runs) for t in (grad_ND, rows_ND, grad_rows_ND))
    w1, w2, w3 = (_of_run(w, runs) for w in weights)
    grad_w1, grad_w2, grad_w3 = (
        _of_run(g, runs) if weights_need_grad else [g] * len(runs) for g in grad_weights
    )
    after = (x, grad_x, w1, w3, grad_w1, grad_w3)
    per_block = _per_block(blocks, (grad, w2, grad_w2), after, gate_NF, up_NF)

    def work(first: int, last: int) -> None:
        scratch = gate_NF.new_empty(3, max(rows[first:last], default=0), gate_NF.shape[1])
        for block, before, after, gate_nF, up_nF in per_block[first:last]:
            activated_nF, hidden_nF, grad_hidden_nF = scratch[:, : gate_nF.shape[0]].unbind(0)
            hiddens = _by_run(hidden_nF, block)
            for (grad, w2, _), out in zip(before, _by_run(grad_hidden_nF, block), strict=True):
                torch.matmul(grad, w2, out=out)
            torch.ops.aten.silu.out(gate_nF, out=activated_nF)
            if weights_need_grad:
                torch.mul(activated_nF, up_nF, out=hidden_nF)
                for (grad, _, grad_w2), hidden in zip(before, hiddens, strict=True):
                    torch.matmul(grad.mT, hidden, out=grad_w2)
            # In place from here: the buffer ``activated`` becomes grad_up, and ``hidden`` grad_gate.
            grad_ups = _by_run(activated_nF.mul_(grad_hidden_nF), block)
            torch.ops.aten.silu_backward.grad_input(
                grad_hidden_nF.mul_(up_nF), gate_nF, grad_input=hidden_nF
            )
            for operands, grad_gate, grad_up in zip(after, hiddens, grad_ups, strict=True):
                x, grad_x, w1, w3, grad_w1, grad_w3 = operands
                if weights_need_grad:
                    torch.matmul(grad_gate.mT, x, out=grad_w1)
                    torch.matmul(grad_up.mT, x, out=grad_w3)
                torch.matmul(grad_gate, w1, out=grad_x)
                # One kernel adds the second product in place instead of allocating (rows, D) for it.
                add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
                add_product(grad_x, grad_up, w3, out=grad_x)

    in_threads(work, [2 * n * rows_ND.shape[1] * gate_NF.shape[1] for n in rows], rows_ND.device)
    return grad_rows_ND, grad_weights[0], grad_weights[1], grad_weights[2]


@swiglu_loop_backward.register_fake
def _(grad_ND, rows_ND, w1_EFD, w2_EDF, w3_EFD, counts_E, gate_NF, up_NF, weights_need_grad):  # type: ignore[no-untyped-def]
    grads = [
        torch.empty_like(w) if weights_need_grad else w.new_empty(0)
        for w in (w1_EFD, w2_EDF, w3_EFD)
    ]
    return torch.empty_like(rows_ND), *grads
