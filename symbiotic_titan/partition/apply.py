"""Partitioning a checkpoint: a model with one pool of experts -> the same model with its experts in groups, tensor by tensor.

Experts keep their weights, router rows and selection biases, so the output is unchanged for a token whose top-k experts are all in
its group (arXiv 2604.07753, "knowledge-inherited initialisation"). Peak memory is two to three times the largest tensor.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
    plan_conversion,
)
from symbiotic_titan.partition.plan import (
    Plan,
    check_layers,
)
from symbiotic_titan.partition.profile import router_hash
from symbiotic_titan.weights.compatibility import (
    part_of,
    router_groups,
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


def expert_slots(
    plan: Plan | None, groups: tuple[ExpertGroup, ...]
) -> dict[tuple[str, str], tuple[int, ...]]:
    """(layer, group) -> original experts; empty for one pool.

    Raises:
        ValueError: the plan is missing, has no effect, or was made for other groups.
    """
    one_pool = [group.name for group in groups] == ["all"]
    if one_pool and plan is None:
        return {}
    if one_pool and plan is not None and not plan.shared.shape[1]:
        raise ValueError(
            "--plan has no effect: the config has no [experts.partition] and no experts.new_shared_experts; leave it out or use "
            "another config"
        )
    if plan is None:
        raise ValueError(
            "the config partitions the experts: --plan must say which expert goes where (symbiotic convert plan makes one)"
        )
    if plan.groups != groups:
        raise ValueError(
            f"the plan is of other groups than the config: it has {_describe(plan.groups)}, "
            f"[experts.partition] has {_describe(groups)}; make a plan with this config"
        )
    if one_pool:
        return {}
    sizes = [group.num_experts for group in groups]
    return {
        (layer, group.name): tuple(experts.tolist())
        for layer, row in zip(plan.layers, plan.order, strict=True)
        for group, experts in zip(groups, row.split(sizes), strict=True)
    }


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


def _check_source(reader: CheckpointReader, plan: Plan | None) -> None:
    groups = router_groups(reader.tensors)
    if groups - {"all"}:
        raise ValueError(
            f"checkpoint {reader.folder} is already partitioned into {', '.join(sorted(groups))}; "
            "start from the checkpoint before that"
        )
    if plan is not None and plan.model.routers != router_hash(reader):
        raise ValueError(
            f"the plan is of another model: its routers have hash {plan.model.routers} (flavor {plan.model.flavor}, step "
            f"{plan.model.step}), those of {reader.folder} {router_hash(reader)}; profile this checkpoint"
        )


def partition_checkpoint(
    source: Path,
    args: ModelArgs,
    plan: Plan | None,
    out: Path,
    *,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> Conversion:
    """Write the model ``args``, made from the checkpoint ``source``, as a checkpoint without training state.

    With one pool of experts, it copies the model (without its shared expert, if ``args`` have none).

    Raises:
        ValueError: ``source`` cannot become this model, the plan belongs to another model, or ``out`` exists.
    """
    check_target(out, overwrite=overwrite)
    reader = open_model(source)
    slots = expert_slots(plan, args.groups)
    _check_source(reader, plan)
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
