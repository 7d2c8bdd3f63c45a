"""The files of docs/tutorials/your_cluster.md: the batch script does what it says with stand-ins for SLURM's programs, the manifest and
the Containerfile name what the repository has. None of them is run on a real cluster here."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "docs/examples/train.sbatch"
IN_QUEUE = ROOT / "tools/run_in_queue.sh"
MANIFEST = ROOT / "docs/examples/kubernetes.yaml"
CONTAINERFILE = ROOT / "Containerfile"

# Stand-ins. The run ends with the status FATE, or waits for a signal.
RUN = """#!/usr/bin/env bash
trap 'echo "SIGUSR1: saving a checkpoint at step 7 and stopping"; exit 0' USR1
env | grep -E '^(NNODES|NGPU|RDZV_|MAX_RESTARTS|CONFIG_FILE)' >environment.txt
printf '%s\\n' "$@" >arguments.txt
[ "$FATE" = wait ] || exit "$FATE"
for _ in $(seq 600); do sleep 0.05; done
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
"$@" &
trap 'again=1; kill -USR1 "$!"' USR1
again=1
while [ -n "$again" ]; do again= status=0; wait "$!" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) printf 'node1\\nnode2\\n' ;; requeue) echo "$2" >>requeued.txt ;; esac
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the script that is tested and stand-ins for all that it calls."""
    write_program(tmp_path / "run_train.sh", RUN)
    write_program(tmp_path / "tools/setup_env.sh", "#!/usr/bin/env bash\n")
    write_program(tmp_path / "bin/srun", SRUN)
    write_program(tmp_path / "bin/scontrol", SCONTROL)
    shutil.copy(IN_QUEUE, tmp_path / "tools")
    return tmp_path


def start(checkout: Path, fate: str, *command: str, **more: str) -> subprocess.Popen[str]:
    environment = {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "FATE": fate}
    environment |= {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "41234"}
    environment |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "CONFIG_FILE": "my.toml"}
    return subprocess.Popen(
        ["bash", *command, "--training.steps", "5 0"],
        cwd=checkout,
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.02)


def requeued(checkout: Path) -> list[str]:
    path = checkout / "requeued.txt"
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("script", [SBATCH, IN_QUEUE], ids=lambda path: path.name)
def test_bash_can_parse_the_script(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize(("fate", "status"), [("0", 0), ("2", 2), ("75", 75), ("wait", 85)])
def test_a_run_in_a_queue_keeps_its_status_unless_a_signal_stopped_it(checkout, fate, status):
    run = start(checkout, fate, "tools/run_in_queue.sh")
    wait_for(checkout / "arguments.txt")
    if fate == "wait":
        run.send_signal(signal.SIGUSR1)
    text, _ = run.communicate(timeout=30)
    assert run.returncode == status, text
    assert (checkout / "arguments.txt").read_text() == "--training.steps\n5 0\n"
    assert ("stopped before the last step" in text) == (status == 85)


def test_the_sentences_by_which_a_stop_is_seen_are_those_of_the_run():
    quoted = re.findall(r"'([^'$]+)'", re.search(r"case \$line in\s+(.*)\)", IN_QUEUE.read_text())[1])  # fmt: skip
    trainer = (ROOT / "symbiotic_titan/training/trainer.py").read_text()
    sources = trainer + (ROOT / "symbiotic_titan/signals.py").read_text()
    assert len(quoted) == 4 and all(words in sources for words in quoted), quoted


@pytest.mark.parametrize(
    ("fate", "number", "status", "again"),
    [
        ("0", None, 0, False),
        ("2", None, 2, False),
        ("75", None, 0, True),
        ("wait", signal.SIGUSR1, 0, True),
        ("wait", signal.SIGTERM, 85, False),
    ],
)
def test_a_job_goes_back_into_the_queue_if_it_can_go_on(checkout, fate, number, status, again):
    job = start(checkout, fate, str(SBATCH))
    wait_for(checkout / "arguments.txt")
    if number is not None:
        job.send_signal(number)
    text, _ = job.communicate(timeout=30)
    assert job.returncode == status, text
    assert requeued(checkout) == ["41234"] * again
    lines = dict(line.split("=", 1) for line in (checkout / "environment.txt").read_text().split())
    expected = {"NNODES": "2", "NGPU": "8", "RDZV_ENDPOINT": "node1:21234", "RDZV_ID": "41234"}
    assert lines.items() >= (expected | {"CONFIG_FILE": "my.toml"}).items()


def test_a_job_is_not_requeued_for_ever(checkout):
    job = start(checkout, "75", str(SBATCH), SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    job.communicate(timeout=30)
    assert job.returncode == 75 and not requeued(checkout)


def test_the_manifest_starts_the_run_on_as_many_pods_as_it_has_machines():
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {row["name"]: row["value"] for row in container["env"]}
    nodes = int(environment["NNODES"])
    assert spec["completions"] == spec["parallelism"] == nodes
    assert environment["RDZV_ENDPOINT"].startswith(
        f"{job['metadata']['name']}-0.{pod['subdomain']}:"
    )
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert int(environment["NGPU"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (ROOT / container["command"][0]) == IN_QUEUE and os.access(IN_QUEUE, os.X_OK)
    script = (ROOT / "run_train.sh").read_text()
    assert not [name for name in environment if f"${{{name}" not in script and f"${name}" not in script]  # fmt: skip
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }


def test_the_statuses_of_the_manifest_are_those_that_the_page_explains():
    page = (ROOT / "docs/running.md").read_text()
    _, job = yaml.safe_load_all(MANIFEST.read_text())
    rules = [rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]  # fmt: skip
    assert rules == [[2, 3, 4], [75, 85]]
    assert all(f"\n| {status} |" in page for status in (2, 3, 4, 75))
    assert "STOPPED=85" in IN_QUEUE.read_text()


def test_the_containerfile_copies_what_exists_and_its_commands_are_bash():
    text = CONTAINERFILE.read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    copied = [shlex.split(rest)[:-1] for word, rest in lines if word == "COPY"]
    assert copied and not [name for names in copied for name in names if not (ROOT / name).exists()]
    for word, rest in lines:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    settings = (ROOT / "tools/setup_env.sh").read_text()
    arguments = [rest.partition("=")[0] for word, rest in lines if word == "ARG"]
    assert [name for name in arguments if f"${{{name}" in settings] == ["TORCH_BUILD", "TORCH_PIP_ARGS"]  # fmt: skip
    (workdir,) = (rest for word, rest in lines if word == "WORKDIR")
    assert f"{workdir}/outputs" in MANIFEST.read_text()
