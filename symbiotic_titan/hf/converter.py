"""Converts stored tensors as they are read, one mapping at a time, so that the model is never whole in memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from symbiotic_titan.hf.architectures.base import ByRows, TensorTransform, stack, unchanged
from symbiotic_titan.weights.reader import Box, TensorSpec, cut

Rows = tuple[int, int]
"""The first one, and how many."""


@dataclass(frozen=True)
class ConverterStep:
    """``transform`` computes the tensors ``outputs`` from the tensors ``inputs``, in the order of these names."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    transform: TensorTransform


class TensorConverter:
    """The outputs of ``steps``; ``read`` gives an input by its name, and where ``part`` is used, also a part of it: see ``PartReader``.

    specs  output name -> shape and dtype, grouped by step: in this order every input is read only once.

    Raises:
        ValueError: inputs of shapes that a step cannot transform.
    """

    def __init__(
        self,
        steps: Iterable[ConverterStep],
        inputs: Mapping[str, TensorSpec],
        read: Callable[..., Tensor],
    ) -> None:
        self._read = read
        self._step_of: dict[str, ConverterStep] = {}
        self._inputs = inputs
        self._rows: Rows | None = None  # those that were computed; None: all
        self._computed: dict[str, Tensor] = {}
        self.specs: dict[str, TensorSpec] = {}
        for step in steps:
            specs = _output_specs(step, inputs)
            assert not self.specs.keys() & set(step.outputs), step.outputs
            self.specs |= dict(zip(step.outputs, specs, strict=True))
            self._step_of |= dict.fromkeys(step.outputs, step)

    def __call__(self, name: str) -> Tensor:
        """The output ``name``. The other outputs of its step are cached until they are read or another step runs."""
        return self._output(name, None)

    def part(self, name: str, box: Box) -> Tensor:
        """The part of the output ``name`` in ``box``. Of the inputs only what it needs is read, if the transform is a usual one."""
        step = self._step_of[name]
        if step.transform is unchanged:
            return self._read(step.inputs[step.outputs.index(name)], box)
        (first, *start), (count, *size) = box
        if step.transform is stack:
            inside = (tuple(start), tuple(size))
            return torch.stack([self._read(n, inside) for n in step.inputs[first : first + count]])
        dims = min(len(self._inputs[part].shape) for part in step.inputs)
        if isinstance(step.transform, ByRows) and dims >= step.transform.min_dims:
            rows = self._output(name, (first, count))
            return cut(rows, ((0, *start), (count, *size)))
        return cut(self(name), box)

    def _output(self, name: str, rows: Rows | None) -> Tensor:
        if name not in self._computed or rows != self._rows:
            self._computed = {}  # freed before the next inputs are read
            step = self._step_of[name]
            outputs = step.transform([self._read_rows(part, rows) for part in step.inputs])
            self._computed, self._rows = dict(zip(step.outputs, outputs, strict=True)), rows
        return self._computed.pop(name)

    def _read_rows(self, name: str, rows: Rows | None) -> Tensor:
        if rows is None:
            return self._read(name)
        others = self._inputs[name].shape[1:]
        return self._read(name, ((rows[0], *(0 for _ in others)), (rows[1], *others)))


def _output_specs(step: ConverterStep, inputs: Mapping[str, TensorSpec]) -> list[TensorSpec]:
    """Shapes and dtypes of the outputs, found by running the transform on the meta device, which computes no values."""
    try:
        outputs = step.transform([inputs[name].placeholder() for name in step.inputs])
    except (IndexError, RuntimeError):  # torch: too few dimensions, or sizes that do not match
        outputs = []
    if len(outputs) != len(step.outputs):  # chunk() returns fewer parts where a tensor is too small
        raise ValueError(_wrong_shape(step, inputs))
    return [TensorSpec.of(tensor) for tensor in outputs]


def _wrong_shape(step: ConverterStep, inputs: Mapping[str, TensorSpec]) -> str:
    """Names the input whose shape differs from the others', or the only input."""
    shapes = Counter(inputs[name].shape for name in step.inputs)
    usual = shapes.most_common(1)[0][0]
    odd = next((name for name in step.inputs if inputs[name].shape != usual), step.inputs[0])
    others = f" and the others like it {usual}" if len(shapes) > 1 else ""
    return (
        f"{odd} has shape {inputs[odd].shape}{others}; {step.outputs[0]} cannot be made from that"
    )
