"""The benchmark of a start divides it into stages, adds up all processes of it, and times the real command."""

import json
import os
import subprocess
import sys

import pytest
import startup
import step_commits

from symbiotic_titan.demo.write import WorldSize, write_world
from tests.helpers.structure import ROOT

TOY = ["--training.seq_len", "160", "--data.too_long", "skip", "--data.max_vae_tokens", "64"]
LINES = {
    "imports": "[titan] 12:00 - root - INFO - Starting job",
    "build": "[titan] 12:00 - root - INFO - Trainer is initialized with",
    "resume": "[titan] 12:00 - root - INFO - Training starts at step 1",
    "first_loss": "[titan] 12:00 - root - INFO - step:  1  text: 6.1",
}


def checkout(folder, script):
    """A folder whose ``run_train.sh`` is ``script``."""
    path = folder / "run_train.sh"
    path.write_text("#!/usr/bin/env bash\n" + script)
    path.chmod(0o755)
    return folder


def test_a_start_of_the_real_command_has_every_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_world(tmp_path / "world", 0, WorldSize(4, 8, 100, 60, train_shards=1))
    config = tmp_path / "job.toml"
    text = (ROOT / "train_configs" / "debug.toml").read_text()
    config.write_text(text.replace("demo_data/", f"{tmp_path}/world/"))
    found = startup.start(ROOT, config, TOY)
    assert list(found.seconds) == [*startup.STAGES, startup.END]
    assert min(found.seconds.values()) > 0 and min(found.cpu_seconds.values()) >= 0
    assert found.cpu_seconds["imports"] == max(found.cpu_seconds.values()) > 0.5


def test_a_stage_lasts_from_the_line_before_to_its_own(tmp_path):
    pauses = {"imports": 0.1, "build": 0.5, "resume": 0.1, "first_loss": 0.1}
    script = "".join(f"sleep {pauses[name]}\necho '{line}'\n" for name, line in LINES.items())
    found = startup.start(checkout(tmp_path, script + "sleep 0.2\n"), tmp_path / "job.toml", [])
    assert all(found.seconds[name] >= 0.9 * pause for name, pause in pauses.items())
    assert found.seconds["build"] == max(found.seconds.values())
    assert found.seconds[startup.END] >= 0.18
    assert found.to_first_loss() == pytest.approx(sum(found.seconds[name] for name in pauses))


@pytest.mark.parametrize("end", ["exit 2", "exit 0"])
def test_a_run_without_a_first_loss_is_no_start(end, tmp_path):
    root = checkout(tmp_path, f"echo '{LINES['imports']}'\necho 'error: no data'\n{end}\n")
    with pytest.raises(SystemExit, match=r"error: no data\n.*did not train"):
        startup.start(root, tmp_path / "job.toml", [])


def test_cpu_seconds_are_those_of_all_processes_of_a_start():
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ntime.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "done\n"
        assert 0.25 <= startup.cpu_seconds(process.pid) < 5
        assert startup.cpu_seconds(os.getpid()) > startup.cpu_seconds(process.pid)
        subprocess.run(["pkill", "-P", str(process.pid)], check=True)


def test_commits_start_in_turn_and_the_first_start_does_not_count(monkeypatch, capsys):
    roots = []

    def start(root, config, overrides):
        roots.append(root)
        assert overrides == ["--training.seed", "3"]
        slow = 1 if root == ROOT else 2
        slow *= 10 if len(roots) <= 2 else len(roots)
        return startup.Start(*(dict.fromkeys([*startup.STAGES, startup.END], s) for s in (slow, 3)))

    monkeypatch.setattr(startup, "start", start)
    monkeypatch.setattr(startup, "unpack", lambda commit, folder: None)
    config = str(ROOT / "train_configs" / "debug.toml")
    options = ["--repeats", "2", "--against", "HEAD", "--training.seed", "3"]
    assert startup.main([config, *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [root == ROOT for root in roots] == [True, False] * 3
    assert result["here"]["to_first_loss"] == {
        "median_ms": 16000,
        "quartile_1_ms": 14000,
        "quartile_3_ms": 18000,
        "cpu_s": 12,
    }
    assert result["ratio"] == pytest.approx((2 * 4 / 3 + 2 * 6 / 5) / 2, abs=1e-3)
    assert result["cpu_ratio"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml"], "CONFIG: there is no file none.toml"),
        (["run_train.sh", "--repeats", "1"], "--repeats must be at least 2"),
        (["run_train.sh", "--against", "no-such-ref"], "has no commit no-such-ref"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        startup.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_scripts_of_an_unpacked_commit_can_be_executed(tmp_path):
    step_commits.unpack("HEAD", tmp_path)
    for script in ("run_train.sh", "tools/setup_env.sh"):
        assert os.access(tmp_path / script, os.X_OK)
