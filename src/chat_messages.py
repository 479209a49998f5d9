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
"""Chats in which somebody types the word that stands for an image, such as `<image>`."""

import re
from collections.abc import Mapping
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

_VISUAL = ("image", "image_url", "video")
_GIVEN_BESIDE = ("images", "videos", "images_encoded")  # arguments of the processor


class TypedPlaceholdersMixin:
    """
    For processors. An `<image>` that somebody types in a chat stays text and takes no image.

    The prompt of a chat has one `<image>` per image, from the items `{"type": "image"}` of its messages. If the word stands
    in their texts too, the mixin writes it with a space, `< image>`, and warns. It leaves the word where it can only be the
    place of an image: when no message has such items and the images are given in another way.
    """

    image_token: str

    def apply_chat_template(self, conversation: Any, *args, **kwargs) -> Any:
        """As [`~transformers.ProcessorMixin.apply_chat_template`]; an `<image>` in a text is written as `< image>`."""
        given = {**kwargs, **(kwargs.get("processor_kwargs") or {})}
        has_images_beside = any(given.get(name) is not None and given[name] is not False for name in _GIVEN_BESIDE)
        is_typed = bool(kwargs.get("tokenize")) and not has_images_beside
        conversation = escape_placeholders(conversation, self._placeholder_words(), is_typed)
        return super().apply_chat_template(conversation, *args, **kwargs)  # type: ignore[misc]

    def _placeholder_words(self) -> list[str]:
        """What stands for an image or a video in a prompt."""
        return [self.image_token]


def escape_placeholders(conversation: Any, words: list[str], is_typed: bool = False) -> Any:
    """
    Writes each word that stands for an image with a space in the texts of a conversation, or of a list of them: `< image>`.

    Args:
        conversation: As `apply_chat_template` takes it. It is not changed.
        words (`list[str]`): What stands for an image or a video.
        is_typed (`bool`): Treat the words as text even in a conversation that has no images or videos among its items. By
            default such a conversation is returned as it is.
    """
    if isinstance(conversation, (list, tuple)) and any(
        isinstance(part, (list, tuple)) or hasattr(part, "messages") for part in conversation
    ):
        return [escape_placeholders(part, words, is_typed) for part in conversation]
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, (list, tuple)):
        return conversation
    if not is_typed and not any(item.get("type") in _VISUAL for message in messages for item in _items(message)):
        return conversation
    pattern = re.compile("|".join(map(re.escape, words)))
    return [_escape(message, pattern, index) for index, message in enumerate(messages)]


def _items(message: Any) -> list[Mapping]:
    """The items of a message whose content is a list."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return [item for item in content if isinstance(item, Mapping)] if isinstance(content, (list, tuple)) else []


def _escape(message: Any, pattern: re.Pattern, index: int) -> Any:
    """A message with a space after the first letter of each word in its texts that matches."""

    def escape(text: Any) -> Any:
        found = pattern.search(text) if isinstance(text, str) else None
        if found is None:
            return text
        logger.warning_once(
            f"The text of message {index} holds {found[0]!r}, which stands for an image or a video in a prompt. It becomes "
            f"{found[0][:1] + ' ' + found[0][1:]!r}, so that it stays text. To show an image, give it as an item of the "
            'content: {"type": "image", "path": ...}.'
        )
        return pattern.sub(lambda word: f"{word[0][:1]} {word[0][1:]}", text)

    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = [
            {**item, "text": escape(item["text"])} if isinstance(item, Mapping) and "text" in item else item
            for item in content
        ]
    else:
        content = escape(content)
    return {**message, "content": content} if "content" in message else message


__all__ = ["TypedPlaceholdersMixin"]
