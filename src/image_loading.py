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
"""Reads images and videos from paths, URLs, base64 strings, bytes, open files, PIL images, arrays and tensors."""

import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_av_available, is_torchcodec_available
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, load_video

from .encoded_images import encoded_bytes, shorten


# If one side of an image is more than this many times as long as the other, its middle is cut out before its shortest edge
# is resized. Otherwise the resizing could make gigapixels, most of which a centre crop discards.
_MAX_ASPECT_RATIO = 4

# Seconds without an answer after which a download is given up.
_DOWNLOAD_TIMEOUT = 60

_VIDEO_DECODERS = {"pyav": is_av_available, "torchcodec": is_torchcodec_available}


def open_images(images: Any) -> Any:
    """
    Opens every image by [`load_rgb_image`], also in nested lists. Arrays and tensors stay as they are, since the image
    processor of the library takes them.

    Raises:
        `ValueError`: One of them is not a readable image. The message names it.
    """
    if isinstance(images, (list, tuple)):
        return [open_images(image) for image in images]
    is_picture = isinstance(images, (str, os.PathLike, Image.Image)) or _holds_file(images)
    return load_rgb_image(images) if is_picture else images


def load_rgb_image(image: Any) -> Image.Image:
    """
    An RGB image from a path, URL, base64 string, the bytes of a file, a file that is open for reading bytes, a dict with
    `bytes` or `path` as `datasets` has it, a PIL image, or an array or tensor of shape `(H, W)`, `(H, W, C)` or `(C, H, W)`
    with 1 to 4 channels.

    It lays transparent images on white, scales 16 bits to 8, and applies the EXIF orientation. From an animated image it
    takes the frame that is shown, which in a file is the first. Arrays hold integers of 8 or 16 bits, or floats in [0, 1] or
    [0, 255].

    Raises:
        `ValueError`: `image` is not a readable image. The message names it.
    """
    if isinstance(image, Mapping) and encoded_bytes(image) is None:
        image = _path_of(image)
    if isinstance(image, (str, os.PathLike)):
        image = _open_image(os.fspath(image))
    elif _holds_file(image):
        content = _bytes_of(image)
        image = _decode(content, f"An image of {len(content)} bytes")
    elif not isinstance(image, Image.Image):
        return _image_from_array(image)
    try:
        read_to_end(image)
        image = ImageOps.exif_transpose(image)  # a copy
    except Exception as error:  # Pillow's readers raise nearly anything
        name = repr(image.filename) if getattr(image, "filename", "") else f"of size {image.width}x{image.height}"
        raise ValueError(f"The image {name} cannot be read to its end; is it truncated? ({error})") from error
    if image.mode.startswith("I") or image.mode == "F":
        return _image_from_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_first(images: Any, image_processor: Any, **kwargs) -> Any:
    """
    Resizes PIL images as the image processor would. The result is the same bit for bit, but the image processor makes an
    array of all pixels first, which for a large photograph takes longer than the resizing. Arrays are returned as they are,
    and so are images for an image processor that does more or does not use Pillow.

    Args:
        images (image or list): RGB.
        image_processor (`BaseImageProcessor`): The one that gets the images next.
        kwargs: Settings of the call of `image_processor`.
    """
    if isinstance(images, list):
        return [resize_first(image, image_processor, **kwargs) for image in images]
    kind, size = type(image_processor), getattr(image_processor, "size", None)
    does_no_more = (
        issubclass(kind, PilBackend)
        and kind.resize is PilBackend.resize
        and kind._preprocess in (PilBackend._preprocess, LlavaImageProcessorPil._preprocess)
        and image_processor.do_resize
        and not image_processor.do_pad
        and isinstance(image_processor.resample, int)
        and kwargs.keys().isdisjoint(("size", "resample", "do_resize", "do_pad"))
    )
    if not does_no_more or not isinstance(size, SizeDict) or not isinstance(images, Image.Image):
        return images
    width, height = images.size
    if size.height and size.width:
        new_size = size.width, size.height
    elif size.shortest_edge and not size.longest_edge:
        longest_edge = int(size.shortest_edge * max(width, height) / min(width, height))  # rounded as the library does
        new_size = (size.shortest_edge, longest_edge) if width <= height else (longest_edge, size.shortest_edge)
    else:
        return images
    return images.resize(new_size, image_processor.resample)


def sample_frames(video: Any, num_frames: int | None = None) -> list:
    """
    Frames of a video, at equal distances, beginning with the first.

    Args:
        video (`str`, path, array, tensor or list): A file or URL, an array `(frames, H, W, C)` or `(frames, C, H, W)`, or a
            list of frames.
        num_frames (`int`, *optional*): Largest number of frames. By default all are taken.

    Raises:
        `ValueError`: The video cannot be read or has no frames.
        `ImportError`: The video is a file or URL, and nothing that decodes it is installed.
    """

    def choose(total: int) -> np.ndarray:
        if total < 1:
            raise ValueError("it has no frames, or does not say how many")
        chosen = total if num_frames is None else min(num_frames, total)
        return default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=chosen)

    if isinstance(video, (str, os.PathLike)):
        backend = next((name for name, is_available in _VIDEO_DECODERS.items() if is_available()), None)
        if backend is None:
            raise ImportError(
                f"Nothing that decodes the video {str(video)!r} is installed: `pip install av`, or pass its frames."
            )
        try:
            frames, _ = load_video(
                os.fspath(video),  # type: ignore[arg-type]  # its type has a name for URLs, not `str`
                backend=backend,
                sample_indices_fn=lambda metadata, **kwargs: choose(metadata.total_num_frames),
            )
        except Exception as error:  # the network fails, or the decoder does
            raise ValueError(f"The video {str(video)!r} could not be read: {error}") from error
        return list(frames)
    if len(video) == 0:
        raise ValueError("A video has no frames.")
    return [video[index] for index in choose(len(video))]


def _open_image(source: str) -> Image.Image:
    """The image of a path, URL or base64 string, in its own mode."""
    name = repr(shorten(source))
    if source.startswith(("http://", "https://")):
        return _decode(_download(source, name), f"What was downloaded from {name}")
    if os.path.isfile(source):
        if os.path.getsize(source) == 0:
            raise ValueError(f"The image file {name} is empty (0 bytes).")
        try:
            with open(source, "rb") as file:
                content = file.read()
        except OSError as error:
            raise ValueError(f"The image file {name} cannot be read: {error.strerror}.") from error
        return _decode(content, f"The file {name}")
    if os.path.isdir(source):
        raise ValueError(f"{name} is a folder, not an image file.")
    decoded = encoded_bytes(source)
    if decoded is None:
        raise ValueError(
            f"There is no image file {name}, and it is neither an http(s) URL nor a base64-encoded image."
        )
    return _decode(decoded, f"The base64-encoded image {name}")


def _holds_file(image: Any) -> bool:
    """Whether an image is the bytes of a file, an open file, or a dict."""
    return isinstance(image, (bytes, bytearray, memoryview, Mapping)) or callable(getattr(image, "read", None))


def _path_of(image: Mapping) -> str | os.PathLike:
    path = image.get("path")
    if not isinstance(path, (str, os.PathLike)):
        fields = ", ".join(map(repr, image)) or "nothing"
        raise ValueError(f"An image that is a dict has its file in `bytes` or `path`, but this one has {fields:.100}.")
    return path


def _bytes_of(image: Any) -> bytes:
    """The bytes of an image that holds a file; an open file is read from its beginning."""
    content = encoded_bytes(image)
    if content is not None:
        return content
    try:
        if image.seekable():
            image.seek(0)
        content = image.read()
    except Exception as error:  # closed, opened as text, or of whatever kind
        raise ValueError(f"An image cannot be read from an open {type(image).__name__}: {error}") from error
    if not isinstance(content, bytes):
        raise ValueError(
            f"An image file must be open for reading bytes, but {type(image).__name__} gives "
            f"{type(content).__name__}. Open it with `open(path, 'rb')`."
        )
    return content


def _download(url: str, name: str) -> bytes:
    try:
        response = httpx.get(url, follow_redirects=True, timeout=_DOWNLOAD_TIMEOUT)
    except Exception as error:  # the network fails, or the URL is not valid
        raise ValueError(f"The image {name} could not be downloaded: {error}") from error
    if not response.is_success:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        raise ValueError(f"The image {name} could not be downloaded: {status}")
    return response.content


def read_to_end(image: Image.Image) -> None:
    """
    Reads a PIL image to its end. Pillow maps the file of an uncompressed TIFF into memory; its pixels are then not turned,
    but it does not say any more that they should be. A TIFF without a file name is read.
    """
    filename = getattr(image, "filename", "")
    if image.format != "TIFF" or not filename:
        image.load()
        return
    image.filename = ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        image.filename = filename  # type: ignore[attr-defined]


def _decode(content: bytes, what: str) -> Image.Image:
    try:
        image = Image.open(BytesIO(content))
        image.load()
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise unreadable_image(what, error) from error
    return image


def unreadable_image(what: str, error: BaseException) -> ValueError:
    """The error for an image that Pillow cannot read. `what` names the image, and `error` is Pillow's."""
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"{what} is too large: {error} Make it smaller.")
    reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"{what} is not a readable image, or truncated: {reason}")


def _image_from_array(array: Any) -> Image.Image:
    """An image from an array or tensor; 16-bit integers are scaled to 8 bits."""
    kind = type(array).__name__
    if hasattr(array, "detach"):
        array = array.detach().cpu().float().numpy() if array.is_floating_point() else array.detach().cpu().numpy()
    try:
        array = np.asarray(array)
        array = array.astype(np.uint8) * 255 if array.dtype == bool else array
        low, high = float(array.min()), float(array.max())
    except (TypeError, ValueError) as error:
        raise ValueError(f"An image cannot be made from {kind} of shape {np.shape(array)}.") from error
    if array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4) and array.shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            f"An image array has shape (height, width), (height, width, channels) or (channels, height, width) with 1 to "
            f"4 channels, got {array.shape}."
        )
    # Resizing overshoots, so floats a little outside of a range still count as of that range and are clipped to it.
    floats = np.issubdtype(array.dtype, np.floating)
    if floats and low >= -0.1 and high <= 1.1:
        array = np.clip(array, 0, 1) * 255
    elif floats and (low >= 0 or high > 16) and low >= -25 and high <= 280:
        array = np.clip(array, 0, 255)
    elif floats or low < 0 or high > 65535:  # or a value is not a number
        raise ValueError(
            "The values of an image array must be in [0, 255]. Integers may also be in [0, 65535] (16 bits), floats in "
            f"[0, 1]. Got {low} to {high}. Pass images that are normalised already to the model as `pixel_values`, not to "
            "the processor."
        )
    elif high > 255 or array.dtype == np.uint16:
        array = array / 257
    array = np.round(array).astype(np.uint8)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[array.shape[-1]]
    return load_rgb_image(Image.fromarray(array.squeeze(-1) if mode == "L" else array, mode))


def cut_to_aspect_ratio(image: Image.Image) -> Image.Image:
    """Cuts out the middle of an image if one side is more than `_MAX_ASPECT_RATIO` times as long as the other."""
    width, height = image.size
    limit = _MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(width - limit, 0) // 2, max(height - limit, 0) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


__all__ = ["cut_to_aspect_ratio", "load_rgb_image", "open_images", "read_to_end", "resize_first", "unreadable_image"]
