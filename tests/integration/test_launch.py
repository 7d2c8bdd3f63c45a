"""tools/launch.py: what several processes say and end with when one of them fails, and when a machine is missing."""

import importlib.util
import logging
import re
import socket
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from symbiotic_titan.process import process_start
from symbiotic_titan.weights.damage import choose_step
from tests.helpers import forked
from tests.helpers.launch import (
    NUM_STEPS,
    ROOT,
    arguments_of,
    environments,
    free_port,
    start_ranks,
    train,
)

ONE_MACHINE = ["--rdzv_backend", "symbiotic", "--rdzv_endpoint", "localhost:0", "--rdzv_id", "test"]


class Launch:
    """A launcher with a toy rank for each of ``fates``, see tests/helpers/toy_rank.py. ``status`` and ``text`` wait for its end."""

    def __init__(self, folder, *fates, restarts=0, shown="0"):
        self.log = folder / f"{'-'.join(fates)}.log"
        self.logs = folder / f"{'-'.join(fates)}-ranks"
        arguments = [
            *(*ONE_MACHINE, "--rdzv_conf", "join_timeout=60", "--nproc_per_node", str(len(fates))),
            *("--max_restarts", str(restarts), "--local-ranks-filter", shown, "--tee", "3"),
            *("--log-dir", str(self.logs), "-m", "tests.helpers.toy_rank", *fates),
        ]
        environment = {"LOG_RANK": shown}
        self.process = forked.start(
            forked.script_here,
            *(str(ROOT / "tools/launch.py"), arguments, str(ROOT), str(self.log), environment),
        )

    def end(self):
        """(exit status, lines)"""
        self.process.join(60)
        return self.process.exitcode, self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Name -> (exit status, lines) of launchers that run at the same time."""
    folder = tmp_path_factory.mktemp("launch")
    started = {
        "well": Launch(folder, "0", "0"),
        "mistake": Launch(folder, "2", "wait", restarts=3),
        "hidden mistake": Launch(folder, "wait", "2", restarts=3),
        "full disk": Launch(folder, "wait", "3", restarts=3),
        "crash": Launch(folder, "wait", "1"),
        "shown crash": Launch(folder, "wait", "1,1", shown="0,1"),
        "killed": Launch(folder, "wait", "kill,0"),
        "killed once": Launch(folder, "wait,0", "kill,0", restarts=2),
        "always killed": Launch(folder, "wait,wait,wait", "kill", restarts=2),
        "store": Launch(folder, "store", restarts=1),
    }
    yield {name: launch.end() for name, launch in started.items()} | {"folder": folder}


def test_a_mistake_is_one_line_with_its_own_status_and_is_not_started_again(ended):
    assert ended["well"] == (0, ["[default0]:attempt 0"])
    assert ended["mistake"] == (2, ["[default0]:attempt 0", "[default0]:broken"])
    assert ended["hidden mistake"] == (2, ["[default0]:attempt 0", "error: rank 1: broken"])
    status, lines = ended["full disk"]
    assert status == 3 and lines[-1] == "error: rank 1: broken"
    assert "[default0]:attempt 1" not in lines
    assert not (ended["folder"] / "2-wait-ranks").exists()


def test_a_crash_shows_its_traceback_once_and_then_names_rank_and_log(ended):
    for name in ("crash", "shown crash"):
        status, lines = ended[name]
        assert status == 1 and sum("Traceback" in line for line in lines) == 1, lines
        words, _, log = lines[-1].rpartition(" ")
        assert words == "error: rank 1 ended with status 1: ValueError: broken; its output:"
        with open(log) as file:
            assert "in the middle of rank" in file.read()
    status, lines = ended["killed"]
    assert status == 1 and len(lines) == 2
    assert lines[-1].startswith("error: rank 1 was killed by SIGKILL; its output: /")


def test_ranks_that_are_killed_start_again_at_most_as_often_as_allowed(ended):
    again = "rank 1 was killed by SIGKILL: all ranks start again from the newest checkpoint, restart {} of 2"
    assert ended["killed once"] == (
        0,
        ["[default0]:attempt 0", again.format(1), "[default0]:attempt 1"],
    )
    status, lines = ended["always killed"]
    assert status == 1 and [line for line in lines if line.startswith("rank 1")] == [
        again.format(1),
        again.format(2),
    ]
    assert "attempt_2/1/stderr.log" in lines[-1]


def test_a_restart_begins_with_an_empty_store(ended):
    status, lines = ended["store"]
    assert status == 0 and "[default0]:attempt 1" in lines, lines


def test_ranks_save_and_end_when_their_launcher_is_killed(tmp_path, demo):
    settings = {"training.steps": 1000, "training.seq_len": 256, "compile.enable": False}
    arguments = arguments_of(tmp_path, demo, settings)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    process = forked.start(
        forked.launcher_here, arguments, environments(2), [str(log) for log in logs]
    )
    wait_until(lambda: logs[0].exists() and "step:  2" in logs[0].read_text())
    ranks = [int(Path(f"{log}.pid").read_text()) for log in logs]
    assert all(map(process_start, ranks))
    process.kill()
    wait_until(lambda: not any(map(process_start, ranks)))
    text = logs[0].read_text()
    assert f"process {process.pid}, which has started this one, is gone: stopping" in text
    saved = int(re.search(r"SIGTERM: saving a checkpoint at step (\d+)", text)[1])
    assert 2 <= saved < 1000 and choose_step(tmp_path / "checkpoint")[:2] == (saved, {})


def files_of(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_run_that_has_taken_its_steps_changes_nothing(tmp_path, demo, reference):
    before = files_of(reference.folder)
    again = {"training.steps": NUM_STEPS, "job.dump_folder": reference.folder}
    run = train(tmp_path, arguments_of(tmp_path, demo, again), world_size=2)
    words = f"nothing to do: the run is at step {NUM_STEPS} ("
    assert run.status == 0 and run.text.splitlines()[-1].count(words) == 1, run.text
    assert f"and training.steps = {NUM_STEPS}; raise it to train on" in run.text
    assert files_of(reference.folder) == before


def test_a_start_that_the_first_rank_refuses_leaves_no_folder(tmp_path, demo):
    refused = {"checkpoint.load_step": 7, "job.dump_folder": tmp_path / "run"}
    ranks = start_ranks(tmp_path, arguments_of(tmp_path, demo, refused), world_size=2)
    ranks.wait_for("checkpoint.load_step: no such folder")
    ranks.wait_for("Starting job", rank=1)
    time.sleep(1)  # it waits for the first one
    assert ranks.processes[1].is_alive() and not (tmp_path / "run").exists()
    ranks.processes[1].kill()


def _raise(error):
    raise error


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def launcher():
    spec = importlib.util.spec_from_file_location("launch", ROOT / "tools" / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    logging.disable(
        logging.NOTSET
    )  # the launcher silences torchrun; here it shares the process with other tests


@pytest.mark.parametrize(
    ("endpoint", "waiting", "last"),
    [
        (
            "127.0.0.1:{port}",
            "waiting for 1 of 2 machines at RDZV_ENDPOINT=127.0.0.1:{port}",
            "error: not all of 2 machines were at RDZV_ENDPOINT=127.0.0.1:{port} within 3 s",
        ),
        (
            "nowhere.invalid:{port}",
            "waiting for RDZV_ENDPOINT=nowhere.invalid:{port}: Name or service not known; that machine must run run_train.sh as well",
            "error: no connection to RDZV_ENDPOINT=nowhere.invalid:{port}: Name or service not known",
        ),
    ],
)
def test_a_missing_machine_is_told_and_is_a_status_in_the_end(
    launcher, monkeypatch, capfd, endpoint, waiting, last
):
    monkeypatch.setattr(launcher, "FIRST_LINE", 0.4)
    monkeypatch.setattr(launcher, "NEXT_LINES", 0.4)
    monkeypatch.setattr(launcher, "ATTEMPT", 1)
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    connect = socket.create_connection
    monkeypatch.setattr(
        launcher.socket,
        "create_connection",
        lambda place, **options: (
            _raise(unknown) if "nowhere" in place[0] else connect(place, **options)
        ),
    )
    monkeypatch.setenv("LOGLEVEL", "CRITICAL")  # of this process nothing is changed
    port = free_port()
    arguments = ["--nnodes", "2", "--rdzv_backend", "symbiotic", "--rdzv_id", "test"]
    arguments += ["--rdzv_conf", "join_timeout=3", "--rdzv_endpoint", endpoint.format(port=port)]
    assert launcher.main([*arguments, "-m", "tests.helpers.toy_rank", "0"]) == 75
    lines = capfd.readouterr().err.splitlines()
    assert re.search(
        f"(?m)^{re.escape(waiting.format(port=port))}; \\d+ s so far$", "\n".join(lines)
    )
    assert lines[-1] == last.format(port=port)


def test_the_cause_is_the_rank_that_ended_the_others(launcher):
    cause_of = {
        (1, 2): 1,  # a mistake was reported
        (1, -9): 1,  # the other one has lost its partner
        (-6, 1): 1,  # NCCL's watchdog
        (-15, 1): 1,
        (1, 1): 0,
        (-6, -15): 0,
    }
    for statuses, rank in cause_of.items():
        failures = {r: ProcessFailure(r, 1, status, "no file") for r, status in enumerate(statuses)}
        assert launcher.cause(failures) == rank, statuses


@pytest.mark.parametrize("endpoint", ["node1", "node1:", ":29500", "node1:295x", "node1:70000"])
def test_an_endpoint_that_is_no_address_is_refused(launcher, capsys, endpoint):
    arguments = ["--nnodes", "2", "--rdzv_endpoint", endpoint]
    assert launcher.main([*arguments, "-m", "tests.helpers.toy_rank", "0"]) == 2
    assert capsys.readouterr().err == (
        f"error: RDZV_ENDPOINT={endpoint}: must be HOST:PORT with a port up to 65535, the same on every machine\n"
    )
