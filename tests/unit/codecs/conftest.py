"""A tiny autoencoder of the Flux kind with random weights: 4 channels, stride 2, so that its tests take milliseconds."""

import pytest

from tests.helpers import released_models


@pytest.fixture(scope="session")
def write_flux(tmp_path_factory):
    def write(seed=0, **sizes):
        path = tmp_path_factory.mktemp("flux") / "ae.safetensors"
        released_models.write_flux(path, seed, **sizes)
        return str(path)

    return write


@pytest.fixture(scope="session")
def flux_file(write_flux):
    return write_flux()
