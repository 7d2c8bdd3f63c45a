"""How often each expert was selected, by layer and modality: from a run's logs or from a profile.

Shape letters: sequence/shapes.py.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbiotic_titan.moe.routing_metrics import (
    COUNTS_TAG,
    LAYERS_TAG,
    REACHABLE_TAG,
    count_std,
    imbalance_ratio,
    overlap_size,
    relative_deviation,
)
from symbiotic_titan.plots.logs import Run
from symbiotic_titan.sequence.modality import NUM_MODALITIES


@dataclass(frozen=True, eq=False)
class ExpertUse:
    """counts_YME int64; reachable_ME bool; layers: number of each layer; period: where the counts come from.

    index: that of the run, which decides the colour.
    is_profile: counts of one fixed pass over data, which are comparable without normalisation.
    """

    index: int
    label: str
    period: str
    counts_YME: np.ndarray
    reachable_ME: np.ndarray
    layers: tuple[int, ...]
    is_profile: bool

    def reachable(self, modality: int) -> np.ndarray:
        """(Y, e) counts of the experts that ``modality`` can reach."""
        return self.counts_YME[:, modality][:, self.reachable_ME[modality]]

    def imbalance(self, modality: int) -> np.ndarray:
        """(Y,) count of the busiest expert / mean count; NaN without assignments."""
        return imbalance_ratio(torch.from_numpy(self.reachable(modality))).numpy()

    def deviation(self, modality: int) -> np.ndarray:
        """(Y,) standard deviation over experts: of the counts in a profile, else divided by their mean."""
        measure = count_std if self.is_profile else relative_deviation
        return measure(torch.from_numpy(self.reachable(modality))).numpy()

    def extremes(self, modality: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(most, least) used experts of layer number ``layer``, by number: ``overlap_size`` of them, and those tied with the last one."""
        numbers = np.flatnonzero(self.reachable_ME[modality])
        counts_e = self.reachable(modality)[self.layers.index(layer)]
        k = overlap_size(len(numbers))
        if k == 0:
            return numbers[:0], numbers[:0]
        lowest_e = np.sort(counts_e)
        return numbers[counts_e >= lowest_e[-k]], numbers[counts_e <= lowest_e[k - 1]]

    def has_tokens(self, modality: int) -> bool:
        return bool(self.counts_YME[:, modality].any())

    def choose_layer(self, layer: int | None) -> int:
        """``layer``, or the middle one.

        Raises:
            ValueError: it is no MoE layer.
        """
        if layer is None:
            return self.layers[len(self.layers) // 2]
        if layer not in self.layers:
            raise ValueError(
                f"--layer {layer}: {self.label} has the MoE layers {_listed(self.layers)}"
            )
        return layer


def from_run(run: Run, *, step: int | None, window: int) -> ExpertUse | None:
    """Counts that were logged at ``step``, or the sum of the last ``window`` logged ones. None where none was logged.

    Raises:
        ValueError: nothing was logged at ``step``.
    """
    logged = run.tensors.get(COUNTS_TAG, {})
    if not logged:
        return None
    if step is not None and step not in logged:
        raise ValueError(f"--step {step}: {run.label} logged counts at {_listed(tuple(logged))}")
    steps = [step] if step is not None else list(logged)[-window:]
    words = f"step {steps[0]}"
    if len(steps) > 1:
        words = f"{len(steps)} logged steps, {steps[0]} to {steps[-1]}"
    return ExpertUse(
        index=run.index,
        label=run.label,
        period=words,
        counts_YME=np.stack([logged[s] for s in steps]).sum(axis=0, dtype=np.int64),
        reachable_ME=run.tensors[REACHABLE_TAG][steps[-1]].astype(bool),
        layers=tuple(run.tensors[LAYERS_TAG][steps[-1]].tolist()),
        is_profile=False,
    )


def from_profile(path: Path) -> ExpertUse:
    """Counts of a JSON file whose key ``counts`` is [layers][text, vit, vae][experts], as ``symbiotic profile-experts`` writes it.

    Of its other keys, ``layers`` names the layers and ``model.groups`` gives the sizes of a partitioned model's groups.

    Raises:
        ValueError: the file cannot be read or has no such table.
    """
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        counts = np.array(profile["counts"], dtype=np.int64)
        groups = profile.get("model", {}).get("groups", {})
    except OSError as error:
        raise ValueError(f"--profile {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--profile {path}: not JSON with a table of integers 'counts'") from None
    if counts.ndim != 3 or counts.shape[1] != NUM_MODALITIES or 0 in counts.shape:
        raise ValueError(
            f"--profile {path}: counts must be [layers][{NUM_MODALITIES}][experts], got the shape {counts.shape}"
        )
    return ExpertUse(
        index=0,
        label=path.stem,
        period="profiled data",
        counts_YME=counts,
        reachable_ME=_groups_in_use(counts, list(groups.values())),
        layers=_layer_numbers(profile.get("layers", []), len(counts)),
        is_profile=True,
    )


def _groups_in_use(counts_YME: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(M, E) bool: the experts of every group that a modality's tokens went to."""
    num_experts = counts_YME.shape[-1]
    if sum(sizes) != num_experts:
        sizes = [num_experts]
    blocks = np.split(counts_YME, np.cumsum(sizes)[:-1], axis=-1)
    used_MG = np.stack([np.any(block, axis=(0, 2)) for block in blocks], axis=1)
    return np.repeat(used_MG, sizes, axis=1)


def _layer_numbers(names: list[Any], num_layers: int) -> tuple[int, ...]:
    """The number in each name (``layers.7`` -> 7); indices in the table where names have none."""
    numbers = [int(found[-1]) for name in names if (found := re.findall(r"\d+", str(name)))]
    return tuple(numbers if len(numbers) == num_layers else range(num_layers))


def _listed(numbers: tuple[int, ...]) -> str:
    """At most eight numbers, the last ones; consecutive ones as a range."""
    if numbers == tuple(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{numbers[0]} to {numbers[-1]}"
    return ("... " if len(numbers) > 8 else "") + ", ".join(map(str, numbers[-8:]))
