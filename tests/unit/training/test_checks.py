"""Rules that span sections: what cannot work is refused before anything is built, with key, value, rule and remedy."""

from pathlib import Path

import pytest

from symbiotic_titan.build import with_rows_of_rank
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.training import checks
from symbiotic_titan.training.checks import (
    check_batch,
    check_job,
    check_parallelism,
    check_shielding,
)

DEBUG = Path(__file__).parents[3] / "train_configs" / "debug.toml"


def config_of(tmp_path, *overrides, old="", new=""):
    text = DEBUG.read_text()
    assert old in text
    path = tmp_path / "job.toml"
    path.write_text(text.replace(old, new) if old else text)
    return load_job_config(["--job.config_file", str(path), *overrides])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


# Ranks that a config is written for, where it is not one.
RANKS = {
    "debug_gpu": [1, 4],
    "1b_a0.3b": [1, 8],
    "30b_a3b": [8, 64, 128, 256, 512],
    "aria_25b": [8, 64, 128, 256, 512],
    "ernie_vl_28b_a3b": [8, 64, 128, 256, 512],
    "qwen3_vl_30b_a3b": [8, 64, 128, 256, 512],
}


@pytest.mark.parametrize("path", sorted(DEBUG.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_pass(path, monkeypatch):
    config = load_job_config(["--job.config_file", str(path)])
    if config.model.attention_backend == "flex":
        with pytest.raises(ValueError, match="'flex' needs a CUDA device"):
            check_job(config)
        monkeypatch.setattr(checks, "supports_flex_attention", lambda: True)
    for num_ranks in RANKS.get(path.stem, [1]):
        monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
        check_job(with_rows_of_rank(config, num_ranks))


def test_offload_to_the_cpu_needs_a_second_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "device_type", lambda: "cuda")
    config = config_of(tmp_path, "--training.enable_cpu_offload")
    with pytest.raises(ValueError, match="use at least 2 ranks"):
        check_job(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_job(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--model.flavor huge", "model.flavor: unknown flavor 'huge'; choose from 1B-A0.3B"),
        ("--model.name llama3", "model.name = 'llama3': this trainer trains 'symbiotic'"),
        ("--model.attention_backend flex", "'flex' needs a CUDA device"),
        (
            "--parallelism.tensor_parallel_degree 2",
            "parallelism.tensor_parallel_degree = 2 is not supported by this trainer; use parallelism.expert_parallel",
        ),
        (
            "--parallelism.expert_parallel_degree 2",
            "parallelism.expert_parallel_degree = 2 does not divide the 1 ranks",
        ),
        ("--parallelism.expert_parallel_degree 0", "must be at least 1, got 0"),
        ("--parallelism.context_parallel_degree 0", "must be at least 1, got 0"),
        (
            "--parallelism.context_parallel_degree 2",
            "parallelism.context_parallel_degree = 2 does not divide the number of ranks (1)",
        ),
        (
            "--parallelism.context_parallel_rotate_method alltoall",
            "parallelism.context_parallel_rotate_method = 'alltoall' is not supported by this trainer",
        ),
        ("--parallelism.data_parallel_shard_degree 3", "must equal the number of ranks (1)"),
        (
            "--training.global_batch_size 5",
            "training.global_batch_size = 5 must be a multiple of training.local_batch_size (2)",
        ),
        ("--training.local_batch_size 0", "training.local_batch_size: must be at least 1, got 0"),
        ("--training.steps 0", "training.steps: must be at least 1, got 0"),
        ("--training.dataset c4", "training.dataset = 'c4' is not supported"),
        (
            "--parallelism.pipeline_parallel_schedule GPipe",
            "parallelism.pipeline_parallel_schedule = 'GPipe' is not supported by this trainer; remove it, there is no pipeline",
        ),
        (
            "--activation_checkpoint.memory_budget 0.3",
            "memory_budget = 0.3 is not supported by this trainer; choose an activation_checkpoint.mode instead",
        ),
        (
            "--fault_tolerance.replica_id 3",
            "fault_tolerance.replica_id = 3 is not supported by this trainer; resume from a checkpoint",
        ),
        (
            "--quantize.linear.mx.recipe_name x",
            "quantize.linear.mx.recipe_name = 'x' is not supported by this trainer; its converters do not",
        ),
        ("--training.max_norm nan", "training.max_norm: must be a finite number, got nan"),
        ("--flow.mean inf", "flow.mean: must be a finite number, got inf"),
        ("--metrics.log_freq 0", "metrics.log_freq: must be at least 1, got 0"),
        (
            "--lr_scheduler.warmup_steps -3",
            "lr_scheduler.warmup_steps: must be zero or positive, got -3",
        ),
        ("--lr_scheduler.decay_ratio 3", "lr_scheduler.decay_ratio: must lie in [0, 1], got 3.0"),
        (
            "--activation_checkpoint.selective_ac_option foo",
            "selective_ac_option: must be 'op' or a positive number of layers, got 'foo'",
        ),
        ("--checkpoint.create_seed_checkpoint", "checkpoint.create_seed_checkpoint = True is not"),
        ("--comm.mode fake_backend", "comm.mode = 'fake_backend' is not supported"),
        (
            "--shielding.modalities vea",
            "shielding.modalities: unknown modality 'vea'; choose from text",
        ),
        ("--experts.no_shared", "[shielding] has no effect with experts.shared = false"),
        (
            "--compile.enable --compile.components model,optimizer",
            "compile.components[1]: must be 'model' or 'loss', got 'optimizer'",
        ),
        ("--activation_checkpoint.mode memory_budget", "'memory_budget' is not supported"),
        ("--checkpoint.async_mode async_with_pinned_mem", "needs an accelerator; use 'async'"),
        ("--profiling.enable_memory_snapshot", "enable_memory_snapshot = true needs an accelera"),
        (
            "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op --activation_checkpoint.debug",
            "activation_checkpoint.debug = true: torch cannot debug the checkpointing of single operators",
        ),
        (
            "--stability.on_bad_step roll_back --checkpoint.no_enable",
            "stability.on_bad_step = 'roll_back': the run saves no checkpoint to go back to with checkpoint.enable = false",
        ),
        ("--stability.on_bad_step roll_back --checkpoint.load_only", "checkpoint.load_only = true"),
        ("--training.gc_debug", "training.gc_debug = true needs an accelerator: it looks for ten"),
        (
            "--profiling.enable_profiling --profiling.profile_freq 3",
            "profiling.profile_freq = 3: must be at least profiling.profiler_warmup + profiler_active = 4",
        ),
        (
            "--training.enable_cpu_offload",
            "training.enable_cpu_offload = True needs an accelerator",
        ),
    ],
)
def test_bad_overrides_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError) as error:
        check_job(config_of(tmp_path, *overrides.split()))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "num_experts = 12",
            "num_experts = 10",
            "the groups hold 14 experts but flavor 'debug' has 16",
        ),
        (
            'modalities = ["vae"]',
            'modalities = ["vea"]',
            "generation.modalities: unknown modality 'vea'",
        ),
        ('modalities = ["vae"]', 'modalities = ["vae", "text"]', "text"),
        ('modalities = ["text", "vit"]', 'modalities = ["text"]', "vit"),
        ("num_experts = 12", "num_experts = 15\n#", "top_k"),
    ],
)
def test_partitions_that_overlap_or_do_not_cover_are_refused(tmp_path, old, new, message):
    if "15" in new:
        text = DEBUG.read_text().replace("num_experts = 4\n", "num_experts = 1\n")
        path = tmp_path / "debug.toml"
        path.write_text(text.replace(old, "num_experts = 15"))
        config = load_job_config(["--job.config_file", str(path)])
    else:
        config = config_of(tmp_path, old=old, new=new)
    with pytest.raises(ValueError) as error:
        check_job(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ("--parallelism.expert_parallel_degree 8", 8, "divide"),
        ("--parallelism.expert_parallel_degree 3", 3, "divide"),
        (
            "--parallelism.data_parallel_replicate_degree 2",
            2,
            "replication without sharding is not supported",
        ),
        ("--parallelism.data_parallel_replicate_degree 2", 3, "must equal the number of ranks (3)"),
        (
            "--parallelism.context_parallel_degree 4",
            6,
            "context_parallel_degree = 4 does not divide the number of ranks (6); start a multiple of 4",
        ),
        (
            "--parallelism.context_parallel_degree 2 --parallelism.data_parallel_shard_degree 4",
            4,
            "x data_parallel_shard_degree (4) x context_parallel_degree (2) must equal the number of ranks (4)",
        ),
        (
            "--parallelism.context_parallel_degree 4 --training.seq_len 388",
            4,
            "training.seq_len = 388 must be a multiple of 8, because every rank has two chunks of each sequence; set it to 392",
        ),
        (
            "--parallelism.context_parallel_degree 2 --parallelism.expert_parallel_degree 4",
            6,
            "expert_parallel_degree = 4 does not divide the 6 ranks",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_refused(tmp_path, overrides, world_size, message):
    config = config_of(tmp_path, "--training.global_batch_size", "-1", *overrides.split())
    args = FLAVORS["debug"]
    args.update_from_config(config)
    with pytest.raises(ValueError) as error:
        check_parallelism(config, args, world_size)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("useless", "useful"),
    [
        ("--checkpoint.no-enable --checkpoint.load_only", "--checkpoint.load_only"),
        (
            "--checkpoint.export_dtype bfloat16",
            "--checkpoint.export_dtype bfloat16 --checkpoint.last_save_model_only",
        ),
        (
            "--activation_checkpoint.selective_ac_option op",
            "--activation_checkpoint.selective_ac_option op --activation_checkpoint.mode selective",
        ),
        ("--compile.backend nope", ""),
        (
            "--training.dataloader.prefetch_factor 2",
            "--training.dataloader.prefetch_factor 2 --training.dataloader.num_workers 1",
        ),
    ],
)
def test_an_option_that_waits_for_another_is_pointed_out(tmp_path, caplog, useless, useful):
    check_job(config_of(tmp_path, *useful.split()))
    assert "has no effect" not in caplog.text
    check_job(config_of(tmp_path, *useless.split()))
    key = [word for word in useless.split() if word.startswith("--")][-1].removeprefix("--")
    [line] = [r.message for r in caplog.records if "has no effect" in r.message]
    assert line.startswith(f"{key} = ") and line.endswith("; set that, or remove it")


STAGE = "[[data.stages]]\nfrom_step = 20\nlr = {%s = 1e-5}\n\n[checkpoint]"


def test_a_stage_changes_the_rate_of_a_trained_group(tmp_path):
    def check(group, *overrides, frozen="frozen = false\n"):
        rows = f"""\n[[optimizer.param_groups]]\nname = "some"\nmatch = ["router"]\n{frozen}
[[optimizer.param_groups]]\nname = "rest"\nmatch = [".*"]\n"""
        text = DEBUG.read_text()
        start = text.index("[[optimizer.param_groups]]")
        rest = text[start:]
        end = start + rest.index("\n[", rest.rindex("[[optimizer.param_groups]]") + 1)
        path = tmp_path / "staged.toml"
        path.write_text((text[:start] + rows + text[end:]).replace("[checkpoint]", STAGE % group))
        check_job(load_job_config(["--job.config_file", str(path), *overrides]))

    check("some")
    with pytest.raises(ValueError) as error:
        check("sum")
    expected = "[[data.stages]] #1.lr: [[optimizer.param_groups]] has no group 'sum'; choose from some, rest"
    assert str(error.value) == expected
    with pytest.raises(ValueError, match=r"#1.lr.some: the group is frozen, so it has no learning"):
        check("some", frozen="frozen = true\n")


def test_a_run_that_ends_before_its_first_trace_is_pointed_out(tmp_path, caplog):
    profiled = ["--profiling.enable_profiling", "--profiling.profile_freq", "20"]
    check_job(config_of(tmp_path, "--training.steps", "20", *profiled))
    assert "has no effect" not in caplog.text
    check_job(config_of(tmp_path, "--training.steps", "19", *profiled))
    assert (
        "enable_profiling = true has no effect: the first trace is written at step" in caplog.text
    )


def test_a_stage_after_the_last_step_is_pointed_out(tmp_path, caplog):
    check_job(
        config_of(tmp_path, "--training.steps", "20", old="[checkpoint]", new=STAGE % "generation")
    )
    assert "has no effect" not in caplog.text
    check_job(
        config_of(tmp_path, "--training.steps", "19", old="[checkpoint]", new=STAGE % "generation")
    )
    assert "#1: from_step = 20 has no effect, the run ends at training.steps = 19" in caplog.text


def test_an_interval_that_leaves_no_step_to_roll_back_is_pointed_out(tmp_path, caplog):
    options = ["--stability.on_bad_step", "roll_back", "--checkpoint.interval", "20"]
    check_job(config_of(tmp_path, "--training.steps", "21", *options))
    assert "has no effect" not in caplog.text
    check_job(config_of(tmp_path, "--training.steps", "20", *options))
    assert "'roll_back' has no effect: with checkpoint.interval = 20 no step of" in caplog.text


def test_reducing_gradients_once_has_an_effect_with_ranks_and_micro_batches_alone(tmp_path, caplog):
    config = config_of(tmp_path, "--parallelism.fsdp_gradient_sync", "last")
    config.training.local_batch_size, config.training.global_batch_size = 2, 16
    check_batch(config, 2)
    assert "has no effect" not in caplog.text
    for num_ranks, micro_batches in ((8, 1), (1, 8)):
        check_batch(config, num_ranks)
        text = f"'last' has no effect with {num_ranks} data-parallel ranks and {micro_batches} micro-batches"
        assert text in caplog.text


def test_a_shield_needs_a_flavor_with_a_shared_expert_or_a_new_one(tmp_path):
    config = config_of(tmp_path)
    args = FLAVORS["Qwen3-VL-30B-A3B"]
    config.model.flavor = "Qwen3-VL-30B-A3B"
    with pytest.raises(ValueError, match="has no effect with model.flavor = 'Qwen3-VL-30B-A3B'"):
        check_shielding(config, args)
    args.shared_hidden_dim = args.expert_hidden_dim
    check_shielding(config, args)


@pytest.mark.parametrize(
    ("dtype", "slow", "warnings"),
    [("bfloat16", True, 1), ("bfloat16", False, 0), ("float32", True, 0)],
)
def test_bfloat16_on_a_cpu_that_has_no_instructions_for_it_is_reported(
    tmp_path, monkeypatch, caplog, dtype, slow, warnings
):
    monkeypatch.setattr(checks, "has_slow_bfloat16", lambda: slow)
    check_job(config_of(tmp_path, "--training.mixed_precision_param", dtype))
    messages = [r.message for r in caplog.records if "as long as with 'float32'" in r.message]
    assert len(messages) == warnings
