"""Every implementation of Adam takes the same steps, on parameters sharded over two meshes and on plain ones."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from symbiotic_titan.config.optimizer import ParamGroupRow
from symbiotic_titan.optim.build import param_group_optimizers
from tests.helpers.debug_model import backward, build, config_of, forward
from tests.helpers.gloo import run_on_ranks

IMPLEMENTATIONS = ("fused", "foreach", "for-loop")
# The gradient of one batch, scaled anew at each step: recomputed gradients would differ by more than the optimizers do, where
# they are nothing but rounding (the bias of the ViT's keys).
STEPS = (1.0, -0.5, 2.0)
LAYOUTS = {
    "one_process": (1, ""),
    "expert_parallel": (2, "--parallelism.expert_parallel_degree 2"),
    "expert_parallel_hsdp": (
        4,
        "--parallelism.expert_parallel_degree 2 --parallelism.data_parallel_replicate_degree 2",
    ),
}


def weights_after_steps(rank, overrides, name, implementation):
    config = config_of(
        f"{overrides} --optimizer.name {name} --optimizer.implementation {implementation}"
    )
    config.optimizer.weight_decay = 0.1
    model, args = build(config)
    # Groups that mix parameters of both meshes, with settings of their own.
    config.optimizer.param_groups = [
        ParamGroupRow("generation", [r"\.generation\.", "^flow_head"], lr=4e-3, betas=[0.8, 0.9]),
        ParamGroupRow("rest", [".*"]),
    ]
    optimizers = param_group_optimizers(model, config.optimizer, None)
    backward(forward(model, args, rank))
    gradients = {p: p.grad.clone() for p in model.parameters()}
    for scale in STEPS:
        for parameter, gradient in gradients.items():
            parameter.grad = scale * gradient
        optimizers.step()
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def all_implementations(rank, overrides, name):
    return {i: weights_after_steps(rank, overrides, name, i) for i in IMPLEMENTATIONS}


@pytest.mark.parametrize(
    ("layout", "name"),
    [*((layout, "AdamW") for layout in LAYOUTS), ("expert_parallel", "Adam")],
)
def test_implementations_agree(layout, name):
    num_ranks, overrides = LAYOUTS[layout]
    results = run_on_ranks(num_ranks, all_implementations, overrides, name)
    start = results[0]["for-loop"]
    for result in results:
        for implementation in IMPLEMENTATIONS:
            for parameter, weight in result[implementation].items():
                torch.testing.assert_close(
                    weight,
                    start[parameter],
                    atol=1e-6,
                    rtol=1e-6,
                    msg=f"{implementation} {parameter}",
                )
