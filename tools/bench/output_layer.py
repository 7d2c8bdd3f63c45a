#!/usr/bin/env python3
"""The output layer with its loss, forward and backward: logits where there are labels, and the loss in chunks.

    tools/bench/output_layer.py --vocab 320 151936 --dtype float32 bfloat16

``all_plain``   logits of all tokens, and the loss by its plain formula, which copies them to float32.
``all``         logits of all tokens, and the loss in chunks.
``labelled``    logits of labelled tokens, and the loss in chunks: what the trainer does.

Prints milliseconds, peak memory of the tensors that a step makes (MiB; their gradients are among them), ratios of time within a round
and, last, one JSON line.
"""

import argparse
import json
import weakref
from collections.abc import Callable
from typing import Any

import bench_timing as timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from symbiotic_titan.device import device_type
from symbiotic_titan.losses.terms import label_index, plain_text_errors, text_errors
from symbiotic_titan.sequence.modality import IGNORE_INDEX


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still in use: now, and at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}  # of each storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._live:
            self._live[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, storage._cdata)
            self.peak = max(self.peak, sum(self._live.values()))


def peak_mib(run: Callable[[], object]) -> float:
    """Peak memory of ``run`` beyond what was in use before it."""
    if not torch.cuda.is_available():
        with LiveTensors() as live:
            run()
        return round(live.peak / 2**20, 1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def contenders(
    vocab_size: int, dim: int, length: int, share: float, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], tuple[Tensor, Tensor]]:
    """The contenders, and the tokens and the weight that they give a gradient. Each returns the summed loss of the same tokens."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(length, dim, generator=generator).to(device_type(), dtype).requires_grad_()
    w_VD = (torch.randn(vocab_size, dim, generator=generator) / dim**0.5).to(device_type(), dtype)
    w_VD.requires_grad_()
    labels_N = torch.randint(vocab_size, (length,), generator=generator)
    labels_N[torch.rand(length, generator=generator) >= share] = IGNORE_INDEX
    index_N = label_index(labels_N).to(device_type())
    labels_N = labels_N.to(device_type())

    def step(errors_of: Callable[[Tensor, Tensor], Tensor], where_N: Tensor | None) -> Tensor:
        x_ND.grad = w_VD.grad = None
        rows_ND = x_ND if where_N is None else x_ND.index_select(0, where_N)
        labels = labels_N if where_N is None else labels_N[where_N]
        loss = errors_of(F.linear(rows_ND, w_VD), labels).sum()
        loss.backward()
        return loss.detach()

    runs = {
        "all_plain": lambda: step(plain_text_errors, None),
        "all": lambda: step(text_errors, None),
        "labelled": lambda: step(text_errors, index_N),
    }
    return runs, (x_ND, w_VD)


def measure(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, object]:
    times = timing.interleave(runs, repeats=repeats, warmup=1)
    return {
        "milliseconds": {name: timing.summary(seconds) for name, seconds in times.items()},
        "peak_mib": {name: peak_mib(run) for name, run in runs.items()},
        "speedup": {n: round(timing.ratio(times, "all_plain", n), 2) for n in ("all", "labelled")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[320, 151936])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--share", type=float, default=0.45, help="of tokens with a label")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    results: dict[str, object] = {}
    for vocab_size in args.vocab:
        for name in args.dtype:
            runs, _ = contenders(
                vocab_size, args.dim, args.length, args.share, getattr(torch, name)
            )
            result = results[f"{vocab_size}_{name}"] = measure(runs, args.repeats)
            print(f"vocabulary {vocab_size}, {name}: {result}")
    print(json.dumps({"results": results, **timing.machine()}))


if __name__ == "__main__":
    main()
