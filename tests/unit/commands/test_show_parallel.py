"""The dry run: it refuses what a run refuses, with the same message, and it passes every large config that is shipped."""

import errno
import json
import os
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from symbiotic_titan.build import build_dataloader, build_tokenizer, with_rows_of_rank
from symbiotic_titan.commands import show_parallel
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.inference.held_out import held_out_data
from symbiotic_titan.process import DiskFull
from symbiotic_titan.training.checks import check_job, check_run

CONFIGS = Path(__file__).parents[3] / "train_configs"
DEBUG = CONFIGS / "debug.toml"
LARGE = ("30b_a3b", "qwen3_vl_30b_a3b", "aria_25b", "ernie_vl_28b_a3b")
RANKS = 4
SPEEDS = "--tflops 400 --network-gbps 200 --node-gbps 3600"


def written(tmp_path, *overrides, lines=""):
    """The arguments that load debug.toml with ``lines`` added and ``overrides``."""
    path = tmp_path / "job.toml"
    path.write_text(f'extends = "{DEBUG}"\n{lines}')
    return ["--job.config_file", str(path), *overrides]


def refusal(call, *arguments, **keywords):
    with pytest.raises(ValueError) as error:
        call(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def run_refuses(config, num_ranks):
    """What the run says: its checks, else its tokenizer, its loader and its held-out loader, which open no file before they refuse."""
    check_job(config, num_ranks)
    options = {"dp_world_size": num_ranks, "dp_rank": 0, "tokenizer": build_tokenizer(config)}
    build_dataloader(job_config=config, **options)
    config.data = held_out_data(config)
    build_dataloader(job_config=config, **options, table="[[validation.sources]]")


HELD_OUT = '[[validation.sources]]\nname = "a"\ntask = "mmu"\nformat = "jsonl"\npath = "x"\n'
BIG = '[validation]\nenable = true\n[data]\nsources = [{name = "a", task = "lm", format = "jsonl", path = "x"}]\n'


@pytest.mark.parametrize(
    ("overrides", "lines", "message"),
    [
        (
            "--training.global_batch_size 9 --training.local_batch_size 1",
            "",
            "training.global_batch_size = 9 must be a multiple of training.local_batch_size (1) x data-parallel ranks (4) = 4; set it "
            "to 8",
        ),
        (
            "--training.global_batch_size 12",
            "",
            "x data-parallel ranks (4) = 8; set it to 16, or training.local_batch_size to 1",
        ),
        (
            "--data.num_lanes 6",
            "",
            "data.num_lanes: 6 streams cannot be shared evenly by 4 data ranks; set it to 8",
        ),
        ("--parallelism.expert_parallel_degree 8", "", "does not divide the 4 ranks"),
        ("--compile.enable --compile.backend nope", "", "compile.backend = 'nope': torch has no"),
        (
            "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option 9",
            "",
            "selective_ac_option = '9' checkpoints no layer, flavor 'debug' has 3; choose at most that",
        ),
        ("--tokenizer.kind huggingface", "", "tokenizer.path: empty; tokenizer.kind"),
        ("--training.seq_len 48", "", "data.max_vit_tokens: 96 is more than a row holds"),
        ("--data.vae_pixels 60000000", "", "training.seq_len: 384 is too short for one image of"),
        ("--data.vit_pixels 63", "", "data.vit_pixels: 63 pixels hold no token of 8 x 8"),
        ("", "[data]\nmax_row_share = {t2i = 0.01}", "data.max_row_share.t2i: 3 of 384 positions"),
        ("--data.max_vit_tokens 8", BIG + HELD_OUT, "data.max_vit_tokens: 8 is too few for one"),
    ],
)
def test_the_dry_run_says_what_the_run_says(tmp_path, overrides, lines, message):
    arguments = written(tmp_path, *overrides.split(), lines=lines)
    config = with_rows_of_rank(load_job_config(arguments), RANKS)
    said = refusal(check_run, config, RANKS)
    assert message in said
    if "path = " in lines:  # of held-out data; the run would open the files of training first
        config.data = held_out_data(config)
    assert said == refusal(run_refuses, config, RANKS)


def test_what_depends_on_the_machine_of_the_run_is_named_and_not_refused(tmp_path, capsys):
    config, *overrides = written(tmp_path, "--model.attention_backend", "flex")[1:]
    overrides += ["--tokenizer.kind", "huggingface", "--tokenizer.path", "/elsewhere"]
    overrides += ["--checkpoint.initial_load_path", "/elsewhere/step-1", "--sampling.enable"]
    assert show_parallel.main([config, "--ranks", "2", *overrides]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "Not checked, as it depends on the run's machine: the device; files of data and their contents; the tokenizer (/elsewhere is "
        "not here); checkpoints"
    )
    # Without the vocabulary the room for an image is still checked.
    small = [*overrides, "--data.max_vae_tokens", "63"]
    assert show_parallel.main([config, "--ranks", "2", *small]) == 2
    assert "data.max_vae_tokens: 63 is too few for one image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--training.steps -1", "training.steps: must be at least 1, got -1"),
        ("--checkpoint.load_step -2", "checkpoint.load_step: must be at least -1, got -2"),
        ("--losses.flow 1e40", "losses.flow: must be at most 3.4e+38 in size, got 1e+40"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(options, message, capsys):
    assert show_parallel.main([str(DEBUG), *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tflops 400", "--network-gbps and --node-gbps missing; give all of them"),
        (SPEEDS.replace("200", "0"), "--network-gbps 0: must be positive and finite"),
        (f"{SPEEDS} --ranks 12", "--ranks 12: must fill nodes of --ranks-per-node 8"),
        ("--ranks 0", "--ranks 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        show_parallel.main([str(DEBUG), *options.split()])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_seconds_are_printed_with_their_speeds_and_only_if_these_are_given(capsys):
    arguments = [str(DEBUG), "--ranks", "16", "--parallelism.expert_parallel_degree", "4"]
    arguments += ["--training.global_batch_size", "-1", "--json"]
    assert show_parallel.main(arguments) == 0
    assert "seconds" not in capsys.readouterr().out.lower()
    assert show_parallel.main([*arguments, *SPEEDS.split()]) == 0
    *text, line = capsys.readouterr().out.splitlines()
    (said,) = [row for row in text if row.startswith("Seconds of a step")]
    assert said == (
        "Seconds of a step at 400 TFLOP/s, 200 Gbit/s to other nodes and 3600 Gbit/s inside a node of 8 ranks (as given, not measured); "
        "a row of 160 text, 96 vit, 128 vae"
    )
    seconds = json.loads(line)["reports"][0]["seconds_of_a_step"]
    assert seconds["speeds"]["ranks_per_node"] == 8
    parts = [seconds[f"{p}_{d}"] for p in ("compute", "exchange") for d in ("forward", "backward")]
    assert min(parts) > 0 and seconds["total"] == pytest.approx(sum(parts) + seconds["fsdp_waits"])


@pytest.mark.parametrize("name", LARGE)
def test_large_configs_pass_on_8_to_512_ranks(name, monkeypatch):
    """All checks; and for the most ranks the parallel model, with two layers of each kind: shards are those of any number of layers."""
    original = show_parallel.model_args

    def shallow(config):
        args = original(config)
        vit = replace(args.vit, num_layers=2, deepstack=(1,) if args.vit.deepstack else ())
        return replace(args, num_layers=args.num_dense_layers + 2, vit=vit)

    monkeypatch.setattr(show_parallel, "model_args", shallow)
    shipped = load_job_config(["--job.config_file", str(CONFIGS / f"{name}.toml")])
    for num_ranks, rows in ((8, 4), (64, 4), (128, 4), (256, 2), (512, 1)):
        config = with_rows_of_rank(shipped, num_ranks)
        assert config.training.local_batch_size == rows
        assert "the device" in check_run(config, num_ranks)
    values = show_parallel.report(config, 512)
    assert values["micro_batches"] == 1 and values["mesh"]["expert"] == 8
    held = sum(prod(row["local"]) * row["count"] for row in values["parameters"])
    assert 0 < values["last_rank_parameters"] <= held


def test_a_rank_takes_no_more_rows_than_it_has(tmp_path):
    config = load_job_config(written(tmp_path))  # 4 rows a step, 2 at once
    assert with_rows_of_rank(config, 2) is config
    assert with_rows_of_rank(config, 4).training.local_batch_size == 1
    assert config.training.local_batch_size == 2
    assert with_rows_of_rank(config, 8) is config and "set it to 16" in refusal(
        check_run, config, 8
    )


@pytest.mark.parametrize(
    ("key", "folder", "why"),
    [
        ("job.dump_folder", "{}/file/run", "Not a directory"),
        ("job.dump_folder", "/proc/x", "No such file or directory"),
        ("job.dump_folder", "{}/" + "x" * 300, "File name too long"),
        ("checkpoint.folder", "{}/file", "Not a directory"),
        ("metrics.save_tb_folder", "../file", "Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, key, folder, why):
    """By a run before anything is built, and by its dry run; neither leaves anything behind."""
    (tmp_path / "file").write_text("")
    options = [f"--{key}", folder.format(tmp_path)]
    if key != "job.dump_folder":
        options += ["--job.dump_folder", str(tmp_path / "run")]
    config = load_job_config(written(tmp_path, *options))
    before = set(tmp_path.rglob("*"))
    for told in (refusal(check_job, config), refusal(check_run, config, 1)):
        assert told.startswith(f"{key}: nothing can be written into") and why in told
    assert set(tmp_path.rglob("*")) == before


def test_what_this_account_may_not_write_another_machine_may(tmp_path, monkeypatch):
    """A read-only disk is refused by the run alone, and a full one is no mistake in the config."""
    config = load_job_config(written(tmp_path, "--job.dump_folder", str(tmp_path / "run")))
    for number, raised in ((errno.EROFS, ValueError), (errno.ENOSPC, DiskFull)):

        def refuse(dir, number=number):  # noqa: A002 - the name that tempfile gives it
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(raised, match=os.strerror(number)):
            check_job(config)
        assert check_run(config, 1)
