# Copyright 2026 The TA-LLaVA Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor of TA-LLaVA: text and images to the tensors of the model, and back to text."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import LARGE_INTEGER, TextInput
from transformers.video_utils import VideoInput

from .chat_messages import TypedPlaceholdersMixin
from .image_loading import cut_to_aspect_ratio, load_rgb_image, open_images, resize_first, sample_frames
from .safe_loading import check_image_size, check_sizes


class TaLlavaProcessor(TypedPlaceholdersMixin, ProcessorMixin):
    r"""
    Turns images and text into the inputs of [`TaLlavaForConditionalGeneration`].

    Anywhere in the text, `image_token` (`"<image>"`) stands for an image and `video_token` (`"<video>"`) for a video. The
    chat template writes them, and one that is typed in a message stays text. A row with images, however many, gets
    `num_prefix_tokens` placeholder ids before all its text, and the BOS token after them. The `<image>`s and `<video>`s
    themselves are taken out, each with the line break that follows it. A row without images is tokenized as the tokenizer
    alone would. To the model, a video is its frames.

    Args:
        image_processor (`BaseImageProcessor`):
            Image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the language model.
        num_prefix_tokens (`int`, *optional*, defaults to 32):
            Number of placeholders; must be that of the model's config.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            What stands for an image in the text.
        image_token_id (`int`, *optional*):
            Id of the placeholder; must be that of the model's config. Defaults to the id of `image_token`, which must then
            be a token of the tokenizer.
        video_token (`str`, *optional*, defaults to `"<video>"`):
            What stands for a video in the text.
        num_video_frames (`int`, *optional*, defaults to 8):
            Largest number of frames that are read from a video, at equal distances.
        chat_template (`str`, *optional*):
            Jinja template for [`~ProcessorMixin.apply_chat_template`]. Defaults to that of the tokenizer.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_prefix_tokens: int = 32,
        image_token: str = "<image>",
        image_token_id: int | None = None,
        video_token: str = "<video>",
        num_video_frames: int = 8,
        chat_template: str | None = None,
        **kwargs,
    ):
        check_image_size(image_processor)
        check_sizes("processor", {"num_prefix_tokens": num_prefix_tokens})
        if image_token_id is None:
            image_token_id = tokenizer.convert_tokens_to_ids(image_token)
            if image_token_id is None or image_token_id == tokenizer.unk_token_id:
                raise ValueError(
                    f"The tokenizer has no token {image_token!r}. Add it (`tokenizer.add_special_tokens`), or give the id "
                    "of an unused token as `image_token_id`."
                )
        self.num_prefix_tokens = num_prefix_tokens
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.video_token = video_token
        self.num_video_frames = num_video_frames
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        audio: Any = None,
        *,
        images_encoded: bool = False,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Args:
            images (image, list of images, or list of lists of images, *optional*):
                Each is a path, URL, base64 string, the bytes or open file of an image, a PIL image, array or tensor. The
                `<image>`s in the texts say which row an image of a flat list belongs to. A nested list has one list per row,
                which may be empty.
            text (`str` or `list[str]`, *optional*):
                The prompts, with one `<image>` per image and one `<video>` per video.
            videos (video, or lists of videos, *optional*):
                Each is a file or URL (which `av` or `torchcodec` decodes, whichever is installed), an array or tensor
                `(frames, H, W, C)` or `(frames, C, H, W)`, or a list of frames, which are PIL images, arrays or tensors.
                The `<video>`s in the texts say which row a video belongs to.
            audio (*optional*):
                Not supported.
            images_encoded (`bool`, *optional*, defaults to `False`):
                Leave images and videos out, because the model is given the result of `encode_image`, or a cache. `<image>`
                and `<video>` then only say which rows get placeholders.
            num_frames (`int`, *optional*):
                Largest number of frames in this call, instead of `num_video_frames`.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` `(B, S)`. With images it also has `pixel_values`
            `(B, I, 3, H, W)` and `image_mask` `(B, I)`, 1 for real images, 0 for filler. Each frame of a video counts as an
            image, at the place of the video among the images of its row. With `return_mm_token_type_ids=True` it also has
            `mm_token_type_ids` `(B, S)`, 1 on the placeholders.

        Raises:
            `ValueError`: An image or video cannot be read; the numbers of images and `<image>`s, or of videos and
                `<video>`s, differ; images come with `images_encoded`; or a prompt is empty or longer than the tokenizer's
                `model_max_length`.
            `ImportError`: A video is a file or URL, and nothing that decodes it is installed.
        """
        if audio is not None:
            raise ValueError("TA-LLaVA does not support `audio`. Give it images, videos or text.")
        if text is None and images is None and videos is None:
            raise ValueError("Give `text`, `images`, `videos`, or several of them.")
        kwargs_class: Any = ProcessingKwargs
        merged = self._merge_kwargs(kwargs_class, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        images_kwargs.pop("return_tensors", None)
        frames = self._frames_of_videos(videos, **merged["videos_kwargs"])

        data: dict[str, Any] = {}
        if text is None:
            rows = _nested_rows(images) if _is_nested(images) else [[image] for image in _flatten_images(images)]
            rows += frames
        else:
            texts = self._check_texts(text)
            if images_encoded:
                if images is not None or videos is not None:
                    raise ValueError("Give images and videos, or `images_encoded=True` for a text alone, not both.")
                has_images = [re.search(self._visual_token_pattern, sample) is not None for sample in texts]
                rows = []
            else:
                rows = self._with_frames(self._images_of_rows(images, texts), frames, texts)
                has_images = [len(row) > 0 for row in rows]
            data.update(self._tokenize(texts, has_images, **text_kwargs))
        if any(rows):
            data.update(self._stack_images(rows, **images_kwargs))
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["text_replacement_offsets"])

    @staticmethod
    def _check_texts(text: Any) -> list[str]:
        """The prompts as a list. Raises `ValueError` for anything but one string or several."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(each, str) for each in texts) or not texts:
            raise ValueError("`text` must be a string or a list of strings, with at least one in it.")
        return list(texts)

    def _images_of_rows(self, images: Any, texts: Sequence[str]) -> list[list]:
        """The images of each row, checked against the `<image>`s in its text."""
        expected = [sample.count(self.image_token) for sample in texts]
        advice = (
            f"Write one {self.image_token} per image into the text, or give the images in the messages of "
            "`apply_chat_template`."
        )
        if _is_nested(images):
            rows = _nested_rows(images)
            if len(rows) != len(texts):
                raise ValueError(f"Got images for {len(rows)} rows, but {len(texts)} prompts.")
            for index, (row, count) in enumerate(zip(rows, expected)):
                if len(row) != count:
                    raise ValueError(f"Prompt {index} has {count} {self.image_token} but {len(row)} images. {advice}")
            return rows
        flat = _flatten_images(images)
        if len(flat) != sum(expected):
            raise ValueError(
                f"The prompts have {sum(expected)} {self.image_token}, but got {len(flat)} images. {advice} For images that "
                "`encode_image` has read, pass `images_encoded=True`."
            )
        remaining = iter(flat)
        return [[next(remaining) for _ in range(count)] for count in expected]

    def _frames_of_videos(
        self,
        videos: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool = True,
        **kwargs,
    ) -> list[list]:
        """The frames that are read from each video. They are processed as images."""
        if videos is None:
            return []
        if fps is not None:
            raise ValueError(
                "Frames are taken at equal distances, by their number: pass `num_frames` instead of `fps`."
            )
        num_frames = self.num_video_frames if num_frames is None else num_frames
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
        return [sample_frames(video, num_frames if do_sample_frames else None) for video in _flatten_videos(videos)]

    def _with_frames(self, rows: list[list], frames: list[list], texts: Sequence[str]) -> list[list]:
        """The images of each row and the frames of its videos, in the order of the text."""
        expected = sum(sample.count(self.video_token) for sample in texts)
        if len(frames) != expected:
            raise ValueError(
                f"The prompts have {expected} {self.video_token}, but got {len(frames)} videos. Write one "
                f"{self.video_token} per video into the text, or give the videos in the messages of `apply_chat_template`."
            )
        if not frames:
            return rows
        remaining, merged = iter(frames), []
        for row, sample in zip(rows, texts):
            images, everything = iter(row), []
            for token in re.findall(self._visual_token_pattern, sample):
                everything += next(remaining) if token == self.video_token else [next(images)]
            merged.append(everything)
        return merged

    def _placeholder_words(self) -> list[str]:
        # The placeholder token may differ from `image_token`. In a message, its id would be mistaken for the prefix.
        return [self.image_token, self.video_token, self.tokenizer.convert_ids_to_tokens(self.image_token_id)]

    @property
    def _visual_token_pattern(self) -> str:
        return f"{re.escape(self.image_token)}|{re.escape(self.video_token)}"

    def _tokenize(
        self,
        texts: list[str],
        has_images: list[bool],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        **kwargs,
    ) -> dict[str, list]:
        """Token ids of the rows, each tokenized as the tokenizer alone would, with placeholders before it."""
        if return_overflowing_tokens:
            raise ValueError("`return_overflowing_tokens` is not supported: a row is one prompt.")
        limit = max_length if max_length is not None else self.tokenizer.model_max_length
        truncate = truncation not in (None, False, "do_not_truncate") and limit < LARGE_INTEGER
        if truncate and any(has_images) and limit <= self.num_prefix_tokens:
            raise ValueError(
                f"`max_length` is {limit}, but a row with images needs {self.num_prefix_tokens} placeholders and some text."
            )
        rows, replacement_offsets = [], []
        for index, (sample, has_image) in enumerate(zip(texts, has_images)):
            prompt, offsets = self._take_out_image_tokens(sample) if has_image else (sample, [])
            if not prompt.strip():
                raise ValueError(f"Prompt {index} is empty. Ask something about the image, or give some text.")
            num_placeholders = self.num_prefix_tokens if has_image else 0
            row = self._tokenize_prompt(prompt, num_placeholders, limit if truncate else None, **kwargs)
            length = len(row["input_ids"])
            if length > limit and not truncate and max_length is None:
                raise ValueError(
                    f"Prompt {index} has {length} tokens, {num_placeholders} of them placeholders, but the context holds "
                    f"{limit} (`tokenizer.model_max_length`). Shorten it, or pass `truncation=True`."
                )
            rows.append(row)
            replacement_offsets.append(offsets)

        data: dict[str, list] = {key: [row[key] for row in rows] for key in rows[0]}
        if padding:
            data = self._pad(data, padding, max_length, padding_side, pad_to_multiple_of)
        if return_attention_mask is False:
            del data["attention_mask"]
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if return_text_replacement_offsets:
            data["text_replacement_offsets"] = replacement_offsets
        return data

    def _tokenize_prompt(
        self,
        prompt: str,
        num_placeholders: int,
        max_length: int | None,
        add_special_tokens: bool = True,
        **kwargs,
    ) -> dict[str, list]:
        """One row: placeholders and the tokens of a prompt, cut to `max_length` if there is one."""
        # The template of a chat model writes the BOS token; the tokenizer must not add it a second time.
        bos_token = self.tokenizer.bos_token
        starts_with_bos = bos_token is not None and prompt.startswith(bos_token)
        row = self.tokenizer(
            prompt,
            add_special_tokens=add_special_tokens and not starts_with_bos,
            truncation=max_length is not None,
            max_length=None if max_length is None else max_length - num_placeholders,
            verbose=False,  # `_tokenize` says it better
            **kwargs,
        )
        row = {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], **row}
        filler = {"input_ids": self.image_token_id, "attention_mask": 1, "offset_mapping": (0, 0)}
        return {key: [filler.get(key, 0)] * num_placeholders + list(value) for key, value in row.items()}

    def _pad(
        self,
        data: dict[str, list],
        padding: bool | str,
        max_length: int | None,
        padding_side: str | None,
        pad_to_multiple_of: int | None,
    ) -> dict[str, list]:
        """Rows of one length, as the tokenizer pads ids and mask. It does not pad all else, such as offsets."""
        padded = self.tokenizer.pad(
            {key: data[key] for key in ("input_ids", "attention_mask")},
            padding=padding,
            max_length=max_length,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        others = {key: rows for key, rows in data.items() if key not in padded}
        left = (padding_side or self.tokenizer.padding_side) == "left"
        for key, rows in others.items():
            for index, row in enumerate(rows):
                fill = [(0, 0) if key == "offset_mapping" else 0] * (len(padded["input_ids"][index]) - len(row))
                rows[index] = fill + row if left else row + fill
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], **others}

    def _take_out_image_tokens(self, sample: str) -> tuple[str, list[dict[str, tuple[int, int]]]]:
        """The text without its `<image>`s and `<video>`s, and where each was (`span`) and is (`new_span`, of length 0)."""
        pattern = rf"(?:{self._visual_token_pattern})\n?"
        offsets, removed = [], 0
        for match in re.finditer(pattern, sample):
            start, end = match.span()
            offsets.append({"span": (start, end), "new_span": (start - removed, start - removed)})
            removed += end - start
        return re.sub(pattern, "", sample), offsets

    def _stack_images(self, rows: list[list], **kwargs) -> dict[str, np.ndarray]:
        """`pixel_values` `(B, I, 3, H, W)` and `image_mask` `(B, I)` of rows with up to I images each."""
        flat = [image for row in rows for image in row]
        if kwargs.get("do_rescale", True):
            flat = [load_rgb_image(image) for image in flat]
            if self.image_processor.size.get("shortest_edge"):
                flat = [cut_to_aspect_ratio(image) for image in flat]
        else:  # arrays of values that are not rescaled: the image processor checks them
            flat = open_images(flat)
        flat = resize_first(flat, self.image_processor, **kwargs)
        pixels = self.image_processor(flat, return_tensors="np", **kwargs)["pixel_values"]
        pixels = np.stack(list(pixels))
        image_mask = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
        for index, row in enumerate(rows):
            image_mask[index, : len(row)] = 1
        pixel_values = np.zeros((*image_mask.shape, *pixels.shape[1:]), dtype=pixels.dtype)
        pixel_values[image_mask.astype(bool)] = pixels
        return {"pixel_values": pixel_values, "image_mask": image_mask}

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs):
        """Placeholders for the images of one prompt. They share the prefix, so the first image counts all of it."""
        num_images = 0 if image_sizes is None else len(image_sizes)
        counts = [self.num_prefix_tokens if index == 0 else 0 for index in range(num_images)]
        return {"num_image_tokens": counts, "num_image_patches": [1] * num_images}

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values", "image_mask"]


def _is_nested(images: Any) -> bool:
    """Whether there is one list (or `None`) per row, not one flat list of images."""
    if not isinstance(images, (list, tuple)) or not images:
        return False
    return all(row is None or isinstance(row, (list, tuple)) for row in images)


def _nested_rows(images: Any) -> list[list]:
    return [[] if row is None else list(row) for row in images]


def _flatten_images(images: Any) -> list:
    """No image, one, a list of them, or a batch array `(N, H, W, C)` or `(N, C, H, W)`, as a list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    if not isinstance(images, (str, os.PathLike, Image.Image)) and getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _flatten_videos(videos: Any, depth: int = 0) -> list:
    """One video, or videos in lists of any depth, as a flat list. Paths that are three lists deep are frames of a video."""
    if isinstance(videos, (str, os.PathLike)) or getattr(videos, "ndim", 0) == 4:
        return [videos]
    if getattr(videos, "ndim", 0) == 5:
        return list(videos)
    if not isinstance(videos, (list, tuple)):
        raise ValueError(
            f"A video must be a file, a URL, an array of 4 dimensions or a list of frames, got {type(videos)}."
        )
    named = depth == 2 and all(isinstance(frame, (str, os.PathLike)) for frame in videos)
    if named or any(isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3 for frame in videos):
        return [videos]
    return [video for part in videos if part is not None for video in _flatten_videos(part, depth + 1)]


__all__ = ["TaLlavaProcessor"]
