"""A partition rule: groups take experts in the order of text tokens' preference, whatever other modalities prefer."""

import torch
from torch import Tensor

from symbiotic_titan.extend import register_partition_rule
from symbiotic_titan.partition.rules import Groups
from symbiotic_titan.sequence.modality import TEXT


@register_partition_rule("text_first")
def text_first(counts_YME: Tensor, groups: Groups) -> Tensor:
    ranked_YE = counts_YME[:, TEXT].argsort(dim=-1, descending=True, stable=True)
    parts = ranked_YE.split([group.num_experts for group in groups], dim=-1)
    # Inside a group the experts keep their order.
    return torch.cat([part_Le.sort(dim=-1).values for part_Le in parts], dim=-1)
