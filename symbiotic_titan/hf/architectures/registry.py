"""Every architecture that there is a table for."""

from symbiotic_titan.hf.architectures.aria import ARIA
from symbiotic_titan.hf.architectures.base import (
    Backbone,
    Config,
)
from symbiotic_titan.hf.architectures.glm4v_moe import GLM4V_MOE
from symbiotic_titan.hf.architectures.hunyuan_v1_moe import HUNYUAN_V1_MOE
from symbiotic_titan.hf.architectures.qwen3_vl_moe import QWEN3_VL_MOE

BACKBONES: dict[str, Backbone] = {
    backbone.model_type: backbone for backbone in (QWEN3_VL_MOE, GLM4V_MOE, HUNYUAN_V1_MOE, ARIA)
}


def backbone_of(config: Config) -> Backbone:
    """The architecture that a config.json is of.

    Raises:
        ValueError: there is no table for its ``model_type``.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BACKBONES:
        raise ValueError(
            f"config.json: model_type = {model_type!r} is an architecture without a table here; there are tables for "
            f"{', '.join(BACKBONES)}"
        )
    return BACKBONES[model_type]
