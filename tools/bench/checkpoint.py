#!/usr/bin/env python3
"""What the digests of a checkpoint cost: seconds of a save, and of a load from the disk, with and without them.

Example: tools/bench/checkpoint.py --gigabytes 1 --scratch outputs/bench_checkpoint

A state of --gigabytes in tensors of 64 MB is saved and loaded by one process, the contenders in turn. A save ends when the bytes are on
the disk; before a load they leave the page cache. --scratch must have room for twice the gigabytes and is removed.

save_s, load_s              medians of seconds; ``plain`` is torch's writer, ``digests`` ours; ``verified`` reads the files for their
                            digests first, as a run does before it starts
save_over, load_over        median over the rounds of with / without
hash_gb_per_s               of hash functions in Python's standard library, on one core
share_of_training           seconds that digests add to a save of --run-gigabytes a rank, over those of the steps between two saves:
                            --interval steps of --step-seconds, by default those of train_configs/debug.toml on 2 cores. Asynchronous
                            saves take them from a thread beside the training

The last line is JSON.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from bench_timing import interleave, machine, ratio
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from symbiotic_titan.weights.digests import DigestingWriter, read_sums, wrong_file

TENSOR_BYTES = 64 << 20


def state_of(gigabytes: float) -> dict[str, Tensor]:
    size = max(1, int(gigabytes * 1e9 / TENSOR_BYTES))
    values = min(TENSOR_BYTES, int(gigabytes * 1e9)) // 4
    return {f"t{number}": torch.randn(values) for number in range(size)}


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Without torch's warnings that a single process saves, and over what is there, which are intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save(state: dict[str, Tensor], writer: FileSystemWriter) -> None:
    with single_process():
        dcp.save(state, storage_writer=writer, no_dist=True)


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path, state: dict[str, Tensor], *, verified: bool) -> None:
    forget(folder)
    if verified:
        sums = read_sums(folder) or {}
        damage = wrong_file(folder, sums, sums)
        assert damage is None, damage
    with single_process():
        dcp.load(state, checkpoint_id=folder, no_dist=True)


def rates() -> dict[str, float]:
    """GB/s of the hash functions in Python's standard library, on one core; the best of three."""
    data = os.urandom(64 << 20)
    functions: dict[str, Callable[[], object]] = {
        "sha256": lambda: hashlib.sha256(data),
        "blake2b": lambda: hashlib.blake2b(data),
        "sha1": lambda: hashlib.sha1(data),
        "crc32": lambda: zlib.crc32(data),
    }
    times = interleave(functions, repeats=3, warmup=1)
    return {name: round(len(data) / min(seconds) / 1e9, 2) for name, seconds in times.items()}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(median(seconds), 3) for name, seconds in times.items()}


def measure(folder: Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    state = state_of(gigabytes)
    plain, digests = folder / "plain", folder / "digests"
    saves = interleave(
        {
            "plain": lambda: save(state, FileSystemWriter(plain)),
            "digests": lambda: save(state, DigestingWriter(digests)),
        },
        repeats=repeats,
        warmup=1,
    )
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    loads = interleave(
        {
            "plain": lambda: load(digests, loaded, verified=False),
            "verified": lambda: load(digests, loaded, verified=True),
        },
        repeats=repeats,
        warmup=1,
    )
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    return {
        "save_s": medians(saves),
        "save_over": round(ratio(saves, "digests", "plain"), 3),
        "load_s": medians(loads),
        "load_over": round(ratio(loads, "verified", "plain"), 3),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the state (default 1)")
    parser.add_argument("--scratch", type=Path, required=True, help="folder to make and remove")
    parser.add_argument("--repeats", type=int, default=10, help="rounds that count (default 10)")
    parser.add_argument("--interval", type=int, default=100, help="steps between two saves")
    parser.add_argument("--step-seconds", type=float, default=0.2)
    parser.add_argument("--run-gigabytes", type=float, default=0.0176, help="that a rank saves")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.gigabytes <= 0:
        parser.error("--repeats must be at least 1 and --gigabytes positive")
    if options.scratch.exists():
        parser.error(f"--scratch: {options.scratch} exists and is not removed; name another folder")
    options.scratch.mkdir(parents=True)
    try:
        found = measure(options.scratch, options.gigabytes, options.repeats)
    finally:
        shutil.rmtree(options.scratch)
    added = (found["save_s"]["digests"] - found["save_s"]["plain"]) / options.gigabytes
    between = options.interval * options.step_seconds
    found |= {
        "gigabytes": options.gigabytes,
        "share_of_training": round(added * options.run_gigabytes / between, 6),
        "hash_gb_per_s": rates(),
    }
    print(json.dumps({**machine(), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
