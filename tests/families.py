"""Tiny models of all families of LLaVAs that VMTC and CMAI extend, and inputs for them."""

from typing import Any

import torch
from conftest import BOS, IMAGE, batch_of, make_lively, random_tokens, text_config
from tiny_parts import SPECIAL_TOKENS, build_image_processor, build_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import ta_llava


FAMILIES = ["llava", "llava_next", "llava_onevision"]
VIEWS = ["llava_next", "llava_onevision"]
VIDEO = 8
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
STOCK = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, None),
}
PREFIXES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}


def ours(family: str, kind: str) -> Any:
    """The class of a family: its "Config", "Model", "ForConditionalGeneration" or "Processor"."""
    return getattr(ta_llava, f"VmtcCmai{PREFIXES[family]}{kind}")


def config_fields(family: str, backbone: str = "llama") -> dict[str, Any]:
    """The fields of the stock config: 24 x 24 pixels are 36 patches, and pictures get 2 or 3 tiles, or 4."""
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "image_size": 24,
        "patch_size": 4,
    }
    vision = CLIPVisionConfig(**sizes, projection_dim=24)
    if family == "llava_onevision":
        vision = SiglipVisionConfig(**sizes, vision_use_head=False)
    text = text_config(backbone, num_hidden_layers=4, max_position_embeddings=512)
    fields = {"vision_config": vision, "text_config": text, "image_token_index": IMAGE}
    if family in VIEWS:
        fields["image_grid_pinpoints"] = PINPOINTS
    if family == "llava_onevision":
        fields["video_token_index"] = VIDEO
    return fields


def build_stock(family: str) -> torch.nn.Module:
    config_class, model_class, _ = STOCK[family]
    torch.manual_seed(0)
    return make_lively(model_class(config_class(**config_fields(family))), seed=3).eval()


def build(family: str, backbone: str = "llama", **kwargs) -> Any:
    """A model with VMTC to 9 tokens of each view, if no total is given, and CMAI."""
    each = None if "vmtc_total_visual_tokens" in kwargs else 9
    flags = {"use_vmtc": True, "vmtc_num_visual_tokens": each, "vmtc_merge_weights": "normalized", "use_cmai": True}
    config = ours(family, "Config")(**{**config_fields(family, backbone), **flags, **kwargs})
    torch.manual_seed(0)
    return make_lively(ours(family, "ForConditionalGeneration")(config)).eval()


# Height and width of the pictures of each row.
ROWS: list[list[tuple[int, int]]] = [[(30, 60)], [(60, 15), (50, 50)], [], [(10, 15)]]


def pictures_of(model: Any, rows: list[list[tuple[int, int]]], seed: int = 0) -> dict[str, Any]:
    """The inputs of a model for the pictures of some rows, without the text. The pixels of a picture depend on its size."""
    sizes = [size for row in rows for size in row]
    if not sizes:
        return {}
    pixels = []
    for height, width in sizes:
        generator = torch.Generator().manual_seed(1000 * height + width + seed)
        pixels.append(torch.randn(5, 3, 24, 24, generator=generator))
    if "image_grid_pinpoints" not in model.config.to_dict():
        return {"pixel_values": torch.stack([views[0] for views in pixels])}
    pictures = {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}
    if "vision_aspect_ratio" in model.config.to_dict():
        pictures["batch_num_images"] = torch.tensor([len(row) for row in rows if row])
    return pictures


@torch.no_grad()
def inputs_of(
    model: Any, rows: list[list[tuple[int, int]]] = ROWS, side: str = "left", seed: int = 0
) -> dict[str, Any]:
    """
    A padded batch of prompts with pictures of these sizes. Whether the number of placeholders is right, which the model
    checks, the tests of the processors show.
    """
    pictures = pictures_of(model, rows, seed)
    features = model.get_image_features(**pictures).pooler_output if pictures else []
    counts = iter([len(tokens) for tokens in features])
    prompts = []
    for number, row in enumerate(rows):
        # What is in a row does not depend on the rows beside it.
        number = sum(map(sum, row)) + len(row) + (number if not row else 0)
        prompt = [BOS, *random_tokens(2, number)]
        for image in range(len(row)):
            prompt += [IMAGE] * next(counts) + random_tokens(2, number + 100 * image)
        prompts.append(prompt + random_tokens(3 + number % 4, number + 7))
    return {**batch_of(prompts, side), **pictures}


def build_processor(family: str, stock: bool = False, **kwargs) -> Any:
    """A processor for the model of `build`, with a chat template."""
    extra = [f"<unused{index}>" for index in range(IMAGE - len(SPECIAL_TOKENS))]
    words = ["a", "b", "c", "what", "is", "it"]
    tokenizer = build_tokenizer("words", [*extra, "<image>", "<video>"], words=words)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<video>"]) == [IMAGE, VIDEO]
    fields: dict[str, Any] = {"tokenizer": tokenizer, "vision_feature_select_strategy": "default"}
    fields["chat_template"] = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    if family == "llava_onevision":
        size = {"height": 24, "width": 24}
        fields["image_processor"] = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS)
        fields |= {"num_image_tokens": 36, "vision_feature_select_strategy": "full"}
    else:
        fields |= {"patch_size": 4, "num_additional_image_tokens": 1, "image_processor": build_image_processor()}
    if family == "llava_next":
        fields["image_processor"] = LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=PINPOINTS
        )
    return (STOCK[family][2] if stock else ours(family, "Processor"))(**{**fields, **kwargs})
