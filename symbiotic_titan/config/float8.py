"""[float8]: how ``model.converters = ["float8"]`` converts."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Float8:
    emulate: bool = False
    """Round operands to float8 and multiply them in the model's precision: any device, for tests; slower than no float8."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """Scales of linear layers: per tensor, per row, or per row with the weights' gradients in the model's precision."""

    experts: bool = True
    """Whether the expert banks' matmuls are converted too. Their scales are per row whatever the recipe."""

    all_gather: bool = False
    """Whether FSDP gathers the weights of linear layers in float8: half the bytes of bfloat16. Recipe 'tensorwise' only."""

    def __post_init__(self) -> None:
        if self.all_gather and self.recipe != "tensorwise":
            raise ValueError(
                f"float8.all_gather needs one scale per weight, but float8.recipe = {self.recipe!r}; "
                "use recipe = 'tensorwise' or set all_gather = false"
            )
