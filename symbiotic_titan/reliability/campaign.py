"""Runs are hurt at random moments, started again with the same command, and compared at their end with runs that nothing happened to.

A chain is one run from its first start to its last step. In each start a fault hits it; before some, its newest checkpoint is damaged.
"""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from symbiotic_titan.process import DISK_FULL, MISTAKE
from symbiotic_titan.reliability.faults import (
    RUNNING,
    Fault,
    damage,
    small_disk,
)
from symbiotic_titan.reliability.runs import (
    CHECKPOINTS,
    Layout,
    Started,
    complete_steps,
    largest_difference,
    tensors_of,
    wait_until,
)

# On other numbers of processes sums are rounded differently.
TOLERANCE_OTHER_LAYOUT = 1e-5
DISK_MEGABYTES = 512
SMALL_RUN = (
    *("--training.seq_len", "256", "--metrics.log_freq", "1", "--metrics.routing_freq", "0"),
    *("--checkpoint.interval", "3", "--checkpoint.keep_latest_k", "3"),
)
MOMENTS = {"start-up": 0.2, "step": 0.45, "save": 0.35}
# Kinds of faults and how often each is drawn, as the sum of all allows.
KINDS = {"kill": 0.5, "signal": 0.25, "stuck read": 0.1, "disk full": 0.15}
DAMAGE_SHARE = 0.35


@dataclass(frozen=True)
class Settings:
    """command:  that trains; ``arguments``: of it.
    steps:    of a chain.
    patience: seconds until what does not end, or does not go on, counts as hanging.
    """

    folder: Path
    command: tuple[str, ...]
    arguments: tuple[str, ...]
    steps: int
    patience: float
    kinds: tuple[str, ...]
    seed: int


@dataclass
class Trial:
    """One fault and what became of it. ``problem``: None where all was well."""

    kind: str
    layout: str
    moment: str
    what: str
    log: str
    seconds: float = 0.0
    problem: str | None = None


@dataclass
class Reference:
    """A run that nothing happened to: its last tensors, and seconds until its first step and of a step."""

    tensors: dict[str, Tensor]
    startup: float
    step: float


@dataclass
class Findings:
    """What a campaign has found so far; ``comparisons``: (layout, largest difference from the reference) of finished chains."""

    trials: list[Trial] = field(default_factory=list)
    comparisons: list[tuple[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0

    def table(self) -> dict[str, dict[str, int]]:
        """Kind -> number of trials, and of those in which all was well."""
        kinds = sorted({trial.kind for trial in self.trials})
        of = {kind: [t.problem is None for t in self.trials if t.kind == kind] for kind in kinds}
        return {kind: {"trials": len(fine), "well": sum(fine)} for kind, fine in of.items()}

    @property
    def num_problems(self) -> int:
        return len(self.problems) + sum(trial.problem is not None for trial in self.trials)

    def as_dict(self) -> dict[str, object]:
        bad = [asdict(trial) for trial in self.trials if trial.problem is not None]
        worst: dict[str, float] = {}
        for layout, difference in self.comparisons:
            worst[layout] = max(worst.get(layout, 0.0), difference)
        return {
            "starts": self.starts,
            "kinds": self.table(),
            "finished_runs": len(self.comparisons),
            "largest_difference": worst,
            "trials_with_problems": bad,
            "problems": self.problems,
        }


def reference(settings: Settings, layout: Layout) -> Reference:
    """Train a run of ``layout`` without a fault.

    Raises:
        RuntimeError: it failed.
    """
    folder = settings.folder / "references" / layout.name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arguments = arguments_of(settings, layout, folder / "run")
    started = Started(arguments, layout.processes[0], folder / "log.txt")
    begin = time.monotonic()
    wait_until(lambda: started.last_step() > 0 or not started.is_running(), 20 * settings.patience)
    startup = time.monotonic() - begin
    wait_until(lambda: not started.is_running(), 20 * settings.patience)
    if started.end() != 0:
        raise RuntimeError(f"a run without any fault failed, see {started.log}")
    seconds = time.monotonic() - begin - startup
    tensors = tensors_of(folder / "run" / CHECKPOINTS / f"step-{settings.steps}")
    return Reference(tensors, startup, seconds / settings.steps)


def arguments_of(settings: Settings, layout: Layout, dump_folder: Path) -> list[str]:
    own = ("--job.dump_folder", str(dump_folder), "--training.steps", str(settings.steps))
    return [*settings.command, *SMALL_RUN, *settings.arguments, *layout.options, *own]


class Chain:
    """A run, started again after each fault until it has all its steps."""

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        reference: Reference,
        findings: Findings,
        name: str,
        chance: random.Random,
    ) -> None:
        self.settings, self.layout, self.reference = settings, layout, reference
        self.findings, self.chance = findings, chance
        self.folder = settings.folder / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.disk = small_disk(self.folder / "disk", DISK_MEGABYTES)
        self.damaged: dict[int, Trial] = {}
        self.number, self.is_well = 0, True

    @property
    def dump_folder(self) -> Path:
        """As the run sees it."""
        return self.folder / "disk" / "run"

    @property
    def seen(self) -> Path:
        """As this process sees it."""
        return self.disk.seen / "run" if self.disk is not None else self.dump_folder

    def intact(self) -> int:
        """The newest step with a complete checkpoint that nothing was done to; 0 if there is none."""
        steps = [step for step in complete_steps(self.seen) if step not in self.damaged]
        return steps[-1] if steps else 0

    def run(self, go_on: Callable[[], bool]) -> None:
        """Until the run is finished or ``go_on`` says no."""
        try:
            while go_on():
                self._maybe_damage()
                if not self._one_start():
                    break
        finally:
            if self.disk is not None:
                self.disk.close()

    def _add(self, trial: Trial) -> None:
        self.findings.trials.append(trial)
        self.is_well &= trial.problem is None

    def _report(self, problem: str) -> None:
        self.findings.problems.append(problem)
        self.is_well = False

    def _maybe_damage(self) -> None:
        """Where another complete checkpoint is left."""
        steps = [step for step in complete_steps(self.seen) if step not in self.damaged]
        if "damage" not in self.settings.kinds or len(steps) < 2:
            return
        if self.chance.random() < DAMAGE_SHARE:
            what = damage(self.seen / CHECKPOINTS / f"step-{steps[-1]}", self.chance)
            trial = Trial("damage", self.layout.name, "between starts", what, "")
            self.damaged[steps[-1]] = trial

    def _one_start(self) -> bool:
        """Start the run and hurt it. Returns whether it must be started again."""
        before, self.number = self.intact(), self.number + 1
        self.findings.starts += 1
        processes = self.layout.processes[self.number % len(self.layout.processes)]
        log = self.folder / f"start-{self.number:03d}.txt"
        arguments = arguments_of(self.settings, self.layout, self.dump_folder)
        prefix = self.disk.prefix if self.disk is not None else []
        started = Started([*prefix, *arguments], processes, log)
        try:
            moment, hit = self._wait_for_moment(started)
            if not hit:
                return self._judge_end(started, before)
            fault = self._hurt(started)
            begin = time.monotonic()
            ended = wait_until(lambda: not started.is_running(), self.settings.patience)
            seconds = time.monotonic() - begin
            self._judge_start(started, before)  # a step that was damaged may be saved anew by now
            problem = self._problem(started, fault, before) if ended else "hangs"
            trial = Trial(
                fault.kind, self.layout.name, moment, fault.what, str(log), seconds, problem
            )
            self._add(trial)
            return True
        finally:
            started.end()
            if self.disk is not None:
                self.disk.empty()

    # ---- the moment and the fault ---------------------------------------------------------------------------------------

    def _wait_for_moment(self, started: Started) -> tuple[str, bool]:
        """(the moment that was drawn, whether it came before the run ended or hung)."""
        moment = self.chance.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        if moment == "start-up":
            seconds = self.chance.uniform(0, self.reference.startup)
            return moment, not wait_until(lambda: not started.is_running(), seconds)
        present = {path.name for path in (self.seen / CHECKPOINTS).glob("step-*")}
        wanted = self.chance.randint(1, 6)

        def has_come() -> bool:
            if moment == "save":
                found = (self.seen / CHECKPOINTS).glob("step-*")
                return any(path.name not in present for path in found)
            first = started.first_step()
            return first is not None and started.last_step() >= first - 1 + wanted

        self._wait_while_it_goes_on(started, has_come)
        if not started.is_running() or not has_come():
            return moment, False
        seconds = self.chance.uniform(0, self.reference.step if moment == "step" else 0.2)
        return moment, not wait_until(lambda: not started.is_running(), seconds)

    def _wait_while_it_goes_on(self, started: Started, condition: Callable[[], bool]) -> None:
        """Until ``condition`` holds, the run ends, or it has printed nothing for so long that it hangs."""
        size, since = -1, time.monotonic()
        while not condition() and started.is_running():
            now = started.log.stat().st_size
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > 2 * self.settings.patience:
                self._report(f"hangs without a fault: {started.log}")
                return
            time.sleep(0.01)

    def _hurt(self, started: Started) -> Fault:
        possible = [
            kind
            for kind in KINDS
            if kind in self.settings.kinds
            and (kind != "stuck read" or self.layout.has_workers)
            and (kind != "disk full" or self.disk is not None)
        ] or ["kill"]
        kind = self.chance.choices(possible, [KINDS[kind] for kind in possible])[0]
        if kind == "disk full":
            assert self.disk is not None
            self.disk.fill()
            return Fault(kind, "the disk is filled", statuses=(DISK_FULL, MISTAKE))
        return RUNNING[kind](started, self.chance)

    # ---- what became of it ----------------------------------------------------------------------------------------------

    def _problem(self, started: Started, fault: Fault, before: int) -> str | None:
        """What is wrong after ``fault``, once all processes have ended."""
        after, last, status = self.intact(), started.last_step(), started.end()
        if after < before:
            return f"lost: step {before} was saved, now the newest is {after}"
        finished = last == self.settings.steps
        if fault.statuses is not None and status not in fault.statuses and not finished:
            return f"ended with status {status} instead of {fault.statuses}"
        if fault.saves and last and after != last:
            return f"lost: step {last} was taken, the newest saved is {after}"
        if fault.statuses is not None and "Traceback" in started.text():
            return "ended with a traceback"
        return None

    def _judge_start(self, started: Started, before: int) -> None:
        """Whether the run went on from its newest intact checkpoint; before training starts there is nothing to judge."""
        first = started.first_step()
        if first is None:
            return
        loaded, wrong = first - 1, f"went on from step {first - 1} instead of {before}"
        for step, trial in self.damaged.items():
            if step < loaded:
                continue  # no start has looked at it
            trial.problem = f"it was loaded: {wrong}" if step == loaded else None
            trial.log = str(started.log)
            self._add(trial)
        if loaded != before and loaded not in self.damaged:
            self._report(f"{wrong}: {started.log}")
        self.damaged = {}

    def _judge_end(self, started: Started, before: int) -> bool:
        """The run ended, or hung, before a fault hit it. Returns whether to go on with it."""
        ended = wait_until(lambda: not started.is_running(), self.settings.patience)
        status = started.end()
        self._judge_start(started, before)
        if not ended or status != 0:
            self._report(f"needs a person: status {status}: {started.log}")
            return False
        try:
            found = tensors_of(self.seen / CHECKPOINTS / f"step-{self.settings.steps}")
        except ValueError as error:
            self._report(f"it ended well, and yet: {error}")
            return False
        difference = largest_difference(found, self.reference.tensors)
        self.findings.comparisons.append((self.layout.name, difference))
        allowed = TOLERANCE_OTHER_LAYOUT if len(self.layout.processes) > 1 else 0.0
        if difference > allowed:
            what = f"differs by {difference:.2g} from a run without faults"
            self._report(f"{what}: {self.folder}")
        if self.is_well:
            shutil.rmtree(self.folder)  # with its logs
        return False
