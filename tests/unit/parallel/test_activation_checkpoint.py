"""The per-op mode keeps expensive results: the backward pass runs no expert matmul and no attention a second time."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.job_config import ActivationCheckpoint

from symbiotic_titan.parallel.parallelize import apply_activation_checkpoint
from tests.helpers.tiny_models import MIXED, pack_row, run_model, tiny_args, tiny_model


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def backward_counts(mode: str) -> tuple[dict[str, int], list[torch.Tensor]]:
    model = tiny_model(tiny_args(num_layers=3))
    config = ActivationCheckpoint(
        mode=mode, selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=[]
    )
    apply_activation_checkpoint(model, config, "")
    output = run_model(model, pack_row(MIXED, tiny_args()))
    loss = output.logits.square().mean() + output.velocity.square().mean()
    with CountOps() as ops:
        loss.backward()
    return ops.counts, [p.grad for p in model.parameters()]


def test_per_op_mode_recomputes_neither_experts_nor_attention():
    plain, expected = backward_counts("none")
    full, full_grads = backward_counts("full")
    per_op, grads = backward_counts("selective")
    for op in ("swiglu_loop", "_scaled_dot_product_flash_attention_for_cpu"):
        assert plain.get(op, 0) == 0
        assert full[op] > 0
        assert per_op.get(op, 0) == 0
    assert plain["mm"] <= per_op["mm"] < full["mm"]
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(full_grads, expected)
