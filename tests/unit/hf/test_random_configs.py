"""Whatever valid config.json an architecture has: our network computes what transformers does, or refuses the setting by name."""

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from symbiotic_titan.hf.architectures.base import ARCHITECTURES, architecture_of
from tests.helpers.parity_table import compared
from tests.helpers.random_configs import DRAWS, random_case
from tests.helpers.unusual_settings import UNUSUAL

SEEDS = range(40)
# A second model_type of an architecture, which its own test covers.
OTHER_FORMS = {"qwen3_omni_moe", "ernie4_5_moe_vl"}


def refusal(config):
    """What the architecture says against a config.json, if anything."""
    try:
        architecture_of(config).model_args(config)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("model_type", DRAWS)
def test_random_configs_are_equal_to_transformers_or_refused_by_name(model_type):
    """Within 1e-5 of the largest logit, with and without images."""
    equal, refused = [], []
    for seed in SEEDS:
        drawn = random_case(model_type, seed)
        text = refusal(drawn.case.config)
        if text:
            assert drawn.unusual, (seed, text)
            assert text.startswith("config.json: ") and text.count("config.json") == 1, text
            assert "\n" not in text
            assert any(key in text for key in named(drawn.unusual)), (drawn.unusual, text)
            refused.append(drawn.unusual)
            continue
        for name, gap, largest, share in compared(drawn.case, seed):
            assert gap <= 1e-5 * max(1.0, largest), (seed, drawn.unusual, name, gap)
            assert share == 1, (seed, drawn.unusual, name, share)
        equal.append(seed)
    assert len(equal) >= 20 and len(refused) >= 10


def named(path):
    """The parts of a setting's name, and what our own checks call it where it must fit to another."""
    ours = {
        "num_key_value_heads": "num_kv_heads",
        "hidden_size": "vit.dim",
        "moe_topk": "top_k",
        "moe_k": "top_k",
    }
    return [*path.split("."), *(ours[key] for key in path.split(".") if key in ours)]


@pytest.mark.parametrize("model_type", DRAWS)
def test_every_setting_that_transformers_has_is_drawn(model_type):
    drawn = [random_case(model_type, seed).case.config for seed in SEEDS]
    whole = AutoConfig.for_model(model_type)
    tables = [table for table in ("text_config", "vision_config") if hasattr(whole, table)]
    for table, made in [("", whole), *((table, getattr(whole, table)) for table in tables)]:
        values = [config[table] if table else config for config in drawn]
        fields = {key for key in type(made).__annotations__ if not key.endswith("_config")}
        fixed = {key for key in fields if len({repr(v.get(key, "unset")) for v in values}) == 1}
        assert fixed <= {"image_token_id", "image_token_index", "vision_start_token_id"}, table


def test_every_architecture_has_random_configs():
    names = {name for name in ARCHITECTURES if name in CONFIG_MAPPING}
    assert names - OTHER_FORMS == set(DRAWS) == set(UNUSUAL)
