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
"""The images of a call of TA-LLaVA, in the forms that it takes, and the checks that they fit to the text."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.utils import ModelOutput, is_tracing


@dataclass
class TaLlavaEncodedImages(ModelOutput):
    r"""
    The images of E rows as [`TaLlavaModel.encode_image`] makes them: all that depends on the images alone. One row
    (E = 1) goes with any number of questions. Otherwise there is one row per question.

    key, value (`torch.FloatTensor` of shape `(E, kv_heads, I * M, head_dim)`):
        What the prefix reads in the vision adapter.
    image_mask (`torch.BoolTensor` of shape `(E, I)`):
        True for real images, False for filler.
    """

    key: torch.Tensor = None  # type: ignore[assignment]  # the library wants defaults; all three are there
    value: torch.Tensor = None  # type: ignore[assignment]
    image_mask: torch.Tensor = None  # type: ignore[assignment]

    def to(self, *args, **kwargs) -> "TaLlavaEncodedImages":
        """On another device or of another dtype, as `torch.Tensor.to` takes them; the mask stays boolean."""
        key, value = self.key.to(*args, **kwargs), self.value.to(*args, **kwargs)
        return type(self)(key=key, value=value, image_mask=self.image_mask.to(key.device))

    def repeat_interleave(self, repeats: int) -> "TaLlavaEncodedImages":
        """Repeats each row side by side, as `generate()` repeats the questions for its beams."""
        return type(self)(**{name: states.repeat_interleave(repeats, dim=0) for name, states in self.items()})

    def expand(self, batch_size: int) -> "TaLlavaEncodedImages":
        """One row for all, as a view of `batch_size` rows."""
        return type(self)(**{name: states.expand(batch_size, *states.shape[1:]) for name, states in self.items()})


@dataclass
class ImageInputs:
    """
    The arguments for images of [`TaLlavaForConditionalGeneration.forward`]. At most one of `pixel_values`,
    `vision_features` and `encoded_images` is given, and `image_mask` only with the first two.
    """

    pixel_values: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    vision_features: torch.Tensor | None = None
    encoded_images: TaLlavaEncodedImages | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ImageInputs":
        """Those among other `arguments` of `forward`."""
        return cls(**{name: arguments.get(name) for name in IMAGE_ARGUMENTS})

    @property
    def is_empty(self) -> bool:
        return self.pixel_values is None and self.vision_features is None and self.encoded_images is None

    def are_all_filler(self) -> bool:
        """Whether the mask says that no image is real. This waits for its values."""
        return self.image_mask is not None and not self.image_mask.any()

    def check_forms(self) -> None:
        """Raises `ValueError` if the images are given in several forms."""
        if self.pixel_values is not None and self.vision_features is not None:
            raise ValueError("Give `pixel_values` or `vision_features`, not both.")
        others = (self.pixel_values, self.vision_features, self.image_mask)
        if self.encoded_images is not None and any(other is not None for other in others):
            raise ValueError(
                "Give `encoded_images` or images in another form, not both; their `image_mask` is in them."
            )

    def count(self, batch_size: int) -> list[int]:
        """The number of images of each row."""
        image_mask = self.image_mask
        if self.encoded_images is not None:
            image_mask = getattr(self.encoded_images, "image_mask", None)
        if image_mask is not None and image_mask.dim() == 2:  # another is refused later
            counts = image_mask.long().sum(dim=-1).tolist()
            return counts * batch_size if len(counts) == 1 else counts
        if self.vision_features is not None:
            return [self.vision_features.shape[1]] * batch_size
        if self.pixel_values is not None:
            return [self.pixel_values.shape[1] if self.pixel_values.dim() == 5 else 1] * batch_size
        return [0] * batch_size


IMAGE_ARGUMENTS = tuple(field.name for field in fields(ImageInputs))


def check_images(
    name: str, images: torch.Tensor, ndim: int, image_mask: torch.Tensor | None, has_prefix: torch.Tensor
) -> None:
    """
    Raises `ValueError` unless `images` `(B, I, ...)` have `ndim` dimensions and fit to their mask, and exactly the rows with
    a prefix have images.
    """
    batch_size = has_prefix.shape[0]
    if images.dim() != ndim or images.shape[0] != batch_size:
        rest = "3, height, width" if name == "pixel_values" else "visual tokens, vision width"
        raise ValueError(
            f"`{name}` has shape {tuple(images.shape)}, but the text has {batch_size} rows: expected "
            f"({batch_size}, images, {rest})."
        )
    check_image_mask(name, images, image_mask)
    num_images = torch.full_like(has_prefix, images.shape[1], dtype=torch.long)
    if image_mask is not None:
        num_images = image_mask.long().sum(dim=-1)
    check_rows(num_images, has_prefix)


def check_image_mask(name: str, images: torch.Tensor, image_mask: torch.Tensor | None) -> None:
    """Raises `ValueError` unless `image_mask` is `(B, I)` as the images are."""
    if image_mask is not None and image_mask.shape != images.shape[:2]:
        raise ValueError(
            f"`image_mask` has shape {tuple(image_mask.shape)}, but `{name}` holds rows x images of "
            f"{tuple(images.shape[:2])}. They must agree; the processor makes both."
        )


def check_rows(num_images: torch.Tensor, has_prefix: torch.Tensor) -> None:
    """Raises `ValueError` unless exactly the rows with a prefix have images."""
    if is_tracing(has_prefix):
        return
    wrong = (num_images.to(has_prefix.device) > 0) != has_prefix
    if wrong.any():
        row = int(wrong.int().argmax())
        begins = "begins with" if has_prefix[row] else "does not begin with"
        raise ValueError(
            f"Row {row} has {int(num_images[row])} images but its text {begins} placeholder tokens. Make text and images "
            "in one call of the processor, and pass its `attention_mask` along: padding that is not marked counts as text."
        )
