"""How vLLM reads the images of a request: converted as `generate()` does, and refused in the words of this package."""

import binascii
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import vllm.envs as envs
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, MediaConnector, MediaWithBytes
from vllm.multimodal.parse import MultiModalDataParser

from ..encoded_images import shorten
from ..image_loading import load_rgb_image, unreadable_image


CONNECTOR = "ta_llava"  # its name in the registry of vLLM


class ImageReader(ImageMediaIO):
    """
    Reads the image of the URL `url` as vLLM does.

    Raises:
        `ValueError`: It is not a readable image. The message names it.
    """

    def __init__(self, url: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.name = f"The image {shorten(url)!r}"

    def load_bytes(self, data: bytes) -> Any:
        try:
            return super().load_bytes(data)
        except Exception as error:  # Pillow's readers raise nearly anything on damaged files
            if "VLLM_MAX_IMAGE_PIXELS" in str(error):
                raise
            raise unreadable_image(self.name, error.__cause__ or error) from error

    def load_base64(self, media_type: str, data: str) -> Any:
        try:
            return super().load_base64(media_type, data)
        except binascii.Error as error:
            raise ValueError(f"{self.name} is not encoded in base64: {error}.") from error

    def load_file(self, filepath: Path) -> Any:
        try:
            return super().load_file(filepath)
        except OSError as error:
            raise ValueError(f"{self.name} cannot be read: {error.strerror}.") from error


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class TaLlavaMediaConnector(MediaConnector):
    def _reader(self, url: str, image_mode: str | None) -> ImageReader:
        return ImageReader(url, **{"image_mode": image_mode, **self.media_io_kwargs.get("image", {})})

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        reader = self._reader(image_url, image_mode)
        with fetching(reader.name):
            return self.load_from_url(image_url, reader, fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        reader = self._reader(image_url, image_mode)
        with fetching(reader.name):
            return await self.load_from_url_async(image_url, reader, fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """
    Raises `ValueError` if the image `name` cannot be fetched: its URL does not answer, or is of a kind that the server does
    not read.
    """
    try:
        yield
    except ValueError:  # it says which image
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be fetched: {str(error) or type(error).__name__}") from error


class RgbImageParser(MultiModalDataParser):
    """Converts images to RGB before vLLM does, which makes an image of 16 bits white."""

    def _parse_image_data(self, data: Any) -> Any:
        return super()._parse_image_data(_to_rgb(data))


def _to_rgb(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_to_rgb(item) for item in data]
    if isinstance(data, MediaWithBytes):
        return replace(data, media=_to_rgb(data.media))
    return load_rgb_image(data) if isinstance(data, Image.Image) else data


def read_images_with_package(model_config: Any) -> None:
    """
    Has vLLM read the images of a model by `TaLlavaMediaConnector`, unless you have chosen another, and leaves their
    conversion to `RgbImageParser`.
    """
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", CONNECTOR)
    model_config.multimodal_config.media_io_kwargs.setdefault("image", {}).setdefault("image_mode", None)
