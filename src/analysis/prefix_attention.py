"""TA-LLaVA: where the prefix looks for each question, as data and as panels of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..configuration_ta_llava import TaLlavaConfig
from ..prefix_adapters import apply_rotary, eager_attention_forward
from .asking import ask, at_patches, decode, hooked, tokens_of_patches, traced_tower
from .drawing import Panels, draw_heat, enlarge


@dataclass(frozen=True, eq=False)
class PrefixView:
    """
    Where the prefix of a TA-LLaVA looks for one question.

    Args:
        question (`str`): The question.
        answer (`str`): The model's answer.
        layers (`list[int]`): The layers of the language model, from 0, after which the prefix reads the image.
        attention (`torch.FloatTensor` of shape `(len(layers), rows, columns)`): The share of the vision adapter's attention
            that each patch of the image gets, averaged over heads and prefix tokens; each map sums to 1. Patches that VMTC
            merged share equally what their token gets; a patch that VMTC dropped is nan.
    """

    question: str
    answer: str
    layers: list[int]
    attention: torch.Tensor


@torch.no_grad()
def trace_prefix(model: Any, processor: Any, image: Any, question: str, max_new_tokens: int = 64) -> PrefixView:
    """
    Asks a TA-LLaVA a question about an image, greedily, and records the attention of its vision adapter. Recording does not
    change the answer.

    Args:
        image: Path, URL, PIL image or array.

    Raises:
        `ValueError`: The model is not a TA-LLaVA, its prefix never reads the image, the question is empty, or the image
            cannot be read.
    """
    if model.config.model_type != TaLlavaConfig.model_type:
        raise ValueError(f"This is a {model.config.model_type!r} model, but only a TA-LLaVA has a prefix.")
    layers = [i for i, layer in enumerate(model.model.language_model.layers) if layer.prefix_source == "vision"]
    if not layers:
        raise ValueError(
            "The language model of this TA-LLaVA has so few layers that its prefix never reads the image."
        )
    maps: list[torch.Tensor] = []

    def keep_weights(attention: Any, arguments: tuple) -> None:
        # Backbones without soft-capping use SDPA, which does not return its weights.
        prefix, key, value, mask, cos, sin = arguments
        query = attention.q_proj(prefix).unflatten(-1, (-1, attention.head_dim))
        if attention.q_norm is not None:
            query = attention.q_norm(query)
        query = apply_rotary(query.transpose(1, 2), cos, sin).reshape(*key.shape[:2], -1, attention.head_dim)
        scaling, softcap = attention.scaling, attention.softcap
        weights = eager_attention_forward(attention, query, key, value, mask, scaling, softcap=softcap)[1]
        maps.append(weights[0].float().mean(dim=(0, 1)).cpu())

    adapter = model.model.vision_adapter.cross_attn
    with hooked(adapter, keep_weights), traced_tower(model) as compressions:
        pixel_values, new_tokens = ask(model, processor, image, question, max_new_tokens)
    tokens = tokens_of_patches(model.config, pixel_values, compressions[0])
    patches_of_token = torch.bincount(tokens[tokens >= 0], minlength=maps[0].shape[-1]).clamp(min=1)
    attention = torch.stack([at_patches(weights / patches_of_token, tokens) for weights in maps])
    return PrefixView(question, decode(processor, new_tokens), layers, attention)


def prefix_panels(image: Image.Image, views: Sequence[PrefixView], patch_size: int) -> Panels:
    """
    Draws one section per question: the image, a heat map for each time that the prefix reads it, and their mean. All
    share one scale, from 0 to the highest value.

    Args:
        image (`PIL.Image.Image`): RGB, as the vision tower sees it (`seen_image`).
        views (`Sequence[PrefixView]`): One or more views of this image by one model.
        patch_size (`int`): Pixels of a patch.
    """
    large, side = enlarge(image, patch_size)
    highest = max(float(view.attention.nan_to_num().max()) for view in views)
    sections = []
    for view in views:
        maps = [(f"after layer {layer}", values) for layer, values in zip(view.layers, view.attention)]
        if len(maps) > 1:
            maps.append(("mean", view.attention.mean(dim=0)))
        panels = [(title, draw_heat(large, values / highest, side)) for title, values in maps]
        sections.append((f"{view.question}  ->  {view.answer}", [("the image", large), *panels]))
    percent = float(f"{100 * highest:.2g}")  # two digits: with many patches none gets 1%
    return Panels(sections, ("share of the prefix's attention:  0", f"{percent:g}% on one patch"))
