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
"""Image files that are given as bytes or as text in base64, recognised by what they hold."""

import base64
import binascii
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError


# Base64 in either alphabet, the one of URLs also without its padding. The smallest image files have 12 bytes.
_DATA_URL = re.compile(r"data:[^,]*,", re.IGNORECASE)
_BASE64 = re.compile(r"(?:[A-Za-z0-9+/\s]{16,}|[A-Za-z0-9_\s-]{16,})={0,2}\s*")

_LONGEST_TEXT = 200


def encoded_bytes(image: Any) -> bytes | None:
    """
    The bytes of an image file that is given as `bytes`, as text in base64 (also as a `data:` URL), or as a dict with either
    under `bytes`; `None` for anything else, such as a path. Text is base64 if Pillow knows the format of what it says.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes")
    if isinstance(image, str):
        return _decode(image)
    return bytes(image) if isinstance(image, (bytes, bytearray, memoryview)) else None


def _decode(text: str) -> bytes | None:
    data_url = _DATA_URL.match(text)
    text = text[data_url.end() :] if data_url else text
    if not _BASE64.fullmatch(text):
        return None
    text = "".join(text.split()).rstrip("=")
    try:
        content = base64.b64decode(text.translate(_OF_URLS) + "=" * (-len(text) % 4))
    except binascii.Error:
        return None
    if data_url:
        return content
    try:  # a long path without a dot may be made of the letters of base64 too
        Image.open(BytesIO(content))
    except UnidentifiedImageError:
        return None
    except Exception:  # of a known format, but damaged or too large: Pillow's readers raise nearly anything
        return content
    return content


_OF_URLS = str.maketrans("-_", "+/")


def shorten(text: str) -> str:
    """A text as an error message shows it: of a long one, such as an image in base64, the beginning and the end."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:60]}...{text[-40:]}"


__all__ = ["encoded_bytes", "shorten"]
