"""
The `vision_features` that a LLaVA gets with a rival of VMTC (`rivals.py`): they go to `forward` and `generate()` in place of
images, with as many placeholders in the prompt.

    output = read_tower(model, pixel_values)
    features = RIVALS["VisionZip"](output, 64)
    model.generate(**inputs, vision_features=features)
"""

from typing import Any

import torch
from rivals import TowerOutput, merge_most_similar, plan_merging
from torch import nn


def blocks_in_use(model: Any) -> list[Any]:
    """The blocks of a DINOv2 up to the one whose output the LLaVA takes."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    if tower.config.model_type != "dinov2" or not isinstance(layer, int):
        raise ValueError(
            f"The rivals need a DINOv2 with one `vision_feature_layer`, got a {tower.config.model_type} with {layer}."
        )
    blocks = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
    return list(blocks)[: layer if layer >= 0 else len(blocks) + 1 + layer]


def heads(states: torch.Tensor, attention: Any) -> torch.Tensor:
    """`(B, tokens, d)` as `(B, heads, tokens, head_dim)`."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


@torch.no_grad()
def read_tower(model: Any, pixel_values: torch.Tensor) -> TowerOutput:
    """
    Runs the vision tower of a LLaVA on images `(B, 3, H, W)`.

    Raises:
        `ValueError`: The tower is no DINOv2.
    """
    blocks = blocks_in_use(model)
    tower = model.model.vision_tower
    states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    attention = blocks[-1].attention
    normed = blocks[-1].norm1(states[len(blocks) - 1])
    query, keys = heads(attention.q_proj(normed[:, :1]), attention), heads(attention.k_proj(normed), attention)
    row = (query.float() @ keys.float().mT * attention.scaling).softmax(dim=-1)
    size = tower.config.patch_size
    grid = (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size)
    return TowerOutput(states[len(blocks)][:, 1:], row[:, :, 0, 1:].mean(dim=1), keys[:, :, 1:], grid)


@torch.no_grad()
def run_tome(model: Any, pixel_values: torch.Tensor, budget: int) -> torch.Tensor:
    """
    Runs the vision tower with ToMe. Every block merges tokens between attention and MLP, by the keys of its attention. A
    token counts in the attention as often as it has patches (proportional attention).

    Returns:
        `torch.FloatTensor` of shape `(B, budget, d)`.
    """
    blocks = blocks_in_use(model)
    states = model.model.vision_tower.embeddings(pixel_values)
    sizes = torch.ones(len(states), states.shape[1] - 1, device=states.device)
    for block, num_merged in zip(blocks, plan_merging(sizes.shape[1], budget, len(blocks))):
        attention, normed = block.attention, block.norm1(states)
        query, keys, values = (
            heads(projection(normed), attention)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        counts = torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1).log()[:, None, None].to(query.dtype)
        attended = nn.functional.scaled_dot_product_attention(query, keys, values, counts, scale=attention.scaling)
        states = states + block.layer_scale1(attention.o_proj(attended.transpose(1, 2).flatten(2)))
        patches, sizes = merge_most_similar(states[:, 1:], keys.mean(dim=1)[:, 1:], sizes, num_merged)
        states = torch.cat([states[:, :1], patches], dim=1)
        states = states + block.layer_scale2(block.mlp(block.norm2(states)))
    return states[:, 1:]
