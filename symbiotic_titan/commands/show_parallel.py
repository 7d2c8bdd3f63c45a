"""What a config's parallel layout costs one rank, without its GPUs: shapes, memory, bytes sent. A dry run on one CPU.

Example: symbiotic show-parallel train_configs/30b_a3b.toml --ranks 8 64 256 --parallelism.expert_parallel_degree 8

The model is built on the meta device and made parallel by the trainer's own function, over a process group in which nothing is
sent; rank 0's shards are counted and the last rank's are compared with them. Weights, gradients and optimizer states are
exact, bytes sent assume even routing and gathers in the dtype of the computation (not float8), activations are an estimate
whose formula is printed. With training.enable_cpu_offload the state is the host's and not in the sum.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype

from symbiotic_titan.build import global_batch_size
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.optim.ema import averaged_parameters
from symbiotic_titan.parallel import dry_run, dry_run_activations
from symbiotic_titan.parallel.parallelize import parallelize
from symbiotic_titan.parallel.ranks import parallel_dims_of
from symbiotic_titan.process import exit_status
from symbiotic_titan.training.checks import check_parallelism

GIB = 2**30


@contextlib.contextmanager
def fake_rank(rank: int, num_ranks: int) -> Iterator[None]:
    """Make this process ``rank`` of a process group whose collectives do nothing."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parameters_of_rank(
    config: JobConfig, args: ModelArgs, rank: int, num_ranks: int
) -> tuple[list[dry_run.ShardedParameter], dict[str, int]]:
    """(parameters as ``rank`` holds them, degree of every mesh axis)."""
    with fake_rank(rank, num_ranks):
        dims = parallel_dims_of(config, num_ranks)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = SymbioticModel(args)
        parallelize(model, dims, config)
        degrees = {
            "replicate": dims.dp_replicate,
            "shard": dims.dp_shard,
            "expert": dims.ep,
            "expert shard": dims.dp_shard // dims.ep,
        }
        return dry_run.sharded_parameters(model), degrees


def step_traffic(
    config: JobConfig,
    args: ModelArgs,
    parameters: list[dry_run.ShardedParameter],
    precision: dry_run.Precision,
) -> dict[str, dry_run.Traffic]:
    """Stage -> traffic of one micro-batch."""
    recomputed = dry_run_activations.recomputed_blocks(
        config.activation_checkpoint, args.num_layers
    )
    # Of groups with a top-k of their own the largest, as for activations: all tokens may be the group's.
    copies = config.training.local_batch_size * config.training.seq_len * max(args.moe_args.top_ks)
    exchanges = {
        f"layers.{layer}": dry_run.exchange_traffic(
            copies,
            args.dim,
            config.parallelism.expert_parallel_degree,
            precision,
            recomputed=recomputed[layer],
        )
        for layer in range(args.num_dense_layers, args.num_layers)
    }
    reshard = config.parallelism.fsdp_reshard_after_forward
    return dry_run.traffic_by_stage(parameters, precision, reshard, exchanges)


def report(config: JobConfig, num_ranks: int) -> dict[str, Any]:
    """Everything about one number of ranks, as plain values."""
    args = model_args(config)
    check_parallelism(config, args, num_ranks)
    parameters, degrees = parameters_of_rank(config, args, 0, num_ranks)
    last, _ = parameters_of_rank(config, args, num_ranks - 1, num_ranks)
    precision = dry_run.Precision.of(config)
    rows = config.training.local_batch_size * num_ranks
    micro_batches = global_batch_size(config, num_ranks) // rows
    traffic = step_traffic(config, args, parameters, precision)
    averaged = averaged_parameters([p.name for p in parameters], config).values()
    state = dry_run.state_memory(parameters, precision, {n for names in averaged for n in names})
    gathered = dry_run.gathered_memory(
        parameters, precision, config.parallelism.fsdp_reshard_after_forward
    )
    activations = dry_run_activations.activation_memory(
        config, args, precision, expert_parallel=degrees["expert"] > 1
    )
    on_device = gathered.peak + gathered.unit_gradients + activations.peak
    if not config.training.enable_cpu_offload:
        on_device += state.total
    once = sum(traffic.values(), dry_run.Traffic())
    if config.losses.balance_scope == "global" and micro_batches > 1:
        once += once.forward  # a first pass counts the step's expert use
    step = once * micro_batches
    return {
        "ranks": num_ranks,
        "mesh": degrees,
        "micro_batches": micro_batches,
        "parameters": dry_run.shape_rows(parameters),
        "last_rank_parameters": sum(prod(p.local) for p in last),
        "state": asdict(state),
        "gathered": asdict(gathered),
        "activations": {**asdict(activations), "peak": activations.peak},
        "total": on_device,
        "traffic_of_a_micro_batch": dry_run.traffic_rows(traffic),
        "traffic_of_a_step": {**asdict(step), "total": step.total},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = [isinstance(value, (int, float)) for value in rows[0].values()]
    for line in cells:
        padded = (
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        )
        print("  " + "  ".join(padded).rstrip())


def cell(value: Any) -> str:
    """Floats are GiB."""
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def in_gib(values: dict[str, Any], unchanged: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        key: value / GIB if isinstance(value, int) and key not in unchanged else value
        for key, value in values.items()
    }


def print_report(values: dict[str, Any]) -> None:
    mesh = ", ".join(f"{name} {degree}" for name, degree in values["mesh"].items())
    print(f"\n== {values['ranks']} ranks: {mesh}; {values['micro_batches']} micro-batches a step\n")
    print_table(values["parameters"])
    kept = sum(prod(row["local"]) * row["count"] for row in values["parameters"])
    print(f"\n  rank 0 keeps {kept:,} parameters, the last rank {values['last_rank_parameters']:,}")
    gathered = in_gib(values["gathered"])
    print(f"\nMemory of a rank, GiB; the largest FSDP unit is {gathered.pop('unit')}")
    for title in ("state", "gathered", "activations"):
        parts = in_gib(values[title]) if title != "gathered" else gathered
        print(f"  {title:12s}" + "  ".join(f"{name} {cell(size)}" for name, size in parts.items()))
    print(f"  together    {cell(values['total'] / GIB)}")
    print("\nSent by a rank in one micro-batch, GiB each")
    print_table([in_gib(row, ("count",)) for row in values["traffic_of_a_micro_batch"]])
    step = in_gib(values["traffic_of_a_step"])
    print("  in a step: " + "  ".join(f"{name} {cell(size)}" for name, size in step.items()))


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raises ValueError for a user's mistake."""
    config = load_job_config(["--job.config_file", options.config, *overrides])
    reports = [report(config, num_ranks) for num_ranks in options.ranks]
    for values in reports:
        print_report(values)
    print(f"\nActivations are an estimate. {dry_run_activations.FORMULA}")
    if options.json:
        print(json.dumps({"config": options.config, "reports": reports}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="TOML file of a training config")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="numbers of ranks")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options, overrides = parser.parse_known_args(arguments)
    return exit_status(lambda: run(options, overrides))
