"""Makes the token ids and labels of samples."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from transformers.utils import logging

from ..common.errors import one_line
from ..data.samples import IMAGE, Sample, SampleError, as_items, as_text, open_image


logger = logging.get_logger(__name__)
IGNORED = -100  # a label without loss

# Characters for private use, which no text has. They show what a chat template does with a question and an answer.
_QUESTION, _ANSWER = "\ue000", "\ue001"


# --- tokens and labels ---------------------------------------------------------------------------------------------


class SampleEncoder:
    """
    Makes token ids and labels of samples. The ids are those of
    `processor(text=processor.apply_chat_template(messages), images=...)`, with one BOS. The images are opened only if their
    sizes decide how many tokens they have, as in LLaVA-NeXT and LLaVA-OneVision. Answers are labelled, with the token that
    ends their turn; all else is not.

    The chat template needs no `{% generation %}`: another answer in the place of each shows what it writes around them.

    Args:
        processor (`TaLlavaProcessor`, `VmtcCmaiLlavaProcessor` or that of a family after it): It has a fast tokenizer and a
            chat template.

    Raises:
        `ValueError`: The processor has another class, its images differ in their number of tokens, or its chat template
            does not write questions and answers as they are.
    """

    def __init__(self, processor: Any):
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(
                "Labels need the place of each token in the text: load a fast tokenizer (`tokenizer.json`)."
            )
        if processor.chat_template is None:
            raise ValueError("The processor has no chat template. Set `processor.chat_template`.")
        self.processor = processor
        self.num_prefix_tokens = getattr(processor, "num_prefix_tokens", 0)
        self._look_at_template()
        token = re.escape(processor.image_token)
        self._image_pattern, self._placeholders = re.compile(token), ""
        self._has_views = hasattr(processor, "view_size")
        if self.num_prefix_tokens:  # TA-LLaVA takes the images out of the text
            self._image_pattern = re.compile(token + r"\n?")
        elif not self._has_views:
            self._placeholders = processor.image_token * self._tokens_per_image()
        self._check_ids()

    @property
    def settings(self) -> list[Any]:
        """What the placeholders of images depend on."""
        sizes = [(24, 24), (20, 1000), (1000, 20), (1000, 1000)]
        placeholders = (
            [self._placeholders_of_views([size]) for size in sizes] if self._has_views else self._placeholders
        )
        return [self.num_prefix_tokens, placeholders]

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """
        Returns:
            `dict`: `input_ids` and `labels`, lists of `int`, with the label -100 where there is no loss; `images` and `id`
            of the sample; and `length`, the number of tokens.

        Raises:
            [`SampleError`]: The chat template refuses the conversation, or changes its answers.
        """
        messages = [self._for_template(message) for message in sample.messages]
        try:
            text = self._render(messages)
            found = text.count(self.processor.image_token)
            if found != len(sample.images):
                raise ValueError(
                    f"The chat template writes {found} {self.processor.image_token} for {len(sample.images)} images."
                )
            spans = self._find_answers(messages, text)
        except TemplateError as error:
            reason = f"The chat template refuses it: {one_line(error)}"
            raise SampleError(sample.id, sample.index, sample.source, reason) from error
        except ValueError as error:
            raise SampleError(sample.id, sample.index, sample.source, str(error)) from error

        try:
            input_ids, offsets, moved = self._tokenize(text, self._placeholders_of(sample.images))
        except ValueError as error:  # an image cannot be read
            raise SampleError(sample.id, sample.index, sample.source, str(error)) from error
        is_answer = np.zeros(len(input_ids), dtype=bool)
        for start, end in spans:
            is_answer |= (offsets[:, 0] < moved(end)) & (offsets[:, 1] > moved(start))
        labels = np.where(is_answer, input_ids, IGNORED).tolist()
        return {
            "input_ids": input_ids,
            "labels": labels,
            "images": sample.images,
            "id": sample.id,
            "length": len(input_ids),
        }

    def _placeholders_of(self, images: Sequence[Any]) -> list[str]:
        """What stands for each image of a sample. Raises `ValueError` if its size decides, and it cannot be read."""
        if not self._has_views:
            return [self._placeholders] * len(images)
        return self._placeholders_of_views([open_image(image).size[::-1] for image in images])

    def _placeholders_of_views(self, sizes: list[tuple[int, int]]) -> list[str]:
        """What stands for each image of a sample, by heights and widths."""
        view = np.empty((3, self.processor.view_size, self.processor.view_size))
        inputs = {"image_sizes": sizes, "batch_num_images": [len(sizes)], "pixel_values": [[view]]}
        return [self.processor.replace_image_token(inputs, index) for index in range(len(sizes))]

    def _tokenize(self, text: str, placeholders: list[str]) -> tuple[list[int], np.ndarray, Callable[[int], int]]:
        """
        Tokenises what the template wrote, with `placeholders` for each of the images.

        Returns:
            The ids; start and end of each token in the text with placeholders, `(S, 2)`; and a function from places in
            `text` to places in that.
        """
        images = list(self._image_pattern.finditer(text))
        grown = [
            (image.end(), len(placeholder) - len(image.group()))
            for image, placeholder in zip(images, placeholders, strict=True)
        ]
        in_order = iter(placeholders)
        prompt = self._image_pattern.sub(lambda image: next(in_order), text)
        tokens = self.processor.tokenizer(
            prompt, add_special_tokens=self._needs_bos(prompt), return_offsets_mapping=True, verbose=False
        )
        num_before = self.num_prefix_tokens if images else 0
        input_ids = [self.processor.image_token_id] * num_before + list(tokens["input_ids"])
        offsets = np.array([(0, 0)] * num_before + list(tokens["offset_mapping"])).reshape(-1, 2)
        return input_ids, offsets, lambda place: place + sum(growth for end, growth in grown if end <= place)

    def _needs_bos(self, text: str) -> bool:
        """Whether the tokenizer must write the BOS token, since the template does not."""
        bos_token = self.processor.tokenizer.bos_token
        return bos_token is None or not text.startswith(bos_token)

    # --- the template ----------------------------------------------------------------------------------------------

    def _render(self, messages: list[dict], **kwargs) -> str:
        return self.processor.apply_chat_template(messages, **kwargs)

    def _look_at_template(self) -> None:
        """Finds which contents the template takes, and what it writes before (`_lead`) and after (`_tail`) an answer."""

        def takes(content: Any) -> bool:
            try:  # a template that expects text writes a list as Python does, with escapes
                return _QUESTION in self._render([{"role": "user", "content": content}])
            except Exception:  # a template is a program
                return False

        self._takes_text = takes(_QUESTION)
        self._takes_items = takes([{"type": "text", "text": _QUESTION}])
        if not self._takes_text and not self._takes_items:
            raise ValueError("The chat template of the processor does not write what the user says.")
        turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        turns = [self._for_template(message) for message in turns]
        before, found, after = self._render(turns).partition(_ANSWER)
        if not found:
            raise ValueError("The chat template of the processor does not write what the assistant says.")
        prompt = self._render(turns[:1], add_generation_prompt=True)
        self._lead = before[len(prompt) :] if before.startswith(prompt) else ""
        after_first = self._render(turns * 2).partition(_ANSWER)[2]
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(after, after_first))
        # The last turn may end like the next one begins, with a "<". So the tail ends with the last whole token.
        tokens = {*self.processor.tokenizer.get_added_vocab(), *self.processor.tokenizer.all_special_tokens}
        token = "|".join(re.escape(token) for token in tokens if token.strip())
        end_of_turn = re.match(f"(.*(?:{token}))?", "".join(character for character, _ in same), re.DOTALL)
        self._tail = (end_of_turn and end_of_turn.group(1)) or ""
        if not self._tail:
            logger.warning(
                "The chat template writes no token that ends the turn of the assistant, so training does not teach the "
                "model where to stop. Add `{{ eos_token }}` after the answers in `processor.chat_template`."
            )

    def _for_template(self, message: dict) -> dict:
        """A message for the template, with the kind of content that the template takes."""
        content = message["content"]
        if isinstance(content, str) and not self._takes_text:
            content = as_items(content)
        elif not isinstance(content, str) and not self._takes_items:
            content = as_text(content)
        if isinstance(content, str):
            content = content.replace(IMAGE, self.processor.image_token)
        return {"role": message["role"], "content": content}

    def _find_answers(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """
        Start and end in `text` of what the model must write: the answers, with the ends of their turns.

        Raises:
            `ValueError`: The template changes answers. White space around them may differ.
        """
        answers = [as_text(message["content"]) for message in messages if message["role"] == "assistant"]
        others = [
            self._for_template({"role": "assistant", "content": _ANSWER})
            if message["role"] == "assistant"
            else message
            for message in messages
        ]
        between = self._render(others).split(_ANSWER)
        changed = ValueError("The chat template does not write all answers, once and as they are.")
        if len(between) != len(answers) + 1 or not text.startswith(between[0]):
            raise changed
        spans, start = [], len(between[0])
        for answer, before, after in zip(answers, between, between[1:]):
            for written in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
                if text.startswith(written + after, start):
                    break
            else:
                raise changed
            end = start + len(written)
            spans.append(
                (
                    start - len(self._lead) * before.endswith(self._lead),
                    end + len(self._tail) * after.startswith(self._tail),
                )
            )
            start = end + len(after)
        if start != len(text):
            raise changed
        return spans

    # --- the processor ---------------------------------------------------------------------------------------------

    def _tokens_per_image(self) -> int:
        """Number of placeholders that the processor writes for an image of any size."""
        if getattr(self.processor, "patch_size", None) is None:
            raise ValueError(
                "The processor does not know the size of a patch (`patch_size`), so the number of tokens of an image is "
                "unknown."
            )
        images = [Image.new("RGB", size) for size in ((64, 64), (96, 64), (64, 96))]
        rows = self.processor(images=images, text=[self.processor.image_token] * len(images))["input_ids"]
        counts = {list(row).count(self.processor.image_token_id) for row in rows}
        if len(counts) > 1:
            raise ValueError(
                f"The processor writes {min(counts)} to {max(counts)} tokens for an image, by its shape. Training needs "
                "images of one size: give the image processor a `crop_size`, or a `size` of height and width."
            )
        return counts.pop()

    def _check_ids(self) -> None:
        """Raises `ValueError` if the processor makes other ids than this encoder."""
        messages = [
            {"role": "user", "content": f"{IMAGE}\nWhat is it?"},
            {"role": "assistant", "content": "It."},
        ]
        text = self._render([self._for_template(message) for message in messages])
        image = Image.new("RGB", (64, 64))
        inputs = self.processor(images=[image], text=[text], add_special_tokens=self._needs_bos(text))
        if list(inputs["input_ids"][0]) != self._tokenize(text, self._placeholders_of([image]))[0]:
            raise ValueError(
                f"A {type(self.processor).__name__} writes images into the text in a way that is not known here. Use a "
                "TaLlavaProcessor, a VmtcCmaiLlavaProcessor or that of a family after it."
            )
