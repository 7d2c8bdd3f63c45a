"""Profile, plan, partition and check as a user runs them, on a model of initial weights and the demo data."""

import copy
import json
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp

from symbiotic_titan.commands import convert, profile_experts
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.weights.new_folder import MANIFEST
from symbiotic_titan.weights.reader import CastingReader
from symbiotic_titan.weights.safetensors import slices_in
from tests.helpers.launch import ROOT
from tests.helpers.released_models import ARIA, QWEN, write_release

HELD_OUT = """
[[validation.sources]]
name = "lm"
task = "lm"
format = "jsonl"
path = "DEMO/heldout/lm/lm-*.jsonl"
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory, demo):
    """Folder with ``split.toml`` (12 / 4), ``pool.toml``, and ``vlm``, a checkpoint of the pool."""
    folder = tmp_path_factory.mktemp("study")
    text = (ROOT / "train_configs" / "debug.toml").read_text().replace("demo_data/", f"{demo}/")
    (folder / "split.toml").write_text(text + HELD_OUT.replace("DEMO", str(demo)))
    before, rest = text.split("[experts.partition.understanding]")
    (folder / "pool.toml").write_text(before + "[optimizer]" + rest.split("[optimizer]", 1)[1])
    args = model_args(load_job_config(["--job.config_file", str(folder / "pool.toml")]))
    model = SymbioticModel(args)
    model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=str(folder / "vlm"), no_dist=True)
    return folder


def run(main, *words) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def profile(study):
    path = study / "profile.json"
    run(
        profile_experts.main,
        *("--config", study / "pool.toml", "--checkpoint", study / "vlm", "--out", path),
        *("--batches", 3),
    )
    return path


def started(study, profile, rule) -> tuple[dict, dict]:
    """(plan, report of the check) of the model partitioned by ``rule``."""
    plan, out, report = (study / f"{rule}{end}" for end in (".json", "", ".report.json"))
    config = ("--config", study / "split.toml")
    run(convert.main, "plan", *config, "--profile", profile, "--rule", rule, "--out", plan)
    source = ("--checkpoint", study / "vlm")
    run(convert.main, "partition", *config, *source, "--plan", plan, "--out", out)
    run(
        convert.main,
        *("check", *config, "--checkpoint", out, "--original", study / "vlm"),
        *("--split", "train", "--batches", 3, "--json", report),
    )
    return json.loads(plan.read_text()), json.loads(report.read_text())


def test_profile_counts_every_choice_of_text_and_vit_tokens(profile):
    values = json.loads(profile.read_text())
    assert values["layers"] == ["layers.1", "layers.2"] and values["model"]["flavor"] == "debug"
    assert [source["task"] for source in values["data"]["sources"]] == ["lm", "mmu"]
    assert values["tokens"]["text"] > 0 and values["tokens"]["vit"] > 0
    for layer in values["counts"]:
        chosen = [sum(row) for row in layer]
        assert chosen == [2 * values["tokens"][name] for name in ("text", "vit", "vae")]
    assert values["tokens"]["vae"] == 0


def test_the_plan_by_use_keeps_more_than_a_plan_by_lot(study, profile):
    (plan, report), (lot, control) = (
        started(study, profile, rule) for rule in ("cumulative", "random")
    )
    kept, kept_by_lot = (p["kept"][0]["mean"] for p in (plan, lot))
    assert kept > kept_by_lot
    assert report["columns"].keys() == {"original", "partitioned", "shared_only"}
    assert report["columns"]["original"] == control["columns"]["original"]
    text = report["columns"]["partitioned"]
    assert {"text", "by_task/lm_text", "by_task/mmu_text", "accuracy/mmu"} <= text.keys()
    inside, inside_by_lot = (sum(r["inside"]["text"]) for r in (report, control))
    assert inside > inside_by_lot
    # The rows that were profiled are the rows that are checked: mass kept and tokens kept belong together.
    assert all(0 < share < 1 for share in report["inside"]["text"])


def test_a_model_without_its_shared_expert_is_checked_against_the_whole(study, profile, capsys):
    out = study / "without_shared"
    config = ("--config", study / "pool.toml", "--experts.no_shared")
    run(convert.main, "partition", *config, "--checkpoint", study / "vlm", "--out", out)
    assert "dropped 49,152" in capsys.readouterr().out
    check = ("check", *config, "--checkpoint", out, "--original", study / "vlm", "--batches", 1)
    run(convert.main, *check)
    table = capsys.readouterr().out
    assert "original   partitioned    difference" in table and "shared_only" not in table


@pytest.fixture(scope="module")
def release(study):
    """Folder of a tiny Qwen3-VL that fits the debug config: its vocabulary, its 16 experts."""
    config = copy.deepcopy(QWEN)
    config["text_config"] |= {"vocab_size": 320, "num_experts": 16}
    write_release(study / "release", config)
    (study / "shape").mkdir()
    (study / "shape" / "model.json").touch()
    return study / "release"


@pytest.fixture(scope="module")
def aria(study):
    """Folder of a tiny Aria that fits the debug config: images of 8 patches a side, which six queries read."""
    config = copy.deepcopy(ARIA)
    config["text_config"] |= {"vocab_size": 320, "moe_num_experts": 16}
    config["projector_patch_to_query_dict"] = {"64": 6}
    write_release(study / "aria", config)
    return study / "aria"


@pytest.mark.parametrize(
    ("family", "experts"), [("release", "num_experts"), ("aria", "moe_num_experts")]
)
def test_a_release_is_profiled_split_checked_and_given_back(
    study, request, capsys, family, experts
):
    """Its tensors are read where they are: no import in between."""
    release = request.getfixturevalue(family)
    shape, profile, plan, split, half = (
        study / f"{family}.{end}" for end in ("shape", "profile.json", "plan.json", "split", "half")
    )
    run(convert.main, "from-hf", "--hf", release, "--out", shape, "--shape-only")
    flavor = ("--model.flavor", shape / "model.json", "--shielding.steps", 0)
    flavor = (*flavor, "--shielding.after_scale", 1.0)  # Qwen3-VL has no shared expert to shield
    groups, read = ("--config", study / "split.toml", *flavor), ("--checkpoint", release)
    run(profile_experts.main, *groups, *read, "--out", profile, "--batches", 2)
    run(convert.main, "plan", *groups, "--profile", profile, "--out", plan)
    run(convert.main, "partition", *groups, *read, "--plan", plan, "--out", split)
    capsys.readouterr()
    check = ("check", *groups, "--checkpoint", split, "--original", release, "--batches", 2)
    run(convert.main, *check, "--split", "train")
    assert "share of tokens whose top-k stays inside the group" in capsys.readouterr().out
    out = ("--checkpoint", split, "--part", "understanding", "--out", half)
    run(convert.main, "to-hf", *groups, *out, "--shard-size", "20kB")
    again = (*out[:-1], study / f"{family}.half again", "--shard-size", "20kB")
    run(convert.main, "to-hf", *again)  # in the shape that lies in the checkpoint
    files = {path.name: path.read_bytes() for path in half.glob("*.*") if path.name != MANIFEST}
    assert files == {name: (again[-3] / name).read_bytes() for name in files}
    assert "left out:" in capsys.readouterr().out
    config = json.loads((half / "config.json").read_text())
    assert config["text_config"][experts] == 12
    assert len(list(half.glob("model-*.safetensors"))) > 1 and (half / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("from-hf --hf VLM --out X", "vlm has no config.json"),
        ("from-hf --hf RELEASE --out X --training.steps 3", "no use for --training.steps 3"),
        ("from-hf --hf org/name --out X", "--hf: org/name: no such folder; give the local folder"),
        ("from-hf --hf RELEASE --out RELEASE --overwrite", "release, which this command reads"),
        (
            "partition --config POOL --checkpoint VLM --out VLM --overwrite",
            "vlm, which this command reads",
        ),
        (
            "to-hf --config POOL --checkpoint VLM --part whole --out VLM --overwrite",
            "vlm, which this command reads",
        ),
        ("to-hf --checkpoint SHAPE --part whole --out X", "shape holds a shape only; name the"),
        ("partition --config POOL --checkpoint SHAPE --out X", "shape holds a shape only"),
        ("check --config POOL --checkpoint VLM --original SHAPE", "--original: .*holds a shape"),
        ("partition --config POOL --checkpoint RELEASE --out X", "convert from-hf --shape-only"),
        ("plan --config SPLIT --profile PROFILE --out PROFILE", "profile.json, which this command"),
        ("plan --config SPLIT --profile PROFILE --out VLM", "vlm cannot be written"),
        ("check --config POOL --checkpoint VLM --json VLM", "--json: .*vlm cannot be written"),
        ("check --config POOL --checkpoint VLM --json POOL", "pool.toml, which this command reads"),
        ("to-hf --config SPLIT --checkpoint VLM --part whole --out X", "has the expert groups all"),
        (
            "to-hf --config POOL --checkpoint VLM --part understanding --out X",
            "nothing says which released architecture the model has",
        ),
        (
            "to-hf --config POOL --checkpoint VLM --part whole --out X --shard-size lots",
            "--shard-size: must be a size such as 5GB or 500MB, got 'lots'",
        ),
        ("plan --config POOL --profile PROFILE --out X", "has no [experts.partition]"),
        ("plan --config SPLIT --profile NONE --out X", "expert profile: no such file"),
        ("plan --config SPLIT --profile PROFILE --out X --rule best", "choose from cumulative"),
        ("partition --config SPLIT --checkpoint VLM --out X", "--plan must say which expert"),
        ("check --config SPLIT --checkpoint VLM", "has the expert groups all"),
        ("check --config SPLIT --checkpoint VLM --batches 0", "--batches: must be at least 1"),
        (
            "check --config SPLIT --checkpoint VLM --original-config POOL",
            "--original-config has no effect without --original",
        ),
        (
            "partition --config POOL --checkpoint VLM --out X --model.flavor huge",
            "unknown flavor 'huge'",
        ),
    ],
)
def test_mistakes_are_one_line(study, profile, release, capsys, words, message):
    names = {"POOL": "pool.toml", "SPLIT": "split.toml", "PROFILE": "profile.json", "VLM": "vlm"}
    names |= {"RELEASE": release.name, "SHAPE": "shape"}
    line = [str(study / names.get(w, w)) if w.isupper() else w for w in words.split()]
    assert convert.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error or re.search(message, error)
    assert not (study / "X").exists()


@pytest.mark.parametrize(
    "words",
    [
        "from-hf --hf R --out X",
        "plan --config C --profile P --out X",
        "partition --config C --checkpoint V --out X",
        "to-hf --checkpoint V --part whole --out X",
    ],
)
def test_commands_that_run_in_one_process_refuse_several(monkeypatch, capsys, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert convert.main(words.split()) == 2
    error = capsys.readouterr().err
    assert f"{words.split()[0]} runs in one process, got WORLD_SIZE = 2; start it without" in error


def test_an_interruption_is_one_line(release, tmp_path, monkeypatch, capsys):
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(CastingReader, "read", interrupted)
    assert convert.main(["from-hf", "--hf", str(release), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == f"interrupted; nothing of {tmp_path / 'out'} was kept\n"
    assert not list(tmp_path.iterdir())


def test_what_was_imported_goes_back_with_the_shape_beside_it(release, tmp_path, capsys):
    imported, back = tmp_path / "imported", tmp_path / "back"
    run(convert.main, "from-hf", "--hf", release, "--out", imported)
    assert (
        f"symbiotic convert partition --checkpoint {imported} --config" in capsys.readouterr().out
    )
    to_hf = ("to-hf", "--checkpoint", imported, "--part", "understanding", "--out", back)
    assert convert.main([*map(str, to_hf), "--training.steps", "3"]) == 2
    assert "no use for --training.steps 3 without --config" in capsys.readouterr().err
    run(convert.main, *to_hf)
    places, expected = slices_in(back), slices_in(release)
    assert places.keys() == expected.keys()
    assert all(torch.equal(places[n].read(), expected[n].read()) for n in expected)


def test_the_original_of_another_model_is_refused(study, profile, tmp_path, capsys):
    config, split = ("--config", study / "split.toml"), tmp_path / "split"
    run(convert.main, "plan", *config, "--profile", profile, "--out", tmp_path / "plan.json")
    source = ("--checkpoint", study / "vlm", "--plan", tmp_path / "plan.json")
    run(convert.main, "partition", *config, *source, "--out", split)
    stranger = {n: t + 1 for n, t in vlm_state(study).items()}
    dcp.save(stranger, checkpoint_id=str(tmp_path / "stranger"), no_dist=True)
    check = ("check", *config, "--checkpoint", split, "--original", tmp_path / "stranger")
    assert convert.main([str(word) for word in check]) == 2
    assert "is of another model: its routers have hash" in capsys.readouterr().err


def vlm_state(study) -> dict[str, torch.Tensor]:
    stored = open_model(study / "vlm")
    return {name: stored.read(name) for name in stored.tensors}


def test_profiling_without_text_sources_is_a_mistake(study, tmp_path, capsys):
    config = tmp_path / "images.toml"
    text = (study / "pool.toml").read_text()
    for task in ("lm", "mmu"):
        text = text.replace(f'task = "{task}"', 'task = "t2i"')
    config.write_text(text)
    arguments = ["--config", str(config), "--checkpoint", str(study / "vlm"), "--out", "x.json"]
    assert profile_experts.main(arguments) == 2
    assert "[[data.sources]]: none has the task lm or mmu" in capsys.readouterr().err
    assert profile_experts.main([*arguments, "--batches", "0"]) == 2
    assert "--batches: must be at least 1, got 0" in capsys.readouterr().err


def test_a_missing_held_out_file_is_told_with_its_table(study, tmp_path, capsys):
    config = tmp_path / "moved.toml"
    before, table, after = (study / "split.toml").read_text().partition("[[validation.sources]]")
    config.write_text(before + table + after.replace("heldout", "moved", 1))
    arguments = ["--config", str(config), "--checkpoint", str(study / "vlm"), "--out", "x.json"]
    assert profile_experts.main([*arguments, "--split", "validation"]) == 2
    assert "[[validation.sources]] #1 (lm): no file matches" in capsys.readouterr().err


def test_the_config_of_the_split_model_profiles_the_unsplit_one_on_held_out_rows(study, profile):
    config, vlm, out = study / "split.toml", study / "vlm", study / "heldout.json"
    run(
        profile_experts.main,
        *("--config", config, "--checkpoint", vlm, "--out", out, "--split", "validation"),
        *("--batches", 1),
    )
    values = json.loads(out.read_text())
    assert [source["path"] for source in values["data"]["sources"]][0].endswith("lm-*.jsonl")
    assert values["tokens"]["vit"] == 0 and torch.tensor(values["counts"])[:, 1].sum() == 0
