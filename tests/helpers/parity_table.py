"""How far our network is from transformers' for each architecture: a table, and one line of JSON.

Example: python -m tests.helpers.parity_table

Tiny random models in float32, each under several seeds: the largest difference of logits, for text alone and with images, beside the
largest logit, and the share of equal expert choices (sets per token and layer).
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from symbiotic_titan.hf.architectures.base import Architecture, architecture_of
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.vit_args import VitArgs
from symbiotic_titan.sequence.batch import PackedBatch
from tests.helpers import released_configs
from tests.helpers.decoder_parity import (
    loaded,
    make_random,
    of_all_pools,
    run,
    run_released,
    saved,
    text_row,
)
from tests.helpers.image_rows import (
    Segment,
    image_row,
    released_inputs,
    released_marked,
    released_squares,
)
from tests.helpers.released_models import ARIA, ERNIE, GLM, QWEN, THINKER

Inputs = Callable[[ModelArgs, list[Segment], PackedBatch], dict[str, Tensor]]

HUNYUAN = (
    {"model_type": "hunyuan_v1_moe"}
    | released_configs.HUNYUAN_SIZES
    | {
        name: released_configs.HUNYUAN[name]
        for name in ("rope_theta", "rope_scaling", "tie_word_embeddings")
    }
)
# Images of the sizes that Aria was released with, in a narrow encoder.
ARIA_SIZES = ARIA | {
    "vision_config": ARIA["vision_config"]
    | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"image_size": 980, "patch_size": 14},
    "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
}
NEW_VIT = VitArgs(dim=16, num_layers=1, num_heads=2, hidden_dim=24, patch=2, merge=2)
SQUARES: list[Segment] = [3, (2, 3), 2, (1, 4), 1, (3, 1), 4]
# Two tokens between images: the one that ends an image and the one that begins the next.
MARKED: list[Segment] = [3, (2, 3), 2, (1, 4), 2, (3, 1), 4]
QUERIES: list[Segment] = [3, (4, 3), 2, (1, 4), 1, (4, 4), 4]
SEEDS = range(5)
NUM_TOKENS = 96


@dataclass(frozen=True)
class Case:
    """A tiny config.json, the class that transformers routes with, and how it is given images (None: it sees none). ``opening``: the
    token before every image. ``name``: in the table; the model_type where nothing is said."""

    config: dict[str, Any]
    router: str
    document: list[Segment]
    inputs: Inputs | None
    placeholder: int = 9
    opening: int | None = None
    name: str = ""


CASES = (
    Case(QWEN, "Qwen3VLMoeTextTopKRouter", SQUARES, released_inputs, 120),
    Case(THINKER, "Qwen3OmniMoeThinkerTextTopKRouter", MARKED, released_marked, 120, opening=123),
    Case(GLM | {"image_token_id": 90}, "Glm4vMoeTextTopkRouter", SQUARES, released_inputs, 90),
    Case(ERNIE, "Ernie4_5_VLMoeMoeTopKRouter", SQUARES, released_inputs, 90),
    Case(ARIA, "AriaTextTopKRouter", QUERIES, released_squares),
    Case(
        ARIA_SIZES, "AriaTextTopKRouter", [5, (35, 24), 3, (35, 35), 4], released_squares, name="aria at 490 pixels"
    ),
    Case(
        ARIA_SIZES, "AriaTextTopKRouter", [5, (70, 50), 3, (70, 70), 4], released_squares, name="aria at 980 pixels"
    ),
    Case(HUNYUAN, "HunYuanMoEV1Gate", [], None),
)  # fmt: skip


def random_release(config: dict[str, Any], seed: int) -> nn.Module:
    """Transformers' model of ``config``."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **values)
    kind = transformers.AutoModelForImageTextToText
    if "vision_config" not in config:
        kind = transformers.AutoModelForCausalLM
    return make_random(kind.from_config(made, attn_implementation="eager"), seed, gain=1.0)


def ours_of(theirs: nn.Module) -> tuple[Architecture, nn.Module]:
    with tempfile.TemporaryDirectory() as folder:
        config, tensors = saved(theirs, Path(folder))
    architecture = architecture_of(config)
    args = architecture.model_args(config)
    if any(re.match(r"(model\.)?(visual|vision_tower|vision_model)\.", name) for name in tensors):
        return architecture, loaded(architecture, args, tensors)
    return architecture, loaded(architecture, replace(args, vit=NEW_VIT), tensors, new=("vit",))


def rows_of(
    one: Case, args: ModelArgs, seed: int
) -> dict[str, tuple[PackedBatch, dict[str, Tensor]]]:
    """Text, and text with images if the model sees any: what our network, and what transformers' is called with."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(10, 80, (2, NUM_TOKENS), generator=generator)
    rows = {"text": (text_row(args, tokens_BT), {"input_ids": tokens_BT})}
    if one.inputs is not None:
        row = image_row(args, one.document, one.placeholder, generator, one.opening)
        rows["image"] = row, one.inputs(args, one.document, row)
    return rows


def compared(one: Case, seed: int) -> Iterator[tuple[str, float, float, float]]:
    """(which inputs, largest difference, largest logit, share of equal choices) of text, then of text with images."""
    theirs = random_release(one.config, seed)
    _, ours = ours_of(theirs)
    routers = tuple({type(m) for m in theirs.modules() if type(m).__name__ == one.router})
    for name, (row, inputs) in rows_of(one, ours.args, seed).items():
        logits, choices = run(ours, row)
        expected, expected_choices = run_released(theirs, routers, inputs)
        if len(ours.args.groups) > 1:
            first = ours.args.groups[0].num_experts
            expected_choices = of_all_pools(expected_choices, row, first)
        equal = [
            (a == b).all(-1).float().mean() for a, b in zip(choices, expected_choices, strict=True)
        ]
        share = sum(map(float, equal)) / len(equal) if equal else 1.0  # of a model without experts
        yield name, (logits - expected).abs().max().item(), expected.abs().max().item(), share


def main() -> None:
    table: dict[str, dict[str, float]] = {}
    for one in CASES:
        worst = table.setdefault(one.name or one.config["model_type"], {})
        for seed in SEEDS:
            for name, gap, largest, share in compared(one, seed):
                for key, value in ((f"{name}_gap", gap), (f"{name}_largest_logit", largest)):
                    worst[key] = max(worst.get(key, 0.0), value)
                worst[f"{name}_equal_choices"] = min(worst.get(f"{name}_equal_choices", 1.0), share)
    for name, values in table.items():
        print(name, *(f"{key} {value:.3g}" for key, value in values.items()), sep="  ")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seeds": len(SEEDS), **versions, "worst": table}))


if __name__ == "__main__":
    main()
