"""
Draws what a model does with an image, from the name of the model: what `ta-llava visualize` does.

`visualize` draws which patches VMTC keeps and merges, `visualize_prefix` where the prefix of a TA-LLaVA looks, and
`visualize_inhibition` which image tokens CMAI inhibits for each word of an answer. `vmtc_stages`, `prefix_attention` and
`inhibition` have a function `trace_...` that runs a loaded model and returns the data, and one `..._panels` that draws them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from ..building.compress import DEFAULT_CMAI_MAX_RATIO, training_free_fields
from ..common.errors import one_line
from ..common.families import COMPRESSED_TYPES, LLAVA_TYPES
from ..common.loading import config_of, load_complete
from ..common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ..configuration_ta_llava import TaLlavaConfig
from ..image_loading import load_rgb_image
from ..inference import load
from ..safe_loading import check_image_size
from ..vision_towers import make_compressible, patch_grid
from ..vmtc import count_visual_tokens
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig
from .asking import check_questions, seen_image, whole_picture
from .drawing import compose
from .inhibition import CmaiView, inhibition_panels, trace_inhibition
from .prefix_attention import PrefixView, prefix_panels, trace_prefix
from .vmtc_stages import StageView, stage_panels, trace_stages


@torch.no_grad()
def visualize(
    image: Any, model: str | Path = DEFAULT_MODEL, num_visual_tokens: int | None = None
) -> tuple[Image.Image, list[StageView]]:
    """
    Runs the vision tower of a model on an image with VMTC and draws what it does. Only the tower of the model is loaded. If
    the model cuts images into views, this is the view of the whole image.

    Args:
        image: Path, URL, PIL image or array.
        model (`str` or `Path`): Folder or Hub repo of a LLaVA, with VMTC or without, a TA-LLaVA, or a vision tower.
        num_visual_tokens (`int`, *optional*): The budget. Defaults to that of the model if it has VMTC on, or to half of
            the patches.

    Returns:
        The picture, and what it shows.

    Raises:
        `ValueError`: The image cannot be read, the budget does not fit it, or the model has no tower that VMTC knows.
    """
    image = load_rgb_image(image)
    settings, image_processor = _load_settings(model)
    pixel_values = whole_picture(image_processor(image, return_tensors="pt")["pixel_values"])
    total = getattr(settings, "vmtc_total_visual_tokens", None)
    if total is not None and num_visual_tokens is None:
        raise ValueError(
            f"{model} shares {total} visual tokens among the views of a picture, but here one view is drawn. Say how many "
            "it keeps: `--visual-tokens`."
        )
    num_patches = math.prod(patch_grid(settings, pixel_values))
    count_visual_tokens(settings, num_patches, num_visual_tokens)  # checks the budget before the weights are loaded
    views = trace_stages(settings, _load_tower(model, settings), pixel_values, num_visual_tokens)
    return compose(stage_panels(seen_image(image_processor, image), views, settings.vision_config.patch_size)), views


def visualize_prefix(
    image: Any, questions: Sequence[str], model: str | Path = DEFAULT_MODEL, max_new_tokens: int = 64
) -> tuple[Image.Image, list[PrefixView]]:
    """
    Loads a TA-LLaVA, asks it questions about an image, and draws where its prefix looks for each.

    Args:
        image: Path, URL, PIL image or array.
        questions (`Sequence[str]`): One or more questions.
        model (`str` or `Path`): Folder or Hub repo.

    Returns:
        The picture, and what it shows.

    Raises:
        `ValueError`: There is no question, or the errors of `trace_prefix` and `load`.
    """
    image = load_rgb_image(image)
    check_questions(questions)
    model_type = config_of(model).model_type
    if model_type != TaLlavaConfig.model_type:
        raise ValueError(f"{str(model)!r} is a {model_type!r} model, but only a TA-LLaVA has a prefix.")
    loaded, processor = load(model)
    views = [trace_prefix(loaded, processor, image, question, max_new_tokens) for question in questions]
    seen = seen_image(processor.image_processor, image)
    return compose(prefix_panels(seen, views, loaded.config.vision_config.patch_size)), views


def visualize_inhibition(
    image: Any,
    question: str,
    model: str | Path = DEFAULT_LLAVA,
    num_visual_tokens: int | None = None,
    cmai_max_ratio: float | None = None,
    max_new_tokens: int = 64,
) -> tuple[Image.Image, CmaiView]:
    """
    Loads a LLaVA with CMAI, asks it a question about an image, and draws which parts of the image CMAI inhibits for each
    word of the answer. If the model cuts images into views, this is the view of the whole image.

    Args:
        image: Path, URL, PIL image or array.
        model (`str` or `Path`): Folder or Hub repo of a LLaVA, with VMTC and CMAI or without.
        num_visual_tokens (`int`, *optional*): Turn VMTC on and keep this many visual tokens.
        cmai_max_ratio (`float`, *optional*): Share inhibited in the last layer. Defaults to that of the model if it has CMAI
            on, or to 0.6.

    Returns:
        The picture, and what it shows.

    Raises:
        `ValueError`: The errors of `trace_inhibition` and `load`.
    """
    image = load_rgb_image(image)
    check_questions([question])
    config = config_of(model)
    if config.model_type not in LLAVA_TYPES:
        raise ValueError(f"{str(model)!r} is a {config.model_type!r} model, but CMAI works in a LLaVA.")
    use_cmai = getattr(config, "use_cmai", False)
    if cmai_max_ratio is None and not use_cmai:
        cmai_max_ratio = DEFAULT_CMAI_MAX_RATIO
    if cmai_max_ratio == 0:
        raise ValueError("With a CMAI ratio of 0 no image token is inhibited. Choose one above 0, e.g. 0.6.")
    loaded, processor = load(model, num_visual_tokens, cmai_max_ratio)
    view = trace_inhibition(loaded, processor, image, question, max_new_tokens=max_new_tokens)
    seen = seen_image(processor.image_processor, image)
    return compose(inhibition_panels(seen, view, loaded.config.vision_config.patch_size)), view


# --- the vision tower alone ----------------------------------------------------------------------------------------


def _load_settings(model: str | Path) -> tuple[Any, Any]:
    """The config of a model with VMTC on, and its image processor. A model without VMTC in its config gets such a config."""
    settings = config_of(model)
    try:
        image_processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # files may be missing or damaged in any way
        raise _cannot_load(model, error) from error
    if settings.model_type not in (TaLlavaConfig.model_type, *COMPRESSED_TYPES):
        vision_config = getattr(settings, "vision_config", settings)  # a LLaVA, or a CLIP with its text tower, has one
        if not isinstance(getattr(vision_config, "patch_size", None), int):
            raise ValueError(
                f"{str(model)!r} is a {settings.model_type!r} model, which has no vision tower of patches."
            )
        feature_layer = getattr(settings, "vision_feature_layer", VmtcCmaiLlavaConfig.vision_feature_layer)
        settings = VmtcCmaiLlavaConfig(vision_config=vision_config, vision_feature_layer=feature_layer)
    check_image_size(image_processor)
    settings.update({"use_vmtc": True, **training_free_fields(settings.to_dict())})
    return settings, image_processor


def _load_tower(model: str | Path, settings: Any) -> Any:
    tower = load_complete(
        model,
        AutoModel,
        what="vision tower",
        needed=("embeddings.", "pre_layrnorm.", "encoder."),  # the norm after the blocks is not used
        config=settings.vision_config,
        key_mapping={r"^(model\.)?vision_tower\.": ""},
        dtype=torch.float32,
    )
    make_compressible(tower)
    return tower.eval()


def _cannot_load(model: str | Path, error: Exception) -> ValueError:
    return ValueError(f"No vision tower could be loaded from {str(model)!r}: {one_line(error)}")
