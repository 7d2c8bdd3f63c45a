"""The commands of a study: what is called for each seed, in which order, with arguments that the commands take. No process is started."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from symbiotic_titan.commands import convert, evaluate, make_demo_data, profile_experts, reproduce
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.study import stages
from symbiotic_titan.study.queue import Queue
from symbiotic_titan.study.stages import Scale, all_stages, bytes_of, keep_scores, systems_of
from tests.helpers.documented import documented
from tests.helpers.written_studies import write_system

OUT = Path("outputs/compared")
TRAINED = {
    *("symbiotic", "standard_moe", "standard_moe_two_rates", "mot", "only_lm_mmu"),
    *("wo_shield", "shield_weights", "wo_shared_expert"),
}
SPLITS = {
    *("bimodal_8_24", "bimodal_16_16", "bimodal_22_10"),
    *("tripartite_8_8_16", "tripartite_11_11_10"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder: what the command writes is relative to it, and the configs are those of the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")


def made(*systems, seeds=(0, 1), scale=None):
    """Name -> stage."""
    found = all_stages(OUT, seeds, list(systems), scale or Scale())
    return {stage.name: stage for stage in found}


def words_after(stage, word):
    return stage.command[stage.command.index(word) + 1]


def options_of(stage):
    """The overrides of a training command."""
    words = stage.command[5:]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_systems_are_those_of_the_paper_and_its_splits():
    systems = systems_of()
    assert {name for name, run in systems.items() if run.steps} == TRAINED | {"vlm"}
    assert {name for name, run in systems.items() if not run.steps} == SPLITS


def test_all_stages_of_a_seed_are_in_an_order_that_a_queue_can_keep():
    found = made(*sorted(TRAINED | SPLITS), seeds=(3, 5))
    Queue(list(found.values()), 2)
    seen = set()
    for stage in found.values():
        assert seen.issuperset(stage.needs)
        assert all(need.split("/")[0] == stage.name.split("/")[0] for need in stage.needs)
        seen.add(stage.name)
    of_seed = {name.removeprefix("seed-3/") for name in found if name.startswith("seed-3/")}
    assert {f"{name}/train" for name in TRAINED | {"vlm"}} < of_seed
    assert {f"{name}/evaluate" for name in TRAINED | {"vlm"}} < of_seed
    for what in ("check", "answers"):
        assert {f"{name}/{what}" for name in TRAINED | SPLITS} < of_seed
    assert not {f"{name}/train" for name in SPLITS} & of_seed
    assert len(found) == 2 * len(of_seed)


def test_systems_wait_for_the_start_that_they_share():
    found = made("symbiotic", "mot", "standard_moe")
    assert found["seed-1/24_8/plan"].needs == ("seed-1/profile",)
    assert found["seed-1/symbiotic/check"].needs == ("seed-1/24_8/partition",)
    assert found["seed-1/mot/check"].needs == ("seed-1/24_8/partition",)
    assert found["seed-1/standard_moe/check"].needs == ("seed-1/vlm/train",)
    assert found["seed-1/mot/train"].needs == ("seed-1/mot/check",)
    assert found["seed-1/mot/evaluate"].needs == ("seed-1/mot/train",)
    assert len([name for name in found if name.endswith("partition")]) == 2  # one per seed


def test_a_seed_has_its_own_data_weights_order_and_folders():
    for seed in (0, 1):
        train = made("symbiotic")[f"seed-{seed}/symbiotic/train"]
        options = options_of(train)
        assert options["--debug.seed"] == options["--data.seed"] == str(seed)
        config = load_job_config(["--job.config_file", train.command[4], *train.command[5:]])
        folder = f"{OUT}/seed-{seed}"
        assert config.job.dump_folder == f"{folder}/symbiotic"
        assert config.checkpoint.initial_load_path == f"{folder}/start/24_8"
        paths = [row.path for row in (*config.data.sources, *config.validation.sources)]
        assert paths and all(path.startswith(f"{folder}/data/") for path in paths)
        assert train.result == Path(folder, "symbiotic/checkpoint/step-450/.metadata")


@pytest.mark.parametrize(
    ("what", "file"), [("check", "before.json"), ("answers", "scores_before.json")]
)
def test_systems_that_begin_with_the_same_model_share_its_losses_and_answers(what, file):
    found = made("symbiotic", "wo_shield", "only_lm_mmu", "mot", "standard_moe")
    measured = {n.split("/")[1] for n, s in found.items() if n.endswith(what) and s.command}
    assert measured == {"symbiotic", "mot", "standard_moe"}
    copied = found[f"seed-0/wo_shield/{what}"]
    assert copied.needs == (f"seed-0/symbiotic/{what}",)
    report = OUT / "seed-0/symbiotic" / file
    report.parent.mkdir(parents=True)
    report.write_text("{}")
    copied.finish()
    assert copied.result.read_text() == "{}"


def test_a_start_is_asked_with_the_config_of_the_system_that_begins_with_it():
    found = made("symbiotic", "mot", "standard_moe", seeds=[0])
    starts = {"symbiotic": "start/24_8", "mot": "start/24_8"}
    starts["standard_moe"] = "vlm/checkpoint/step-1500"
    for name, start in starts.items():
        stage = found[f"seed-0/{name}/answers"]
        assert stage.command[4] == str(OUT / "seed-0" / start)
        assert Path(words_after(stage, "--config")).stem == name
        asked = {k: words_after(stage, f"--demo_world.{k}") for k in ("questions", "pictures")}
        assert asked == {"questions": "300", "pictures": "0"}


def test_the_commands_take_their_arguments(monkeypatch):
    found = made("symbiotic", "standard_moe", seeds=(0,))
    parser = convert.parser()
    for stage in found.values():
        command, rest = stage.command[3:4], list(stage.command[4:])
        if command == ("convert",):
            options, overrides = parser.parse_known_args(rest)
            assert options.config.startswith(str(OUT)) and Path(options.config).is_file()
            load_job_config(["--job.config_file", options.config, *overrides])
        elif command == ("evaluate",):
            options, sections = evaluate.parse(rest)
            assert options.suite == ["demo_world"] and "--demo_world.data" in sections
    read = {}

    def profile_run(options, overrides):
        read["profile"] = options.checkpoint, overrides
        raise ValueError("not run")

    def write(out, seed, size, advance):
        read["data"] = seed, size.questions

    monkeypatch.setattr(profile_experts, "run", profile_run)
    monkeypatch.setattr(make_demo_data, "write_world", write)
    assert profile_experts.main(list(found["seed-0/profile"].command[4:])) == 2
    assert make_demo_data.main(list(found["seed-0/data"].command[4:])) == 0
    assert read["profile"] == (OUT / "seed-0/vlm/checkpoint/step-1500", [])
    assert read["data"] == (0, 300)


def test_a_system_without_target_images_is_not_asked_for_pictures():
    found = made("symbiotic", "only_lm_mmu")
    pictures = {
        name: words_after(found[f"seed-0/{name}/evaluate"], "--demo_world.pictures")
        for name in ("symbiotic", "only_lm_mmu")
    }
    assert pictures == {"symbiotic": "32", "only_lm_mmu": "0"}


def test_the_shared_expert_of_two_systems_is_scored_alone():
    stages = made("symbiotic", "only_lm_mmu", "mot", seeds=[0])
    alone = {name: stage for name, stage in stages.items() if name.endswith("shared_only")}
    assert set(alone) == {f"seed-0/{name}/shared_only" for name in ("symbiotic", "only_lm_mmu")}
    stage = alone["seed-0/symbiotic/shared_only"]
    assert stage.result == OUT / "seed-0/symbiotic/scores_shared_only.json"
    assert words_after(stage, "--probe") == "shared_only"
    assert words_after(stage, "--demo_world.pictures") == "0"
    evaluated = stages["seed-0/symbiotic/evaluate"]
    assert words_after(stage, "--out") != words_after(evaluated, "--out")


def test_fewer_steps_shorten_the_pre_training_too_and_move_the_start():
    found = made("standard_moe", "symbiotic", scale=Scale(steps=90))
    assert options_of(found["seed-0/vlm/train"])["--training.steps"] == "300"
    train = options_of(found["seed-0/standard_moe/train"])
    vlm = f"{OUT}/seed-0/vlm/checkpoint/step-300"
    assert (train["--training.steps"], train["--checkpoint.initial_load_path"]) == ("90", vlm)
    assert "--checkpoint.initial_load_path" not in options_of(found["seed-0/symbiotic/train"])
    assert words_after(found["seed-0/24_8/partition"], "--checkpoint") == vlm


@pytest.mark.parametrize(
    ("scale", "starts"),
    [(Scale(), [151, 1201]), (Scale(steps=90), [31, 241]), (Scale(factor=2), [301, 2401])],
)
def test_the_mixture_of_the_pre_training_changes_where_the_scale_has_it(scale, starts):
    train = made("symbiotic", seeds=[0], scale=scale)["seed-0/vlm/train"]
    config = load_job_config(["--job.config_file", words_after(train, "train")])
    changes = [{"reading": 0, "mmu": 1}, {"lm": 1.5}]
    found = [(stage.from_step, stage.weights) for stage in config.data.stages]
    assert found == list(zip(starts, changes, strict=True))


@pytest.mark.parametrize("name", ["symbiotic", "standard_moe"])
def test_a_scale_multiplies_steps_warm_up_shield_rows_and_what_they_read(name):
    scaled = made(name, scale=Scale(factor=4))
    stage, before = scaled[f"seed-0/{name}/train"], systems_of()[name]
    config = load_job_config(["--job.config_file", stage.command[4], *stage.command[5:]])
    assert config.training.steps == 4 * before.steps and stage.steps == 1800
    assert config.training.global_batch_size == config.training.local_batch_size == 4 * before.rows
    assert config.lr_scheduler.warmup_steps == 400
    assert config.shielding.steps == 4 * before.shield_steps
    assert words_after(scaled["seed-0/data"], "--questions") == "4800"
    assert "--questions" not in made(name)["seed-0/data"].command


def test_scores_are_kept_and_of_a_finished_run_its_last_checkpoint():
    run = OUT / "seed-0/mot"
    for step in (200, 400, 600):
        (run / f"checkpoint/step-{step}").mkdir(parents=True)
    scores = run / "evaluation/mot-step-600-abc/demo_world-0123abcd.json"
    scores.parent.mkdir(parents=True)
    scores.write_text(json.dumps({"scores": 1}))
    keep_scores(run / "checkpoint/step-600", run / "evaluation", run / "scores.json")
    assert json.loads((run / "scores.json").read_text()) == {"scores": 1}
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-600"]


# ---- what the command refuses ---------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """(runs the command, the stages that it would have run)."""
    ran = []
    monkeypatch.setattr(Queue, "run", lambda self: ran.append(self))
    monkeypatch.setattr(reproduce, "write_page", lambda out: None)
    return lambda *words: reproduce.main([*words, "--out", str(OUT)]), ran


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds: intervals over seeds need at least 2, got 1; give more"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 is given twice; every seed is another sample"),
        (["--seeds", "-1", "2"], "--seeds: must not be negative, got -1"),
        (["symbiosis"], "no system named symbiosis; choose from mot, only_lm_mmu"),
        (["vlm"], "no system named vlm; choose from mot"),
        (["mot", "--page-only", "--steps", "3"], "--page-only: shows what is in --out"),
        (["--page-only", "--at-once", "33"], "has no use for at-once; leave that out"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_built(command, capsys, words, message):
    main, ran = command
    assert main(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not ran and not OUT.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mot", "--steps", "60"], "with steps = 0, now it is 60; name another folder"),
        (["mot", "--scale", "2"], "with scale = 1, now it is 2"),
        (["mot", "--seeds", "0", "1"], "with seeds = 0 1 2, now it is 0 1"),
        (["symbiotic"], "with systems = mot, now it is symbiotic"),
    ],
)
def test_a_study_begun_with_other_settings_is_refused_and_the_same_goes_on(
    command, capsys, words, message
):
    main, ran = command
    assert main("mot") == 0 and main("mot", "--seeds", "2", "0", "1", "--at-once", "1") == 0
    assert [queue.at_once for queue in ran][1:] == [1]
    assert main(*words) == 2
    error = capsys.readouterr().err
    assert message in error and "settings.json" in error and error.count("\n") == 1
    assert len(ran) == 2


@pytest.mark.parametrize(
    "line", sorted({str(c) for c in documented() if c.words[:2] == ("symbiotic", "reproduce")})
)
def test_a_documented_study_has_the_stages_of_its_systems_and_seeds(line, command, tmp_path):
    """The whole of it, at toy size: tests/integration/test_reproduce.py."""
    _, ran = command
    words = line.split()[2:]
    assert reproduce.main(words) == 0
    options = reproduce.build_parser().parse_args(words)
    if options.page_only:
        assert not ran
        return
    (queue,) = ran
    named = {name.name.split("/")[1] for name in queue.stages if name.name.endswith("/check")}
    assert named == set(options.systems or TRAINED | SPLITS)
    folders = {stage.name.split("/")[0] for stage in queue.stages}
    assert folders == {f"seed-{seed}" for seed in options.seeds}
    assert (tmp_path / options.out / "settings.json").is_file()


def test_a_page_can_be_written_again_and_nothing_is_run(monkeypatch, capsys):
    monkeypatch.setattr(Queue, "run", lambda self: pytest.fail("a stage was run"))
    assert reproduce.main(["--page-only", "--out", str(OUT)]) == 2
    assert "no study (no folder seed-0" in capsys.readouterr().err
    for seed in (0, 1):
        write_system(OUT / f"seed-{seed}/mot", before={"text": 1.0 + seed})
    assert reproduce.main(["--page-only", "--out", str(OUT)]) == 0
    page = capsys.readouterr().out.strip()
    assert page == str(OUT / "page/index.html")
    assert "seed 1, mot: has no curves" in Path(page).read_text()


def test_a_study_knows_its_configs_by_their_values(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text("[training]\nsteps = 1\n")
    monkeypatch.setattr(stages, "FOLDER", tmp_path)
    before = stages.configs_hash()
    (tmp_path / "a.toml").write_text("# shorter\n[training]\nsteps = 1\n")
    assert stages.configs_hash() == before
    (tmp_path / "a.toml").write_text("[training]\nsteps = 2\n")
    assert stages.configs_hash() != before


def test_a_changed_config_is_other_settings(command, capsys, monkeypatch):
    main, _ = command
    assert main("mot") == 0
    monkeypatch.setattr(reproduce, "configs_hash", lambda: "another")
    assert main("mot") == 2
    assert "begun there with other configs in train_configs/study" in capsys.readouterr().err


def test_a_disk_without_room_is_one_line(command, capsys, monkeypatch):
    main, ran = command
    usage = SimpleNamespace(free=10**6)
    monkeypatch.setattr(reproduce.shutil, "disk_usage", lambda path: usage)
    assert main("mot") == 3
    error = capsys.readouterr().err
    assert "MB more, its disk has 1 MB; free some space" in error and error.count("\n") == 1
    assert not ran and not (OUT / "settings.json").exists()


def test_three_seeds_are_estimated_at_two_hours_on_two_cores():
    """A run took as long: benchmarks/reproduce_cpu-2core-avx2_202611.md."""
    found = made(*sorted(TRAINED | SPLITS), seeds=(0, 1, 2))
    assert 100 * 60 < sum(stage.seconds for stage in found.values()) / 2 < 130 * 60


def test_bytes_grow_with_seeds_and_systems():
    systems = systems_of()
    both = [systems["symbiotic"], systems["standard_moe"]]
    one, two, more = bytes_of(1, both, 2), bytes_of(2, both, 2), bytes_of(1, [*both, systems["mot"]], 2)  # fmt: skip
    assert one < more < two < 2 * one
    assert more - one == stages.MODEL_CHECKPOINT + stages.LOGS  # its split is there
    assert two < 10**9


def test_the_environment_divides_the_cores(monkeypatch):
    monkeypatch.setattr(reproduce, "cores", lambda: 8)
    assert [reproduce.environment(n)["OMP_NUM_THREADS"] for n in (1, 2, 8, 16)] == list("8411")
