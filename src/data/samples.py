"""Samples: conversations about images, in the format of LLaVA or TRL; and the images, opened and checked."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..common.errors import one_line
from ..encoded_images import encoded_bytes, shorten
from ..image_loading import load_rgb_image


IMAGE = "<image>"  # stands for an image in the text of the data; processors may write another token
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
HOW_TO_CAST = (
    'Give paths or image files, or say that it holds images: `dataset.cast_column("image", datasets.Image())`, for lists '
    "`datasets.List(datasets.Image())`."
)


# --- one sample ----------------------------------------------------------------------------------------------------


class SampleError(ValueError):
    """
    A sample that cannot be trained on.

    Args:
        sample_id (`str`): Id of the sample.
        index (`int`): Place of the sample in its source, from 0.
        source (`str`): File, folder or repo; empty if the source has no name.
        reason (`str`): What is wrong with the sample.
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
        id (`str`): Id of the record, or its index if it has none.
        images (`list`): Images, each as a path, a PIL image, or the bytes of a file (see [`encoded_bytes`]).
        messages (`list[dict]`):
            Messages with `role` ("system", "user", "assistant") and `content`. The content is text with an `<image>` per
            image. That of a user may also be a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
        index (`int`): Place of the record in the source, from 0.
        source (`str`): Name of the source.
        began_with_answer (`bool`): Whether the record began with a turn of the assistant. That turn was dropped.
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
    Reads a sample from a record in the format of LLaVA or TRL. Images are not opened. A turn of the assistant before the
    first question is dropped, as in LLaVA's own code.

    Args:
        record (`Mapping`): It has `conversations` or `messages`, and `image` or `images`: one image or a list.
        index (`int`): Place of the record in its source, from 0. Serves as id if the record has none.
        image_folder (`str` or `Path`, *optional*): Folder that relative paths of images start from.
        source (`str`): Name of the source, for error messages.

    Raises:
        [`SampleError`]: A role or the order of turns is wrong, a question or answer is empty, or the number of `<image>`s
            is not the number of images.
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
        images = as_list(record.get("images") if record.get("image") is None else record["image"])
    except Exception as error:  # `datasets` decodes images here, and Pillow's readers raise nearly anything
        raise ValueError(f"An image cannot be read: {one_line(error)}") from error
    return [locate_image(image, image_folder or "") if is_path(image) else image for image in images]


def path_or_image(image: Any) -> Any:
    """The path that a dict has which holds no bytes; any other image as it is."""
    if (
        isinstance(image, Mapping)
        and encoded_bytes(image) is None
        and isinstance(image.get("path"), (str, os.PathLike))
    ):
        return image["path"]
    return image


def is_path(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike)) and encoded_bytes(image) is None


def locate_image(image: str | os.PathLike, image_folder: str | Path) -> str:
    """
    The path of a sample's image, from a path relative to `image_folder`.

    Raises:
        `ValueError`: The relative path leaves the folder.
    """
    if image_folder and os.path.normpath(image).split(os.sep)[0] == os.pardir:
        raise ValueError(
            f"Its image {shorten(os.fspath(image))!r} is outside of {image_folder}. Name a folder that holds all images."
        )
    return os.path.join(image_folder, image)


def as_list(images: Any) -> list:
    """One image, a list of them or none, as a list."""
    if isinstance(images, Mapping) and not any(value is not None for value in images.values()):
        return []  # a struct that is null
    if images is None or (isinstance(images, str) and not images):
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _read_messages(record: Mapping[str, Any]) -> list[dict]:
    """
    The turns as messages. Their content is not checked yet.

    Raises:
        `ValueError`: The turns have none of the two formats.
    """
    if record.get("conversations") is not None:
        turns_key, role_key, content_key = "conversations", "from", "value"
    elif record.get("messages") is not None:
        turns_key, role_key, content_key = "messages", "role", "content"
    else:
        raise ValueError(f"It has neither `conversations` nor `messages`, but {', '.join(record) or 'nothing'}.")
    turns = record[turns_key]
    if isinstance(turns, Mapping):  # a list of dicts, in older versions of `datasets`
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
            content = items if ROLES[role] == "user" else as_text(items)
        elif not isinstance(content, str):
            raise ValueError(f"Turn {number} has no text: `{content_key}` is {content!r}.")
        messages.append({"role": ROLES[role], "content": content})
    if any({"type": "image"} in message["content"] for message in messages if isinstance(message["content"], list)):
        # Beside such items the processor takes an `<image>` in a text for text. In a sample it always is an image.
        for message in messages:
            if message["role"] == "user" and IMAGE in as_text(message["content"]):
                message["content"] = as_items(message["content"])
    return messages


def _read_item(item: Any, number: int) -> dict:
    """An item of a message's content, without the keys that `datasets` fills with `None`."""
    if isinstance(item, Mapping) and item.get("type") == "image":
        return {"type": "image"}
    if isinstance(item, Mapping) and item.get("type") == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    raise ValueError(f"Turn {number} holds {item!r:.100}, which is neither an image nor a text.")


def as_text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "".join(f"{IMAGE}\n" if item["type"] == "image" else item["text"] for item in content)


def as_items(content: str | list[dict]) -> list[dict]:
    if isinstance(content, list):
        return [part for item in content for part in (as_items(item["text"]) if "text" in item else [item])]
    items: list[dict] = []
    for index, part in enumerate(re.split(rf"\n?{IMAGE}\n?", content)):
        items += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": part}] * (part != "")
    return items


def _check_messages(messages: list[dict], num_images: int) -> None:
    """
    Checks the turns of a sample.

    Raises:
        `ValueError`: Questions and answers do not take turns up to an answer, one of them is empty, or the number of
            `<image>`s is not `num_images`.
    """
    may_follow = {"system": ("system", "user"), "user": ("assistant",), "assistant": ("user",)}
    num_found, previous = 0, "system"
    for number, message in enumerate(messages, start=1):
        role, text = message["role"], as_text(message["content"])
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
    Opens as RGB whatever [`load_rgb_image`] reads. The message of an error is one line. If a column holds no image, it says
    how to cast the column.

    Raises:
        `ValueError`: The image cannot be read.
    """
    try:
        return load_rgb_image(image)
    except Exception as error:  # Pillow's readers raise nearly anything
        image = path_or_image(image)
        is_no_file = error.__cause__ is None or isinstance(error.__cause__, UnidentifiedImageError)
        hint = "" if isinstance(image, (str, os.PathLike, Image.Image)) or not is_no_file else f" {HOW_TO_CAST}"
        raise ValueError(one_line(error) + hint) from error


def find_damage(image: Any) -> str:
    """Says why an image cannot be read to its end; empty if it can."""
    if is_path(image) and not os.path.isfile(image):
        return f"There is no image file {shorten(str(image))!r}."
    try:
        open_image(image)
    except ValueError as error:
        return str(error)
    return ""


def find_damaged_files(paths: Iterable[str], memory: Path, num_threads: int = 1) -> dict[str, str]:
    """
    Reads image files to their end. The findings are remembered as long as size and date of a file stay the same, so that
    a second call, or one after an interruption, is quick.

    Args:
        paths (`Iterable[str]`): Files. The same file may come several times.
        memory (`Path`): File of JSON lines to remember the findings in. New ones are appended.
        num_threads (`int`): Number of threads that decode images.

    Returns:
        `dict[str, str]`: What is wrong with each file that is missing or damaged.
    """
    known = _read_findings(memory)
    damaged, unknown = {}, []
    for path in tqdm(dict.fromkeys(paths), desc="image files", unit="file", leave=False):
        try:
            status = os.stat(path)
        except OSError:
            damaged[path] = find_damage(path)
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
        findings = pool.imap(find_damage, [path for path, _ in unknown], chunksize=16)
        for (path, stamp), reason in zip(unknown, tqdm(findings, "check images", len(unknown), unit="image")):
            file.write("\n" + json.dumps([os.path.abspath(path), *stamp, reason]))  # the last line may be cut off
            if reason:
                damaged[path] = reason
    return damaged


def _read_findings(memory: Path) -> dict[str, list]:
    """Size, date and damage (empty if there is none) of each file that was read before."""
    findings: dict[str, list] = {}
    if memory.is_file():
        with memory.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    path, *finding = json.loads(line)
                except ValueError:  # empty, or cut off
                    continue
                findings[path] = finding
    return findings
