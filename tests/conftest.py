"""What all tests share: the same seeds every time, marks that follow from the folder, GPU tests only where there is one."""

import os
import random
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

# Importing the package prepares the device, which must come before any import of torchtitan.
from symbiotic_titan.process import loading

DISTRIBUTED = Path(__file__).parent / "distributed"


def pytest_configure(config: pytest.Config) -> None:
    """Tests of the CPU see no GPU, nor do processes that they start; torch has not looked for one yet."""
    chosen = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collection imports everything, as a program does when it starts."""
    with loading():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_accelerator = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if DISTRIBUTED in item.path.parents:
            item.add_marker("distributed")
        if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
            item.add_marker(no_accelerator)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
