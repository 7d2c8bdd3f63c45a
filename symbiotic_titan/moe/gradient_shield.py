"""Scale the gradient of chosen tokens: identity forward, per-token factor backward.

arXiv 2604.07753 does not say which gradient is shielded, so there are two modes. Both leave the forward pass bitwise unchanged:

- ``output``: ``scale_gradient`` on the shared expert's output. The gradients of its weights and of the token's input are both scaled.
- ``weights``: ``scaled_weight_linear`` in place of each of its linear layers. Only the weights' gradient is scaled.

The scale is a tensor, so that a new value does not cause a recompilation.

Shape letters: sequence/shapes.py. D is the width in, F the width out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def token_factors(shielded_T: Tensor, scale: Tensor | float) -> Tensor:
    """(T,) float32: ``scale`` for shielded tokens, 1 for the others."""
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, device=shielded_T.device)
    return torch.where(shielded_T, scale.float(), 1.0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, factors_T: Tensor) -> Tensor:
        ctx.save_for_backward(factors_T)
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        (factors_T,) = ctx.saved_tensors
        # The factor stays float32, because bfloat16 cannot represent most scales (such as 0.1); only the product is rounded.
        return (grad_TD * factors_T.unsqueeze(-1)).to(grad_TD.dtype), None


class _ScaledWeightLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, factors_T: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_FD, factors_T)
        return F.linear(x_TD, weight_FD)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_FD, factors_T = ctx.saved_tensors
        grad_x_TD = grad_TF @ weight_FD if ctx.needs_input_grad[0] else None
        grad_weight_FD = None
        if ctx.needs_input_grad[1]:
            # Scaled before the matmul, which sums over tokens.
            scaled_TF = (grad_TF * factors_T.unsqueeze(-1)).to(grad_TF.dtype)
            grad_weight_FD = scaled_TF.t() @ x_TD
        return grad_x_TD, grad_weight_FD, None


def scale_gradient(x_TD: Tensor, factors_T: Tensor) -> Tensor:
    """``x_TD`` itself; backward multiplies each token's gradient by its factor."""
    return _ScaleGradient.apply(x_TD, factors_T)


def scaled_weight_linear(x_TD: Tensor, weight_FD: Tensor, factors_T: Tensor) -> Tensor:
    """(T, F): ``x @ weight.T`` with the full gradient to x and the per-token scaled gradient to the weight.

    It costs one more elementwise pass over the output gradient than a plain linear layer.
    """
    return _ScaledWeightLinear.apply(x_TD, weight_FD, factors_T)
