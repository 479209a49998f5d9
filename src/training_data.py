"""
From LLaVA's JSON, or from chat messages, to the batches of a `Trainer`.

`prepare_dataset` reads the samples, leaves out what cannot be trained on, and says how many for which reason. What it
keeps are token ids and labels, and where the images are; `Collator` opens the images, batch by batch.

Two formats of records are read, from JSON files, folders of `datasets`, repos on the Hub and dataset objects:

- LLaVA's: `{"id", "image", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", ...}]}`
- that of TRL: `{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...],
  "images": [...]}`, where the content may also be text with `<image>` in it
"""

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers.utils import logging

from .encoded_images import encoded_bytes
from .error_messages import one_line
from .image_loading import load_rgb_image


logger = logging.get_logger(__name__)

IMAGE = "<image>"  # in the text of the data, whatever the processor writes
IGNORED = -100  # a label without loss
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
COLUMNS = ["input_ids", "labels", "images", "id", "length"]

_PROBED = 16  # at most so many samples, evenly spaced, are looked at before all are

_IMAGE_COLUMNS = ("image", "images")
_CAST = (
    'Give paths or image files, or say that it holds images: `dataset.cast_column("image", datasets.Image())`, for lists '
    "`datasets.List(datasets.Image())`."
)

# Characters for private use, which no text has, to see what a chat template does with a question and an answer.
_QUESTION, _ANSWER = "\ue000", "\ue001"


# --- one sample ----------------------------------------------------------------------------------------------------


class SampleError(ValueError):
    """
    A sample that cannot be trained on.

    Args:
        sample_id (`str`): Its id.
        index (`int`): Its place in the source, from 0.
        source (`str`): File, folder or repo; empty if it has no name.
        reason (`str`): What is wrong with it.
    """

    def __init__(self, sample_id: str, index: int, source: str, reason: str):
        super().__init__(sample_id, index, source, reason)  # so that it can be pickled
        self.sample_id, self.index, self.source, self.reason = sample_id, index, source, reason

    def __str__(self) -> str:
        place = f"record {self.index} of {self.source}" if self.source else f"record {self.index}"
        return f"Sample {self.sample_id} ({place}): {self.reason}"


@dataclass
class Sample:
    """
    One conversation.

    Args:
        id (`str`): That of the record, or else its index.
        images (`list`): Path, PIL image, or the bytes of a file (see [`encoded_bytes`]) each.
        messages (`list[dict]`):
            `role` ("system", "user", "assistant") and `content`: text with an `<image>` per image or, of a user, also a
            list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
        index (`int`): Place of the record in the source, from 0.
        source (`str`): Where it is from.
        began_with_answer (`bool`): Whether the record began with a turn of the assistant, which was dropped.
    """

    id: str
    images: list
    messages: list[dict]
    index: int = 0
    source: str = ""
    began_with_answer: bool = False


def read_sample(
    record: Mapping[str, Any], index: int = 0, image_folder: str | Path | None = None, source: str = ""
) -> Sample:
    """
    A sample from a record in the format of LLaVA or TRL. Images are not opened. A turn of the assistant before the first
    question is dropped, as in LLaVA's own code.

    Args:
        record (`Mapping`): With `conversations` or `messages`, and `image` or `images`: one or a list of them.
        index (`int`): Place of the record in its source, from 0. It is the id of a sample that has none.
        image_folder (`str` or `Path`, *optional*): What relative paths of images start from.
        source (`str`): For error messages.

    Raises:
        [`SampleError`]: An unknown role or order of turns, an empty question or answer, or numbers of images and
            of `<image>`s that differ.
    """
    sample_id = str(index) if record.get("id") is None else str(record["id"])
    try:
        images = _read_images(record, image_folder)
        messages = _read_messages(record)
        first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
        began_with_answer = messages[first]["role"] == "assistant"
        if began_with_answer:
            del messages[first]
        _check_messages(messages, len(images))
    except ValueError as error:
        raise SampleError(sample_id, index, source, str(error)) from error
    return Sample(sample_id, images, messages, index, source, began_with_answer)


def _read_images(record: Mapping[str, Any], image_folder: str | Path | None) -> list:
    try:
        images = _as_list(record.get("images") if record.get("image") is None else record["image"])
    except Exception as error:  # `datasets` decodes them here, and Pillow's readers raise nearly anything
        raise ValueError(f"An image cannot be read: {one_line(error)}") from error
    return [locate_image(image, image_folder or "") if _is_path(image) else image for image in images]


def _is_path(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike)) and encoded_bytes(image) is None


def locate_image(image: str | os.PathLike, image_folder: str | Path) -> str:
    """
    Path of an image of a sample.

    Raises:
        `ValueError`: A relative path that leaves the folder.
    """
    if image_folder and os.path.normpath(image).split(os.sep)[0] == os.pardir:
        raise ValueError(
            f"Its image {os.fspath(image)!r} is outside of {image_folder}. Name a folder that holds all images."
        )
    return os.path.join(image_folder, image)


def _as_list(images: Any) -> list:
    """One image, a list of them or none, as a list."""
    if isinstance(images, Mapping) and not any(value is not None for value in images.values()):
        return []  # how a struct that is null may come
    if images is None or (isinstance(images, str) and not images):
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _read_messages(record: Mapping[str, Any]) -> list[dict]:
    """
    The turns as messages, not yet checked for what they say.

    Raises:
        `ValueError`: They are not in one of the formats.
    """
    if record.get("conversations") is not None:
        turns_key, role_key, content_key = "conversations", "from", "value"
    elif record.get("messages") is not None:
        turns_key, role_key, content_key = "messages", "role", "content"
    else:
        raise ValueError(f"It has neither `conversations` nor `messages`, but {', '.join(record) or 'nothing'}.")
    turns = record[turns_key]
    if isinstance(turns, Mapping):  # how older versions of `datasets` give a list of dicts
        turns = [dict(zip(turns, values)) for values in zip(*turns.values())]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"`{turns_key}` must be a list of turns, with at least one in it.")
    messages = []
    for number, turn in enumerate(turns, start=1):
        role, content = turn.get(role_key), turn.get(content_key)
        if role not in ROLES:
            raise ValueError(f"Turn {number} is from {role!r}, which is none of {', '.join(ROLES)}.")
        if isinstance(content, list):
            items = [_read_item(item, number) for item in content]
            content = items if ROLES[role] == "user" else _as_text(items)
        elif not isinstance(content, str):
            raise ValueError(f"Turn {number} has no text: `{content_key}` is {content!r}.")
        messages.append({"role": ROLES[role], "content": content})
    if any({"type": "image"} in message["content"] for message in messages if isinstance(message["content"], list)):
        # Beside such items the processor takes an `<image>` in a text for text. In a sample it is an image, always.
        for message in messages:
            if message["role"] == "user" and IMAGE in _as_text(message["content"]):
                message["content"] = _as_items(message["content"])
    return messages


def _read_item(item: Any, number: int) -> dict:
    """An item of a list as content, without the keys that `datasets` fills with `None`."""
    if isinstance(item, Mapping) and item.get("type") == "image":
        return {"type": "image"}
    if isinstance(item, Mapping) and item.get("type") == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    raise ValueError(f"Turn {number} holds {item!r:.100}, which is neither an image nor a text.")


def _as_text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "".join(f"{IMAGE}\n" if item["type"] == "image" else item["text"] for item in content)


def _as_items(content: str | list[dict]) -> list[dict]:
    if isinstance(content, list):
        return [part for item in content for part in (_as_items(item["text"]) if "text" in item else [item])]
    items: list[dict] = []
    for index, part in enumerate(re.split(rf"\n?{IMAGE}\n?", content)):
        items += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": part}] * (part != "")
    return items


def _check_messages(messages: list[dict], num_images: int) -> None:
    """
    Raises:
        `ValueError`: Not question and answer in turn, up to an answer; an empty one; or numbers of images that differ.
    """
    may_follow = {"system": ("system", "user"), "user": ("assistant",), "assistant": ("user",)}
    num_found, previous = 0, "system"
    for number, message in enumerate(messages, start=1):
        role, text = message["role"], _as_text(message["content"])
        if role not in may_follow[previous]:
            after = f"follows a turn of the {previous}" if number > 1 else "is the first"
            raise ValueError(f"Turn {number} is of the {role} and {after}. Questions and answers must take turns.")
        previous = role
        if not text.replace(IMAGE, "").strip():
            raise ValueError(f"Turn {number}, of the {role}, is empty.")
        if role != "user" and IMAGE in text:
            raise ValueError(f"Turn {number} has {IMAGE} outside a question.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Turn {number} has a broken character: {error}.") from error
        num_found += text.count(IMAGE)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("It has no question.")
    if previous != "assistant":
        raise ValueError(f"The last turn is of the {previous}, so there is nothing to learn from it. Drop it.")
    if num_found != num_images:
        raise ValueError(f"There are {num_found} {IMAGE} in the questions, but {num_images} images.")


# --- images --------------------------------------------------------------------------------------------------------


def open_image(image: Any) -> Image.Image:
    """
    The RGB image of a path, a PIL image, the bytes of a file (see [`encoded_bytes`]), or a dict with `bytes` and `path` as
    `datasets` has it.

    Raises:
        `ValueError`: It cannot be read.
    """
    try:
        content = encoded_bytes(image)
        if content is not None:
            image = Image.open(BytesIO(content))
        elif isinstance(image, Mapping):
            if not isinstance(image.get("path"), (str, os.PathLike)):
                raise ValueError(
                    f"An image has the fields {', '.join(map(str, image))}, but no file in `bytes` or `path`. {_CAST}"
                )
            image = image["path"]
        return load_rgb_image(image)
    except Exception as error:  # Pillow's readers raise nearly anything
        raise ValueError(one_line(error)) from error


def _find_damage(image: Any) -> str:
    """What keeps an image from being read to its end; empty if nothing does."""
    if _is_path(image) and not os.path.isfile(image):
        return f"There is no image file {str(image)[:1000]!r}."
    try:
        open_image(image)
    except ValueError as error:
        return str(error)
    return ""


def find_damaged_files(paths: Iterable[str], memory: Path, num_threads: int = 1) -> dict[str, str]:
    """
    Reads image files to their end. What was found is remembered as long as size and date of a file stay the same, so
    that a second look, or one after an interruption, is quick.

    Args:
        paths (`Iterable[str]`): Files, each as often as it comes.
        memory (`Path`): JSON lines, appended to.
        num_threads (`int`): Pillow decodes in parallel.

    Returns:
        `dict[str, str]`: What is wrong with those that are missing or damaged.
    """
    known: dict[str, list] = {}
    if memory.is_file():
        with memory.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    path, *finding = json.loads(line)
                except ValueError:  # empty, or cut off
                    continue
                known[path] = finding
    damaged, unknown = {}, []
    for path in tqdm(dict.fromkeys(paths), desc="image files", unit="file", leave=False):
        try:
            status = os.stat(path)
        except OSError:
            damaged[path] = _find_damage(path)
            continue
        stamp = [status.st_size, status.st_mtime_ns]
        finding = known.get(os.path.abspath(path), [])
        if finding[:2] != stamp:
            unknown.append((path, stamp))
        elif finding[2]:
            damaged[path] = finding[2]
    if not unknown:
        return damaged
    memory.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPool(num_threads) as pool, memory.open("a", encoding="utf-8") as file:
        findings = pool.imap(_find_damage, [path for path, _ in unknown], chunksize=16)
        for (path, stamp), reason in zip(unknown, tqdm(findings, "check images", len(unknown), unit="image")):
            file.write("\n" + json.dumps([os.path.abspath(path), *stamp, reason]))  # what is there may be cut off
            if reason:
                damaged[path] = reason
    return damaged


# --- tokens and labels ---------------------------------------------------------------------------------------------


class SampleEncoder:
    """
    Token ids and labels of samples: the ids that `processor(text=processor.apply_chat_template(messages), images=...)`
    makes, with one BOS, but without a look at the images. What the assistant says is labelled, with the token that ends
    its turn; all else is not.

    The chat template needs no `{% generation %}`: what it writes around an answer is found out by writing another answer.

    Args:
        processor (`TaLlavaProcessor` or `VmtcCmaiLlavaProcessor`): With a fast tokenizer and a chat template.

    Raises:
        `ValueError`: A processor that is not of these kinds, or whose images differ in their number of tokens; a chat
            template that does not write questions and answers as they are.
    """

    def __init__(self, processor: Any):
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(
                "Labels need to know where tokens are in the text: load a fast tokenizer (`tokenizer.json`)."
            )
        if processor.chat_template is None:
            raise ValueError("The processor has no chat template. Set `processor.chat_template`.")
        self.processor = processor
        self.num_prefix_tokens = getattr(processor, "num_prefix_tokens", 0)
        self._look_at_template()
        token = re.escape(processor.image_token)
        if self.num_prefix_tokens:  # TA-LLaVA takes the images out of the text
            self._image_pattern, self._placeholders = re.compile(token + r"\n?"), ""
        else:
            self._image_pattern, self._placeholders = (
                re.compile(token),
                processor.image_token * self._tokens_per_image(),
            )
        self._check_ids()

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """
        Returns:
            `dict`: `input_ids` and `labels`, lists of `int` with -100 where there is no loss; `images` and `id` of the
            sample, and `length`, the number of tokens.

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

        input_ids, offsets, moved = self._tokenize(text)
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

    def _tokenize(self, text: str) -> tuple[list[int], np.ndarray, Any]:
        """
        Ids of what the template wrote; where each token is in the text with placeholders, `(S, 2)`, and a function from
        places in `text` to places in that.
        """
        images = list(self._image_pattern.finditer(text))
        grown = [(image.end(), len(self._placeholders) - len(image.group())) for image in images]
        prompt = self._image_pattern.sub(self._placeholders, text)
        tokens = self.processor.tokenizer(
            prompt, add_special_tokens=self._needs_bos(prompt), return_offsets_mapping=True, verbose=False
        )
        num_before = self.num_prefix_tokens if images else 0
        input_ids = [self.processor.image_token_id] * num_before + list(tokens["input_ids"])
        offsets = np.array([(0, 0)] * num_before + list(tokens["offset_mapping"])).reshape(-1, 2)
        return input_ids, offsets, lambda place: place + sum(growth for end, growth in grown if end <= place)

    def _needs_bos(self, text: str) -> bool:
        """Whether the tokenizer, not the template, is to write the BOS token."""
        bos_token = self.processor.tokenizer.bos_token
        return bos_token is None or not text.startswith(bos_token)

    # What the template does

    def _render(self, messages: list[dict], **kwargs) -> str:
        return self.processor.apply_chat_template(messages, **kwargs)

    def _look_at_template(self) -> None:
        """Finds which contents the template takes, and what it writes before (`_lead`) and after (`_tail`) an answer."""

        def takes(content: Any) -> bool:
            try:  # a list where text is expected would be written as Python writes it, with escapes
                return _QUESTION in self._render([{"role": "user", "content": content}])
            except Exception:  # of the template, or of Python in it
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
        # Up to the last token in what is the same: the last turn may end like the next one begins, with a "<".
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
        """The message as it is, unless the template takes only the other kind of content."""
        content = message["content"]
        if isinstance(content, str) and not self._takes_text:
            content = _as_items(content)
        elif not isinstance(content, str) and not self._takes_items:
            content = _as_text(content)
        if isinstance(content, str):
            content = content.replace(IMAGE, self.processor.image_token)
        return {"role": message["role"], "content": content}

    def _find_answers(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """
        Where in `text` is what the model has to write: the answers with what ends their turns.

        Raises:
            `ValueError`: The template does not write the answers as they are, but for white space around them.
        """
        answers = [_as_text(message["content"]) for message in messages if message["role"] == "assistant"]
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

    # What the processor does

    def _tokens_per_image(self) -> int:
        """Placeholders that the processor writes for an image, of any size."""
        if getattr(self.processor, "patch_size", None) is None:
            raise ValueError(
                "The processor does not know the size of a patch (`patch_size`), and so not how many tokens an image has."
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
        """Raises `ValueError` if the ids made here are not those that the processor makes."""
        messages = [
            {"role": "user", "content": f"{IMAGE}\nWhat is it?"},
            {"role": "assistant", "content": "It."},
        ]
        text = self._render([self._for_template(message) for message in messages])
        image = Image.new("RGB", (64, 64))
        inputs = self.processor(images=[image], text=[text], add_special_tokens=self._needs_bos(text))
        if list(inputs["input_ids"][0]) != self._tokenize(text)[0]:
            raise ValueError(
                f"A {type(self.processor).__name__} writes images into the text in a way that is not known here. Use a "
                "TaLlavaProcessor or a VmtcCmaiLlavaProcessor."
            )


# --- data sets -----------------------------------------------------------------------------------------------------


@dataclass
class DataReport:
    """
    How many samples were kept, and how many left out for which reason. That of a streamed dataset grows while the main
    process reads it for the first time.
    """

    kept: int = 0
    text_only: int = 0
    too_long: int = 0
    bad: int = 0
    max_length: int = 0
    began_with_answer: int = 0  # of those that were kept; the answer was dropped

    @property
    def total(self) -> int:
        return self.kept + self.text_only + self.too_long + self.bad

    def __str__(self) -> str:
        text = (
            f"{self.kept} of {self.total} samples kept; left out: {self.text_only} without an image, {self.too_long} over "
            f"{self.max_length} tokens, {self.bad} bad"
        )
        if self.began_with_answer:
            text += f"; {self.began_with_answer} began with an answer, which was dropped"
        return text

    def _count(self, row: Mapping[str, Any]) -> None:
        setattr(self, row["outcome"], getattr(self, row["outcome"]) + 1)
        self.began_with_answer += row["outcome"] == "kept" and row["began_with_answer"]


@dataclass
class _Preparation:
    """
    From a record to a row: `COLUMNS`, the `outcome` (a field of [`DataReport`]), of bad samples the `reason`, and whether
    it `began_with_answer`.
    """

    encoder: SampleEncoder
    max_length: int
    image_folder: str | None
    keep_text_only: bool
    source: str
    is_json: bool  # a record is one text, `record`
    opens_files: bool

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        row = {"input_ids": [], "labels": [], "images": [], "id": str(index), "length": 0, "outcome": "", "reason": ""}
        row["began_with_answer"] = False
        try:
            sample = read_sample(self._parse(record, index), index, self.image_folder, self.source)
            row["id"] = sample.id
            if not sample.images and not self.keep_text_only:
                return {**row, "outcome": "text_only"}
            item = self.encoder(sample)
            if item["length"] > self.max_length:
                return {**row, "length": item["length"], "outcome": "too_long"}
            for image in sample.images:
                if self.is_json and not isinstance(image, str):
                    reason = f"Its image is {image!r:.100}, but in JSON an image is its path, or its file in base64."
                    raise SampleError(sample.id, index, self.source, reason)
                damage = _find_damage(image) if self.opens_files or not _is_path(image) else ""
                if damage:
                    raise SampleError(sample.id, index, self.source, damage)
        except SampleError as error:
            return {**row, "id": error.sample_id, "outcome": "bad", "reason": error.reason}
        return {**row, **item, "outcome": "kept", "began_with_answer": sample.began_with_answer}

    def _parse(self, record: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        if not self.is_json:
            return record
        try:
            parsed = json.loads(record["record"])
        except ValueError as error:
            raise SampleError(str(index), index, self.source, f"It is not JSON: {one_line(error)}") from error
        if not isinstance(parsed, dict):
            raise SampleError(str(index), index, self.source, f"It is not a JSON object, but {record['record']:.100}.")
        return parsed

    def fingerprint(self, records: datasets.Dataset) -> str:
        """Changes with all that the rows depend on, and with nothing else."""
        processor = self.encoder.processor
        settings = [self.max_length, self.image_folder, self.keep_text_only, self.is_json, self.encoder._placeholders]
        return Hasher.hash(
            [
                records._fingerprint,
                Path(__file__).read_text(encoding="utf-8"),
                processor.tokenizer.backend_tokenizer.to_str(),
                str(processor.tokenizer.special_tokens_map),
                str(processor.chat_template),
                str([processor.image_token_id, self.encoder.num_prefix_tokens, *settings]),
            ]
        )


@dataclass
class _BadSamples:
    """What becomes of bad samples."""

    on_bad_sample: str
    file: Path | None
    source: str

    def handle(self, samples: list[tuple[str, int, str]]) -> None:
        """
        Raises the first of the `samples` (id, index, reason) as [`SampleError`], or writes all to the file, one line each
        that is not in it yet.
        """
        if samples and self.on_bad_sample == "error":
            sample_id, index, reason = samples[0]
            if len(samples) > 1:
                reason += f" ({len(samples) - 1} more samples are bad.)"
            raise SampleError(
                sample_id, index, self.source, f'{reason} `on_bad_sample="skip"` leaves such samples out.'
            )
        if not samples or self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        known = set(self.file.read_text(encoding="utf-8").splitlines()) if self.file.is_file() else set()
        lines = [json.dumps({"id": name, "index": index, "reason": reason}) for name, index, reason in samples]
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines if line not in known))


@dataclass
class _StreamedPreparation:
    """A preparation of one record after the other, with what is to be done about each."""

    prepare: _Preparation
    report: DataReport
    bad_samples: _BadSamples
    last_index: int = -1  # later epochs are not counted again

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        row = self.prepare(record, index)
        if row["outcome"] == "bad":
            self.bad_samples.handle([(row["id"], index, row["reason"])])
        if index > self.last_index:
            self.report._count(row)
            self.last_index = index
        return row


def prepare_dataset(
    source: Any,
    processor: Any,
    *,
    image_folder: str | Path | None = None,
    max_length: int = 1024,
    keep_text_only: bool = False,
    on_bad_sample: Literal["error", "skip"] = "error",
    bad_samples_file: str | Path | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    split: str = "train",
) -> tuple[datasets.Dataset | datasets.IterableDataset, DataReport]:
    """
    Samples as token ids and labels, ready for [`Collator`], and the report of what was left out. What was computed is
    kept in the cache of `datasets`, so that a second call is quick.

    Args:
        source (`str`, `Path`, `Dataset` or `IterableDataset`):
            A `.json` file of one array, a `.jsonl` or `.parquet` file, a folder of such, or one that `save_to_disk` has
            written, the name of a repo on the Hub, or a dataset, with records in the format of LLaVA or TRL. Images may lie
            in a column: as images of `datasets`, or as `bytes`, base64, or structs with `bytes` and `path`.
        processor (`TaLlavaProcessor` or `VmtcCmaiLlavaProcessor`):
            That of the model.
        image_folder (`str` or `Path`, *optional*):
            What relative paths of images start from. Defaults to the current folder.
        max_length (`int`):
            Samples with more tokens, placeholders included, are left out; so are those that the tokenizer's
            `model_max_length` does not allow.
        keep_text_only (`bool`):
            Keep samples without an image.
        on_bad_sample (`str`):
            `"error"` raises a bad sample, if there are any; `"skip"` leaves them out.
        bad_samples_file (`str` or `Path`, *optional*):
            Gets a JSON line with `id`, `index` and `reason` for each that was left out.
        streaming (`bool`):
            Read the samples while they are used, and open their images then. A mapped dataset is read, and every image
            opened, beforehand. Of a `.json` file, streamed or not, all is held in memory; `.jsonl` is read by lines.
        num_proc (`int`, *optional*):
            Processes that prepare a mapped dataset.
        split (`str`):
            Of a repo or folder with several.

    Returns:
        `tuple[Dataset | IterableDataset, DataReport]`: Columns `input_ids`, `labels` (lists of `int`), `images` (paths or,
        where the source holds them, the images; see [`iterate_images`]), `id`, `length`.

    Raises:
        [`SampleError`]: A bad sample, with `on_bad_sample="error"`.
        `ValueError`: A source that cannot be read, or nothing left to train on.
    """
    if on_bad_sample not in ("error", "skip"):
        raise ValueError(f'`on_bad_sample` is "error" or "skip", got {on_bad_sample!r}.')
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"`image_folder` is {str(image_folder)!r}, but there is no such folder.")
    encoder = SampleEncoder(processor)
    max_length = min(max_length, processor.tokenizer.model_max_length)
    if max_length <= encoder.num_prefix_tokens:
        raise ValueError(
            f"`max_length` is {max_length}, but a sample has {encoder.num_prefix_tokens} placeholders and some text."
        )
    records, name, is_json = _load(source, streaming, split)
    is_streamed = isinstance(records, datasets.IterableDataset)
    folder = None if image_folder is None else os.path.abspath(image_folder)
    prepare = _Preparation(encoder, max_length, folder, keep_text_only, name, is_json, opens_files=is_streamed)
    bad_samples = _BadSamples(on_bad_sample, None if bad_samples_file is None else Path(bad_samples_file), name)
    if isinstance(records, datasets.IterableDataset):
        return _prepare_streamed(records, prepare, bad_samples)
    return _prepare_mapped(records, prepare, bad_samples, num_proc)


def _nothing_left(source: str, report: DataReport, bad: str = "") -> ValueError:
    bad = f" The first bad one: {bad}" if bad else ""
    return ValueError(f"There is nothing to train on in {source or 'the dataset'}: {report}.{bad}")


def _prepare_mapped(
    records: datasets.Dataset, prepare: _Preparation, bad_samples: _BadSamples, num_proc: int | None
) -> tuple[datasets.Dataset, DataReport]:
    # Images inside the dataset stay where they are: they are not copied with the tokens.
    held = [name for name in _IMAGE_COLUMNS if _holds_images(records, name, prepare.source)][:1]
    if not held:
        _probe(records, prepare, bad_samples)
    tokens = datasets.Sequence(datasets.Value("int32"))
    text = datasets.Value("string")
    features = {
        **dict.fromkeys(("input_ids", "labels"), tokens),
        "images": datasets.Sequence(text),
        **dict.fromkeys(("id", "outcome", "reason"), text),
        "length": datasets.Value("int32"),
        "began_with_answer": datasets.Value("bool"),
    }
    rows = records.map(
        _WithoutImages(prepare) if held else prepare,
        with_indices=True,
        remove_columns=records.column_names,
        features=datasets.Features(features),
        num_proc=num_proc,
        new_fingerprint=prepare.fingerprint(records),
        desc="samples",
    )
    outcomes, reasons = list(rows["outcome"]), list(rows["reason"])
    if not held:
        paths_of_rows = rows.select_columns(["images"])
        memory = Path(datasets.config.HF_DATASETS_CACHE) / "ta_llava_checked_images.jsonl"
        damaged = find_damaged_files(
            (path for row in paths_of_rows for path in row["images"] if _is_path(path)),
            memory,
            num_threads=num_proc or os.cpu_count() or 1,
        )
        if damaged:
            for index, row in enumerate(paths_of_rows):
                for path in row["images"]:
                    if path in damaged and outcomes[index] == "kept":
                        outcomes[index], reasons[index] = "bad", damaged[path]
    ids = rows.select_columns(["id"])
    bad = [(ids[index]["id"], index, reasons[index]) for index, outcome in enumerate(outcomes) if outcome == "bad"]
    bad_samples.handle(bad)
    dropped = sum(began and outcome == "kept" for began, outcome in zip(rows["began_with_answer"], outcomes))
    report = DataReport(**Counter(outcomes), max_length=prepare.max_length, began_with_answer=dropped)
    if report.kept == 0:
        raise _nothing_left(prepare.source, report, bad[0][2] if bad else "")
    if held:
        images = records.select_columns(held).rename_columns(dict.fromkeys(held, "images"))
        rows = datasets.concatenate_datasets([rows.remove_columns("images"), images], axis=1)
    rows = rows.select([index for index, outcome in enumerate(outcomes) if outcome == "kept"])
    return rows.select_columns(COLUMNS), report


def _probe(records: datasets.Dataset, prepare: _Preparation, bad_samples: _BadSamples) -> None:
    """What is wrong with all samples, such as a wrong `image_folder`, shows in a few, before all are tokenised."""
    if bad_samples.on_bad_sample == "skip":
        return
    bad = []
    for index in range(0, len(records), max(math.ceil(len(records) / _PROBED), 1)):
        row = prepare(records[index], index)
        damages = (_find_damage(image) for image in row["images"])
        if reason := row["reason"] or next(filter(None, damages), ""):
            bad.append((row["id"], index, reason))
    bad_samples.handle(bad)


@dataclass
class _WithoutImages:
    """Rows for a dataset whose images are in a column of their own."""

    prepare: _Preparation

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {**self.prepare(record, index), "images": []}


def _prepare_streamed(
    records: datasets.IterableDataset, prepare: _Preparation, bad_samples: _BadSamples
) -> tuple[datasets.IterableDataset, DataReport]:
    for name in _IMAGE_COLUMNS:  # `datasets` would decode them outside our reach
        feature = (records.features or {}).get(name)
        if feature is not None:
            _check_column(name, feature, prepare.source)
        if isinstance(_element(feature), datasets.Image):
            undecoded = datasets.Image(decode=False)
            is_one = isinstance(feature, datasets.Image)
            records = records.cast_column(name, undecoded if is_one else datasets.Sequence(undecoded))

    def stream(report: DataReport, bad_samples: _BadSamples) -> datasets.IterableDataset:
        rows = records.map(_StreamedPreparation(prepare, report, bad_samples), with_indices=True)
        return rows.filter(_is_kept).select_columns(COLUMNS)

    # A look at the beginning finds what is wrong with all of it.
    trial = DataReport(max_length=prepare.max_length)
    if next(iter(stream(trial, _BadSamples(bad_samples.on_bad_sample, None, prepare.source))), None) is None:
        raise _nothing_left(prepare.source, trial)
    report = DataReport(max_length=prepare.max_length)
    return stream(report, bad_samples), report


def _is_kept(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "kept"


def _element(feature: Any) -> Any:
    """What a column holds, or the lists in it."""
    if isinstance(feature, list):
        feature = feature[0]
    return getattr(feature, "feature", feature)


def _is_of(element: Any, *dtypes: str) -> bool:
    return isinstance(element, datasets.Value) and element.dtype in dtypes


def _check_column(name: str, feature: Any, source: str) -> None:
    """Raises `ValueError` for a column that can hold neither images nor their paths."""
    element = _element(feature)
    is_struct = isinstance(element, dict) and not element.keys().isdisjoint(("bytes", "path"))
    texts, contents = ("string", "large_string", "string_view", "null"), ("binary", "large_binary", "binary_view")
    if not is_struct and not isinstance(element, datasets.Image) and not _is_of(element, *texts, *contents):
        raise ValueError(
            f"The column `{name}` of {source or 'the dataset'} holds {element!s:.200}, no images. {_CAST}"
        )


def _holds_images(records: datasets.Dataset, name: str, source: str) -> bool:
    """
    Whether a column holds images, not their paths: those of `datasets`, or files that it no longer says to be images, as
    bytes, in structs, or as text in base64.
    """
    if name not in records.features:
        return False
    _check_column(name, records.features[name], source)
    element = _element(records.features[name])
    if not _is_of(element, "string", "large_string", "string_view"):
        return not _is_of(element, "null")
    first = next((images[0] for row in records.select_columns([name]) if (images := _as_list(row[name]))), None)
    return first is not None and not _is_path(first)


def _load(source: Any, streaming: bool, split: str) -> tuple[datasets.Dataset | datasets.IterableDataset, str, bool]:
    """
    The records of a source, its name, and whether each record is a text of JSON.

    Raises:
        `ValueError`: There is no such source, or it cannot be read.
    """
    name = str(source) if isinstance(source, (str, os.PathLike)) else ""
    path = Path(name)
    is_json = bool(name) and path.suffix in (".json", ".jsonl")
    is_parquet = bool(name) and path.suffix == ".parquet" and path.is_file()
    if is_json:
        if not path.is_file():
            raise ValueError(f"There is no file {name}.")
        # One text per record: their fields differ in type, and often are not there.
        status = path.stat()
        arguments: dict[str, Any] = {"path": str(path.resolve()), "stamp": (status.st_size, status.st_mtime_ns)}
        kind = datasets.IterableDataset if streaming else datasets.Dataset
        if streaming:
            next(_read_json(**arguments))  # which finds what is wrong with the file before it is used
        try:
            records = kind.from_generator(
                _read_json, gen_kwargs=arguments, features=datasets.Features({"record": datasets.Value("string")})
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(one_line(error.__cause__ or error)) from error
    elif not name:
        records = source
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        records = datasets.load_from_disk(name)
    elif path.is_file() and not is_parquet:
        raise ValueError(f"{name} is neither a .json, nor a .jsonl, nor a .parquet file.")
    else:
        try:
            records = (
                datasets.load_dataset("parquet", data_files=name, split="train", streaming=streaming)
                if is_parquet
                else datasets.load_dataset(name, split=split, streaming=streaming)
            )
        except Exception as error:  # of the network, the Hub, the data, or a name that cannot be one
            raise ValueError(f"There is no dataset {name!r} that could be read: {one_line(error)}") from error
    if isinstance(records, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in records:
            raise ValueError(f"{name or 'The dataset'} has no split {split!r}, but {', '.join(records)}.")
        records = records[split]
    if not isinstance(records, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(
            f"A source of samples is a file, a folder, the name of a repo or a dataset, not a {type(source).__name__}."
        )
    if streaming and isinstance(records, datasets.Dataset):
        records = records.to_iterable_dataset()
    return records, name, is_json


def _read_json(path: str, stamp: Any) -> Iterator[dict[str, str]]:
    """
    The records of a file, each as a text of JSON; `stamp` tells apart versions of the file in the cache.

    Raises:
        `ValueError`: It is not an array of records, or it is empty.
    """
    count = 0
    with open(path, encoding="utf-8-sig") as file:
        if path.endswith(".jsonl"):
            for line in file:
                if line.strip():
                    count += 1
                    yield {"record": line.strip()}
        else:
            try:
                records = json.load(file)
            except ValueError as error:
                raise ValueError(
                    f"{path} is not JSON: {one_line(error)}. One record per line? Call it .jsonl."
                ) from error
            if not isinstance(records, list):
                raise ValueError(f"{path} is not an array of records. One record per line? Call it .jsonl.")
            for record in records:
                count += 1
                yield {"record": json.dumps(record)}
    if count == 0:
        raise ValueError(f"There are no records in {path}.")


def iterate_images(dataset: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The images of all rows of [`prepare_dataset`], one after the other, as [`Collator`] asks for their features."""
    for row in dataset.select_columns(["images"]) if isinstance(dataset, datasets.Dataset) else dataset:
        yield from _as_list(row["images"])


# --- batches -------------------------------------------------------------------------------------------------------


class VisionFeatures(Protocol):
    """What the vision tower made of images before."""

    def get(self, image: Any) -> torch.Tensor:
        """Features `(M, vision width)` of an image, given as in the column `images`."""


class Collator:
    """
    Batches for the `Trainer`, of rows of [`prepare_dataset`]: padded on the right, with the images opened.

    Args:
        processor (`TaLlavaProcessor` or `VmtcCmaiLlavaProcessor`): That of the model.
        vision_features ([`VisionFeatures`], *optional*): Use these instead of opening the images.

    Raises:
        `ValueError`: The tokenizer has no padding token.
    """

    def __init__(self, processor: Any, vision_features: VisionFeatures | None = None):
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token. Set `processor.tokenizer.pad_token`.")
        self.processor = processor
        self.vision_features = vision_features
        self.images_by_row = hasattr(processor, "num_prefix_tokens")  # TA-LLaVA

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `labels` `(B, S)`. For TA-LLaVA with images also `image_mask` `(B, I)`
            and `pixel_values` `(B, I, 3, H, W)` or `vision_features` `(B, I, M, d)`, zeros where a row has fewer images;
            for LLaVA `(N, 3, H, W)` or `(N, M, d)`, the images of all rows one after the other.

        Raises:
            `ValueError`: An image that cannot be read any more.
        """
        input_ids = [torch.tensor(item["input_ids"]) for item in items]
        labels = [torch.tensor(item["labels"]) for item in items]
        batch = {
            "input_ids": pad_sequence(input_ids, True, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], True, 0),
            "labels": pad_sequence(labels, True, IGNORED),
        }
        rows = [_as_list(item["images"]) for item in items]
        if not any(rows):
            return batch
        if self.vision_features is not None:
            name = "vision_features"
            images = torch.stack([self.vision_features.get(image) for row in rows for image in row])
        else:
            name = "pixel_values"
            opened = [self._open(image, item) for item, row in zip(items, rows) for image in row]
            images = torch.as_tensor(self.processor(images=opened, return_tensors="pt")["pixel_values"])
            images = images.flatten(0, -4)  # (N, 3, H, W)
        if not self.images_by_row:
            return {**batch, name: images}
        counts = torch.tensor([len(row) for row in rows])
        image_mask = torch.arange(int(counts.max())) < counts[:, None]
        by_row = images.new_zeros(*image_mask.shape, *images.shape[1:])
        by_row[image_mask] = images
        return {**batch, name: by_row, "image_mask": image_mask.long()}

    @staticmethod
    def _open(image: Any, item: Mapping[str, Any]) -> Image.Image:
        try:
            return open_image(image)
        except ValueError as error:
            raise ValueError(f"Sample {item.get('id')}: {error}") from error
