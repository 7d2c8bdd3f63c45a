"""Stop signals in processes of their own: at each moment, in code that does not come back to Python, and twice."""

import signal
import subprocess
import sys
import time

import pytest

from symbiotic_titan import signals
from symbiotic_titan.config.job import Checkpoint
from symbiotic_titan.signals import StopRequest
from tests.helpers.structure import ROOT

PROGRAM = """
import ctypes, signal, sys, time
from symbiotic_titan import signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that nohup runs are started with it ignored
signals.GRACE, signals.APART = 0.2, 0.3
stop = signals.StopRequest()
try:
    stop.begin()
    what = sys.argv[1]
    if what == "swallowing":
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            time.sleep(60)
    stop.nothing_to_save = what in ("starting", "blocked")
    print("ready", flush=True)
    if what == "blocked":  # a mutex that this thread holds: a handler in Python never runs
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    if what == "training":
        while stop.signal_name is None:
            time.sleep(0.02)
        time.sleep(1.0)  # saves
        print(stop.signal_name, flush=True)
    time.sleep(60 if what != "training" else 0)
except signals.Stopped:
    stop.end(0)
"""
BEFORE = "SIGTERM: stopped before the first step\n"
INTERRUPTED = "SIGINT: interrupted; what was not saved is lost\n"
# What the process is at, the signals it gets, its status, its output and its line of error.
CASES = {
    "starting": ("starting", [signal.SIGTERM], 0, "", BEFORE),
    "blocked": ("blocked", [signal.SIGTERM], 0, "", BEFORE),
    "swallowing": ("swallowing", [signal.SIGTERM], 0, "", BEFORE),
    "training": ("training", [signal.SIGHUP, signal.SIGHUP], 0, "SIGHUP\n", ""),
    "twice": ("sleeping", [signal.SIGINT, signal.SIGINT], 130, "", INTERRUPTED),
    "at_once": ("training", [signal.SIGINT, signal.SIGINT], 0, "SIGINT\n", ""),
}


@pytest.fixture(scope="module")
def ended():
    """Case -> (status, output, errors); the processes run side by side."""
    command = [sys.executable, "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = {c: subprocess.Popen([*command, CASES[c][0]], **pipes) for c in CASES}
    for process in started.values():
        assert process.stdout.readline() == "ready\n"
    for number in (0, 1):
        for case, process in started.items():
            for sent in CASES[case][1][number : number + 1] if case != "at_once" else ():
                process.send_signal(sent)
        time.sleep(0.6)
    for sent in CASES["at_once"][1]:
        started["at_once"].send_signal(sent)
    found = {}
    for case, process in started.items():
        text, errors = process.communicate(timeout=20)
        found[case] = process.returncode, text, errors
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_process_ends_as_its_moment_demands(ended, case):
    assert ended[case] == CASES[case][2:]


def test_only_the_chosen_signals_are_handled_and_an_ignored_hangup_stays_ignored():
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    before = {n: signal.signal(n, signal.SIG_DFL) for n in numbers}
    stop = StopRequest()
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop.install()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        stop.install(["SIGUSR1"])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.raise_signal(signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1"
        stop.close()
        assert {signal.getsignal(n) for n in numbers} == {signal.SIG_DFL, signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_stop_signal_is_chosen_by_its_name():
    assert Checkpoint(stop_signals=["SIGUSR2"]).stop_signals == ["SIGUSR2"]
    assert Checkpoint().stop_signals == list(signals.STOP_SIGNALS)
    with pytest.raises(ValueError, match="must be one of SIGINT, SIGTERM, SIGHUP, SIGUSR1"):
        Checkpoint(stop_signals=["TERM"])
