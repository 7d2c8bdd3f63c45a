"""Released architectures as data: config.json -> ModelArgs, and released tensor names -> ours.

There is no model class per architecture: one decoder and one image encoder, with switches, implement them all. An architecture is
one file of this folder and one row of ``ARCHITECTURES``; a third party adds its own with
``symbiotic_titan.extend.register_architecture``.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.hf.architectures.unknown_settings import refused_together
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.registry import Registry

Config = Mapping[str, Any]
TensorTransform = Callable[[list[Tensor]], list[Tensor]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ByRows:
    """A transform that makes row i (index i of dim 0) of each output from row i of its inputs, if these have at least ``min_dims`` dims. A
    rank that holds some rows then reads those only."""

    transform: TensorTransform
    min_dims: int

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.transform(tensors)


def unchanged(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


def stack(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack(tensors)]


def all_mapped(args: ModelArgs, names: Container[str]) -> tuple[str, ...]:
    """No unmapped tensors: the default of ``Architecture.unmapped``."""
    return ()


def as_released(layout: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """The layout itself: the default of ``Architecture.export_layout``."""
    return layout


@dataclass(frozen=True)
class WeightMapping:
    """Tensors of a release (``theirs``) that hold the same values as some of ours (``ours``). ``load`` turns theirs into ours and
    ``save`` ours into theirs, bit for bit; both take and return tensors in the order of the names."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: TensorTransform = unchanged
    save: TensorTransform = unchanged


@dataclass(frozen=True)
class Architecture:
    """Everything that is specific to one ``model_type``.

    model_args  config.json -> ModelArgs with one pool of experts and the latent parts of a flavor. Raises ValueError naming an
                unsupported setting.
    weight_map  (args, shapes of the released tensors by name) -> one mapping for every tensor of the model except the latent
                parts. The shapes distinguish file layouts with the same names.
    config      (original config.json, args) -> config.json of the model that ``args`` describe, e.g. with fewer or wider experts.
    unmapped    (args, released tensor names) -> regular expressions for the beginnings of names without a counterpart in our
                network. These tensors are kept in a separate file.
    export_layout  shapes of the released tensors by name -> those that say in which layout an export is written, where transformers
                does not load the one that was read.
    """

    model_args: Callable[[Config], ModelArgs]
    weight_map: Callable[[ModelArgs, Mapping[str, Shape]], list[WeightMapping]]
    config: Callable[[Config, ModelArgs], dict[str, Any]]
    unmapped: Callable[[ModelArgs, Container[str]], tuple[str, ...]] = all_mapped
    export_layout: Callable[[Mapping[str, Shape]], Mapping[str, Shape]] = as_released

    def __post_init__(self) -> None:
        # For every architecture, also those of other modules: all unknown settings in one message.
        object.__setattr__(self, "model_args", refused_together(self.model_args))


ARCHITECTURES: Registry[Architecture] = Registry(
    "config.json: model_type",
    {
        "qwen3_vl_moe": "symbiotic_titan.hf.architectures.qwen3_vl_moe:QWEN3_VL_MOE",
        "qwen3_omni_moe": "symbiotic_titan.hf.architectures.qwen3_omni_moe:QWEN3_OMNI_MOE",
        "qwen3_omni_moe_thinker": "symbiotic_titan.hf.architectures.qwen3_omni_moe:QWEN3_OMNI_MOE",
        "glm4v_moe": "symbiotic_titan.hf.architectures.glm4v_moe:GLM4V_MOE",
        "hunyuan_v1_moe": "symbiotic_titan.hf.architectures.hunyuan_v1_moe:HUNYUAN_V1_MOE",
        "aria": "symbiotic_titan.hf.architectures.aria:ARIA",
        "ernie4_5_moe_vl": "symbiotic_titan.hf.architectures.ernie4_5_moe_vl:ERNIE4_5_MOE_VL",
        "ernie4_5_vl_moe": "symbiotic_titan.hf.architectures.ernie4_5_vl_moe:ERNIE4_5_VL_MOE",
    },
)


def architecture_of(config: Config) -> Architecture:
    """The architecture of a config.json.

    Raises:
        ValueError: its ``model_type`` is not registered.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(
            f"{ARCHITECTURES.key}: must name one of {', '.join(ARCHITECTURES)}, got {model_type!r}"
        )
    return ARCHITECTURES[model_type]
