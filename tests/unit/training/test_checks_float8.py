"""What float8 cannot do is refused before anything is built, with key, value, rule and remedy."""

from dataclasses import replace

import pytest

from symbiotic_titan.config.job import Float8, JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.parallel import float8
from symbiotic_titan.parallel.float8 import (
    check_converters,
    check_float8,
)
from symbiotic_titan.training.checks import check_job
from tests.unit.training.test_checks import DEBUG

FLOAT8 = ("--model.converters", "float8")
BFLOAT16 = ("--training.mixed_precision_param", "bfloat16")


def config_of(*overrides):
    return load_job_config(["--job.config_file", str(DEBUG), *overrides])


def refusal(check, *args):
    with pytest.raises(ValueError) as error:
        check(*args)
    return str(error.value)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of the compute capability that is asked for."""

    def install(*capability):
        monkeypatch.setattr(float8, "cuda_capability", lambda: capability)
        monkeypatch.setattr(float8, "device_type", lambda: "cuda")

    return install


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(float8, "cuda_capability", lambda: None)
    monkeypatch.setattr(float8, "device_type", lambda: "cpu")


def test_emulation_passes_everywhere(no_gpu):
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        asked = (*FLOAT8, "--float8.recipe", recipe)
        assert "set float8.emulate = true" in refusal(check_job, config_of(*asked))
        assert check_job(config_of(*asked, "--float8.emulate")) is None


def test_without_a_gpu_emulation_is_the_remedy(no_gpu):
    assert refusal(check_job, config_of(*FLOAT8)) == (
        "model.converters = ['float8'] needs a CUDA device of compute capability 9.x or 10.x, there is none; "
        "set float8.emulate = true to try it here"
    )


@pytest.mark.parametrize(
    ("capability", "overrides", "needed"),
    [
        ((8, 9), (), "9.x or 10.x, this one has 8.9"),
        ((12, 0), (), "9.x or 10.x, this one has 12.0"),
        ((8, 0), ("--float8.no_experts",), "8.9 or newer, this one has 8.0"),
        ((8, 9), ("--float8.no_experts", "--float8.recipe", "rowwise"), "9.0 or newer"),
        ((9, 0), (), None),
        ((10, 0), (), None),
        ((8, 9), ("--float8.no_experts",), None),
        ((12, 0), ("--float8.no_experts", "--float8.recipe", "rowwise"), None),
    ],
)
def test_each_part_asks_for_the_gpu_it_needs(gpu, capability, overrides, needed):
    gpu(*capability)
    config = config_of(*FLOAT8, *BFLOAT16, *overrides)
    if needed is None:
        check_float8(config, FLAVORS["debug"], 1)
    else:
        assert needed in refusal(check_float8, config, FLAVORS["debug"], 1)


def test_a_gpu_multiplies_float8_into_bfloat16(gpu):
    gpu(9, 0)
    message = refusal(check_float8, config_of(*FLOAT8), FLAVORS["debug"], 1)
    assert message.startswith(
        "training.mixed_precision_param = 'float32': float8 matmuls return bfloat16"
    )


@pytest.mark.parametrize("name", ["dim", "expert_hidden_dim"])
def test_experts_of_odd_width_are_refused_and_named(name):
    args = FLAVORS["debug"]
    setattr(args, name, 72)
    config = config_of(*FLOAT8, "--float8.emulate")
    assert refusal(check_float8, config, args, 1) == (
        f"float8.experts: {name} = 72 of flavor 'debug' is not a multiple of 16; "
        "set float8.experts = false or choose another flavor"
    )
    check_float8(config_of(*FLOAT8, "--float8.emulate", "--float8.no_experts"), args, 1)


def test_a_group_of_odd_width_is_refused_and_named():
    groups = (ExpertGroup("und", (0, 1), 12), ExpertGroup("gen", (2,), 4, hidden_dim=24))
    config = config_of(*FLOAT8, "--float8.emulate")
    args = replace(FLAVORS["debug"], groups=groups)
    assert refusal(check_float8, config, args, 1) == (
        "float8.experts: the hidden_dim of expert group 'gen' = 24 of flavor 'debug' is not a multiple of 16; "
        "set float8.experts = false or choose another width"
    )
    check_float8(config_of(*FLOAT8, "--float8.emulate", "--float8.no_experts"), args, 1)


def test_shielding_of_weights_is_refused():
    overrides = (*FLOAT8, "--float8.emulate", "--shielding.mode", "weights")
    message = refusal(check_job, config_of(*overrides))
    assert message.startswith(
        "shielding.mode = 'weights' scales the gradients of the shared experts' weights"
    )
    assert "use shielding.mode = 'output'" in message
    check_job(config_of(*overrides, "--shielding.steps", "0", "--shielding.after_scale", "1"))


@pytest.mark.parametrize(
    ("world_size", "device", "overrides", "why"),
    [
        (1, "cuda", (), "nothing is gathered on one rank"),
        (2, "cpu", (), "gloo, which connects CPUs, cannot send float8"),
        (2, "cuda", ("--training.enable_cpu_offload",), "have no scales there"),
    ],
)
def test_weights_travel_in_float8_between_gpus_only(
    monkeypatch, world_size, device, overrides, why
):
    monkeypatch.setattr(float8, "device_type", lambda: device)
    config = config_of(*FLOAT8, "--float8.emulate", "--float8.all_gather", *overrides)
    message = refusal(check_float8, config, FLAVORS["debug"], world_size)
    assert (
        message.startswith("float8.all_gather = true: ")
        and why in message
        and message.endswith("set it to false")
    )


def test_float8_gather_needs_one_scale_per_weight():
    with pytest.raises(ValueError, match="float8.all_gather needs one scale per weight, but"):
        Float8(all_gather=True, recipe="rowwise")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("--model.converters", "float9"),
            "model.converters: unknown converter 'float9'; choose from float8",
        ),
        (
            ("--model.converters", "quantize.linear.float8"),
            "unknown converter 'quantize.linear.float8'; choose from float8",
        ),
        (("--model.converters", "float8,float8"), "'float8' is given twice; name it once"),
        (("--float8.emulate",), "[float8] has no effect without its converter"),
        (
            ("--quantize.linear.float8.emulate",),
            "is not supported by this trainer; its converters do not handle grouped experts; use model.converters",
        ),
    ],
)
def test_converters_and_their_sections_must_fit(overrides, message):
    assert message in refusal(check_job, config_of(*overrides))


def test_a_converter_that_the_user_registered_is_known(monkeypatch):
    config = JobConfig()
    config.model.converters = ["mine"]
    with pytest.raises(ValueError, match="model.converters: unknown converter 'mine'"):
        check_converters(config)
    registry = float8.upstream._registry_model_converter_cls
    monkeypatch.setitem(registry, "mine", object)
    check_converters(config)
