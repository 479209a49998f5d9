"""
Draws what the models do with an image: which patches VMTC keeps and merges, where the prefix of a TA-LLaVA looks, and
which image tokens CMAI inhibits for each word of an answer.

For each there are a function `trace_...` that runs a model and returns the data, one `..._panels` that draws them, one
`draw_...` that makes one picture of the panels, and one `visualize...` that does all, with the model still to be loaded.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging

from ..building.compress import DEFAULT_CMAI_MAX_RATIO
from ..cmai import Inhibition
from ..common.errors import one_line
from ..common.loading import check_complete, config_of
from ..common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ..configuration_ta_llava import TaLlavaConfig
from ..image_loading import load_rgb_image
from ..inference import GREEDY, load
from ..modeling_ta_llava import apply_rotary, eager_attention_forward
from ..safe_loading import check_image_size, read_safetensors
from ..vision_towers import compression_of_call, make_compressible, patch_grid
from ..vmtc import VmtcStage, count_visual_tokens
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig
from .drawing import DROPPED, KEPT, Panels, compose, draw_heat, draw_panel, enlarge


logger = logging.get_logger(__name__)


# --- VMTC: what is kept and merged ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageView:
    """
    What has become of the patches of an image after a stage.

    Args:
        clusters (`list[int]`): For each patch the number, from 1, of the cluster that it was merged into; `KEPT` if it is
            a token of its own; `DROPPED` if it is none.
        num_before, num_kept, num_merged, num_dropped (`int`): Tokens before the stage; after it those that are single
            patches, and those that are clusters; and those that the stage dropped.
    """

    clusters: list[int]
    num_before: int
    num_kept: int
    num_merged: int
    num_dropped: int

    @property
    def title(self) -> str:
        counts = [f"{self.num_kept} kept"]
        counts += [f"{self.num_merged} merged"] if self.num_merged else []
        counts += [f"{self.num_dropped} dropped"] if self.num_dropped else []
        return f"{self.num_before} -> {self.num_kept + self.num_merged} ({', '.join(counts)})"


def compose_trace(trace: list[torch.Tensor], stages: list[VmtcStage]) -> list[StageView]:
    """
    From what each stage does to its tokens, what has become of each patch after each stage.

    What was merged once is a cluster from then on, also where a later stage keeps it. A cluster has its number for as long
    as it lives; of clusters that are merged, the one with the most patches gives its number to the new one.

    Args:
        trace (`list[torch.LongTensor]` of shapes `(n,)`, n falling): Per stage, which output token each token of one image
            becomes, -1 where it is dropped (`TowerCompression.trace`).
        stages (`list[VmtcStage]`): The stages; their first `num_kept` output tokens are single input tokens.
    """
    views: list[StageView] = []
    tokens = list(range(len(trace[0]))) if trace else []  # of each patch, its token, or -1
    numbers = [KEPT] * len(tokens)  # of each token, its cluster, or KEPT
    for stage_trace, stage in zip(trace, stages, strict=True):
        becomes: list[int] = stage_trace.tolist()
        sizes = [0] * len(numbers)  # of each token before the stage, its patches
        for token in tokens:
            if token >= 0:
                sizes[token] += 1
        after: dict[int, int] = {}
        founders: dict[int, tuple[int, int]] = {}  # of each merged token, size and number of its largest cluster
        for source, target in enumerate(becomes):
            if 0 <= target < stage.num_kept:
                after[target] = numbers[source]
            elif target >= 0:
                candidate = (sizes[source] if numbers[source] != KEPT else 0, numbers[source])
                founders[target] = max(founders.get(target, (0, KEPT)), candidate)
        after |= {target: number for target, (_, number) in founders.items() if number != KEPT}
        used = set(after.values())
        unused = (number for number in range(1, len(tokens) + 1) if number not in used)
        for target in sorted(founders):
            if target not in after:
                after[target] = next(unused)
        tokens = [becomes[token] if token >= 0 else DROPPED for token in tokens]
        numbers = [after[target] for target in range(len(after))]
        num_kept = numbers.count(KEPT)
        views.append(
            StageView(
                clusters=[numbers[token] if token >= 0 else DROPPED for token in tokens],
                num_before=len(becomes),
                num_kept=num_kept,
                num_merged=len(numbers) - num_kept,
                num_dropped=becomes.count(DROPPED),
            )
        )
    return views


def draw_stages(image: Image.Image, views: list[StageView], patch_size: int) -> Image.Image:
    """The panels of `stage_panels`, which has the same arguments, as one picture."""
    return compose(stage_panels(image, views, patch_size))


def stage_panels(image: Image.Image, views: list[StageView], patch_size: int) -> Panels:
    """
    The image, and one panel per stage: kept patches as they are, each cluster in its colour with an outline, dropped
    patches dark.

    Args:
        image (`PIL.Image.Image`): RGB, as the vision tower sees it (`seen_image`).
        views (`list[StageView]`): From `compose_trace`; their patches are rows of the image, top first.
        patch_size (`int`): Pixels of a patch.
    """
    large, side = enlarge(image, patch_size)
    num_patches = (image.width // patch_size) * (image.height // patch_size)
    panels = [(f"original ({num_patches} patches)", large)]
    panels += [(view.title, draw_panel(large, view.clusters, side)) for view in views]
    legend = "as in the image: a token of its own; one colour: patches merged into one token"
    if any(view.num_dropped for view in views):
        legend += "; dark: dropped"
    return Panels([("", panels)], (legend,) if views else ())


@torch.no_grad()
def visualize(
    image: Any, model: str | Path = DEFAULT_MODEL, num_visual_tokens: int | None = None
) -> tuple[Image.Image, list[StageView]]:
    """
    Runs the vision tower of a model on an image with VMTC and draws what it does. Of a whole LLaVA only the tower is
    loaded.

    Args:
        image: Path, URL, PIL image or array.
        model (`str` or `Path`): Folder or Hub repo of a LLaVA, with VMTC or without, a TA-LLaVA, or a vision tower.
        num_visual_tokens (`int`, *optional*): The budget. Defaults to that of the model if it has VMTC on, or to half of
            the patches.

    Returns:
        The picture, and what it shows.

    Raises:
        `ValueError`: The image cannot be read, the budget is not one for it, or the model has no tower that VMTC knows.
    """
    image = load_rgb_image(image)
    settings, image_processor = _load_settings(model)
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    num_patches = math.prod(patch_grid(settings, pixel_values))
    count_visual_tokens(settings, num_patches, num_visual_tokens)  # before the weights are loaded
    views = trace_stages(settings, _load_tower(model, settings), pixel_values, num_visual_tokens)
    return draw_stages(seen_image(image_processor, image), views, settings.vision_config.patch_size), views


@torch.no_grad()
def trace_stages(
    config: Any, tower: Any, pixel_values: torch.Tensor, num_visual_tokens: int | None = None
) -> list[StageView]:
    """
    What VMTC does to the patches of one image.

    Args:
        config ([`VmtcConfig`]): Of the model, with VMTC on.
        tower (`PreTrainedModel`): Its vision tower, `model.model.vision_tower`.
        pixel_values (`torch.FloatTensor` of shape `(1, 3, H, W)`): What the image processor makes of it.
        num_visual_tokens (`int`, *optional*): A budget for this call, instead of that of the config.

    Returns:
        `list[StageView]`: One per stage; none if the budget is the number of patches.
    """
    vmtc = compression_of_call(config, tower, pixel_values, config.vision_feature_layer, num_visual_tokens)
    if vmtc is None:
        return []
    tower(pixel_values, vmtc=vmtc)
    return _stage_views(vmtc)


def _stage_views(vmtc: Any) -> list[StageView]:
    """Of the first image, after the call."""
    return compose_trace(
        [becomes[0].cpu() for becomes in vmtc.trace], [stage for _, stage in sorted(vmtc.stages.items())]
    )


def _load_settings(model: str | Path) -> tuple[Any, Any]:
    """The config of a model with VMTC on, and the image processor; a model that has no such config gets one."""
    settings = config_of(model)
    try:
        image_processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # files may be missing or damaged in any way
        raise _cannot_load(model, error) from error
    if settings.model_type not in (TaLlavaConfig.model_type, VmtcCmaiLlavaConfig.model_type):
        vision_config = getattr(settings, "vision_config", settings)  # of a LLaVA, or a CLIP with its text side
        if not isinstance(getattr(vision_config, "patch_size", None), int):
            raise ValueError(
                f"{str(model)!r} is a {settings.model_type!r} model, which has no vision tower of patches."
            )
        feature_layer = getattr(settings, "vision_feature_layer", VmtcCmaiLlavaConfig.vision_feature_layer)
        settings = VmtcCmaiLlavaConfig(vision_config=vision_config, vision_feature_layer=feature_layer)
    check_image_size(image_processor)
    if not settings.use_vmtc:
        settings.use_vmtc, settings.vmtc_merge_weights = True, "normalized"  # the tower was trained without
    return settings, image_processor


def _load_tower(model: str | Path, settings: Any) -> Any:
    try:
        tower, info = read_safetensors(
            AutoModel.from_pretrained,
            model,
            config=settings.vision_config,
            key_mapping={r"^(model\.)?vision_tower\.": ""},
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except Exception as error:
        raise _cannot_load(model, error) from error
    needed = ("embeddings.", "pre_layrnorm.", "encoder.")  # not what comes after the blocks, where VMTC has no part
    missing = [key for key in info["missing_keys"] if key.startswith(needed)]
    check_complete(f"The vision tower in {str(model)!r}", missing)
    make_compressible(tower)
    return tower.eval()


def _cannot_load(model: str | Path, error: Exception) -> ValueError:
    return ValueError(f"No vision tower could be loaded from {str(model)!r}: {one_line(error)}")


# --- TA-LLaVA: where the prefix looks -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PrefixView:
    """
    Where the prefix of a TA-LLaVA looks for one question.

    Args:
        question, answer (`str`).
        layers (`list[int]`): The layers of the language model, from 0, after which the prefix reads the image.
        attention (`torch.FloatTensor` of shape `(len(layers), rows, columns)`): Of each patch of the image, its share of the
            attention of the vision adapter, averaged over heads and prefix tokens; each map sums to 1. What a token of
            VMTC receives is shared out among its patches; a patch that VMTC dropped is nan.
    """

    question: str
    answer: str
    layers: list[int]
    attention: torch.Tensor


@torch.no_grad()
def trace_prefix(model: Any, processor: Any, image: Any, question: str, max_new_tokens: int = 64) -> PrefixView:
    """
    Asks a TA-LLaVA a question about an image, greedily, and looks at its vision adapter meanwhile. The answer is that
    without looking.

    Args:
        image: Path, URL, PIL image or array.

    Raises:
        `ValueError`: The model is no TA-LLaVA, its prefix never reads the image, the question is empty, or the image cannot
            be read.
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
        # SDPA, which backbones without soft-capping use, does not return its weights.
        prefix, key, value, mask, cos, sin = arguments
        query = attention.q_proj(prefix).unflatten(-1, (-1, attention.head_dim))
        if attention.q_norm is not None:
            query = attention.q_norm(query)
        query = apply_rotary(query.transpose(1, 2), cos, sin).reshape(*key.shape[:2], -1, attention.head_dim)
        scaling, softcap = attention.scaling, attention.softcap
        weights = eager_attention_forward(attention, query, key, value, mask, scaling, softcap=softcap)[1]
        maps.append(weights[0].float().mean(dim=(0, 1)).cpu())

    adapter = model.model.vision_adapter.cross_attn
    with _hooked(adapter, keep_weights), _traced_tower(model) as compressions:
        pixel_values, new_tokens = _ask(model, processor, image, question, max_new_tokens)
    tokens = _tokens_of_patches(model.config, pixel_values, compressions[0])
    patches_of_token = torch.bincount(tokens[tokens >= 0], minlength=maps[0].shape[-1]).clamp(min=1)
    attention = torch.stack([_at_patches(weights / patches_of_token, tokens) for weights in maps])
    return PrefixView(question, _decode(processor, new_tokens), layers, attention)


def draw_prefix(image: Image.Image, views: Sequence[PrefixView], patch_size: int) -> Image.Image:
    """The panels of `prefix_panels`, which has the same arguments, as one picture."""
    return compose(prefix_panels(image, views, patch_size))


def prefix_panels(image: Image.Image, views: Sequence[PrefixView], patch_size: int) -> Panels:
    """
    One section per question: the image, a heat map for each time that the prefix reads it, and their mean. All
    share one scale, from 0 to the highest value.

    Args:
        image (`PIL.Image.Image`): RGB, as the vision tower sees it (`seen_image`).
        views (`Sequence[PrefixView]`): At least one, all of this image and one model.
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
    percent = float(f"{100 * highest:.2g}")  # two digits, for of many patches none gets 1%
    return Panels(sections, ("share of the prefix's attention:  0", f"{percent:g}% on one patch"))


def visualize_prefix(
    image: Any, questions: Sequence[str], model: str | Path = DEFAULT_MODEL, max_new_tokens: int = 64
) -> tuple[Image.Image, list[PrefixView]]:
    """
    Loads a TA-LLaVA, asks it questions about an image, and draws where its prefix looks for each.

    Args:
        image: Path, URL, PIL image or array.
        questions (`Sequence[str]`): At least one.
        model (`str` or `Path`): Folder or Hub repo.

    Returns:
        The picture, and what it shows.

    Raises:
        `ValueError`: As `trace_prefix` and `load`, or there is no question.
    """
    image = load_rgb_image(image)
    _check_questions(questions)
    model_type = config_of(model).model_type
    if model_type != TaLlavaConfig.model_type:
        raise ValueError(f"{str(model)!r} is a {model_type!r} model, but only a TA-LLaVA has a prefix.")
    loaded, processor = load(model)
    views = [trace_prefix(loaded, processor, image, question, max_new_tokens) for question in questions]
    seen = seen_image(processor.image_processor, image)
    return draw_prefix(seen, views, loaded.config.vision_config.patch_size), views


# --- CMAI: what each word does not look at --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CmaiView:
    """
    What CMAI inhibits while an answer is generated.

    Args:
        question, answer (`str`).
        words (`list[str]`): Of the answer.
        inhibited (`torch.FloatTensor` of shape `(len(words), rows, columns)`): Of each patch of the image, the share of the
            layers of the language model in which its token is inhibited as the word is chosen; of a word of several
            tokens, their mean. A patch that VMTC dropped is nan.
        num_layers (`int`): Of the language model.
        stages (`list[StageView]`): What VMTC has done before; empty without it.
    """

    question: str
    answer: str
    words: list[str]
    inhibited: torch.Tensor
    num_layers: int
    stages: list[StageView]


class _RecordingInhibition(Inhibition):
    """
    Keeps which image tokens the last column of the call does not attend to.

    last_row (`dict[int, torch.BoolTensor]`): By layer, `(B, n)`; nothing is inhibited in a layer that is not in it.
    """

    last_row: dict[int, torch.Tensor]

    def blocked_keys(self, visible: Any, layer_idx: int, averaged: torch.Tensor) -> torch.Tensor:
        blocked = super().blocked_keys(visible, layer_idx, averaged)
        place = self.image_columns.to(blocked.device) - max(self.num_seen - blocked.shape[2], 0)
        is_left = place >= 0  # in a sliding window
        self.last_row[layer_idx] = (blocked[:, -1].gather(1, place.clamp(min=0)) | ~is_left).cpu()
        return blocked


@torch.no_grad()
def trace_inhibition(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    num_visual_tokens: int | None = None,
    max_new_tokens: int = 64,
) -> CmaiView:
    """
    Asks a LLaVA with CMAI a question about an image, greedily, and keeps what CMAI inhibits meanwhile. The answer is that
    without keeping it.

    Args:
        image: Path, URL, PIL image or array.
        num_visual_tokens (`int`, *optional*): A budget for this call, instead of that of model and processor.

    Raises:
        `ValueError`: The model is no LLaVA with CMAI on, the question is empty, the image cannot be read, or the budget is
            not one for it.
    """
    config = model.config
    if config.model_type != VmtcCmaiLlavaConfig.model_type:
        raise ValueError(
            f"This is a {config.model_type!r} model, but CMAI works in a {VmtcCmaiLlavaConfig.model_type!r}."
        )
    if not config.use_cmai or config.cmai_max_ratio == 0 or config.cmai_focus == "none":
        raise ValueError("CMAI is off, so no image token is inhibited. Load the model with CMAI on, e.g. with 0.6.")
    steps: list[dict[int, torch.Tensor]] = []

    def record(language_model: Any, arguments: tuple, kwargs: dict) -> None:
        kwargs["cmai"].__class__ = _RecordingInhibition
        kwargs["cmai"].last_row = {}
        steps.append(kwargs["cmai"].last_row)

    with _hooked(model.model.language_model, record, with_kwargs=True), _traced_tower(model) as compressions:
        pixel_values, new_tokens = _ask(model, processor, image, question, max_new_tokens, num_visual_tokens)
    tokens = _tokens_of_patches(config, pixel_values, compressions[0])
    num_layers = config.text_config.num_hidden_layers
    # A class token, if the model uses it, stands before the patches.
    by_step = [sum(row[0, -int(tokens.max()) - 1 :].float() for row in step.values()) / num_layers for step in steps]
    words = _split_words(processor.tokenizer, new_tokens)
    inhibited = [
        torch.stack([_at_patches(by_step[step], tokens) for step in indices]).mean(dim=0) for _, indices in words
    ]
    return CmaiView(
        question,
        _decode(processor, new_tokens),
        [word for word, _ in words],
        torch.stack(inhibited) if words else torch.empty(0, *tokens.shape),
        num_layers,
        _stage_views(compressions[0]) if compressions[0] is not None else [],
    )


def draw_inhibition(image: Image.Image, view: CmaiView, patch_size: int) -> Image.Image:
    """The panels of `inhibition_panels`, which has the same arguments, as one picture."""
    return compose(inhibition_panels(image, view, patch_size))


def inhibition_panels(image: Image.Image, view: CmaiView, patch_size: int) -> Panels:
    """
    The image, the tokens that VMTC has left if it is on, and one panel per word of the answer: dark where
    CMAI inhibits the image in many layers, bright where in none.

    Args:
        image (`PIL.Image.Image`): RGB, as the vision tower sees it (`seen_image`).
        view ([`CmaiView`]): Of this image.
        patch_size (`int`): Pixels of a patch.
    """
    large, side = enlarge(image, patch_size)
    highest = float(view.inhibited.nan_to_num().max()) if view.words else 0
    panels = [("the image", large)]
    if view.stages:
        last = view.stages[-1]
        title = f"VMTC: {view.stages[0].num_before} -> {last.num_kept + last.num_merged} tokens"
        panels.append((title, draw_panel(large, last.clusters, side)))
    for word, inhibited in zip(view.words, view.inhibited):
        panels.append(
            (
                f"left to \N{LEFT DOUBLE QUOTATION MARK}{word}\N{RIGHT DOUBLE QUOTATION MARK}",
                draw_heat(large, 1 - inhibited / (highest or 1), side),
            )
        )
    most = f"{highest * view.num_layers:.3g} of {view.num_layers}"
    return Panels(
        [(f"{view.question}  ->  {view.answer}", panels)],
        (f"inhibited by CMAI in {most} layers", "no layer"),
    )


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
    word of the answer.

    Args:
        image: Path, URL, PIL image or array.
        model (`str` or `Path`): Folder or Hub repo of a LLaVA, with VMTC and CMAI or without.
        num_visual_tokens (`int`, *optional*): VMTC on, with so many visual tokens.
        cmai_max_ratio (`float`, *optional*): Share inhibited in the last layer. Defaults to that of the model if it has CMAI
            on, or to 0.6.

    Returns:
        The picture, and what it shows.

    Raises:
        `ValueError`: As `trace_inhibition` and `load`.
    """
    image = load_rgb_image(image)
    _check_questions([question])
    config = config_of(model)
    if config.model_type not in (VmtcCmaiLlavaConfig.model_type, "llava"):
        raise ValueError(f"{str(model)!r} is a {config.model_type!r} model, but CMAI works in a LLaVA.")
    use_cmai = getattr(config, "use_cmai", False)
    if cmai_max_ratio is None and not use_cmai:
        cmai_max_ratio = DEFAULT_CMAI_MAX_RATIO
    if cmai_max_ratio == 0:
        raise ValueError("With a CMAI ratio of 0 no image token is inhibited. Choose one above 0, e.g. 0.6.")
    loaded, processor = load(model, num_visual_tokens, cmai_max_ratio)
    view = trace_inhibition(loaded, processor, image, question, max_new_tokens=max_new_tokens)
    seen = seen_image(processor.image_processor, image)
    return draw_inhibition(seen, view, loaded.config.vision_config.patch_size), view


# --- running a model ------------------------------------------------------------------------------------------------


def prompt_inputs(processor: Any, image: Any, question: str, num_visual_tokens: int | None = None) -> Any:
    """
    What the processor makes of a question about an image, by its chat template.

    Args:
        num_visual_tokens (`int`, *optional*): Of a LLaVA with VMTC: a budget for this call.

    Raises:
        `ValueError`: The question is empty, or the image cannot be read.
    """
    _check_questions([question])
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
    """An image as the vision tower sees it: cut and resized, RGB."""
    pixels = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    return Image.fromarray(pixels.float().round().clamp(0, 255).byte().permute(1, 2, 0).numpy(), "RGB")


def _check_questions(questions: Sequence[str]) -> None:
    if not questions:
        raise ValueError("Give a question: what the picture shows depends on it.")
    if any(not question.strip() for question in questions):
        raise ValueError("The question is empty.")


def _ask(
    model: Any, processor: Any, image: Any, question: str, max_new_tokens: int, num_visual_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values of the image, and the tokens of the greedy answer."""
    inputs = prompt_inputs(processor, image, question, num_visual_tokens).to(model.device)
    budget = {} if num_visual_tokens is None else {"num_visual_tokens": num_visual_tokens}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY, **budget)
    return inputs["pixel_values"], output[0, inputs["input_ids"].shape[1] :]


def _decode(processor: Any, tokens: torch.Tensor) -> str:
    return processor.post_process_image_text_to_text(tokens[None])[0].strip()


def _split_words(tokenizer: Any, tokens: torch.Tensor) -> list[tuple[str, list[int]]]:
    """The words of a text, and of each the indices of its tokens; special tokens belong to none."""
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
def _hooked(module: Any, hook: Any, **kwargs) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, **kwargs)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _traced_tower(model: Any) -> Iterator[list[Any]]:
    """A list that gets the `TowerCompression` of each call of the vision tower, `None` where nothing is compressed."""
    compressions: list[Any] = []
    with _hooked(
        model.model.vision_tower,
        lambda tower, arguments, kwargs: compressions.append(kwargs.get("vmtc")),
        with_kwargs=True,
    ):
        yield compressions


def _tokens_of_patches(config: Any, pixel_values: torch.Tensor, vmtc: Any) -> torch.Tensor:
    """Which visual token each patch has become, `(rows, columns)`; -1 where VMTC dropped it."""
    rows, columns = patch_grid(config, pixel_values)
    factor = getattr(config, "spd_factor", 1)
    tokens = torch.arange((rows // factor) * (columns // factor)).view(rows // factor, columns // factor)
    tokens = tokens.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    for becomes in vmtc.trace if vmtc is not None else ():
        tokens = torch.where(tokens >= 0, becomes[0].cpu()[tokens.clamp(min=0)], -1)
    return tokens


def _at_patches(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`values` `(visual tokens)` at the patches that became `tokens` `(rows, columns)`; nan where one was dropped."""
    return values[tokens.clamp(min=0)].masked_fill(tokens < 0, torch.nan)
