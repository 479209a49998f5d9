"""CMAI: which parts of the image it inhibits for each word of an answer, as data and as panels of a picture."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..cmai import Inhibition
from ..common.families import COMPRESSED_TYPES, has_views
from .asking import ask, at_patches, decode, hooked, split_words, tokens_of_patches, traced_tower
from .drawing import Panels, draw_heat, draw_panel, enlarge
from .vmtc_stages import StageView, stage_views


@dataclass(frozen=True, eq=False)
class CmaiView:
    """
    What CMAI inhibits while an answer is generated.

    Args:
        question (`str`): The question.
        answer (`str`): The model's answer.
        words (`list[str]`): The words of the answer.
        inhibited (`torch.FloatTensor` of shape `(len(words), rows, columns)`): For each patch of the image, the share of the
            language model's layers in which its token is inhibited as the word is chosen, averaged over the tokens of the
            word. A patch that VMTC dropped is nan.
        num_layers (`int`): Number of layers of the language model.
        stages (`list[StageView]`): What VMTC did before; empty without it.
    """

    question: str
    answer: str
    words: list[str]
    inhibited: torch.Tensor
    num_layers: int
    stages: list[StageView]


class _RecordingInhibition(Inhibition):
    """
    Keeps which image tokens the last token of the call does not attend to.

    last_row (`dict[int, torch.BoolTensor]`): By layer, `(B, n)`. Nothing is inhibited in a layer that is not in it.
    """

    last_row: dict[int, torch.Tensor]

    def inhibited_images(self, visible: Any, layer_idx: int, averaged: torch.Tensor) -> torch.Tensor:
        inhibited = super().inhibited_images(visible, layer_idx, averaged)
        is_lost = (
            torch.zeros_like(inhibited) if visible.hidden_images is None else visible.hidden_images
        )  # by a window
        self.last_row[layer_idx] = (inhibited | is_lost)[:, -1].cpu()
        return inhibited


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
    Asks a LLaVA with CMAI a question about an image, greedily, and records what CMAI inhibits. Recording does not change the
    answer.

    Args:
        image: Path, URL, PIL image or array.
        num_visual_tokens (`int`, *optional*): Budget of this call. Defaults to that of model and processor.

    Raises:
        `ValueError`: The model is not a LLaVA with CMAI on, the question is empty, the image cannot be read, or the budget
            does not fit the image.
    """
    config = model.config
    if config.model_type not in COMPRESSED_TYPES:
        raise ValueError(
            f"This is a {config.model_type!r} model, but CMAI works in a {' or '.join(map(repr, COMPRESSED_TYPES))}."
        )
    if not config.use_cmai or config.cmai_max_ratio == 0 or config.cmai_focus == "none":
        raise ValueError("CMAI is off, so no image token is inhibited. Load the model with CMAI on, e.g. with 0.6.")
    steps: list[dict[int, torch.Tensor]] = []

    def record(language_model: Any, arguments: tuple, kwargs: dict) -> None:
        kwargs["cmai"].__class__ = _RecordingInhibition
        kwargs["cmai"].last_row = {}
        steps.append(kwargs["cmai"].last_row)

    with hooked(model.model.language_model, record, with_kwargs=True), traced_tower(model) as compressions:
        pixel_values, new_tokens = ask(model, processor, image, question, max_new_tokens, num_visual_tokens)
    tokens = tokens_of_patches(config, pixel_values, compressions[0])
    num_layers = config.text_config.num_hidden_layers
    # The last columns are the patches, after the class token if the model uses it. Of several views, the first is drawn.
    count = int(tokens.max()) + 1
    columns = slice(count) if has_views(config) else slice(-count, None)
    by_step = [sum(row[0, columns].float() for row in step.values()) / num_layers for step in steps]
    words = split_words(processor.tokenizer, new_tokens)
    inhibited = [
        torch.stack([at_patches(by_step[step], tokens) for step in indices]).mean(dim=0) for _, indices in words
    ]
    return CmaiView(
        question,
        decode(processor, new_tokens),
        [word for word, _ in words],
        torch.stack(inhibited) if words else torch.empty(0, *tokens.shape),
        num_layers,
        stage_views(compressions[0]) if compressions[0] is not None else [],
    )


def inhibition_panels(image: Image.Image, view: CmaiView, patch_size: int) -> Panels:
    """
    Draws the image, the tokens that VMTC has left if it is on, and one panel per word of the answer: dark where CMAI
    inhibits the image in many layers, bright where it inhibits it in none.

    Args:
        image (`PIL.Image.Image`): RGB, as the vision tower sees it (`seen_image`).
        view ([`CmaiView`]): A view of this image.
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
