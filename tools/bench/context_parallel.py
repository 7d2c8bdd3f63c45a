"""What context parallelism saves: memory of a rank, for one long sequence that 1, 2, 4, ... ranks share.

    tools/bench/context_parallel.py train_configs/debug.toml --seq-len 8192 --degrees 1 2 4

The real trainer runs on the config's data, one row a step, without checkpoints, logs, validation and sample grids; options of the
config may follow. Of the rank that needs most:

  saved_mib  bytes of the tensors that autograd holds between the forward and the backward of the last step, weights not counted
  rss_mib    peak resident memory of the process above that of a rank which has built its trainer and taken no step
  state_mib  its shard of weights and gradients, and of the optimizer's moments
  losses     of all steps, to be the same for every degree; the table has the last one

Ranks share this machine, so seconds would say nothing about several machines and are not measured. A table, then one JSON line.
"""

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_timing import machine
from step_child import load_config, make_trainer, note_steps, register, stepper

MIB = 2**20


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """A list that gets, at the end, the bytes of the distinct memory that autograd saves, without that of the weights."""
    weights = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
    # Held until the end, so that no address is used for two tensors.
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    result: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result.append(sum(storage.nbytes() for storage in held.values()))


def local(tensor: torch.Tensor) -> torch.Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def state_bytes(trainer: Any) -> int:
    """This rank's weights, gradients and moments of the optimizer."""
    parts = [p for p in trainer.model_parts[0].parameters()]
    tensors = [*parts, *(p.grad for p in parts if p.grad is not None)]
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(local(tensor).nbytes for tensor in tensors)


def rank_main(rank: int, options: dict[str, Any]) -> None:
    """One rank of a degree: takes the steps and writes its figures to a file of its own."""
    from symbiotic_titan.device import process_memory_bytes

    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options["degree"])}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options["port"]))
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options["config"], folder, options["steps"], options["overrides"])
        note_steps(trainer, lambda values, grad_norm: losses.append(values["total"]))
        step = stepper(trainer)
        before = process_memory_bytes()
        for _ in range(options["steps"] - 1):
            step()
        rss = process_memory_bytes() - before
        with saved_bytes(trainer.model_parts[0]) as saved:
            step()
        figures = {
            "saved_mib": saved[0] / MIB,
            "rss_mib": rss / MIB,
            "state_mib": state_bytes(trainer) / MIB,
            "losses": losses,
        }
        (Path(options["out"]) / f"{rank}.json").write_text(json.dumps(figures))
        trainer.close()


def measure(degree: int, options: dict[str, Any]) -> dict[str, Any]:
    """The largest figures of the ranks of one degree, and the losses, which all of them know."""
    with tempfile.TemporaryDirectory() as out:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        overrides = [*options["overrides"], "--parallelism.context_parallel_degree", str(degree)]
        task = {**options, "out": out, "overrides": overrides, "degree": degree, "port": port}
        # Forked: what this process has imported is not imported again.
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=rank_main, args=(rank, task)) for rank in range(degree)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise SystemExit(f"context_parallel.py: degree {degree} failed, see above")
        figures = [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))]
    return {key: max(rank[key] for rank in figures) for key in figures[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="TOML file of a training config")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of the sequence")
    parser.add_argument(
        "--degrees", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps; the last one is measured")
    options, overrides = parser.parse_known_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: must be at least 2, the last one is measured alone")
    rows = ["--training.local_batch_size", "1", "--training.global_batch_size", "1"]
    overrides = [*rows, "--training.seq_len", str(options.seq_len), *overrides]
    register()
    torch.set_num_threads(1)  # no pool of threads yet, which would not survive the fork
    for degree in options.degrees:
        os.environ["WORLD_SIZE"] = str(degree)
        degree_of = ["--parallelism.context_parallel_degree", str(degree)]
        try:
            load_config(options.config, "unused", options.steps, [*overrides, *degree_of])
        except ValueError as error:
            parser.error(str(error))
    task = {"config": options.config, "steps": options.steps, "overrides": overrides}
    results = {degree: measure(degree, task) for degree in options.degrees}
    columns = list(next(iter(results.values())))
    print(f"{options.config}, one sequence of {options.seq_len} tokens")
    print("degree" + "".join(f"{column:>12s}" for column in columns))
    for degree, figures in results.items():
        row = [*(figures[column] for column in columns[:-1]), figures["losses"][-1]]
        print(f"{degree:6d}" + "".join(f"{number:12.4f}" for number in row))
    first = results[options.degrees[0]]
    summary = {
        **machine(),
        "seq_len": options.seq_len,
        "saved_share": {
            d: round(f["saved_mib"] / first["saved_mib"], 3) for d, f in results.items()
        },
        "largest_loss_difference": max(
            abs(ours / alone - 1)
            for figures in results.values()
            for ours, alone in zip(figures["losses"], first["losses"], strict=True)
        ),
        "degrees": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
