"""The dense limit of a training step: the time of plain matmuls with as many FLOPs as the step.

The FLOPs of a step are those of ``model/flops.py``: of every token of the step, by its modality, and of the logits of every label,
forward and backward; padding counts nothing, recomputation neither. Attention counts as torchtitan does, every query with its whole
row. The matmuls are one linear layer of the model's width D, without anything around it: (T, D) by (D, 4 D), T the positions of a
micro-batch, and both gradients, in the dtype of ``training.mixed_precision_param``, as often as the step's FLOPs ask for. Share of the
dense limit: their seconds / the step's.
"""

from typing import Any

import torch
from bench_timing import Clock, default_device

from symbiotic_titan.model.flops import model_cost
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import TEXT


class DenseLimit:
    """Measures the dense limit of the step that ``trainer`` took last; made before that step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._clock = Clock(default_device())
        self._batches: list[PackedBatch] = []  # of the last step
        to_device = trainer.to_device

        def note_batch(batch: PackedBatch, *places: Any) -> PackedBatch:
            if len(self._batches) == trainer.gradient_accumulation_steps:
                self._batches.clear()
            self._batches.append(to_device(batch, *places))
            return self._batches[-1]

        trainer.to_device = note_batch
        training = trainer.job_config.training
        dtype = getattr(torch, training.mixed_precision_param)
        num_tokens = training.local_batch_size * training.seq_len
        dim = trainer.model_args.dim
        shapes = ((num_tokens, dim), (4 * dim, dim), (num_tokens, 4 * dim))
        self._x_TD, self._w_HD, self._g_TH = (
            torch.randn(shape, device=trainer.device, dtype=dtype) for shape in shapes
        )
        self._flops_of_layer = 3 * 2 * num_tokens * dim * 4 * dim

    def measure(self) -> dict[str, float]:
        """``seconds`` of the last step's dense limit, and ``in_documents``: see ``share_in_documents``."""
        return {"seconds": self.seconds(), "in_documents": self.share_in_documents()}

    def _tokens(self) -> list[int]:
        """Tokens of the step, by modality."""
        return sum(batch.num_tokens() for batch in self._batches).tolist()  # type: ignore[union-attr]

    def flops(self) -> float:
        """Of the last step, forward and backward."""
        tokens = self._tokens()
        labelled = float(sum(batch.num_labels() for batch in self._batches))
        cost = self._trainer.metrics_processor.cost
        return cost.training_flops_per_token(tuple(map(float, tokens)), labelled) * sum(tokens)

    def share_in_documents(self) -> float:
        """The share of ``flops`` that is left where attention counts, for every query, its own document only."""
        trainer, pairs = self._trainer, 0
        for batch in self._batches:
            for document_T in batch.document:
                lengths = document_T[document_T >= 0].bincount()
                pairs += int(lengths.square().sum())
        cost = [model_cost(trainer.model_parts[0], trainer.model_args, length) for length in (1, 2)]
        of_a_pair = 3 * (cost[1].forward_flops[TEXT] - cost[0].forward_flops[TEXT])
        whole = sum(self._tokens()) * trainer.job_config.training.seq_len
        return 1 - of_a_pair * (whole - pairs) / self.flops()

    def seconds(self) -> float:
        """Of the matmuls, scaled from a whole number of layers to the step's FLOPs."""
        repeats = max(1, round(self.flops() / self._flops_of_layer))
        begin = self._clock.now()
        for _ in range(repeats):
            torch.mm(self._x_TD, self._w_HD.t())
            torch.mm(self._g_TH, self._w_HD)
            torch.mm(self._g_TH.t(), self._x_TD)
        seconds = self._clock.seconds(begin, self._clock.now())
        return seconds * self.flops() / (repeats * self._flops_of_layer)
