"""The per-op mode keeps expensive results: the backward pass runs no expert matmul and no attention a second time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.job_config import ActivationCheckpoint

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.parallel.compile import apply_compile, checkpointing
from symbiotic_titan.parallel.parallelize import apply_activation_checkpoint
from tests.helpers.debug_model import DEBUG
from tests.helpers.tiny_models import MIXED, pack_row, run_model, tiny_args, tiny_model


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def backward_counts(mode: str, compiled: bool = False) -> tuple[dict[str, int], list[torch.Tensor]]:
    model = tiny_model(tiny_args(num_layers=3))
    config = ActivationCheckpoint(
        mode=mode, selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=[]
    )
    apply_activation_checkpoint(model, config, "")
    if compiled:
        apply_compile(model, "aot_eager_decomp_partition")
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


# Dynamo's own, as in test_compile.py.
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)
def test_compiled_it_leaves_the_choice_to_the_compiler_which_saves_matmuls():
    """Wrapped, the backward would run every compiled graph again."""
    per_op = "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op"
    compiled = "--compile.enable --compile.components model"
    config = load_job_config(["--job.config_file", str(DEBUG), *f"{per_op} {compiled}".split()])
    assert checkpointing(config).mode == "none"
    config.compile.enable = False
    assert checkpointing(config) is config.activation_checkpoint
    plain, full, counts = (
        backward_counts(*mode)[0] for mode in (("none", False), ("full", False), ("none", True))
    )
    # Two matrix-vector products count as matmuls once they are decomposed.
    assert abs(counts["mm"] - plain["mm"]) <= 2 and plain["mm"] + 10 < full["mm"]
    for op in ("swiglu_loop", "_scaled_dot_product_flash_attention_for_cpu"):
        assert counts.get(op, 0) == 0
