"""Several training runs one after another in the same processes: each saves the seconds that a start and the imports take.

``python -m tests.helpers.runs_in_turn FILE`` is one rank. FILE is a JSON list of runs: the arguments of each, and its port. Before and
behind the output of a run stands a line by which ``run_in_turn`` divides it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.launch import ROOT, Run, environment, free_port

END = "=== exit status"


def run_in_turn(
    folder: Path, runs: list[list[str]], *, world_size: int = 1, timeout: int = 240
) -> list[list[Run]]:
    """What each run left behind on each rank; ``Run.folder`` is ``folder``. Fails where a run hangs."""
    plan = folder / "runs.json"
    plan.write_text(json.dumps([{"port": str(free_port()), "arguments": run} for run in runs]))
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    ranks = []
    for rank, path in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        with path.open("w") as log:
            command = [sys.executable, "-m", "tests.helpers.runs_in_turn", str(plan)]
            ranks.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment(1) | place, stdout=log, stderr=log
                )
            )
    try:
        for process in ranks:
            process.wait(timeout=timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    by_rank = [runs_of(path.read_text(), folder) for path in logs]
    assert all(len(found) == len(runs) for found in by_rank), logs[0].read_text()[-3000:]
    return [list(found) for found in zip(*by_rank, strict=True)]


def runs_of(log: str, folder: Path) -> list[Run]:
    runs = []
    for part in log.split("=== run\n")[1:]:
        text, found, status = part.partition(END)
        if found:
            runs.append(Run(int(status.split()[0]), text, folder))
    return runs


def main() -> None:
    from symbiotic_titan.train import leave, main

    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = run["port"]
        print("=== run", flush=True)
        print(END, main(run["arguments"]), file=sys.stderr, flush=True)
    leave(0)


if __name__ == "__main__":
    main()
