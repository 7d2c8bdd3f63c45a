"""The queue of a study: order, results that are there, failures, and what Ctrl-C ends. Stages are one-line shell commands."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from symbiotic_titan.process import is_running
from symbiotic_titan.study import queue as queues
from symbiotic_titan.study.queue import Progress, Queue, Stage
from tests.helpers import forked


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(queues, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(queues, "GRACE", 5.0)


@pytest.fixture
def stage(tmp_path):
    """Makes a stage that runs ``script``, notes that it did, and touches its result."""

    def make(name, script="", *needs, **fields):
        result = tmp_path / f"{name}.done"
        words = f"{script}\necho {name} >>{tmp_path}/order\n: >{result}"
        fields = {"command": ("sh", "-ec", words)} | fields
        return Stage(name, result, tmp_path / "logs" / f"{name}.txt", needs=needs, **fields)

    return make


@pytest.fixture
def order(tmp_path):
    return lambda: (tmp_path / "order").read_text().split()


def run(*stages, at_once=2):
    queue = Queue(stages, at_once)
    queue.run()
    return queue


def test_a_stage_waits_for_those_that_it_needs(stage, order):
    run(
        stage("page", "", "symbiotic", "mot"),
        stage("symbiotic", "", "vlm"),
        stage("mot", "", "vlm"),
        stage("vlm", "sleep 0.1"),
        stage("data"),
    )
    done = order()
    assert done[-1] == "page" and set(done[-3:-1]) == {"symbiotic", "mot"}
    assert sorted(done[:2]) == ["data", "vlm"]


def test_the_stage_that_the_longest_chain_waits_for_is_begun_first(stage, order):
    """By the seconds of whole chains, not by those of a stage; without chains in the order that they have."""
    run(
        stage("one", seconds=5.0),
        stage("two", seconds=5.0),
        stage("vlm", seconds=1.0),
        stage("system", "", "vlm", seconds=3.0),
        stage("scores", "", "system", seconds=2.0),
        at_once=1,
    )
    assert order() == ["vlm", "one", "two", "system", "scores"]


def test_no_more_run_at_once_than_may(stage, tmp_path):
    script = (
        f"mkdir {tmp_path}/busy\nsleep 0.02\nrmdir {tmp_path}/busy"  # mkdir fails where it exists
    )
    queue = run(stage("a", script), stage("b", script), stage("c", script), at_once=1)
    assert queue.done == {"a", "b", "c"}
    marks = f"echo x >>{tmp_path}/count\nwhile [ $(wc -l <{tmp_path}/count) -lt 2 ]; do sleep 0.01; done"
    assert run(stage("d", marks), stage("e", marks), at_once=2).done == {"d", "e"}


def test_what_is_done_is_passed_over_even_if_what_it_needs_is_gone(stage, order, tmp_path):
    stages = stage("vlm"), stage("mot", "", "vlm")
    run(*stages)
    (tmp_path / "order").unlink()
    (tmp_path / "vlm.done").unlink()
    run(*stages)
    assert order() == ["vlm"]


def test_a_failure_shows_the_end_of_its_log_and_ends_the_others(stage, tmp_path):
    fails = stage("mot", "for i in $(seq 40); do echo line $i; done\nexit 3")
    waits = stage("symbiotic", f"echo $$ >{tmp_path}/pid\nexec sleep 60")
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        run(waits, fails, stage("page", "", "mot"))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("mot ended with status 3; the end of ") and "mot.txt" in lines[0]
    assert lines[-1] == "line 40" and len(lines) == queues.TAIL_LINES + 1
    assert time.monotonic() - begin < 10
    assert not (tmp_path / "page.done").exists()


def test_a_failed_study_goes_on_where_it_failed(stage, order, tmp_path):
    script = f"test -e {tmp_path}/mended"
    stages = stage("vlm"), stage("mot", script, "vlm"), stage("page", "", "mot")
    with pytest.raises(RuntimeError, match="mot ended with status 1"):
        run(*stages)
    (tmp_path / "mended").touch()
    run(*stages)
    assert order() == ["vlm", "mot", "page"]
    log = (tmp_path / "logs/mot.txt").read_text()
    assert log.count("$ sh -ec") == 2  # the log of the first try is kept


def test_a_run_that_ended_well_before_its_result_has_failed(stage):
    with pytest.raises(RuntimeError, match="mot ended without its result, .*mot.done"):
        run(stage("mot", "exit 0"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_ends_the_processes_and_lets_them_save(stage, tmp_path, number):
    script = f"set +e\ntrap 'echo saved >{tmp_path}/saved; exit 0' TERM\necho $$ >{tmp_path}/pid\n"
    script += "while :; do sleep 0.01; done"
    before = signal.getsignal(number)
    pid = tmp_path / "pid"

    def stop():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(stage("symbiotic", script))
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert not is_running(int(pid.read_text()))
    assert signal.getsignal(number) == before


def test_a_process_that_does_not_end_is_killed(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(queues, "GRACE", 0.1)
    script = f"set +e\ntrap '' TERM\necho $$ >{tmp_path}/pid\nwhile :; do sleep 0.01; done"
    fails = f"while [ ! -s {tmp_path}/pid ]; do sleep 0.01; done\nexit 1"
    with pytest.raises(RuntimeError, match="fails ended with status 1"):
        run(stage("deaf", script), stage("fails", fails))
    assert not is_running(int((tmp_path / "pid").read_text()))


MODULE = """
import os, signal, sys, time
if sys.argv[1:] == ["waits"]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    open("waiting", "w").close()
    time.sleep(60)
print("said", os.environ["STUDY"], os.getsid(0) == os.getpid(), __name__)
open(sys.argv[1], "w").close()
sys.exit(int(sys.argv[2]))
"""


def test_a_python_module_runs_in_a_fork_as_a_program_of_its_own(tmp_path, monkeypatch):
    forked.ensure_server()  # of all tests of this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("said.py").write_text(MODULE)

    def queue(*words):
        command = (sys.executable, "-m", "said", *words)
        stage = Stage("said", tmp_path / "made", tmp_path / "log.txt", command)
        return Queue([stage], 1, {"STUDY": "7", "PYTHONUNBUFFERED": "1"})

    queue("made", "0").run()
    assert "said 7 True __main__" in Path("log.txt").read_text().splitlines()
    Path("made").unlink()
    with pytest.raises(RuntimeError, match="said ended with status 5"):
        queue("other", "5").run()
    assert Path("other").exists()
    waiting = queue("waits")
    threading.Thread(target=lambda: [wait_for("waiting"), os.kill(os.getpid(), 2)]).start()
    with pytest.raises(KeyboardInterrupt):
        waiting.run()
    assert not waiting.running


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.01)


def test_a_stage_may_only_finish_what_others_made(stage, order, tmp_path):
    made = tmp_path / "copy.done"
    copy = stage("copy", "", "check", command=(), finish=made.touch)
    queue = run(copy, stage("check"), stage("train", f"test -e {made}", "copy"))
    assert queue.done == {"copy", "check", "train"} and order() == ["check", "train"]


def test_needs_that_cannot_be_met_are_refused_before_anything_runs(stage, tmp_path):
    with pytest.raises(ValueError, match="stage mot needs vlm, which is no stage"):
        Queue([stage("mot", "", "vlm")], 2)
    with pytest.raises(ValueError, match="needs stages that need each other"):
        Queue([stage("a", "", "b"), stage("b", "", "a")], 2)
    assert not (tmp_path / "logs").exists()


def test_progress_is_read_from_logs_and_says_what_is_left(stage, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(queues.time, "monotonic", lambda: clock[0])
    train = stage("train", seconds=3000.0, steps=600)
    vlm = stage("vlm", seconds=1000.0)
    train.log.parent.mkdir()
    progress = Progress((vlm, train), at_once=2, start=0.0)
    assert progress.line(set(), ()) == "0/2 stages, 0%, 33 min left"
    train.log.write_text("step:   0 \nstep: 150  loss: 2.0\n")
    clock[0] = 500.0
    line = progress.line({"vlm"}, [train])
    assert line.startswith("1/2 stages, 44%, ") and line.endswith(": train 150/600")
    # 1750 of 4000 s of work in 500 s, besides the first minute's 120 in 60 s: 3.34 a second.
    assert progress.seconds_left(1750.0) == pytest.approx(2250 / (1870 / 560))


def test_lines_are_plain_where_there_is_no_terminal(stage, capfd):
    run(stage("vlm"), stage("mot", "", "vlm"))
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["vlm", "mot"]
    assert lines[-1].endswith("2/2 stages, 100%, 0 min left")
