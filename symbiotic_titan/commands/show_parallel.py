"""What a config's parallel layout costs one rank, without its GPUs: shapes, memory, bytes sent. A dry run on one CPU.

Examples: symbiotic show-parallel train_configs/30b_a3b.toml --ranks 8 64 256 --parallelism.expert_parallel_degree 8
          symbiotic show-parallel train_configs/30b_a3b.toml --ranks 64 --tflops 400 --network-gbps 400 --node-gbps 3600

What a run would refuse is refused here with the same message, except for what depends on its machine, which is listed at the end. With
--tflops, --network-gbps and --node-gbps the seconds of a step are computed from these speeds; nothing is measured.

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

from symbiotic_titan.build import global_batch_size, with_rows_of_rank
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.flops import ModelCost, model_cost
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.optim.ema import averaged_parameters
from symbiotic_titan.parallel import dry_run, dry_run_activations, dry_run_seconds
from symbiotic_titan.parallel.compile import checkpointing
from symbiotic_titan.parallel.parallelize import parallelize
from symbiotic_titan.parallel.ranks import parallel_dims_of
from symbiotic_titan.process import exit_status
from symbiotic_titan.sequence.modality import MODALITY_NAMES
from symbiotic_titan.training.checks import check_run

GIB = 2**30


@contextlib.contextmanager
def fake_rank(rank: int, num_ranks: int) -> Iterator[None]:
    """Make this process ``rank`` of a process group whose collectives do nothing."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meta_model(config: JobConfig, args: ModelArgs) -> SymbioticModel:
    """The model without memory for its weights."""
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        return SymbioticModel(args)


def parameters_of_rank(
    config: JobConfig, args: ModelArgs, rank: int, num_ranks: int
) -> tuple[list[dry_run.ShardedParameter], dict[str, int]]:
    """(parameters as ``rank`` holds them, degree of every mesh axis)."""
    with fake_rank(rank, num_ranks):
        dims = parallel_dims_of(config, num_ranks)
        model = parallelize(meta_model(config, args), dims, config)
        degrees = {
            "replicate": dims.dp_replicate,
            "shard": dims.dp_shard,
            "context": dims.cp,
            "expert": dims.ep,
            "expert shard": dims.dp_shard * dims.cp // dims.ep,
        }
        return dry_run.sharded_parameters(model), degrees


def step_traffic(
    config: JobConfig,
    args: ModelArgs,
    parameters: list[dry_run.ShardedParameter],
    precision: dry_run.Precision,
) -> dict[str, dry_run.Traffic]:
    """Stage -> traffic of one micro-batch."""
    recomputed = dry_run_activations.recomputed_blocks(checkpointing(config), args.num_layers)
    # Of groups with a top-k of their own the largest, as for activations: all tokens may be the group's.
    tokens = config.training.local_batch_size * config.training.seq_len
    copies = tokens // config.parallelism.context_parallel_degree * max(args.moe_args.top_ks)
    of_tokens = {
        f"layers.{layer}": dry_run.context_traffic(
            tokens,
            args.num_kv_heads * args.head_dim,
            config.parallelism.context_parallel_degree,
            precision,
            recomputed=again,
        )
        for layer, again in enumerate(
            dry_run_activations.regathered_blocks(checkpointing(config), args.num_layers)
        )
    }
    for layer in range(args.num_dense_layers, args.num_layers):
        of_tokens[f"layers.{layer}"] += dry_run.exchange_traffic(
            copies,
            args.dim,
            config.parallelism.expert_parallel_degree,
            precision,
            recomputed=recomputed[layer],
        )
    reshard = config.parallelism.fsdp_reshard_after_forward
    return dry_run.traffic_by_stage(parameters, precision, reshard, of_tokens)


def cost_of(config: JobConfig, args: ModelArgs) -> ModelCost:
    """The model's cost with input images of the configured size."""
    seen = config.data.seen_pixels
    patches = args.geometry.vit_budget(seen)[1] if seen else None
    return model_cost(meta_model(config, args), args, config.training.seq_len, patches)


def counts_first(config: JobConfig, micro_batches: int) -> bool:
    """Whether a first pass over all micro-batches counts the step's expert use."""
    return config.losses.balance_scope == "global" and micro_batches > 1


def seconds_of_step(
    config: JobConfig,
    args: ModelArgs,
    parameters: list[dry_run.ShardedParameter],
    once: dry_run.Traffic,
    micro_batches: int,
    speeds: dry_run_seconds.Speeds,
) -> dict[str, Any]:
    """Seconds of a step by what takes them; ``once``: traffic of one micro-batch."""
    precision = dry_run.Precision.of(config)
    recomputed = dry_run_activations.recomputed_blocks(checkpointing(config), args.num_layers)
    compute = dry_run_seconds.compute_of(config, args, cost_of(config, args), recomputed)
    parallelism = config.parallelism
    network = dry_run_seconds.fsdp_seconds(
        parameters,
        precision,
        parallelism.fsdp_reshard_after_forward,
        speeds,
        micro_batches,
        parallelism.fsdp_gradient_sync,
    )
    network += dry_run_seconds.exchange_seconds(once, parallelism.expert_parallel_degree, speeds)
    network += dry_run_seconds.context_seconds(once, parallelism.context_parallel_degree, speeds)
    step = dry_run_seconds.step_seconds(
        compute, network, micro_batches, speeds, counts_first=counts_first(config, micro_batches)
    )
    sums = {"fsdp_waits": step.fsdp_waits, "total": step.total}
    row = dict(zip(MODALITY_NAMES, dry_run_seconds.tokens_of_row(config), strict=True))
    return {"speeds": asdict(speeds), "tokens_of_a_row": row, **asdict(step), **sums}


def report(
    config: JobConfig, num_ranks: int, speeds: dry_run_seconds.Speeds | None = None
) -> dict[str, Any]:
    """Everything about one number of ranks, as plain values; seconds only at given ``speeds``.

    Raises:
        ValueError: what a run on that many ranks would refuse.
    """
    config = with_rows_of_rank(config, num_ranks)
    unchecked = check_run(config, num_ranks)
    args = model_args(config)
    parameters, degrees = parameters_of_rank(config, args, 0, num_ranks)
    last, _ = parameters_of_rank(config, args, num_ranks - 1, num_ranks)
    precision = dry_run.Precision.of(config)
    num_data_ranks = degrees["replicate"] * degrees["shard"]
    rows = config.training.local_batch_size * num_data_ranks
    micro_batches = global_batch_size(config, num_data_ranks) // rows
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
    gradient_sync = config.parallelism.fsdp_gradient_sync
    unsharded = 0
    if num_ranks > 1 and micro_batches > 1 and gradient_sync == "last":
        unsharded = dry_run.unsharded_gradients(parameters, precision)
    once = sum(traffic.values(), dry_run.Traffic())
    step = once.of_step(micro_batches, gradient_sync)
    if counts_first(config, micro_batches):
        step += once.forward * micro_batches
    values = {
        "ranks": num_ranks,
        "rows_at_once": config.training.local_batch_size,
        "mesh": degrees,
        "micro_batches": micro_batches,
        "parameters": dry_run.shape_rows(parameters),
        "last_rank_parameters": sum(prod(p.local) for p in last),
        "state": asdict(state),
        "gathered": {**asdict(gathered), "unsharded_gradients": unsharded},
        "activations": {**asdict(activations), "peak": activations.peak},
        "total": on_device + unsharded,
        "traffic_of_a_micro_batch": dry_run.traffic_rows(traffic),
        "traffic_of_a_step": {**asdict(step), "total": step.total},
        "not_checked": unchecked,
    }
    if speeds is not None:
        values["seconds_of_a_step"] = seconds_of_step(
            config, args, parameters, once, micro_batches, speeds
        )
    return values


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
    batch = f"{values['micro_batches']} micro-batches of {values['rows_at_once']} rows a step"
    print(f"\n== {values['ranks']} ranks: {mesh}; {batch}\n")
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
    if "seconds_of_a_step" in values:
        print_seconds(values["seconds_of_a_step"])


def print_seconds(values: dict[str, Any]) -> None:
    """The seconds of a step, with the speeds and the rows that they are computed for."""
    at, row = values["speeds"], values["tokens_of_a_row"]
    print(
        f"\nSeconds of a step at {at['tflops']:g} TFLOP/s, {at['network_gbps']:g} Gbit/s to other nodes and {at['node_gbps']:g} Gbit/s "
        f"inside a node of {at['ranks_per_node']} ranks (as given, not measured); a row of "
        + ", ".join(f"{n} {modality}" for modality, n in row.items())
    )
    for what, remark in (
        ("compute", "matrix products and attention, recomputation included"),
        ("fsdp", f"beside the computation, but for {values['fsdp_waits']:.3f}"),
        ("exchange", "all-to-alls; nothing runs beside them"),
        ("context", "keys and values; nothing runs beside them"),
    ):
        forward, backward = values[f"{what}_forward"], values[f"{what}_backward"]
        print(f"  {what:10s} forward {forward:8.3f}  backward {backward:8.3f}  {remark}")
    print(f"  together   {values['total']:.3f}")


def speeds_of(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> dry_run_seconds.Speeds | None:
    """The speeds that were given; ends the program where some are missing, or do not fit the ranks."""
    given = {name: getattr(options, name) for name in ("tflops", "network_gbps", "node_gbps")}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    for name in (*given, "ranks_per_node"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value:g}: must be positive and finite")
    if len(missing) == len(given):
        return None
    if missing:
        parser.error(
            f"seconds need three speeds, {' and '.join(missing)} missing; give all of them, or none for bytes alone"
        )
    for ranks in options.ranks:
        if ranks > options.ranks_per_node and ranks % options.ranks_per_node:
            parser.error(
                f"--ranks {ranks}: must fill nodes of --ranks-per-node {options.ranks_per_node}; choose a multiple of it"
            )
    return dry_run_seconds.Speeds(**given, ranks_per_node=options.ranks_per_node)


def run(
    options: argparse.Namespace, overrides: list[str], speeds: dry_run_seconds.Speeds | None
) -> None:
    """Raises ValueError for a user's mistake."""
    config = load_job_config(["--job.config_file", options.config, *overrides])
    reports = [report(config, num_ranks, speeds) for num_ranks in options.ranks]
    for values in reports:
        print_report(values)
    print(f"\nActivations are an estimate. {dry_run_activations.FORMULA}")
    print(
        f"\nNot checked, as it depends on the run's machine: {'; '.join(reports[0]['not_checked'])}"
    )
    if options.json:
        print(json.dumps({"config": options.config, "reports": reports}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="TOML file of a training config")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="numbers of ranks")
    rates = parser.add_argument_group("speeds, of one rank, for the seconds of a step")
    rates.add_argument("--tflops", type=float, help="10^12 operations a second in matrix products")
    rates.add_argument("--network-gbps", type=float, help="10^9 bits a second to other nodes")
    rates.add_argument("--node-gbps", type=float, help="10^9 bits a second inside a node")
    rates.add_argument("--ranks-per-node", type=int, default=8, help="ranks of a node")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options, overrides = parser.parse_known_args(arguments)
    if min(options.ranks) < 1:
        parser.error(f"--ranks {min(options.ranks)}: must be at least 1")
    speeds = speeds_of(options, parser)
    return exit_status(lambda: run(options, overrides, speeds))
