"""
Counts what a model costs, on tensors without data: no weights are needed, and full-size models take seconds.

`torch.utils.flop_counter` counts the operations of the prefill: two for each multiplication and addition of matrix products
and convolutions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
)
from transformers.initialization import no_init_weights

from ..cmai import attention_weights, focus_scores, head_averaged_scores, inhibition_ratio
from ..common.families import LLAVA_TYPES, has_views
from ..common.loading import config_of
from ..common.sources import check_source
from ..configuration_ta_llava import TaLlavaConfig
from ..library_versions import CACHE
from ..safe_loading import check_image_size
from ..vmtc_cmai_llava_next import VmtcCmaiLlavaNextConfig
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig


def _grouped(key: Sequence[int], query: Sequence[int]) -> tuple[int, ...]:
    """Shape of keys or values with as many heads as the queries. Before torch 2.13 the counter needs it."""
    return (key[0], query[1], *key[2:])


# The counter knows the attention of GPUs, but not that of the CPU, which has the same operands.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, _grouped(key, query), _grouped(value, query))
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *args, **kwargs: sdpa_backward_flop_count(
            grad, query, _grouped(key, query), _grouped(value, query)
        )
    ),
}
PARTS = {
    "vision tower": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "adapters": ("text_adapter", "vision_adapter", "prefix_embedding", "image_index_embedding"),
}
LANGUAGE_MODEL = "language model"


@dataclass
class Cost:
    """
    What one row costs.

    Args:
        parameters (`dict[str, int]`): Number of parameters of each part; tied embeddings count once.
        operations (`dict[str, int]`): Floating point operations of each part in the prefill of one row.
        num_tokens (`int`): Number of tokens in the language model: visual or prefix tokens, and text.
        cache_bytes (`int`): Size of the KV cache after the prefill, in bfloat16.
    """

    parameters: dict[str, int]
    operations: dict[str, int]
    num_tokens: int
    cache_bytes: int


def clip_large() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels, the vision tower of both papers."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def full_size_config(name: str) -> Any:
    """
    The config of a model of the papers.

    Args:
        name (`str`): One of `FULL_SIZE`.
    """
    if name == "ta-llava-gemma-2-2b":
        return TaLlavaConfig(
            vision_config=clip_large(),
            text_config=Gemma2Config(),
            image_token_id=7,
            response_marker_ids=[106, 2516],
        )
    sizes = {
        "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
        "llava-1.5-13b": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40, "heads": 40},
    }
    sizes["llava-next-7b"] = sizes["llava-1.5-7b"]
    size = sizes[name]
    text_config = LlamaConfig(
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    config_class = VmtcCmaiLlavaNextConfig if name == "llava-next-7b" else VmtcCmaiLlavaConfig
    return config_class(vision_config=clip_large(), text_config=text_config)


REFERENCES = ("llava-1.5-7b", "llava-1.5-13b")
FULL_SIZE = ("ta-llava-gemma-2-2b", *REFERENCES, "llava-next-7b")


def read_config(source: str | Path) -> tuple[Any, int]:
    """
    Config of a model, and the side of its images in pixels. Of pictures in views it is the side of a view.

    Args:
        source (`str` or `Path`): A `config.json`, a folder or Hub repo, or one of `FULL_SIZE`.

    Raises:
        `ValueError`: There is no config, or its kind of model cannot be counted.
    """
    if source in FULL_SIZE:
        config = full_size_config(str(source))
        return config, config.vision_config.image_size
    try:
        check_source(source)
    except ValueError as error:
        raise ValueError(f"{error} These need no files: {', '.join(FULL_SIZE)}.") from error
    config = config_of(source)
    known = (TaLlavaConfig.model_type, *LLAVA_TYPES)
    if config.model_type not in known:
        raise ValueError(f"{source} is a {config.model_type!r} model; only {', '.join(known)} can be counted.")
    try:
        image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):  # there is only a config
        return config, config.vision_config.image_size
    check_image_size(image_processor)
    return config, torch.as_tensor(
        image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    ).shape[-1]


def count_cost(config: Any, text_tokens: int = 40, num_images: int = 1, image_size: int | None = None) -> Cost:
    """
    Counts the cost of one row with images. Pictures in views have the size of `largest_picture`.

    Args:
        config ([`TaLlavaConfig`], [`VmtcCmaiConfig`] or a config of the library such as `LlavaConfig`):
            Config of the model. The cost of CMAI is part of the language model's.
        text_tokens (`int`): Text tokens of the prompt.
        num_images (`int`): Images of the row.
        image_size (`int`, *optional*): Side of the images in pixels. Defaults to that of the vision tower.
    """
    image_size = image_size or config.vision_config.image_size
    with FakeTensorMode(), torch.no_grad():
        model = build_without_data(config)
        shape = (num_images, 3, image_size, image_size)
        if has_views(config):
            shape = (num_images * count_views(config), *shape[1:])
        pixel_values = torch.empty(shape, dtype=torch.bfloat16)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            outputs = _Row(model)(pixel_values, text_tokens)
        counts, total = counter.get_flop_counts(), counter.get_total_flops()
        cache = getattr(outputs, CACHE)
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        num_tokens = cache.get_seq_length()
        parameters, operations = {}, {}
        for part, names in PARTS.items():
            modules = [getattr(model.model, name) for name in names if hasattr(model.model, name)]
            if modules:
                parameters[part] = sum(parameter.numel() for module in modules for parameter in module.parameters())
                operations[part] = sum(
                    sum(by_kind.values())
                    for name, by_kind in counts.items()
                    if name in {f"_Row.model.model.{part}" for part in names}
                )
        parameters[LANGUAGE_MODEL] = sum(p.numel() for p in model.parameters()) - sum(parameters.values())
        operations[LANGUAGE_MODEL] = total - sum(operations.values())
    return Cost(parameters, operations, num_tokens, cache_bytes)


def largest_picture(config: Any) -> list[int]:
    """
    Height and width of the picture with most tiles, up to the 9 to which LLaVA-OneVision scales larger ones down: 672 x 672
    pixels of LLaVA-NeXT, which are 2,880 tokens, and 1152 x 1152 of LLaVA-OneVision, which are 7,290.
    """
    tile = config.vision_config.image_size**2
    return max(
        (canvas for canvas in config.image_grid_pinpoints if canvas[0] * canvas[1] <= 9 * tile),
        key=lambda canvas: (canvas[0] * canvas[1], min(canvas)),
    )


def count_views(config: Any) -> int:
    """The views of the `largest_picture`."""
    height, width = largest_picture(config)
    return 1 + height * width // config.vision_config.image_size**2


def build_without_data(config: Any) -> Any:
    """
    A model in bfloat16 of tensors without data, inside a `FakeTensorMode`. A total budget of a picture, whose split depends
    on data, becomes the same budget for each view.
    """
    total = getattr(config, "vmtc_total_visual_tokens", None)
    if total is not None:
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        of_view = min(max(round(total / count_views(config)), 1), patches)  # no view keeps more than it has
        changed = {"vmtc_total_visual_tokens": None, "vmtc_num_visual_tokens": of_view}
        config = type(config).from_dict({**config.to_dict(), **changed})
    with no_init_weights():  # the initialization of DINOv2 reads its numbers
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    model.tie_weights()
    return model


class _Row(nn.Module):
    """Makes one module of `run`, so that the counter knows the names of all modules in it."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, text_tokens: int) -> Any:
        outputs = run(self.model, pixel_values, text_tokens)
        if getattr(self.model.config, "use_cmai", False):
            inhibit(self.model.config, getattr(outputs, CACHE).get_seq_length() - text_tokens, text_tokens)
        return outputs


def inhibit(config: Any, visual_tokens: int, text_tokens: int) -> None:
    """Does the matrix products of CMAI in the prefill of a row. `run` lacks them, since it skips the model's own forward."""
    text_config: Any = config.text_config
    heads, key_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    num_layers = text_config.num_hidden_layers
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    query = torch.empty(1, heads, text_tokens, head_dim)
    key = torch.empty(1, key_heads, visual_tokens + text_tokens, head_dim)
    allowed = torch.ones(1, text_tokens, visual_tokens + text_tokens, dtype=torch.bool)
    for layer_idx in range(num_layers):
        if config.cmai_focus == "none" or inhibition_ratio(layer_idx, num_layers, config.cmai_max_ratio) == 0:
            continue
        if config.cmai_attention == "weights":
            averaged = attention_weights(query, key, 1, allowed).mean(dim=1)
        else:
            averaged = head_averaged_scores(query, key, 1)
        if config.cmai_focus != "tia":
            text_to_image, neighbors = averaged[..., :visual_tokens], averaged[..., visual_tokens:-1]
            focus_scores(text_to_image, neighbors, text_to_image[:, :-1])


def run(model: Any, pixel_values: torch.Tensor, text_tokens: int, labels: bool = False) -> Any:
    """
    Does a forward pass of one row with the images `pixel_values` `(I, 3, H, W)`, or all their views, and text, on tensors
    without data. With `labels`, the output has a loss.
    """
    if model.config.model_type == TaLlavaConfig.model_type:
        ids = torch.zeros(1, model.config.num_prefix_tokens + text_tokens, dtype=torch.long)
        return model(input_ids=ids, pixel_values=pixel_values[None], labels=ids if labels else None)
    # LLaVA reads the ids to place the visual tokens, and tensors without data have none. Here they come before the text.
    views = {}
    if has_views(model.config):
        views["image_sizes"] = [largest_picture(model.config)] * (len(pixel_values) // count_views(model.config))
    outputs = model.model.get_image_features(pixel_values, return_dict=True, **views)
    visual_tokens = torch.cat(outputs.pooler_output)[None]
    text = model.get_input_embeddings()(torch.zeros(1, text_tokens, dtype=torch.long))
    outputs = model.model.language_model(inputs_embeds=torch.cat([visual_tokens, text], dim=1), use_cache=not labels)
    logits = model.lm_head(outputs.last_hidden_state)
    if labels:
        targets = torch.zeros(logits.shape[:2], dtype=torch.long)
        outputs.loss = model.loss_function(logits=logits, labels=targets, vocab_size=logits.shape[-1])
    return outputs


def format_cost(costs: dict[str, Cost], references: Sequence[str]) -> str:
    """
    A Markdown table with a column for each model.

    Args:
        costs (`dict[str, Cost]`): Costs by name of the model.
        references (`Sequence[str]`): Names of the models that the last rows compare with.
    """
    parts = [*PARTS, LANGUAGE_MODEL]
    rows = [["", *costs], ["---", *["---:"] * len(costs)]]
    rows.append(["parameters", *(in_millions(sum(cost.parameters.values())) for cost in costs.values())])
    rows += [
        [
            f"- {part}",
            *(in_millions(cost.parameters[part]) if part in cost.parameters else "" for cost in costs.values()),
        ]
        for part in parts
    ]
    rows.append(["tokens in the language model", *(f"{cost.num_tokens:,}" for cost in costs.values())])
    rows.append(["prefill", *(scaled(sum(cost.operations.values()), "FLOP") for cost in costs.values())])
    rows += [
        [
            f"- {part}",
            *(scaled(cost.operations[part], "FLOP") if part in cost.operations else "" for cost in costs.values()),
        ]
        for part in parts
    ]
    rows.append(["KV cache", *(scaled(cost.cache_bytes, "B") for cost in costs.values())])
    for reference in references:
        total, cache = sum(costs[reference].operations.values()), costs[reference].cache_bytes
        ratios = [total / sum(cost.operations.values()) for cost in costs.values()]
        rows.append([f"prefill, {reference} / this", *(f"{ratio:.2f}x" for ratio in ratios)])
        rows.append(
            [f"KV cache, {reference} / this", *(f"{cache / cost.cache_bytes:.2f}x" for cost in costs.values())]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def in_millions(number: int) -> str:
    """A number of parameters, in millions."""
    return f"{number / 1e6:,.2f} M" if number < 1e7 else f"{number / 1e6:,.0f} M"


def scaled(number: float, unit: str) -> str:
    """A number of operations or bytes, in the largest unit that it reaches."""
    factor, prefix = next(
        ((factor, prefix) for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= factor),
        (1, ""),
    )
    return f"{number / factor:.3g} {prefix}{unit}"
