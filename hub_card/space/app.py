"""
A demo of TA-LLaVA, and of VMTC and CMAI, beside LLaVA: three models answer one question, and the page shows what each costs
and looks at. Set `TA_LLAVA_MODEL` and `LLAVA_MODEL` to folders or Hub repos to replace the shipped models.
"""

import base64
import html
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from ta_llava.analysis.asking import prompt_inputs, seen_image
from ta_llava.analysis.cost import count_cost
from ta_llava.analysis.drawing import Panels, draw_heat_scale
from ta_llava.analysis.inhibition import inhibition_panels, trace_inhibition
from ta_llava.analysis.prefix_attention import prefix_panels, trace_prefix
from ta_llava.analysis.vmtc_stages import stage_panels, trace_stages
from ta_llava.common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ta_llava.image_loading import load_rgb_image
from ta_llava.inference import GREEDY, load
from ta_llava.vision_towers import patch_grid


TA_LLAVA = os.environ.get("TA_LLAVA_MODEL") or DEFAULT_MODEL
LLAVA = os.environ.get("LLAVA_MODEL") or DEFAULT_LLAVA
MAX_NEW_TOKENS = 64
EXAMPLES = [
    ("red_circle.png", "what shape is in the image?"),
    ("red_circle.png", "is there a red shape?"),
    ("teal_triangle.png", "what color is the shape?"),
]
# CMAI is set on the model, not in a call, so only one answer is computed at a time. Its time is then its own, too.
MODEL_IN_USE = Lock()

ABOUT = """
# Fewer visual tokens, and the ones that matter

One question, three models: **LLaVA** reads every patch of the image. **VMTC + CMAI** merges patches inside its vision tower,
and stops words from attending to what they have nothing to do with. **TA-LLaVA** reads the question first, and then the
image into a few prefix tokens.
"""
SHIPPED = """
These are the tiny models of the package. They know one coloured shape on a plain background, and answer anything else with a
colour, a shape, yes or no. At their size time is mostly overhead; the operations show what a larger model saves.
"""


@dataclass
class Result:
    """
    An answer, complete or not, and its cost.

    Args:
        answer (`str`): The text so far.
        image_tokens, text_tokens (`int`): Visual or prefix tokens of the prompt, and its other tokens.
        operations (`int`): Floating point operations of the prefill.
        seconds (`float`, *optional*): Time from the pixels to the last word; `None` until then.
    """

    answer: str
    image_tokens: int
    text_tokens: int
    operations: int
    seconds: float | None = None

    @property
    def facts(self) -> str:
        seconds = "..." if self.seconds is None else f"{1000 * self.seconds:,.0f} ms"
        return (
            f"**{self.image_tokens}** tokens for the image, {self.text_tokens} for the text  \n"
            f"**{self.operations / 1e9:,.2f} GFLOP** before the first word  \n**{seconds}** for the answer"
        )


class Models:
    """A TA-LLaVA, and a LLaVA whose VMTC and CMAI are set for each call. Both are folders or Hub repos."""

    def __init__(self, ta_llava: str | Path, llava: str | Path):
        self.ta_llava, self.ta_llava_processor = load(ta_llava)
        self.llava, self.llava_processor = load(llava, cmai_max_ratio=0.6)
        self.num_patches = self._count_patches()
        for part in (self.llava, self.llava_processor):
            part.set_visual_budget(self.num_patches)  # the default; a call can name another
        self._warm_up()

    def _count_patches(self) -> int:
        pixel_values = self.llava_processor.image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")
        rows, columns = patch_grid(self.llava.config, pixel_values["pixel_values"])
        return rows * columns

    def _warm_up(self) -> None:
        """Answers once with each model, since the first answers take longer."""
        for settings in ((self.num_patches, 0.0), (max(1, self.num_patches // 4), 0.6), (None, 0.0)):
            for _ in self.answer(Image.new("RGB", (64, 64)), "?", *settings):
                pass

    @contextmanager
    def cmai(self, ratio: float) -> Iterator[None]:
        """Reserves the models for one caller, with CMAI of the LLaVA up to `ratio`; 0 turns it off."""
        with MODEL_IN_USE:
            self.llava.config.use_cmai, self.llava.config.cmai_max_ratio = ratio > 0, ratio
            yield

    def answer(self, image: Image.Image, question: str, budget: int | None, ratio: float) -> Iterator[Result]:
        """
        Answers with the LLaVA or the TA-LLaVA, and yields the answer as it grows.

        Args:
            budget (`int`, *optional*): Number of visual tokens of the LLaVA; `None` asks the TA-LLaVA.
            ratio (`float`): Ratio of CMAI; 0 turns it off.
        """
        is_llava = budget is not None
        model = self.llava if is_llava else self.ta_llava
        processor = self.llava_processor if is_llava else self.ta_llava_processor
        inputs = prompt_inputs(processor, image, question, budget).to(model.device)
        ids = inputs["input_ids"][0]
        image_tokens = int((ids == model.config.image_token_id).sum())
        text_tokens, image_size = len(ids) - image_tokens, inputs["pixel_values"].shape[-1]
        operations = self.count_operations(budget, ratio, text_tokens, image_size)
        result = Result("", image_tokens, text_tokens, operations)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = {**inputs, "streamer": streamer, "max_new_tokens": MAX_NEW_TOKENS, **GREEDY}
        arguments |= {"num_visual_tokens": budget} if is_llava else {}
        seconds: list[float] = []
        errors: list[Exception] = []

        def generate() -> None:
            try:
                with self.cmai(ratio):
                    start = time.perf_counter()
                    model.generate(**arguments)
                    seconds.append(time.perf_counter() - start)
            except Exception as error:  # raised again in the thread that waits for the words
                errors.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        for text in streamer:
            result.answer += text
            yield result
        thread.join()
        if errors:
            raise errors[0]
        result.answer, result.seconds = result.answer.strip(), seconds[0]
        yield result

    @cache  # noqa: B019 - there is one object, for as long as the app runs
    def count_operations(self, budget: int | None, ratio: float, text_tokens: int, image_size: int) -> int:
        """Operations of the prefill of the LLaVA with `budget` visual tokens and CMAI up to `ratio`, or of the TA-LLaVA."""
        config = deepcopy(self.ta_llava.config if budget is None else self.llava.config)
        if budget is not None:
            config.vmtc_num_visual_tokens = budget
            config.use_cmai, config.cmai_max_ratio = ratio > 0, ratio
        return sum(count_cost(config, text_tokens, image_size=image_size).operations.values())

    @torch.no_grad()
    def overlays(self, image: Image.Image, question: str, budget: int, ratio: float) -> list[Panels | None]:
        """Pictures of what VMTC merges, where the prefix looks and, if CMAI is on, what it inhibits."""
        processor, config = self.llava_processor, self.llava.config
        patch_size, seen = config.vision_config.patch_size, seen_image(processor.image_processor, image)
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(self.llava.device)
        with self.cmai(ratio):
            tower = self.llava.model.vision_tower
            stages = trace_stages(config, tower, pixel_values.to(tower.dtype), budget)
            overlays: list[Panels | None] = [stage_panels(seen, stages, patch_size)]
            prefix = trace_prefix(self.ta_llava, self.ta_llava_processor, image, question, MAX_NEW_TOKENS)
            seen_by_prefix = seen_image(self.ta_llava_processor.image_processor, image)
            overlays.append(prefix_panels(seen_by_prefix, [prefix], self.ta_llava.config.vision_config.patch_size))
            if ratio == 0:
                return [*overlays, None]
            inhibition = trace_inhibition(self.llava, processor, image, question, budget, MAX_NEW_TOKENS)
            return [*overlays, inhibition_panels(seen, inhibition, patch_size)]


def read_input(path: str | None, question: str) -> tuple[Image.Image, str]:
    """
    Opens the image, and strips the question.

    Raises:
        `gr.Error`: There is no image or no question, or the file is not an image.
    """
    if path is None:
        raise gr.Error("Choose an image first.", print_exception=False)
    if not question.strip():
        raise gr.Error("The question is empty. Ask something about the image.", print_exception=False)
    try:
        return load_rgb_image(path), question.strip()
    except ValueError as error:
        message = f"{Path(path).name} is not an image that can be read. Choose a PNG, JPEG or WebP file."
        raise gr.Error(message, print_exception=False) from error


def ask(models: Models, path: str | None, question: str, budget: int, ratio: float) -> Iterator[list[str]]:
    """Yields answers and facts of the three models, one after the other as they come, then the pictures."""
    image, question = read_input(path, question)
    shown = [""] * (6 + len(PICTURES))
    try:
        for place, settings in enumerate([(models.num_patches, 0.0), (int(budget), float(ratio)), (None, 0.0)]):
            for result in models.answer(image, question, *settings):
                shown[2 * place : 2 * place + 2] = result.answer, result.facts
                yield shown
        shown[6:] = map(picture_html, PICTURES, models.overlays(image, question, int(budget), float(ratio)))
    except ValueError as error:  # such as a question that is too long for a model
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
    yield shown


# The app gets uploaded files, not images, so that it can say what is wrong with them. The method is replaced on the class
# because sessions copy components by their class, and a subclass would write a file beside this one.
gr.Image.preprocess = lambda self, payload: None if payload is None else payload.path
PICTURES = ("What VMTC keeps and merges", "Where the prefix of TA-LLaVA looks", "What CMAI inhibits for each word")


def picture_html(title: str, panels: Panels | None) -> str:
    """Panels side by side, as many as fit, under a title. Empty without panels."""
    if panels is None:
        return ""
    parts = [f"<h3>{title}</h3>"]
    for heading, images in panels.sections:
        parts += [f"<p>{html.escape(heading)}</p>"] * bool(heading)
        figures = [
            f"<figure><figcaption>{html.escape(text)}</figcaption>{image_html(each, text)}</figure>"
            for text, each in images
        ]
        parts.append(f'<div class="panels">{"".join(figures)}</div>')
    legend = image_html(draw_heat_scale(), "from dark to bright").join(map(html.escape, panels.legend))
    return "".join([*parts, f'<p class="legend">{legend}</p>'])


def image_html(image: Image.Image, alt: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img src="{source}" alt="{html.escape(alt)}" width="{image.width}" height="{image.height}">'


CSS = """
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)); gap: 12px; }
.panels figure { margin: 0; }
.panels img { width: 100%; height: auto; }
.legend { margin-top: 8px; }
.legend img { display: inline; margin: 0 8px; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_app(models: Models) -> gr.Blocks:
    with gr.Blocks(title="TA-LLaVA, VMTC and CMAI", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(ABOUT + (SHIPPED if (TA_LLAVA, LLAVA) == (DEFAULT_MODEL, DEFAULT_LLAVA) else ""))
        with gr.Row():
            with gr.Column(min_width=300) as left:
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=260, buttons=[])
            with gr.Column(min_width=300):
                question = gr.Textbox(label="Question", placeholder="Type a question about the image", max_length=1000)
                budget = gr.Slider(
                    1, models.num_patches, value=models.num_patches // 4, step=1, label="VMTC: visual tokens left"
                )
                ratio = gr.Slider(
                    0, 1, value=0.6, step=0.05, label="CMAI: share of them inhibited in the last layer (0: off)"
                )
                button = gr.Button("Ask", variant="primary")
        with left:
            gr.Examples(
                [[str(Path(__file__).parent / "examples" / name), text] for name, text in EXAMPLES],
                [image, question],
                example_labels=[f"{Path(name).stem.replace('_', ' ')}: {text}" for name, text in EXAMPLES],
            )
        outputs: list[Any] = []
        with gr.Row():
            for name in ("LLaVA", "VMTC + CMAI", "TA-LLaVA"):
                with gr.Column(min_width=240):
                    outputs.append(gr.Textbox(label=name, interactive=False))
                    outputs.append(gr.Markdown())
        outputs += [gr.HTML() for _ in PICTURES]

        def answer(*values: Any) -> Iterator[Any]:
            try:
                yield from ask(models, *values)
            except gr.Error as error:  # if it were raised here, it would leave a mark on every output
                gr.Warning(html.escape(error.message), title="No answer")
                yield [gr.skip()] * len(outputs)

        gr.on(
            [button.click, question.submit], answer, [image, question, budget, ratio], outputs, show_progress="minimal"
        )
    return app


def launch(app: gr.Blocks, **kwargs: Any) -> Any:
    return app.queue(max_size=32).launch(
        theme=THEME, css=CSS, ssr_mode=False, max_file_size="20mb", footer_links=[], **kwargs
    )


if __name__ == "__main__":
    launch(build_app(Models(TA_LLAVA, LLAVA)))
