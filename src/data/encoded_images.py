"""Image files that lie in a dataset itself, recognised by what they are: a column may have lost what it says it is."""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any


# How files of PNG, JPEG, GIF, WebP, BMP and TIFF begin.
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+;base64,)?([A-Za-z0-9+/\s]{40,}={0,2})\s*")


def encoded_bytes(image: Any) -> bytes | None:
    """
    The bytes of an image file that is given as `bytes`, as text in base64 (also as a `data:` URL), or as a dict with either
    under `bytes`; `None` for anything else, such as a path.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes")
    if isinstance(image, str):
        match = _BASE64.fullmatch(image)
        try:
            image = None if match is None else base64.b64decode(match[1])
        except binascii.Error:
            return None
        # A long path without a dot may be made of the letters of base64 too.
        return image if image is not None and image.startswith(_BEGINNINGS) else None
    return bytes(image) if isinstance(image, (bytes, bytearray, memoryview)) else None


__all__ = ["encoded_bytes"]
