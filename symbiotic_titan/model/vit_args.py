"""VitArgs: hyperparameters of the image encoder and its projector, and checks that they share with ``ModelArgs``."""

from dataclasses import dataclass, fields
from typing import Literal, get_type_hints

from symbiotic_titan.config.rows import check_value
from symbiotic_titan.registry import choice
from symbiotic_titan.sequence.geometry import RESIZE_RULES

PositionReading = Literal["bilinear", "bicubic", "floor"]


def require(ok: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``ok``."""
    if not ok:
        raise ValueError(message)


def check_fields(args: object, where: str, *, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless every field has its type and every number is positive, or zero if it is in ``may_be_zero``."""
    hints = get_type_hints(type(args))
    for f in fields(args):  # type: ignore[arg-type]
        value = getattr(args, f.name)
        check_value(f"{where}.{f.name}", value, hints[f.name])
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            ok, rule = value > 0, "positive"
            if f.name in may_be_zero:
                ok, rule = value >= 0, "zero or positive"
            require(ok, f"{where}.{f.name}: must be {rule}, got {value}")


@dataclass(frozen=True, kw_only=True)
class VitArgs:
    """Hyperparameters of the image encoder: pre-norm blocks, and a projector to the decoder's width.

    Fields with a default are switches that the released backbones need, at their usual setting.
    """

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    patch: int
    """Pixels along one side of a patch."""
    merge: int
    """Patches along one side of one sequence token."""
    queries: tuple[int, ...] = ()
    """Numbers of learned queries that read an image and become its tokens, ascending, one for each of ``query_sides``; empty: a token
    is a square of merge x merge patches."""
    query_sides: tuple[int, ...] = ()
    """Patches along the longer side of the images that each number of queries is for, ascending."""
    channels: int = 3
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    """Base of the two-dimensional rotary positions; 0: none, then ``position_grid`` must be set."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm of the blocks."""
    outer_norms: bool = False
    """An RMSNorm after the patch embedding and another after the last block."""
    last_norm: bool = False
    """A norm like those of the blocks after the last block."""
    bias: bool = True
    """Biases in the blocks' linear layers."""
    patch_bias: bool = True
    """A bias in the patch embedding."""
    activation: Literal["gelu_tanh", "gelu", "quick_gelu", "swiglu"] = "gelu_tanh"
    """Activation of the blocks' feed-forward; ``quick_gelu`` is x * sigmoid(1.702 x), ``swiglu`` has a third layer, the gate."""
    temporal_patch: int = 1
    """Frames that the patch embedding reads. An image is one frame, repeated that many times."""
    position_grid: int = 0
    """Side of the learned table of positions, resampled to each image's grid of patches; 0: no table."""
    position_reading: PositionReading = "bilinear"
    """How the table is resampled, see ``model.vit``."""
    projector_hidden_dim: int = 0
    """Width of the projector's final gated feed-forward; 0: a projector of two linear layers."""
    resampled_frames: int = 0
    """Frames of a video that the projector joins into one, after it has merged patches. An image is one frame, repeated that many
    times; 0: a projector for images only."""
    own_delimiters: bool = False
    """The tokens that begin and end an image are routed as its tokens are, not as text."""
    deepstack: tuple[int, ...] = ()
    """Layers whose output is also projected and added to the image tokens, one after each of the decoder's first layers
    (arXiv 2406.04334)."""
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean per channel by which images are normalized, for pixels in [0, 1]."""
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Standard deviation per channel, likewise."""
    image_resize: str = choice(RESIZE_RULES, "fit")
    """How images are resized, see ``data.images``."""

    def __post_init__(self) -> None:
        may_be_zero = ("position_grid", "projector_hidden_dim", "rope_theta", "resampled_frames")
        check_fields(self, "vit", may_be_zero=may_be_zero)
        require(self.channels == 3, f"vit.channels: images are read as RGB, got {self.channels}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            require(
                len(values) == self.channels and min(values) > 0,
                f"vit.{name}: must be {self.channels} positive numbers, got {values}",
            )
        require(
            self.dim % self.num_heads == 0,
            f"vit.dim: must be a multiple of vit.num_heads = {self.num_heads}, got {self.dim}",
        )
        require(
            not self.rope_theta or self.dim % (4 * self.num_heads) == 0,
            f"vit.dim: must be a multiple of 4 * vit.num_heads = {4 * self.num_heads} "
            f"(rotary rotates pairs of channels by row and by column), got {self.dim}",
        )
        require(
            list(self.deepstack) == sorted({i for i in self.deepstack if 0 <= i < self.num_layers}),
            f"vit.deepstack: must be ascending indices of the {self.num_layers} layers, from 0, got {self.deepstack}",
        )
        require(
            self.rope_theta > 0 or self.position_grid > 0,
            "vit.rope_theta: with 0 (no rotary) and vit.position_grid = 0, patches have no positions; set one of them",
        )
        require(
            self.position_grid > 0 or self.position_reading == "bilinear",
            f"vit.position_reading: has no effect without a table (vit.position_grid = 0), got {self.position_reading!r}",
        )
        require(
            not (self.outer_norms and self.last_norm),
            "vit.last_norm: has no effect with vit.outer_norms, which has a last norm already; set one of them to false",
        )
        require(
            not (self.resampled_frames and self.projector_hidden_dim),
            f"vit.resampled_frames: must be 0 with a gated projector (vit.projector_hidden_dim), got {self.resampled_frames}",
        )
        self._validate_queries()

    def _validate_queries(self) -> None:
        RESIZE_RULES.check("vit.image_resize", self.image_resize)
        require(
            (self.image_resize == "aria") == bool(self.queries),
            f"vit.image_resize: must be 'aria' with learned queries (vit.queries) and only with them, got {self.image_resize!r} "
            f"with vit.queries = {self.queries}",
        )
        require(
            len(self.queries) == len(self.query_sides),
            f"vit.query_sides: must be one for each of vit.queries = {self.queries}, got {self.query_sides}",
        )
        for name in ("queries", "query_sides"):
            values = getattr(self, name)
            require(
                list(values) == sorted({value for value in values if value > 0}),
                f"vit.{name}: must be positive and ascending, got {values}",
            )
        if self.queries:
            plain = {"merge": 1, "projector_hidden_dim": 0, "resampled_frames": 0, "deepstack": ()}
            for name, expected in plain.items():
                value = getattr(self, name)
                require(
                    value == expected,
                    f"vit.{name}: must be {expected} with learned queries (vit.queries), got {value}",
                )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads
