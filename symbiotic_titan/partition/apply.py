"""Partitioning a checkpoint: a model with one pool of experts -> the same model with its experts in groups, tensor by tensor.

Experts keep their weights, router rows and selection biases, so the output is unchanged for a token whose top-k experts are all in
its group (arXiv 2604.07753, "knowledge-inherited initialisation"). Peak memory is two to three times the largest tensor.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from symbiotic_titan.config.experts import ExpertGroupRow
from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.hf.release_files import (
    copy_release_files,
    release_files_bytes,
)
from symbiotic_titan.model import model_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.initialize import initialize
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.conversion import (
    Conversion,
    Slots,
    plan_conversion,
)
from symbiotic_titan.partition.plan import (
    Plan,
    check_layers,
    check_sources_named,
    whole_pools_plan,
    without_sizes,
)
from symbiotic_titan.partition.pools import (
    ONE_POOL,
    group_sources,
    pool_sizes,
    pool_widths,
)
from symbiotic_titan.partition.profile import ModelIdentity, router_hash
from symbiotic_titan.weights.compatibility import (
    part_of,
    tensors_of_model,
)
from symbiotic_titan.weights.dcp import write_model
from symbiotic_titan.weights.new_folder import check_target
from symbiotic_titan.weights.reader import (
    CheckpointReader,
    ProgressCallback,
    no_progress,
    reporting_progress,
)

KIND = "partitioned checkpoint"
RECORD = "conversion.json"

Rows = Mapping[str, ExpertGroupRow]


def check_plan(plan: Plan, reader: CheckpointReader, args: ModelArgs, rows: Rows) -> None:
    """Pass if ``plan`` makes the groups of ``args`` from the checkpoint.

    Raises:
        ValueError: it has no effect, or was made for other groups or from another model.
    """
    pools = pool_sizes(reader.tensors)
    if _is_one_pool(args) and not plan.shared.shape[1]:
        raise ValueError(
            "--plan has no effect: the config has no [experts.partition] and no experts.new_shared_experts; leave it out or use "
            "another config"
        )
    if plan.groups != without_sizes(args.groups):
        raise ValueError(
            f"the plan is of other groups than the config: it has {_describe(plan.groups)}, "
            f"[experts.partition] has {_describe(args.groups)}; make a plan with this config"
        )
    _check_sources_named(reader, pools, rows)
    if plan.model.routers != router_hash(reader):
        raise ValueError(
            f"the plan is of another model: its routers have hash {plan.model.routers} (flavor {plan.model.flavor}, step "
            f"{plan.model.step}), those of {reader.folder} {router_hash(reader)}; profile this checkpoint"
        )
    sources = group_sources(args.groups, pools, rows)
    if plan.sources != sources:
        pairs = zip(args.groups, plan.sources, sources, strict=True)
        name, has, needs = next((g.name, a, b) for g, a, b in pairs if a != b)
        raise ValueError(
            f"the plan takes the group {name!r} from {has.pool!r} with copy = {str(has.copy).lower()}, experts.partition.{name} from "
            f"{needs.pool!r} with copy = {str(needs.copy).lower()}; make a plan with this config"
        )


def plan_without_profile(reader: CheckpointReader, args: ModelArgs, rows: Rows) -> Plan | None:
    """The plan of groups that each take all experts of a group of the checkpoint; None where its groups stay as they are.

    Raises:
        ValueError: groups divide the experts, so that a plan must be given.
    """
    pools = pool_sizes(reader.tensors)
    if not rows and pools.keys() == {group.name for group in args.groups}:
        return None
    _check_sources_named(reader, pools, rows)
    if _is_one_pool(args):
        return None
    identity = ModelIdentity("", reader.step, router_hash(reader), pools, args.top_k)
    layers = dict.fromkeys(name.split(".moe.")[0] for name in reader.tensors if ".moe." in name)
    sources = group_sources(args.groups, pools, rows)
    plan = whole_pools_plan(identity, args.groups, tuple(layers), sources)
    if plan is None:
        raise ValueError(
            "the config partitions the experts: --plan must say which expert goes where (symbiotic convert plan makes one)"
        )
    return plan


def _check_sources_named(reader: CheckpointReader, pools: Iterable[str], rows: Rows) -> None:
    remedy = "start from the checkpoint before that"
    check_sources_named(f"checkpoint {reader.folder} is already", pools, rows, remedy)


def _is_one_pool(args: ModelArgs) -> bool:
    return [group.name for group in args.groups] == [ONE_POOL]


def expert_slots(plan: Plan) -> Slots:
    """What each group takes in each layer."""
    return {
        (layer, group.name): (source.pool, None if whole else tuple(order_YE[i].tolist()))
        for group, source, order_YE in plan.by_group()
        for i, layer in enumerate(plan.layers)
        for whole in [order_YE[i].tolist() == list(range(plan.model.groups[source.pool]))]
    }


def check_widths(reader: CheckpointReader, args: ModelArgs, plan: Plan) -> None:
    """Pass if every group has the width of the experts that it takes.

    Raises:
        ValueError: one has another.
    """
    widths, several = pool_widths(reader.tensors), len(plan.model.groups) > 1
    sizes = zip(args.groups, plan.sources, args.moe_args.hidden_dims, strict=True)
    for group, source, hidden_dim in sizes:
        # One pool with a width unlike the flavor's is another model; that is said of all tensors at once.
        chosen = several or group.hidden_dim is not None
        if chosen and hidden_dim != widths[source.pool]:
            raise ValueError(
                f"experts.partition.{group.name}.hidden_dim: a group has the width of the experts that it takes, "
                f"{widths[source.pool]} in the checkpoint's group {source.pool!r}, got {hidden_dim}; set it to {widths[source.pool]}"
            )


def shared_sources(plan: Plan | None, args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Layer -> original experts that its new shared expert is made from; empty where the plan makes none.

    Raises:
        ValueError: the model's shared expert has another width.
    """
    if plan is None or not plan.shared.shape[1]:
        return {}
    number = plan.shared.shape[1]
    if number * args.expert_hidden_dim != args.shared_hidden_dim:
        raise ValueError(
            f"the plan makes a shared expert {number} times a routed expert's width, the config's model has one of "
            f"{args.shared_hidden_dim / args.expert_hidden_dim:g} times; set experts.new_shared_experts = {number}, or make a plan "
            "with this config"
        )
    return {layer: tuple(row.tolist()) for layer, row in zip(plan.layers, plan.shared, strict=True)}


def _describe(groups: tuple[ExpertGroup, ...]) -> str:
    return " + ".join(f"{group.name} {group.num_experts}" for group in groups)


def partition_checkpoint(
    source: Path,
    args: ModelArgs,
    plan: Plan | None,
    out: Path,
    *,
    rows: Rows | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> Conversion:
    """Write the model ``args``, made from the checkpoint ``source``, as a checkpoint without training state.

    With one pool of experts, it copies the model (without its shared expert, if ``args`` have none). ``rows``: the config's
    [experts.partition], which say what the groups take where the checkpoint has several.

    Raises:
        ValueError: ``source`` cannot become this model, the plan belongs to another model, or ``out`` exists.
    """
    check_target(out, overwrite=overwrite)
    reader = open_model(source)
    if plan is None:
        plan = plan_without_profile(reader, args, rows or {})
    else:
        check_plan(plan, reader, args, rows or {})
    slots: Slots = {}
    if plan is not None and not _is_one_pool(args):
        check_widths(reader, args, plan)
        slots = expert_slots(plan)
    with torch.device("meta"):
        model = SymbioticModel(args)
    target = tensors_of_model(model)
    if plan is not None:
        check_layers(plan, {name.split(".moe.")[0] for name in target if ".moe." in name})
    conversion = plan_conversion(reader.tensors, target, slots, shared_sources(plan, args))
    values = _Values(reader, conversion, _initial_values(model, args, conversion))

    def finish(folder: Path) -> None:
        record = {
            "source": str(source),
            "step": reader.step,
            "plan": None if plan is None else plan.values(),
            "parameters": conversion.totals(),
            "tensors": conversion.rows(),
        }
        write_json(folder / RECORD, KIND, record)
        model_config.write_model_config(folder / model_config.FILE_NAME, args)
        copy_release_files(reader, folder)

    write_model(
        out,
        conversion.after,
        reporting_progress(values, conversion.after, progress),
        finish,
        finish_bytes=release_files_bytes(reader),
        overwrite=overwrite,
    )
    return conversion


def plan_of_checkpoint(folder: Path) -> Plan | None:
    """The plan that a checkpoint was partitioned with; None if its experts are one pool or no record of the partition exists."""
    if not (folder / RECORD).is_file():
        return None
    plan = read_json(folder / RECORD, KIND, ("plan",))["plan"]
    return None if plan is None else Plan.of_values(plan, str(folder / RECORD))


def check_original(checkpoint: Path, original: Path) -> None:
    """Pass if ``checkpoint`` was partitioned from ``original``, or has no record of what it was made from.

    Raises:
        ValueError: it was made from a model with other routers.
    """
    plan = plan_of_checkpoint(checkpoint)
    if plan is None:
        return
    found = router_hash(open_model(original))
    if plan.model.routers != found:
        raise ValueError(
            f"the plan of {checkpoint} is of another model: its routers have hash {plan.model.routers} (flavor "
            f"{plan.model.flavor}, step {plan.model.step}), those of {original} {found}; name with --original what the checkpoint "
            "was made from"
        )


def _initial_values(
    model: SymbioticModel, args: ModelArgs, conversion: Conversion
) -> dict[str, Tensor]:
    """Initial values of the new tensors, by name; the rest of ``model`` stays on the meta device."""
    new = {
        n for n, origin in conversion.origins.items() if origin.kind == "new" and not origin.zeros
    }
    for part in {part_of(name) for name in new}:
        model.get_submodule(part).to_empty(device="cpu")
    initialize(model, seed=args.init_seed, only=new)
    state = model.state_dict()
    return {name: state[name] for name in new}


class _Values:
    """Values of the new checkpoint's tensors. The old tensor read last is cached, because the next new ones are usually slices of it
    too."""

    def __init__(
        self, reader: CheckpointReader, conversion: Conversion, initial: Mapping[str, Tensor]
    ) -> None:
        self._reader = reader
        self._conversion = conversion
        self._initial = initial
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        origin, spec = self._conversion.origins[name], self._conversion.after[name]
        if origin.zeros:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        if origin.name is None:
            return self._initial[name].to(spec.dtype)
        if origin.experts is None:
            return self._reader.read(origin.name)
        if self._last is None or self._last[0] != origin.name:
            self._last = None  # freed before the next is read
            self._last = (origin.name, self._reader.read(origin.name))
        taken = self._last[1][list(origin.experts)]
        return taken.flatten(0, 1) if origin.joined else taken
