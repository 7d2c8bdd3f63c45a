"""The loss of one optimizer step, put together from the registered terms.

Targets are counted before the forward passes, over all ranks and micro-batches, and every micro-batch's sums are divided by these
counts. The gradient of N micro-batches on M ranks is therefore that of one batch N x M times as large.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symbiotic_titan.config.losses import TASK_WEIGHT, Losses, LossSettings
from symbiotic_titan.losses.terms import StepInputs, label_index, sum_by_task, text_errors
from symbiotic_titan.moe.record import RoutingTotals
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import MODALITY_NAMES, NUM_MODALITY_SETS
from symbiotic_titan.sequence.tasks import TASKS


@dataclass(frozen=True)
class StepTotals:
    """Targets of one step over all ranks and micro-batches; known before any forward, on the host and on the device.

    counts     term -> (J,) targets by task, for the terms that count targets.
    modality   (M,) tokens.
    positions  () tokens and padding.
    sets       (S,) micro-batches with each set of modalities, by ``PackedBatch.modality_set``.
    """

    counts: dict[str, Tensor]
    modality: Tensor
    positions: Tensor
    sets: Tensor


@dataclass(frozen=True)
class MicroBatchResult:
    """Detached results of one micro-batch on this rank.

    values   term -> (J,) sums by task, or () its share of the step's value.
    routing  None without MoE layers.
    """

    values: dict[str, Tensor]
    routing: RoutingTotals | None

    @property
    def is_finite(self) -> Tensor:
        """() bool."""
        return torch.isfinite(sum(value.sum() for value in self.values.values()))  # type: ignore[arg-type]


def mean_losses(
    sums: Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
    weighted: Callable[[Tensor], Tensor] = torch.sum,
) -> dict[str, float]:
    """``<term>`` and ``by_task/<task>_<term>`` from (J,) sums and counts by term; those without targets are left out.

    weighted: (J,) -> (), the sum over tasks that a term is the ratio of.
    """
    losses = {  # device sync, here and below, where the sums are on a device
        term: float(weighted(sums_J) / weighted(counts[term]))
        for term, sums_J in sums.items()
        if counts[term].sum() > 0
    }
    for i, task in enumerate(TASKS):
        for term, sums_J in sums.items():
            if counts[term][i] > 0:
                losses[f"by_task/{task}_{term}"] = float(sums_J[i] / counts[term][i])
    return losses


def _check_shape(what: str, value: object, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a term, which may come from a user's module, gives something other than a tensor of ``shape``."""
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if found != shape:
        rule = f"{shape}, a sum for each task" if shape else "(), one number"
        raise ValueError(f"{what}: must be a tensor of shape {rule}, got {found}")


class LossFunction:
    """The registered terms with the weights of [losses]; torchtitan's train spec takes it as the loss function.

    cross_entropy: ``text_errors``, possibly compiled.
    """

    def __init__(
        self,
        settings: LossSettings | None = None,
        cross_entropy: Callable[[Tensor, Tensor], Tensor] = text_errors,
    ) -> None:
        settings = settings or Losses()
        terms = {
            name: term
            for name, term in settings.terms().items()
            if settings.weight(name) or not term.only_weighted
        }
        self.cross_entropy = cross_entropy
        self.weights = {name: settings.weight(name) for name in terms}
        # By the number of the task in tensors, how much its targets count besides once.
        numbers = {task: number for number, task in enumerate(TASKS)}
        self._more = {numbers[task]: weight - 1 for task, weight in settings.task_weights.items()}
        self._reads_all_logits = any(term.all_logits for term in terms.values())
        self._values = {name: term.value_function() for name, term in terms.items()}
        counts = {name: term.count_function() for name, term in terms.items()}
        self._counts = {name: count for name, count in counts.items() if count is not None}

    @property
    def counted(self) -> list[str]:
        """Terms that are sums over targets, in order of registration."""
        return list(self._counts)

    def logit_index(self, batch: PackedBatch) -> Tensor | None:
        """(N,) on the batch's device: the tokens whose logits the terms read; None: all. No device sync for a ``batch`` on the host."""
        return None if self._reads_all_logits else label_index(batch.labels)

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Term -> (J,) targets of ``batch`` by task, known before the forward."""
        counts = {name: count(batch) for name, count in self._counts.items()}
        for name, count in counts.items():
            _check_shape(f"the count of the loss term {name!r}", count, (len(TASKS),))
        return counts

    def values(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Term -> its differentiable sums by task (J,), or its () share of the step's value."""
        values = {name: value(inputs) for name, value in self._values.items()}
        for name, value in values.items():
            shape = (len(TASKS),) if name in self._counts else ()
            _check_shape(f"the value of the loss term {name!r}", value, shape)
        return values

    def count_step(
        self, batches: Sequence[PackedBatch], whole: Sequence[PackedBatch] | None = None
    ) -> Tensor:
        """(J * counted terms + M + 1 + S,) float64: this rank's share of ``StepTotals``, to be summed over ranks. All on the host.

        ``batches``: this rank's parts of its micro-batches. ``whole``: these micro-batches, or none where another of the ranks that share
        them counts them. None: the parts are whole.
        """
        # float64 counts exactly where float32 ends at 2^24; concatenated, all counts need one all-reduce.
        total = torch.zeros(
            len(TASKS) * len(self._counts) + len(MODALITY_NAMES) + 1, dtype=torch.float64
        )
        for batch in batches:
            counts = list(self.counts(batch).values())
            positions = torch.tensor([batch.tokens.numel()])
            total += torch.cat([*counts, batch.num_tokens(), positions])
        sets = torch.zeros(NUM_MODALITY_SETS, dtype=torch.float64)
        for batch in batches if whole is None else whole:
            sets[batch.modality_set()] += 1
        return torch.cat([total, sets])

    def totals(self, total: Tensor) -> StepTotals:
        """From ``count_step`` summed over ranks."""
        sizes = [len(TASKS)] * len(self._counts)
        others = [len(MODALITY_NAMES), 1, NUM_MODALITY_SETS]
        *counts, modality, positions, sets = total.split([*sizes, *others])
        by_term = {n: c.float() for n, c in zip(self._counts, counts, strict=True)}
        return StepTotals(by_term, modality, positions, sets)

    def _over_tasks(self, by_task_J: Tensor) -> Tensor:
        """() the sum over tasks, each with its weight. No device sync."""
        total = by_task_J.sum()
        for number, more in self._more.items():
            total = total + more * by_task_J[number]
        return total

    def loss(self, values: Mapping[str, Tensor], totals: StepTotals) -> Tensor:
        """() a micro-batch's share of the step's loss."""
        terms = []
        for name, value in values.items():
            if name in totals.counts:
                # Without any target in the step the loss is 0, not NaN.
                count = self._over_tasks(totals.counts[name]).clamp(min=TASK_WEIGHT.least)
                terms.append(self.weights[name] * self._over_tasks(value) / count)
            else:
                terms.append(self.weights[name] * value.sum())
        return functools.reduce(operator.add, terms)

    def sum_results(self, results: Sequence[MicroBatchResult]) -> Tensor:
        """All terms' values of this rank, concatenated, to be summed over ranks in one all-reduce."""
        rows = [torch.cat([v.reshape(-1) for v in result.values.values()]) for result in results]
        return torch.stack(rows).sum(0)

    def step_losses(self, total: Tensor, totals: StepTotals) -> dict[str, float]:
        """Losses of the step by name, from ``sum_results`` summed over ranks; terms and tasks without targets in this step are left out.
        Both on the host."""
        sizes = [len(TASKS) if name in totals.counts else 1 for name in self._values]
        values = dict(zip(self._values, total.split(sizes), strict=True))
        sums = {n: v for n, v in values.items() if n in totals.counts}
        means = mean_losses(sums, totals.counts, self._over_tasks)
        others = {n: float(v) for n, v in values.items() if n not in totals.counts}
        losses = others | means
        terms = {name: losses.pop(name) for name in self.weights if name in losses}
        weighted = sum(self.weights[name] * value for name, value in terms.items())
        return terms | losses | {"total": weighted}

    def not_finite(self, losses: Mapping[str, float], grad_norm: float) -> dict[str, float]:
        """The non-finite ones among the step's weighted losses and its gradient norm."""
        terms = {name: losses[name] for name in self.weights if name in losses}
        values = terms | {"grad_norm": grad_norm}
        return {n: v for n, v in values.items() if not torch.isfinite(torch.tensor(v))}


def correct_tokens(inputs: StepInputs) -> Tensor:
    """(J,) labelled tokens whose most likely next token is the label, by task."""
    # IGNORE_INDEX is negative, so no token equals it.
    return sum_by_task((inputs.logits.argmax(-1) == inputs.labels).float(), inputs.tasks)


def accuracies(correct_J: Tensor, count_J: Tensor) -> dict[str, float]:
    """``accuracy/<task>``: share of correct labelled tokens; tasks without labels are left out."""
    return {
        f"accuracy/{task}": float(correct_J[i] / count_J[i])  # device sync
        for i, task in enumerate(TASKS)
        if count_J[i] > 0
    }
