"""A part of a converted tensor is that of the whole, and is made of the parts of the stored tensors that it needs."""

from random import Random

import pytest
import torch

from symbiotic_titan.hf.architectures.base import stack, unchanged
from symbiotic_titan.hf.architectures.weight_map import (
    chain,
    ends,
    join,
    split,
    transpose,
)
from symbiotic_titan.hf.converter import ConverterStep, TensorConverter
from symbiotic_titan.weights.reader import TensorSpec, box_of, cut
from tests.helpers.tiny_models import tiny_args

TIED = ends("table", "norm", "head", tiny_args(tie_embeddings=True))[1].load
# (transform, shapes of the inputs, number of outputs, share of the inputs that a third of the outputs' rows needs)
STEPS = {
    "unchanged": (unchanged, [(6, 4)], 1, 1 / 3),
    "one_tensor_per_expert": (stack, [(4, 5)] * 6, 1, 1 / 3),
    "gate_and_up": (split(1), [(6, 8, 3)], 2, 1 / 3),
    "transposed_experts": (chain(transpose, split(1)), [(6, 3, 8)], 2, 1 / 3),
    "tied": (TIED, [(6, 4)], 2, 1 / 3),
    "joined_columns": (join(1), [(6, 2), (6, 3)], 1, 1 / 3),
    "transposed_matrix": (transpose, [(4, 6)], 1, 1.0),
    "joined_rows": (join(0), [(2, 4), (4, 4)], 1, 1.0),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_part_is_that_of_the_whole(kind):
    transform, shapes, num_outputs, share = STEPS[kind]
    stored = {f"in{i}": torch.rand(shape) for i, shape in enumerate(shapes)}
    outputs = tuple(f"out{i}" for i in range(num_outputs))
    num_read = 0

    def read(name, box=None):
        nonlocal num_read
        part = stored[name] if box is None else cut(stored[name], box)
        num_read += part.numel()
        return part

    step = ConverterStep(tuple(stored), outputs, transform)
    specs = {name: TensorSpec.of(tensor) for name, tensor in stored.items()}
    converter, random = TensorConverter([step], specs, read), Random(3)
    whole = {name: converter(name) for name in outputs}
    for name in outputs * 10:
        (_, shape), is_last = box_of(whole[name]), name == outputs[-1]
        start = tuple(random.randrange(size) for size in shape)
        sizes = tuple(random.randint(1, n - at) for n, at in zip(shape, start, strict=True))
        assert converter.part(name, (start, sizes)).equal(cut(whole[name], (start, sizes)))
        assert not is_last or converter(name).equal(whole[name])
    num_read = 0
    for name in outputs:
        rows = (2, *whole[name].shape[1:])
        found = converter.part(name, ((2, *(0 for _ in rows[1:])), rows))
        assert found.equal(whole[name][2:4])
    assert num_read == pytest.approx(share * sum(t.numel() for t in stored.values()))
