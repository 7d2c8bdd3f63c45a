"""Whatever stands in a config.json, it is read or refused by name; every setting of the released ones is tried."""

import copy

import pytest

from symbiotic_titan.hf.architectures.base import architecture_of
from tests.helpers import released_configs
from tests.helpers.omni_config import OMNI

NAMES = ("QWEN", "GLM", "ARIA", "HUNYUAN")
RELEASED = {"omni": OMNI} | {name.lower(): getattr(released_configs, name) for name in NAMES}
# Where the decoder's settings are, if not in text_config.
TABLES = {"hunyuan": (), "omni": ("thinker_config", "text_config")}
MALFORMED = (None, "x", [], {}, -1, 0, 1.5, True)
ABSENT = object()


def paths(table, above=()):
    """Of every setting in a table and in those within it."""
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def args_with(name, path, value):
    """What becomes of a released file where ``path`` holds another value, or nothing."""
    config = copy.deepcopy(RELEASED[name])
    table = config
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = value
    if value is ABSENT:
        del table[path[-1]]
    return architecture_of(config).model_args(config)


@pytest.mark.parametrize("name", RELEASED)
def test_any_value_of_any_setting_is_read_or_refused_by_name(name):
    """A setting that was made silent may leave others of its table at odds: then the table is named."""
    for path in paths(RELEASED[name]):
        for value in MALFORMED:
            try:
                args_with(name, path, value)
            except ValueError as error:
                text = str(error)
                assert text.startswith("config.json"), text
                assert any(key in text for key in path), (path, value, text)
                assert "\n" not in text


@pytest.mark.parametrize("name", ["qwen", "glm", "aria"])
@pytest.mark.parametrize("table", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    "value, message",
    [
        (ABSENT, "config.json has no {}, a table"),
        (None, "config.json has no {}, a table"),
        ([], r"config.json: {}: must be a table, got \[\]"),
        ("x.json", "config.json: {}: must be a table, got 'x.json'"),
        (0, "config.json: {}: must be a table, got 0"),
    ],
)
def test_a_table_that_is_no_table_is_named(name, table, value, message):
    with pytest.raises(ValueError, match=message.format(table)):
        args_with(name, (table,), value)


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize(
    "key, value, rule",
    [
        ("hidden_size", "32", "must be an integer, got '32'"),
        ("hidden_size", -4, "must be positive, got -4"),
        ("num_attention_heads", 0, "must be positive, got 0"),
        ("num_attention_heads", "4", "must be an integer, got '4'"),
        ("num_key_value_heads", "2", "must be an integer, got '2'"),
        ("num_hidden_layers", 2.0, "must be an integer, got 2.0"),
        ("head_dim", "16", "must be an integer, got '16'"),
        ("rms_norm_eps", 0, "must be positive, got 0"),
        ("rope_theta", "big", "must be a number, got 'big'"),
        ("rope_theta", float("inf"), "must be a finite number, got inf"),
        ("rope_parameters", [1], r"must be a table, got \[1\]"),
        ("rope_scaling", "x", "must be a table, got 'x'"),
    ],
)
def test_a_setting_of_the_decoder_is_named_as_it_stands(name, key, value, rule):
    path = (*TABLES.get(name, ("text_config",)), key)
    with pytest.raises(ValueError, match=rf"^config.json: {'.'.join(path)}: {rule}$"):
        args_with(name, path, value)


@pytest.mark.parametrize(
    "name, path, value, rule",
    [
        ("qwen", "text_config.rope_scaling.mrope_section", 4, "a list"),
        ("qwen", "text_config.rope_scaling.mrope_section", [70, -3, -3], "zero or positive"),
        ("qwen", "text_config.rope_scaling.rope_theta", "big", "a number"),
        ("qwen", "text_config.mlp_only_layers", [-1], "zero or positive"),
        ("qwen", "text_config.num_local_experts", "8", "an integer"),
        ("qwen", "vision_config.num_position_embeddings", -4, "positive"),
        ("qwen", "vision_config.deepstack_visual_indexes", "a", "a list"),
        ("glm", "text_config.rope_scaling.mrope_section", 4, "a list"),
        ("glm", "text_config.first_k_dense_replace", -1, "zero or positive"),
        ("glm", "text_config.num_nextn_predict_layers", "1", "an integer"),
        ("glm", "vision_config.image_size", [12, 12], "an integer"),
        ("glm", "vision_config.patch_size", "4", "an integer"),
        ("glm", "vision_config.patch_size", 0, "positive"),
        ("glm", "tie_word_embeddings", "yes", "true or false"),
        ("aria", "vision_config.patch_size", 0, "positive"),
        ("aria", "vision_config.attention_heads", "16", "an integer"),
        ("hunyuan", "rope_scaling.alpha", "x", "a number"),
        ("hunyuan", "rope_scaling.alpha", 0, "positive"),
        ("hunyuan", "attention_head_dim", "16", "an integer"),
    ],
)
def test_settings_of_one_architecture_are_named_as_they_stand(name, path, value, rule):
    with pytest.raises(ValueError, match=f"^config.json: {path}: must be {rule}"):
        args_with(name, tuple(path.split(".")), value)


@pytest.mark.parametrize(
    "name, path, value, message",
    [
        ("qwen", "text_config.num_key_value_heads", 3, "text_config: model.num_heads: must be a mul"),
        ("qwen", "vision_config.hidden_size", 1150, "vision_config: vit.dim: must be a multiple"),
        ("hunyuan", "num_key_value_heads", 3, "model.num_heads: must be a multiple of"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together_are_told_with_their_table(name, path, value, message):
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        args_with(name, tuple(path.split(".")), value)


@pytest.mark.parametrize("value", [["x"], None, 3, "llama4"])
def test_an_architecture_that_is_not_registered_is_named(value):
    with pytest.raises(
        ValueError,
        match="^config.json: model_type(: must name one of|.*nothing is registered)",
    ):
        args_with("qwen", ("model_type",), value)


@pytest.mark.parametrize(
    "name, key", [("glm", "first_k_dense_replace"), ("glm", "n_shared_experts"), ("aria", "moe_num_shared_experts")]
)  # fmt: skip
def test_of_some_settings_there_may_be_none(name, key):
    args = args_with(name, ("text_config", key), 0)
    assert 0 in (args.num_dense_layers, args.shared_hidden_dim)


# ---- settings that are not known --------------------------------------------------------------------------------------------

NOTES = {
    "unsloth_version": "2026.4.1",
    "unsloth_fixed": True,
    "_name_or_path": "somewhere/else",
    "_attn_implementation": "sdpa",
    "attn_implementation": "flash_attention_2",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "ms_swift": {"version": 3},
    "swift_version": "3.9.0.dev0",
    "trainer_version": "v1.2+cu128",
    "temperature": 0.7,
    "top_k": 50,
    "processor_class": "Qwen3VLProcessor",
    "off": False,
    "none": None,
}


def tables_of(config):
    """The file's top level and its tables of settings."""
    inner = [config[key] for key in ("text_config", "vision_config") if key in config]
    return [config, *inner]


@pytest.mark.parametrize("name", RELEASED)
def test_notes_in_any_table_change_nothing(name):
    config = copy.deepcopy(RELEASED[name])
    expected = architecture_of(config).model_args(config)
    for table in tables_of(config):
        table |= NOTES
    assert architecture_of(config).model_args(config) == expected


@pytest.mark.parametrize("name", RELEASED)
def test_all_unknown_settings_are_named_in_one_line(name):
    """A version that is none, a note's name within another, and what belongs to no table."""
    config = copy.deepcopy(RELEASED[name])
    stated = []
    unknown = {"rope_version": "yarn", "version": 2, "my_unsloth": 1, "gate_kind": "x" * 300}
    for table, prefix in zip(
        tables_of(config), ("", "text_config.", "vision_config."), strict=False
    ):
        table |= unknown
        stated += [prefix + key for key in unknown]
    with pytest.raises(ValueError) as caught:
        architecture_of(config).model_args(config)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    names = [part.split(" = ")[0] for part in text.removeprefix("config.json: ").split(", ")]
    assert names == stated
    assert text.endswith(
        "are not settings that this network is known to support; remove from the "
        "file those that do not change what is computed"
    )


def test_one_unknown_setting_is_named_alone():
    with pytest.raises(
        ValueError, match=r"^config.json: vision_config.twist = 3 is not a setting that"
    ):
        args_with("qwen", ("vision_config", "twist"), 3)
