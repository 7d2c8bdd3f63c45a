"""What was saved before this layout still loads: a run of commit d603279, its profile and its plan.

``tests/fixtures/run_d603279`` was written by the code of that commit, with ``make.sh`` in it: three steps of a model of 28,224
parameters on data beside it, and in ``expected.json`` what that code computed from there: the losses of the next three
steps, the keys of the state that it saved after them, digests of the exported weights, and a generated text.
"""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from symbiotic_titan import cli
from tests.helpers.launch import ROOT, Run, train

FIXTURE = ROOT / "tests" / "fixtures" / "run_d603279"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


def copy_run(folder: Path) -> Path:
    """The run's folder, with its checkpoint unpacked, where a test may write."""
    folder.mkdir()
    shutil.copy(FIXTURE / "config.toml", folder)
    with tarfile.open(FIXTURE / "checkpoint.tar.xz") as archive:
        # Python 3.11.3 and older have no filters, 3.12 wants one.
        archive.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    return folder


def resume(folder: Path, *options: str) -> Run:
    arguments = ["--job.config_file", str(folder / "config.toml"), "--training.steps", "6"]
    arguments += ["--job.dump_folder", str(folder), *options]
    # From the root: the config names its data and its model relative to it.
    return train(folder, arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return copy_run(tmp_path_factory.mktemp("older") / "run")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Run:
    run = resume(copy_run(tmp_path_factory.mktemp("resumed") / "run"))
    assert run.status == 0, run.text[-3000:]
    return run


@pytest.mark.parametrize("metric", EXPECTED["losses"])
def test_the_next_steps_give_the_losses_of_the_code_that_saved_it(resumed, metric):
    expected = {int(step): value for step, value in EXPECTED["losses"][metric].items()}
    # The same bits on the CPU that wrote the fixture; another one may round differently.
    assert resumed.scalars(metric) == pytest.approx(expected, rel=1e-6)


def test_the_state_keeps_its_keys(resumed):
    saved = FileSystemReader(resumed.folder / "checkpoint" / "step-6").read_metadata()
    assert sorted(saved.state_dict_metadata) == EXPECTED["state_keys"]


def test_the_weights_are_exported_under_their_names(run, tmp_path):
    step = run / "checkpoint" / "step-3"
    words = ["to-hf", "--checkpoint", step, "--part", "whole", "--out", tmp_path / "whole"]
    assert cli.main(["convert", *map(str, words)]) == 0
    tensors = {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
        for path in (tmp_path / "whole").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert tensors == EXPECTED["whole"]


def test_the_model_generates_the_text_it_did(run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["text", "--run", run, "--prompt", EXPECTED["text"]["prompt"], "--plain"]
    words += ["--max-tokens", EXPECTED["text"]["tokens"], "--out", tmp_path]
    assert cli.main(["generate", *map(str, words)]) == 0
    assert json.loads((tmp_path / "texts.jsonl").read_text()) == EXPECTED["text"]


def plan_from(profile: Path, out: Path) -> int:
    config = FIXTURE / "config.toml"
    words = ["plan", "--config", config, "--profile", profile, "--out", out]
    return cli.main(["convert", *map(str, words)])


def test_the_profile_gives_the_plan_it_gave(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert plan_from(FIXTURE / "profile.json", tmp_path / "plan.json") == 0
    made, kept = (json.loads((f / "plan.json").read_text()) for f in (tmp_path, FIXTURE))
    # Keys of groups with a top-k and sources of their own, which are younger.
    assert made["model"].pop("top_ks") == {}
    assert [(g.pop("pool"), g.pop("copy")) for g in made["groups"].values()] == [("all", False)] * 2
    assert made | {"profile": kept["profile"]} == kept


def test_the_plan_is_read_and_refused_for_another_model(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["partition", "--config", run / "config.toml", "--plan", FIXTURE / "plan.json"]
    words += ["--checkpoint", run / "checkpoint" / "step-3", "--out", tmp_path / "split"]
    assert cli.main(["convert", *map(str, words)]) == 2
    # It was made for the pool; this run's experts are in groups already.
    assert "understanding" in capsys.readouterr().err
    assert not (tmp_path / "split").exists()


def test_a_profile_of_another_kind_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert plan_from(FIXTURE / "model.json", tmp_path / "plan.json") == 2
    assert "model.json" in capsys.readouterr().err


def test_a_run_of_another_model_or_other_data_is_not_resumed(tmp_path):
    folder = copy_run(tmp_path / "run")
    shape = json.loads((FIXTURE / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(shape | {"dense_hidden_dim": 24}))
    for options, words in (
        (["--model.flavor", str(tmp_path / "model.json")], "layers.0"),
        (["--training.seq_len", "256"], "training.seq_len was 128, now it is 256"),
    ):
        refused = resume(folder, *options)
        assert refused.status == 2, refused.text[-3000:]
        assert words in refused.text and "Traceback" not in refused.text
