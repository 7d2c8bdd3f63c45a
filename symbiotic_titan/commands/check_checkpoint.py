"""Lists the checkpoints of a run, or of any folder with weights, and verifies their bytes.

Example: symbiotic check-checkpoint outputs/debug

PATH is the folder of a run or of its checkpoints, one checkpoint, or a converted or exported model. Every file is read and compared with
the SHA-256 that was written with it; --fast compares lengths only. Nothing is changed.

state:  whole          every file has its digest
        no digests     every file has its length; written by an older version or by another program, so nothing shows the bytes right
        not verified   the same, with --fast
        damaged        what is wrong follows; training would pass over it, or refuse it where it names a function
        renamed        to damaged-N, by a run that found it damaged

abandoned-N is a checkpoint of a branch that the run went back from; it is verified like the others. follows: the step that a checkpoint
was trained on from, or the weights that the run began with, as far as its lineage is kept.

Exit status: 0 if nothing is damaged, 1 if something is, 2 on a mistake such as a folder without checkpoints.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from symbiotic_titan.checkpoint.history import Lineage, folders_of, read_lineage
from symbiotic_titan.process import exit_status
from symbiotic_titan.weights.damage import read_metadata, step_of
from symbiotic_titan.weights.digests import METADATA, in_order, read_sums, wrong_files
from symbiotic_titan.weights.safetensors import slices_in
from symbiotic_titan.weights.weight_files import has_weights

DAMAGED = 1


@dataclass
class Report:
    """One checkpoint. ``holds``: "full" with the training state, else "model only", "?" where it cannot be read. ``written``: local time
    of its newest file."""

    path: str
    step: int | None
    holds: str
    files: int
    bytes: int
    written: str
    state: str
    lineage: Lineage | None
    damage: list[str] = field(default_factory=list)


def report_on(folder: Path, *, fast: bool) -> Report:
    files = [path for path in folder.iterdir() if path.is_file()]
    newest = max((path.stat().st_mtime for path in files), default=folder.stat().st_mtime)
    report = Report(
        path=str(folder),
        step=step_of(folder),
        holds="?",
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
        written=datetime.fromtimestamp(newest).isoformat(" ", "seconds"),
        state="renamed",
        lineage=read_lineage(folder),
    )
    if not folder.name.startswith("damaged-"):
        report.holds, report.damage = _metadata_of(folder)
        report.state = _verified(folder, report.damage, fast)
    return report


def _metadata_of(folder: Path) -> tuple[str, list[str]]:
    """(what the checkpoint holds, what is wrong as far as lengths and metadata show it)."""
    if not (folder / METADATA).is_file() and has_weights(folder):
        try:
            slices_in(folder)
        except ValueError as error:
            return "model only", [str(error)]
        return "model only", []
    try:
        metadata, damage = read_metadata(folder)
    except ValueError as error:
        metadata, damage = None, str(error)
    wrong = [] if damage is None else [damage]
    if metadata is None:
        return "?", wrong
    is_full = "train_state.step" in metadata.state_dict_metadata
    return "full" if is_full else "model only", wrong


def _verified(folder: Path, damage: list[str], fast: bool) -> str:
    """The state of a checkpoint; what is wrong with its bytes is added to ``damage``, where no file is named twice."""
    try:
        sums = read_sums(folder)
    except ValueError:
        return "damaged"  # which its metadata told
    if sums is not None and not fast:
        wrong = wrong_files(folder, sums, in_order(sums.keys() - {METADATA}))
        damage += [text for text in wrong if text not in damage]
    if damage:
        return "damaged"
    return "no digests" if sums is None else "not verified" if fast else "whole"


def checkpoints_in(path: Path, subfolder: str) -> list[Path]:
    """The checkpoints of a run by their steps, the renamed ones after them; or ``path`` itself.

    Raises:
        ValueError: there is no checkpoint in ``path``.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; name a run, its checkpoints or one of them")
    for folder in (path / subfolder, path):
        if found := [*folders_of(folder, "step"), *folders_of(folder, "abandoned", "damaged")]:
            return found
    if not (has_weights(path) or (path / METADATA).is_file() or any(path.glob("*.distcp"))):
        raise ValueError(
            f"{path} holds no checkpoint; name a run, its checkpoints or one of them, and with --folder their folder's name in the run"
        )
    return [path]


def lines_of(reports: list[Report]) -> Iterator[str]:
    width = max(len(report.path) for report in reports)
    yield f"{'checkpoint':{width}}  {'holds':10}  {'files':>6}  {'bytes':>17}  {'written':19}  {'follows':11}  state"
    for r in reports:
        row = f"{r.path:{width}}  {r.holds:10}  {r.files:6}  {r.bytes:17,}  {r.written:19}"
        yield f"{row}  {_follows(r.lineage):11}  {r.state}"
        yield from (f"    {text}" for text in r.damage)


def _follows(lineage: Lineage | None) -> str:
    if lineage is None:
        return "?"
    if lineage.parent_step:
        return f"step {lineage.parent_step}"
    return lineage.source or "new weights"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument(
        "--folder", default="checkpoint", help="checkpoint.folder of the run's config"
    )
    parser.add_argument("--fast", action="store_true", help="lengths only; tensors are not read")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    options = parser.parse_args(arguments)
    reports: list[Report] = []

    def run() -> None:
        for path in options.paths:
            found = checkpoints_in(path, options.folder)
            reports.extend(report_on(folder, fast=options.fast) for folder in found)
        if options.json:
            print(json.dumps([asdict(report) for report in reports], indent=2))
        else:
            print("\n".join(lines_of(reports)))

    status = exit_status(run)
    if status == 0 and any(report.damage for report in reports):
        return DAMAGED
    return status
