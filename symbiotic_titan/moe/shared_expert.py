"""The expert that every token visits, behind the gradient shield.

Letters: T tokens, D width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from symbiotic_titan.moe.gradient_shield import (
    scale_gradient,
    scaled_weight_linear,
    token_factors,
)
from symbiotic_titan.moe.partition import MoEArgs
from symbiotic_titan.moe.precision import compute_dtype
from symbiotic_titan.moe.router import is_any_modality


class SharedExpert(nn.Module):
    """SwiGLU ``w2(silu(w1 x) * w3 x)``, optionally times ``sigmoid(gate x)``.

    In ``weights`` mode the layers' weights are used directly, so a float8 conversion of these linear layers has no effect
    there.
    """

    def __init__(self, args: MoEArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.shared_hidden_dim, bias=False)
        self.w2 = nn.Linear(args.shared_hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.shared_hidden_dim, bias=False)
        self.gate = nn.Linear(args.dim, 1, bias=False) if args.shared_gate else None
        self._shield_modalities = args.shield_modalities
        self._shield_mode = args.shield_mode

    def forward(self, x_TD: Tensor, modality_T: Tensor, shield_scale: Tensor) -> Tensor:
        """(T, D). ``shield_scale``: 0-dim, factor on the gradient of shielded tokens; 1 is no shield."""
        if not self._shield_modalities:
            return self._swiglu(x_TD, lambda layer, y: layer(y))
        shielded_T = is_any_modality(modality_T, self._shield_modalities)
        factors_T = token_factors(shielded_T, shield_scale)
        if self._shield_mode == "output":
            return scale_gradient(self._swiglu(x_TD, lambda layer, y: layer(y)), factors_T)

        def linear(layer: nn.Linear, y: Tensor) -> Tensor:
            dtype = compute_dtype(y)
            return scaled_weight_linear(y.to(dtype), layer.weight.to(dtype), factors_T)

        return self._swiglu(x_TD, linear)

    def _swiglu(self, x_TD: Tensor, linear: Callable[[nn.Linear, Tensor], Tensor]) -> Tensor:
        out_TD = linear(self.w2, F.silu(linear(self.w1, x_TD)) * linear(self.w3, x_TD))
        return out_TD if self.gate is None else out_TD * linear(self.gate, x_TD).sigmoid()
