"""Asks a model about one image while hooks record what it does, and maps visual tokens to patches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..image_loading import load_rgb_image
from ..inference import GREEDY
from ..vision_towers import patch_grid


def prompt_inputs(processor: Any, image: Any, question: str, num_visual_tokens: int | None = None) -> Any:
    """
    The inputs of a model for a question about an image, by the processor's chat template.

    Args:
        num_visual_tokens (`int`, *optional*): Budget of this call, for a LLaVA with VMTC.

    Raises:
        `ValueError`: The question is empty, or the image cannot be read.
    """
    check_questions([question])
    content = [{"type": "image", "image": load_rgb_image(image)}, {"type": "text", "text": question}]
    budget = {} if num_visual_tokens is None else {"num_visual_tokens": num_visual_tokens}
    return processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=budget,
    )


def seen_image(image_processor: Any, image: Image.Image) -> Image.Image:
    """An image as the vision tower sees it: cropped and resized, RGB; of several views, that of the whole image."""
    pixels = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    pixels = whole_picture(pixels)[0]
    return Image.fromarray(pixels.float().round().clamp(0, 255).byte().permute(1, 2, 0).numpy(), "RGB")


def whole_picture(pixel_values: torch.Tensor) -> torch.Tensor:
    """The pixels `(1, 3, H, W)` of the whole image, which may come as views `(1, views, 3, H, W)`."""
    return pixel_values[:, 0] if pixel_values.dim() == 5 else pixel_values


def check_questions(questions: Sequence[str]) -> None:
    if not questions:
        raise ValueError("Give a question: what the picture shows depends on it.")
    if any(not question.strip() for question in questions):
        raise ValueError("The question is empty.")


def ask(
    model: Any, processor: Any, image: Any, question: str, max_new_tokens: int, num_visual_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values of the image, and the tokens of the greedy answer."""
    inputs = prompt_inputs(processor, image, question, num_visual_tokens).to(model.device)
    budget = {} if num_visual_tokens is None else {"num_visual_tokens": num_visual_tokens}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY, **budget)
    return whole_picture(inputs["pixel_values"]), output[0, inputs["input_ids"].shape[1] :]


def decode(processor: Any, tokens: torch.Tensor) -> str:
    return processor.post_process_image_text_to_text(tokens[None])[0].strip()


def split_words(tokenizer: Any, tokens: torch.Tensor) -> list[tuple[str, list[int]]]:
    """The words of a text, each with the indices of its tokens. Special tokens belong to no word."""
    ids = tokens.tolist()
    texts = [tokenizer.decode(ids[:length], skip_special_tokens=True) for length in range(len(ids) + 1)]
    words: list[list[int]] = []
    for index, (before, after) in enumerate(pairwise(texts)):
        if after == before:
            continue
        if not words or after[len(before) : len(before) + 1].isspace():
            words.append([])
        words[-1].append(index)
    return [(texts[indices[-1] + 1][len(texts[indices[0]]) :].strip(), indices) for indices in words]


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., None], with_kwargs: bool = False) -> Iterator[None]:
    """Calls `hook` before each forward pass of a module."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def traced_tower(model: Any) -> Iterator[list[Any]]:
    """A list that gets the `TowerCompression` of each call of the vision tower, or `None` if nothing is compressed."""
    compressions: list[Any] = []
    with hooked(
        model.model.vision_tower,
        lambda tower, arguments, kwargs: compressions.append(kwargs.get("compression")),
        with_kwargs=True,
    ):
        yield compressions


def tokens_of_patches(config: Any, pixel_values: torch.Tensor, compression: Any) -> torch.Tensor:
    """The visual token that each patch of the first view has become, `(rows, columns)`; -1 if VMTC dropped the patch."""
    rows, columns = patch_grid(config, pixel_values)
    factor = getattr(config, "spd_factor", 1)
    tokens = torch.arange((rows // factor) * (columns // factor)).view(rows // factor, columns // factor)
    tokens = tokens.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    for becomes in compression.trace if compression is not None else ():
        tokens = torch.where(tokens >= 0, becomes[0].cpu()[tokens.clamp(min=0)], -1)
    return tokens


def at_patches(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`values` `(visual tokens)` at the patches that became `tokens` `(rows, columns)`; nan if a patch was dropped."""
    return values[tokens.clamp(min=0)].masked_fill(tokens < 0, torch.nan)
