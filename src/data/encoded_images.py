"""Recognises image files inside a dataset by their content, since a column may no longer say that it holds images."""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any


# First bytes of PNG, JPEG, GIF, WebP, BMP and TIFF files.
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+;base64,)?([A-Za-z0-9+/\s]{40,}={0,2})\s*")


def encoded_bytes(image: Any) -> bytes | None:
    """
    The bytes of an image file, from `bytes`, from text in base64 (also as a `data:` URL), or from a dict with either under
    `bytes`. `None` for anything else, such as a path.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes")
    if isinstance(image, str):
        match = _BASE64.fullmatch(image)
        try:
            image = None if match is None else base64.b64decode(match[1])
        except binascii.Error:
            return None
        # A long path without a dot may look like base64 too.
        return image if image is not None and image.startswith(_BEGINNINGS) else None
    return bytes(image) if isinstance(image, (bytes, bytearray, memoryview)) else None


__all__ = ["encoded_bytes"]
