"""Whether a stored model is the one that a config shapes."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from symbiotic_titan.weights.reader import (
    StoredModel,
    TensorKind,
    some_of,
)

# Parts that a stored model may lack, each as a whole: released models make no images, and some see none.
OPTIONAL_PARTS = ("vit", "latent_embedding", "flow_head")

SHARED = ".moe.shared_experts."


def tensors_of_model(model: nn.Module) -> dict[str, TensorKind]:
    """What a checkpoint of ``model`` holds."""
    return {name: TensorKind.of(tensor) for name, tensor in model.state_dict().items()}


def part_of(name: str) -> str:
    return name.split(".", 1)[0]


def absent_parts(names: Iterable[str]) -> set[str]:
    """The optional parts of which ``names`` of stored tensors have nothing: they get their initial values."""
    return set(OPTIONAL_PARTS) - {part_of(name) for name in names}


def check_is_model(stored: StoredModel, tensors: Mapping[str, TensorKind]) -> None:
    """Pass if the checkpoint holds ``tensors``, but for parts that it may lack, and nothing else but shared experts, which
    experts.shared = false leaves aside.

    Raises:
        ValueError: names a tensor that differs, and the groups where the partition does.
    """
    has, needs = sorted(router_groups(stored.tensors)), sorted(router_groups(tensors))
    if has != needs:
        raise ValueError(
            f"checkpoint {stored.folder} has the expert groups {', '.join(has)}, the config's model {', '.join(needs)}; "
            "use the config that the checkpoint was made for"
        )
    where = f"checkpoint {stored.folder} is of another model"
    remedy = "use the model.flavor, [experts] and [latents] it was saved with"
    absent = absent_parts(stored.tensors)
    for name, kind in tensors.items():
        if name not in stored.tensors and part_of(name) not in absent:
            raise ValueError(f"{where}: it lacks {name}; {remedy}")
        if name in stored.tensors and stored.tensors[name].shape != kind.shape:
            raise ValueError(
                f"{where}: {name} has shape {stored.tensors[name].shape} in it and {kind.shape} here; {remedy}"
            )
    more = [name for name in stored.tensors if name not in tensors and SHARED not in name]
    if more:
        raise ValueError(
            f"{where}: it holds {some_of(more)}, which the config's model has not; {remedy}"
        )


def router_groups(names: Mapping[str, Any]) -> set[str]:
    """Names of the expert groups among a model's parameter names."""
    routers = (name.split(".moe.router.") for name in names if ".moe.router." in name)
    return {rest.split(".")[0] for _, rest in routers}
