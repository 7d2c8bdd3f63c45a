"""Parts from a user's own module: registered, chosen by name, and the worked examples of docs/extending.md."""

import math
import re
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.commands import show_parallel
from symbiotic_titan.config.data import FORMATS, PACKINGS
from symbiotic_titan.config.experts import (
    PARTITION_RULES,
    ROUTER_SCORES,
    SHIELD_SCHEDULES,
    Shielding,
)
from symbiotic_titan.config.extension import import_extension
from symbiotic_titan.config.generation import CODECS, SOLVERS
from symbiotic_titan.config.job import JobConfig, job_config_class
from symbiotic_titan.config.load import check_table, load_job_config
from symbiotic_titan.config.losses import LOSS_TERMS, TIMESTEP_DISTRIBUTIONS
from symbiotic_titan.config.optimizer import LR_DECAYS, OPTIMIZER_BUILDERS, Optimizer
from symbiotic_titan.evaluation.suite import SUITES
from symbiotic_titan.extend import (
    register_lr_decay,
    register_optimizer_builder,
    register_partition_rule,
    register_router_score,
    register_shield_schedule,
)
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.optim.shield_schedule import shield_scale
from symbiotic_titan.partition.plan import check_order
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE, VIT
from symbiotic_titan.sequence.tasks import TASKS
from symbiotic_titan.training.checks import check_job
from tests.helpers.moe_reference import grads, make_args, make_layer, make_tokens
from tests.helpers.users_parts import users_parts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
REGISTRIES = (
    CODECS,
    FORMATS,
    PACKINGS,
    LOSS_TERMS,
    LR_DECAYS,
    PARTITION_RULES,
    SHIELD_SCHEDULES,
    ROUTER_SCORES,
    OPTIMIZER_BUILDERS,
    SOLVERS,
    SUITES,
    TASKS,
    TIMESTEP_DISTRIBUTIONS,
)


@pytest.fixture(autouse=True)
def own_registries():
    """What a test registers or imports is forgotten after it."""
    with users_parts(*REGISTRIES):
        yield


DEBUG = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml")]


# ---- registering ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decorator", "registry", "ours"),
    [
        (register_partition_rule, PARTITION_RULES, "cumulative"),
        (register_shield_schedule, SHIELD_SCHEDULES, "linear"),
        (register_router_score, ROUTER_SCORES, "sigmoid"),
        (register_optimizer_builder, OPTIMIZER_BUILDERS, "param_groups"),
        (register_lr_decay, LR_DECAYS, "cosine"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_part_is_known_under_its_name_and_takes_nobody_elses(decorator, registry, ours):
    def part():
        """Stays what it is."""

    assert decorator("mine")(part) is part
    assert registry["mine"] is part and ours in registry
    with pytest.raises(ValueError, match=f"{registry.key}: '{ours}' is already registered"):
        decorator(ours)(part)


# ---- importing ------------------------------------------------------------------------------------------------------------


def test_a_module_in_the_current_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "from symbiotic_titan.extend import register_shield_schedule\n"
        "register_shield_schedule('mine')(lambda config, step: 0.25)\n"
    )
    monkeypatch.chdir(tmp_path)
    import_extension("my_parts")
    assert shield_scale(Shielding(steps=2, ramp="mine"), 1) == 0.25
    import_extension("my_parts")  # again is nothing new


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shielding.ramp=cosine", "shielding.ramp = 'cosine': nothing is registered under"),
        ("--experts.score_function=softplus", "experts.score_function = 'softplus': nothing is"),
        ("--experts.partition_rule=text_first", "experts.partition_rule = 'text_first': nothing"),
        ("--optimizer.builder=sgd", "optimizer.builder = 'sgd': nothing is registered under this"),
    ],
)
def test_a_name_is_checked_before_the_run_and_known_when_its_module_is_named(
    option, message, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "1")
    arguments = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml"), option]
    with pytest.raises(ValueError, match=message):
        check_job(load_job_config(arguments))
    check_job(load_job_config([*arguments, "--experimental.custom_import=docs.examples.all_parts"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_absent",
            "experimental.custom_import = 'my_absent': there is no module 'my_absent' in",
        ),
        ("docs.absent.part", "'docs.absent.part': there is no module 'docs.absent' in"),
        ("docs/examples/cosine_shield.py", "not of its file; write 'docs.examples.cosine_shield'"),
        (".relative", "must be the name of a module"),
    ],
)
def test_a_name_that_is_no_module_is_told(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        import_extension(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import my_absent_library", "'my_broken': importing it failed: No module named 'my_abs"),
        ("from torch import no_such_name", "importing it failed: cannot import name 'no_such_nam"),
        ("x = = 1", "'my_broken': invalid syntax (my_broken.py, line 1)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told(tmp_path, monkeypatch, code, message):
    (tmp_path / "my_broken.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        import_extension("my_broken")


def test_a_mistake_in_the_modules_own_code_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError) as caught:
        import_extension("my_broken")
    assert caught.traceback[-1].path.name == "my_broken.py"


# ---- the worked examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_imports_registers_and_stands_on_the_page(path):
    before = sum(len(list(registry)) for registry in REGISTRIES)
    import_extension(f"docs.examples.{path.stem}")
    added = sum(len(list(registry)) for registry in REGISTRIES) - before
    assert added == (4 if path.stem == "all_parts" else 1)
    assert path.read_text().strip() in PAGE


def test_every_toml_block_of_the_page_is_a_valid_config():
    blocks = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        table = tomllib.loads(block)
        table.pop("extends", None)
        if "experimental" in table:
            import_extension(table["experimental"]["custom_import"])
        check_table(job_config_class(), table)


def test_the_cosine_shield_rises_from_0_to_the_scale_behind_it():
    import_extension("docs.examples.cosine_shield")
    config = Shielding(steps=4, after_scale=0.2, ramp="cosine")
    expected = [0.1 * (1 - math.cos(math.pi * i / 4)) for i in range(5)]
    assert [shield_scale(config, step) for step in range(1, 6)] == pytest.approx(expected)


def softplus_router(**changes):
    import_extension("docs.examples.softplus_score")
    return make_layer(make_args(score_function="softplus", **changes)).router


@pytest.mark.parametrize("normalize", [True, False])
def test_a_registered_score_makes_choice_weights_and_probabilities(normalize):
    router = softplus_router(normalize_weights=normalize, route_scale=2.0)
    x_TD, modality_T = make_tokens()
    routing = router(x_TD, modality_T)
    sums = {"understanding": torch.zeros(7), "generation": torch.zeros(5)}
    for t, modality in enumerate(modality_T.tolist()):
        if modality == PADDING:
            continue
        group, first = ("generation", 7) if modality == VAE else ("understanding", 0)
        scores_e = F.softplus(router[group].weight @ x_TD[t])
        weights_K, experts_K = scores_e.topk(3)
        weights_K = weights_K / weights_K.sum() if normalize else weights_K
        assert (routing.experts_TK[t] - first).tolist() == experts_K.tolist()
        torch.testing.assert_close(routing.weights_TK[t], 2.0 * weights_K)
        sums[group] += scores_e.detach() / scores_e.detach().sum()
    for prob_sum, expected in zip(routing.record.prob_sum, sums.values(), strict=True):
        torch.testing.assert_close(prob_sum, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_registered_score_is_compiled_into_the_routers_graph():
    router = softplus_router()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    x_TD, modality_T = make_tokens()
    ours, eager = compiled(x_TD, modality_T), router(x_TD, modality_T)
    torch.testing.assert_close(ours.weights_TK, eager.weights_TK)
    direction_TK = torch.randn_like(eager.weights_TK)
    found = grads((ours.weights_TK * direction_TK).sum(), router, x_TD)
    for name, grad in grads((eager.weights_TK * direction_TK).sum(), router, x_TD).items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_the_config_overrides_the_flavors_score_function():
    import_extension("docs.examples.softplus_score")
    for name, expected in ((None, "softmax"), ("softplus", "softplus"), ("sigmoid", "sigmoid")):
        config, args = JobConfig(), FLAVORS["debug"]
        config.experts.score_function = name
        args.update_from_config(config)
        assert args.moe_args.score_function == expected


def test_an_unknown_score_function_lists_the_known_ones():
    config, args = JobConfig(), FLAVORS["debug"]
    config.experts.score_function = "relu"
    message = (
        "experts.score_function = 'relu': nothing is registered under this name; "
        "choose from softmax, sigmoid, or name the module"
    )
    with pytest.raises(ValueError, match=message):
        args.update_from_config(config)


def test_text_first_deals_the_experts_by_the_choices_of_text():
    import_extension("docs.examples.text_first")
    counts_YME = torch.zeros(2, 3, 6, dtype=torch.int64)
    counts_YME[0, TEXT] = torch.tensor([1, 9, 2, 8, 3, 7])
    counts_YME[1, TEXT] = torch.tensor([9, 1, 8, 2, 7, 3])
    counts_YME[:, VIT] = 1000 * torch.arange(6)
    groups = (ExpertGroup("und", (TEXT, VIT), 4), ExpertGroup("gen", (VAE,), 2))
    order_YE = PARTITION_RULES["text_first"](counts_YME, groups)
    check_order(order_YE, (2, 6), "text_first")
    assert order_YE.tolist() == [[1, 3, 4, 5, 0, 2], [0, 2, 4, 5, 1, 3]]


def test_the_sgd_builder_steps_every_group_at_its_rate_and_checks_its_options():
    import_extension("docs.examples.sgd_builder")
    rules = [{"name": "bias", "match": ["bias"], "lr": 0.5}, {"name": "rest", "match": [".*"]}]
    net = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    config = Optimizer(builder="sgd", lr=0.1, param_groups=rules)
    optimizers = OPTIMIZER_BUILDERS["sgd"](net, config, None)
    net(torch.ones(1, 3)).sum().backward()
    optimizers.step()
    torch.testing.assert_close(net.bias, before["bias"] - 0.5)
    torch.testing.assert_close(net.weight, before["weight"] - 0.1)
    assert any("momentum_buffer" in key for key in optimizers.state_dict())
    config.builder_options = {"momentun": 0.5}
    with pytest.raises(ValueError, match="builder_options: unknown key 'momentun'; did you mean"):
        OPTIMIZER_BUILDERS["sgd"](net, config, None)


def test_the_dry_run_knows_the_parts_that_a_config_brings_along(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["train_configs/debug.toml", "--ranks", "2", "--experts.score_function", "softplus"]
    assert show_parallel.main(command) == 2
    assert "experts.score_function = 'softplus': nothing is registered" in capsys.readouterr().err
    command += ["--experimental.custom_import", "docs.examples.softplus_score"]
    assert show_parallel.main(command) == 0
