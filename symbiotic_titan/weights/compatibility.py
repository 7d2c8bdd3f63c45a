"""Compatibility of a stored model with the model that a config describes."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from symbiotic_titan.weights.reader import (
    CheckpointReader,
    Entries,
    TensorSpec,
    some_of,
)

# Parts that a stored model may lack as a whole: released models generate no images, and some see none.
OPTIONAL_PARTS = ("vit", "latent_embedding", "flow_head")

SHARED = ".moe.shared_experts."
EMBEDDINGS = "tok_embeddings.weight"


def tensors_of_model(model: nn.Module) -> dict[str, TensorSpec]:
    """What a checkpoint of ``model`` contains."""
    return {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}


def part_of(name: str) -> str:
    return name.split(".", 1)[0]


def absent_parts(names: Iterable[str]) -> set[str]:
    """The optional parts that have no tensor among the stored ``names``: they start from initial values."""
    return set(OPTIONAL_PARTS) - {part_of(name) for name in names}


def check_is_model(reader: CheckpointReader, tensors: Mapping[str, TensorSpec]) -> None:
    """Pass if the checkpoint has ``tensors``, except for optional parts, and no others except shared experts, which
    experts.shared = false ignores.

    Raises:
        ValueError: names a tensor that differs, or the expert groups if the partition does.
    """
    has, needs = sorted(router_groups(reader.tensors)), sorted(router_groups(tensors))
    if has != needs:
        raise ValueError(
            f"checkpoint {reader.folder} has the expert groups {', '.join(has)}, the config's model {', '.join(needs)}; "
            "use the config that the checkpoint was made for"
        )
    held = {name: spec.shape for name, spec in reader.tensors.items()}
    check_num_embeddings(
        f"checkpoint {reader.folder}", held, {name: spec.shape for name, spec in tensors.items()}
    )
    where = f"checkpoint {reader.folder} is of another model"
    remedy = "use the model.flavor, [experts] and [latents] it was saved with"
    absent = absent_parts(reader.tensors)
    for name, spec in tensors.items():
        if name not in reader.tensors and part_of(name) not in absent:
            raise ValueError(f"{where}: it lacks {name}; {remedy}")
        if name in reader.tensors and reader.tensors[name].shape != spec.shape:
            raise ValueError(
                f"{where}: {name} has shape {reader.tensors[name].shape} in it and {spec.shape} here; {remedy}"
            )
    more = [name for name in reader.tensors if name not in tensors and SHARED not in name]
    if more:
        raise ValueError(
            f"{where}: it has {some_of(more)}, which the config's model lacks; {remedy}"
        )


def check_num_embeddings(checkpoint: str, held: Entries, needs: Entries) -> None:
    """Pass unless the number of embeddings differs between the stored tensors ``held`` and the model's ``needs``, and their width does not.
    ``checkpoint``: how a message begins.

    Raises:
        ValueError: it does.
    """
    stored, here = held.get(EMBEDDINGS), needs.get(EMBEDDINGS)
    if stored and here and stored != here and stored[1:] == here[1:]:
        raise ValueError(
            f"{checkpoint} has {stored[0]} embeddings, the config's model {here[0]}; set model.vocab_size = {stored[0]}: loading a "
            "checkpoint does not change their number"
        )


def router_groups(names: Mapping[str, Any]) -> set[str]:
    """The expert groups in a model's parameter names."""
    routers = (name.split(".moe.router.") for name in names if ".moe.router." in name)
    return {rest.split(".")[0] for _, rest in routers}
