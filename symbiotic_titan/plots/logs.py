"""Reads the TensorBoard logs in a run's dump folder as plain numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from symbiotic_titan.moe.routing_metrics import (
    COUNTS_TAG,
    LAYERS_TAG,
    REACHABLE_TAG,
)

T = TypeVar("T")
ROUTING_TAGS = (COUNTS_TAG, REACHABLE_TAG, LAYERS_TAG)


@dataclass(frozen=True, eq=False)
class Run:
    """index: position among the runs, which decides its colour.   scalars, tensors: tag -> step -> value, steps in order."""

    index: int
    label: str
    folder: Path
    scalars: dict[str, dict[int, float]]
    tensors: dict[str, dict[int, np.ndarray]]

    def curve(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a scalar; empty where it was never logged."""
        points = self.scalars.get(tag, {})
        return np.array(list(points), dtype=np.int64), np.array(list(points.values()))

    @property
    def last_step(self) -> int:
        return max(step for points in self.scalars.values() for step in points)


def succeed(earlier: dict[int, T], later: dict[int, T]) -> dict[int, T]:
    """Merge step -> value of two writers of one run, steps in order.

    The later one resumed from a checkpoint, so the earlier one's values from that step on are dropped.
    """
    start = min(later)
    kept = {step: value for step, value in earlier.items() if step < start}
    return kept | {step: later[step] for step in sorted(later)}


def event_files(folder: Path) -> list[Path]:
    """Event files of the dump folder ``folder``; rank 0's if every rank logs."""
    logs = folder / "tb"
    return sorted([*logs.glob("*/events.out.*"), *logs.glob("*/rank_0/events.out.*")])


def read_run(folder: Path, label: str, index: int = 0) -> Run:
    """What the run in ``folder`` logged. Of several writers (resumed runs) the later wins, tag by tag.

    Raises:
        ValueError: there is no such folder, or no log with a scalar in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the job.dump_folder of a run")
    files = event_files(folder)
    if not files:
        raise ValueError(
            f"{folder}: no TensorBoard logs below {folder / 'tb'}; give the job.dump_folder of a run that had "
            "metrics.enable_tensorboard = true"
        )
    scalars: dict[str, dict[int, float]] = {}
    tensors: dict[str, dict[int, np.ndarray]] = {}
    for log in _in_order_of_writing(files):
        for tag in log.Tags()["scalars"]:
            values = {event.step: float(event.value) for event in log.Scalars(tag)}
            scalars[tag] = succeed(scalars.get(tag, {}), values)
        for tag in set(ROUTING_TAGS) & set(log.Tags()["tensors"]):
            arrays = {event.step: make_ndarray(event.tensor_proto) for event in log.Tensors(tag)}
            tensors[tag] = succeed(tensors.get(tag, {}), arrays)
    if not scalars:
        raise ValueError(f"{folder}: the logs are empty; wait for the first logged step")
    return Run(index, label, folder, scalars, tensors)


def _in_order_of_writing(files: list[Path]) -> list[EventAccumulator]:
    """The event files that have scalars, sorted by the creation time in their first entry."""
    everything = {"scalars": 0, "tensors": 0, "images": 1}  # 0: all of them
    logs = [EventAccumulator(str(file), size_guidance=everything).Reload() for file in files]
    filled = [log for log in logs if log.Tags()["scalars"]]
    return sorted(filled, key=lambda log: log.FirstEventTimestamp())


def default_labels(folders: list[Path]) -> list[str]:
    """The folders' names, or their paths where two share a name.

    Raises:
        ValueError: a folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path}: the run is given twice")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
