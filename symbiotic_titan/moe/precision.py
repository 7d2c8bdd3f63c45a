"""The dtype and the storage that an explicit matmul must use."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would compute a matmul of ``x`` in; ``x.dtype`` without autocast. Grouped matmuls and our autograd
    functions are on no autocast list, so they ask."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter; the parameter itself where nothing sharded it. The gradient stays a shard."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
