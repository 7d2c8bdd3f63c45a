"""Models whose images to be understood are read by learned queries, as Aria's are."""

from dataclasses import replace

from symbiotic_titan.model.args import ModelArgs


def with_queries(args: ModelArgs, by_side: dict[int, int]) -> ModelArgs:
    """``args`` but for the images. ``by_side``: patches along the longer side of an image -> queries that read it."""
    vit = replace(
        args.vit,
        merge=1,
        queries=tuple(by_side.values()),
        query_sides=tuple(by_side),
        image_resize="aria",
        rope_theta=0.0,
        position_grid=max(by_side),
        position_reading="floor",
    )
    layout = {"rotary_layout": "sequence", "mrope": "none", "mrope_sections": ()}
    return replace(args, vit=vit, vit_attention="causal", **layout)
