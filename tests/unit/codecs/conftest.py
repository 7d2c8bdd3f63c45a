"""A tiny autoencoder of the Flux kind with random weights: 4 channels, stride 2, so that its tests take milliseconds."""

import pytest
import torch
from safetensors.torch import save_file

from symbiotic_titan.codecs.flux import autoencoder_module


@pytest.fixture(scope="session")
def write_flux(tmp_path_factory):
    def write(seed=0, **sizes):
        module = autoencoder_module()
        sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4} | sizes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            weights = module.AutoEncoder(module.AutoEncoderParams(**sizes)).state_dict()
        path = tmp_path_factory.mktemp("flux") / "ae.safetensors"
        save_file(weights, path)
        return str(path)

    return write


@pytest.fixture(scope="session")
def flux_file(write_flux):
    return write_flux()
