"""Hurt runs at random moments and see whether they go on as if nothing had happened: kills, stop signals, damaged checkpoints, full disks,
reads that never end.

Example: symbiotic reliability --minutes 30

Small runs of a config, on one process and several, are started, hurt, and started again with the same command until they are finished.
Then their weights and optimizer state must be those of a run that nothing happened to: bit for bit, or within 1e-5 where the number of
processes changed. A trial is well if nothing hung, no saved step was lost, no damaged checkpoint was loaded, the run ended with the
status and without the traceback that it should, and started again without a person. The table and the last line, which is JSON, say how
many were; status 1 says that something was not well. Each start keeps its log below --out where something went wrong. Options that the
command does not know are those of every run. It needs Linux; a full disk is tried where the machine allows namespaces. Ctrl-C ends it
early, with what was found by then.
"""

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from symbiotic_titan.process import ROOT, ProgressLine, check_checkout, duration, exit_status
from symbiotic_titan.reliability.campaign import KINDS, Chain, Findings, Settings, reference
from symbiotic_titan.reliability.runs import LAYOUTS, Layout

ALL_KINDS = (*KINDS, "damage")
SCRIPT = "run_train.sh"


class Campaign:
    """Chains of all layouts in turn, several at once, until the time is over or enough faults were tried."""

    def __init__(
        self, settings: Settings, layouts: list[Layout], at_once: int, trials: int
    ) -> None:
        self.settings, self.layouts, self.at_once, self.most = settings, layouts, at_once, trials
        self.findings, self._lock, self._next = Findings(), threading.Lock(), 0
        self._errors: list[BaseException] = []
        self.is_interrupted, self._line = False, ProgressLine()

    def run(self, minutes: float) -> Findings:
        """What was found, after Ctrl-C by then. Raises RuntimeError if a run without a fault fails."""
        self.references = {layout: reference(self.settings, layout) for layout in self.layouts}
        end = time.monotonic() + 60 * minutes
        threads = [
            threading.Thread(target=self._chains, args=(end,), daemon=True)
            for _ in range(self.at_once)
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
                self._show(end)
        except KeyboardInterrupt:  # the runs, in sessions of their own, would go on
            self.is_interrupted = True
            print("ending the runs that are under way", file=sys.stderr)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._errors:
            raise self._errors[0]
        return self.findings

    def _chains(self, end: float) -> None:
        def go_on() -> bool:
            is_time = time.monotonic() < end and not self._errors and not self.is_interrupted
            return is_time and len(self.findings.trials) < self.most

        try:
            while go_on():
                with self._lock:
                    number, self._next = self._next, self._next + 1
                layout = self.layouts[number % len(self.layouts)]
                chance = random.Random(f"{self.settings.seed} {number}")
                known = self.references[layout]
                name = f"run-{number:03d}"
                Chain(self.settings, layout, known, self.findings, name, chance).run(go_on)
        except BaseException as error:  # noqa: BLE001 - of a thread: raised by the main one
            self._errors.append(error)

    def _show(self, end: float) -> None:
        table = self.findings.table()
        counts = ", ".join(f"{kind} {row['well']}/{row['trials']}" for kind, row in table.items())
        left = max(0, end - time.monotonic())
        self._line.show(f"{counts or 'starting'}; {duration(left)} left")


def print_table(findings: Findings) -> None:
    """Of what was tried, and what went wrong."""
    print(f"\n{'fault':12s} {'trials':>8s} {'well':>6s}")
    for kind, row in findings.table().items():
        print(f"{kind:12s} {row['trials']:8d} {row['well']:6d}")
    print(f"{len(findings.comparisons)} runs finished and were compared with runs without faults")
    for trial in findings.trials:
        if trial.problem is not None:
            print(f"  {trial.kind}, {trial.layout}, {trial.moment}, {trial.what}: {trial.problem} ({trial.log})")  # fmt: skip
    for problem in findings.problems:
        print(f"  {problem}")


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=positive, default=30.0, help="after the runs without faults; default 30")
    add("--trials", type=int, default=10**9, help="stop after so many faults")
    add("--steps", type=int, default=24, help="of every run; default 24")
    add(
        "--kinds",
        nargs="+",
        choices=ALL_KINDS,
        default=list(ALL_KINDS),
        help="default: all; where none can be, it is a kill",
    )
    add("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="default: all")
    add("--at-once", type=int, default=2, help="runs at once; default 2")
    add(
        "--patience",
        type=positive,
        default=60.0,
        help="seconds until what does not end counts as hanging; default 60",
    )
    add("--seed", type=int, default=0, help="of moments and faults")
    add("--out", type=Path, default=Path("outputs/reliability"), help="folder of runs and logs")
    return parser


@contextmanager
def ended_by(*numbers: signal.Signals) -> Iterator[None]:
    """These signals raise KeyboardInterrupt."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    if not sys.platform.startswith("linux"):
        parser.error(f"it watches processes through /proc, which {sys.platform} has not")
    if min(options.trials, options.steps, options.at_once) < 1:
        parser.error("--trials, --steps and --at-once must be at least 1")
    settings = Settings(
        folder=options.out.resolve(),
        command=(str(ROOT / SCRIPT),),
        arguments=tuple(overrides),
        steps=options.steps,
        patience=options.patience,
        kinds=tuple(options.kinds),
        seed=options.seed,
    )
    layouts = [LAYOUTS[name] for name in options.layouts]
    campaign = Campaign(settings, layouts, options.at_once, options.trials)

    def run() -> None:
        check_checkout(ROOT, SCRIPT)
        findings = campaign.run(options.minutes)
        print_table(findings)
        print(json.dumps(findings.as_dict()))
        if campaign.is_interrupted:
            raise KeyboardInterrupt

    with ended_by(
        signal.SIGINT, signal.SIGTERM
    ):  # a shell lets its background jobs ignore the first
        status = exit_status(run, (OSError, RuntimeError, ValueError))
    found = campaign.findings
    return status or int(found.num_problems > 0)
