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
"""KV cache layers for CMAI. They also keep A_t2i, the attention of earlier text tokens to the image tokens."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class CmaiLayerMixin(CacheLayerMixin):
    """
    What a cache layer keeps beside keys and values, so that the focus of later tokens can be computed. Every layer but the
    first keeps the row of A_t2i of each text token. The first layer, which inhibits nothing, keeps the columns of the text
    tokens and of the image tokens instead. All of it stays on the device when keys and values are offloaded: it is small,
    and the attention needs it after they have left.

    text_to_image (`torch.FloatTensor` of shape `(B, T, n)`, *optional*)
    text_columns (`torch.LongTensor` of shape `(B, T)`, *optional*): -1 for a row that is no text token.
    image_columns (`torch.LongTensor` of shape `(B, n)`, *optional*): -1 for none.
    aligned_images (`slice`, *optional*): Those of `Inhibition`, in the first layer.
    reserved_counts (`tuple[int, int]`, *optional*): See `reserve_state`; in the first layer.
    """

    aligned_images: slice | None = None
    reserved_counts: tuple[int, int] | None = None
    text_to_image: torch.Tensor | None = None
    text_columns: torch.Tensor | None = None
    image_columns: torch.Tensor | None = None
    _state_names = ("text_to_image", "text_columns", "image_columns")

    @abstractmethod
    def update_columns(
        self, text: torch.Tensor, image: torch.Tensor, has_row_per_column: bool, num_columns: int, max_length: int
    ) -> torch.Tensor:
        """
        Appends the columns of the text `(B, t)` and of the image tokens `(B, i)` of a call.

        Args:
            has_row_per_column (`bool`): Whether each column of the call gets a row, not only those of text.
            num_columns (`int`): Columns of the call.
            max_length (`int`): Capacity of the cache in columns, if it is fixed.

        Returns:
            `torch.LongTensor` of shape `(t,)`: Indices of the rows of this call among all rows.
        """

    @abstractmethod
    def update_rows(
        self, rows: torch.Tensor, has_row_per_column: bool, positions: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """Appends the `rows` `(B, t, n)` of a call at `positions`, and returns all `num_rows` of them, `(B, T, n)`."""

    def columns_so_far(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`text_columns` and `image_columns`, after `update_columns`."""
        return cast(torch.Tensor, self.text_columns), cast(torch.Tensor, self.image_columns)

    def _apply_to_state(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self._state_names:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, function(value))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self._apply_to_state(lambda value: value.index_select(0, beam_idx.to(value.device)))


# Minimum number of spare rows when a buffer is made or grows.
_MIN_SPARE_ROWS = 16


class CmaiDynamicLayer(CmaiLayerMixin, DynamicLayer):
    """
    A layer that grows.

    row_buffer (`torch.FloatTensor` of shape `(B, T or more, n)`, *optional*): Holds `text_to_image`, with spare rows, so
        that a decoding step does not copy it.
    num_rows (`int`): Rows of the buffer in use.
    num_columns_with_row (`int`): Number of columns at the end that all have a row. Before them only text tokens have one.
    """

    row_buffer: torch.Tensor | None = None
    num_rows = 0
    num_columns_with_row = 0
    _state_names = ("row_buffer", "text_columns", "image_columns")

    @property
    def text_to_image(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self.row_buffer is None else self.row_buffer[:, : self.num_rows]

    def update_columns(
        self, text: torch.Tensor, image: torch.Tensor, has_row_per_column: bool, num_columns: int, max_length: int
    ) -> torch.Tensor:
        self._count_columns_with_row(text.shape[1], has_row_per_column)
        num_new = text.shape[1]
        if self.text_columns is not None and self.image_columns is not None:
            text = torch.cat([self.text_columns, text], dim=1)
            image = torch.cat([self.image_columns, image], dim=1) if image.shape[1] > 0 else self.image_columns
        self.text_columns, self.image_columns = text, image
        return torch.arange(text.shape[1] - num_new, text.shape[1], device=text.device)

    def update_rows(
        self, rows: torch.Tensor, has_row_per_column: bool, positions: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        self._count_columns_with_row(rows.shape[1], has_row_per_column)
        batch_size, num_new, num_images = rows.shape
        buffer = self.row_buffer
        fits = buffer is not None and buffer.shape[1] >= num_rows and buffer.shape[2] == num_images
        if buffer is None or not fits or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            # Zeros: earlier text saw no later image.
            new_rows = rows.new_zeros if num_rows > num_new else rows.new_empty
            grown = new_rows(batch_size, num_rows + max(_MIN_SPARE_ROWS, num_rows // 8), num_images)
            if buffer is not None:
                grown[:, : self.num_rows, : buffer.shape[2]] = buffer[:, : self.num_rows]
            self.row_buffer = buffer = grown
        buffer[:, num_rows - num_new : num_rows] = rows
        self.num_rows = num_rows
        return buffer[:, :num_rows]

    def _count_columns_with_row(self, num_new: int, has_row_per_column: bool) -> None:
        self.num_columns_with_row = self.num_columns_with_row + num_new if has_row_per_column else 0

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        after = self.get_seq_length()
        num_removed = min(before - after, self.num_columns_with_row)
        if num_removed < before - after:  # part of the prompt is removed, but its rows stay: -1 marks them below
            self.aligned_images = None
        self.num_columns_with_row -= num_removed
        self.num_rows = max(self.num_rows - num_removed, 0)
        if self.text_columns is not None and self.image_columns is not None:
            text = self.text_columns[:, : self.text_columns.shape[1] - num_removed]
            self.text_columns = text.masked_fill(text >= after, -1)
            self.image_columns = self.image_columns.masked_fill(self.image_columns >= after, -1)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._apply_to_state(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._apply_to_state(lambda value: value[indices, ...])

    def reset(self) -> None:
        super().reset()
        self.row_buffer = self.text_columns = self.image_columns = self.aligned_images = None
        self.num_columns_with_row = self.num_rows = 0


class CmaiDynamicSlidingWindowLayer(CmaiDynamicLayer, DynamicSlidingWindowLayer):
    pass


class CmaiStaticLayer(CmaiLayerMixin, StaticLayer):
    """
    A layer of fixed size: its buffers are written in place, so that decoding can be compiled.

    num_rows (`torch.LongTensor` of shape `()`, *optional*): Rows of the buffers in use; in the first layer.
    image_buffer (`torch.LongTensor` of shape `(B, n)`, *optional*): Holds `image_columns`, if `reserve_state` has made it.
    max_columns (`int`): Longest sequence that the buffers can hold.
    """

    num_rows: torch.Tensor | None = None
    image_buffer: torch.Tensor | None = None
    max_columns = 0
    is_empty = True

    def update_columns(
        self, text: torch.Tensor, image: torch.Tensor, has_row_per_column: bool, num_columns: int, max_length: int
    ) -> torch.Tensor:
        # The same for all prompts with equally many columns and image tokens, so that they share a compiled decoding step.
        num_rows_of_call = max(text.shape[1], num_columns - image.shape[1])
        self._ensure_capacity(text, num_rows_of_call, num_columns, max_length)
        buffer, num_rows = cast(torch.Tensor, self.text_columns), cast(torch.Tensor, self.num_rows)
        if self.image_columns is None or self.is_empty:
            if self.image_buffer is not None and self.image_buffer.shape == image.shape:
                image = self.image_buffer.copy_(image)
            self.image_columns = image
        elif image.shape[1] > 0:
            self.image_columns = torch.cat([self.image_columns, image], dim=1)
        self.is_empty = False
        positions = torch.arange(text.shape[1], device=text.device) + num_rows
        buffer.index_copy_(1, positions, text)
        num_rows.add_(text.shape[1])
        return positions

    def _ensure_capacity(self, text: torch.Tensor, num_rows_of_call: int, num_columns: int, max_length: int) -> None:
        """Makes the buffer `text_columns`, or a longer one for a sequence that gets longer than the cache."""
        seen = self.get_seq_length()
        if self.is_empty:
            num_spare = _count_spare_rows(num_columns, max_length)
            self.max_columns = num_columns + num_spare
            shape = (text.shape[0], num_rows_of_call + num_spare)
            if self.text_columns is None or self.num_rows is None or self.text_columns.shape != shape:
                self.text_columns = _mark_static(text.new_full(shape, -1))
                self.num_rows = _mark_static(text.new_zeros(()))
        elif isinstance(seen, int) and seen + num_columns > self.max_columns:
            num_spare = self.max_columns + num_columns
            self.max_columns += num_spare
            buffer = cast(torch.Tensor, self.text_columns)
            self.text_columns = _mark_static(nn.functional.pad(buffer, (0, num_spare), value=-1))

    def update_rows(
        self, rows: torch.Tensor, has_row_per_column: bool, positions: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        shape = (rows.shape[0], num_rows, rows.shape[2])
        if self.text_to_image is None or self.text_to_image.shape != shape:
            earlier, self.text_to_image = self.text_to_image, _mark_static(rows.new_zeros(shape))
            if earlier is not None and not self.is_empty:
                self.text_to_image[:, : earlier.shape[1], : earlier.shape[2]] = earlier
        self.is_empty = False
        self.text_to_image.index_copy_(1, positions.to(rows.device), rows)
        return self.text_to_image

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.text_columns is None or self.num_rows is None or self.image_columns is None:
            return  # not the first layer, whose columns say which rows count
        after = self.get_seq_length()
        self.text_columns.masked_fill_(self.text_columns >= after, -1)
        # The next call overwrites the rows behind the last one that any sequence still needs.
        in_use = (self.text_columns >= 0).any(dim=0)
        self.num_rows.copy_((in_use * torch.arange(1, len(in_use) + 1, device=in_use.device)).amax())
        self.image_columns = self.image_columns.masked_fill(self.image_columns >= after, -1)
        self.aligned_images = None

    def reset(self) -> None:
        super().reset()
        for name, value in (("text_to_image", 0), ("text_columns", -1), ("num_rows", 0)):
            if (buffer := getattr(self, name)) is not None:
                buffer.fill_(value)
        self.image_columns = self.aligned_images = self.reserved_counts = None
        self.is_empty = True


class CmaiStaticSlidingWindowLayer(CmaiStaticLayer, StaticSlidingWindowLayer):
    pass


def _count_spare_rows(num_columns: int, max_length: int) -> int:
    """Rows to reserve for later text. Where all layers have a sliding window, sequences may get longer than the cache."""
    return max(max_length - num_columns, _MIN_SPARE_ROWS)


def reserve_state(cache: Cache, is_image: torch.Tensor, focus: str) -> None:
    """
    Makes the buffers of an empty static cache before a compiled prefill, since what a CUDA graph allocates does not outlive
    it. The tokens are counted here, since a graph must not wait for numbers. All prompts of a length whose rows have equally
    many images get buffers of the same sizes.

    Args:
        cache (`Cache`): Prepared by `prepare_cache`, with keys and values allocated.
        is_image (`torch.BoolTensor` of shape `(B, S)`): Which columns hold image tokens.
        focus (`str`): `cmai_focus` of the config.
    """
    layers: list[Any] = cache.layers
    first, device = layers[0], layers[0].keys.device
    batch_size, num_columns = is_image.shape
    fewest, num_images = torch.stack(is_image.sum(dim=1).aminmax()).tolist()
    num_texts = max(num_columns - fewest, 1)  # padding among them
    num_rows = num_texts + _count_spare_rows(num_columns, cache.get_max_length())
    if first.image_buffer is None or first.image_buffer.shape != (batch_size, num_images):
        first.image_buffer = _mark_static(torch.full((batch_size, num_images), -1, device=device))
    if first.text_columns is None or first.text_columns.shape != (batch_size, num_rows):
        first.text_columns = _mark_static(torch.full((batch_size, num_rows), -1, device=device))
        first.num_rows = _mark_static(torch.zeros((), dtype=torch.long, device=device))
    first.reserved_counts = num_images, num_texts
    for layer in layers:
        layer.image_columns, layer.is_empty = None, True  # graphs also depend on whether a layer has an attribute
    for layer in layers[1:] if focus not in ("none", "tia") and num_images > 0 else ():
        shape = (batch_size, num_rows, num_images)
        if layer.text_to_image is None or layer.text_to_image.shape != shape:
            layer.text_to_image = _mark_static(torch.zeros(shape, device=layer.keys.device))


def _mark_static(buffer: torch.Tensor) -> torch.Tensor:
    """Tells the compiler, as the library does for keys and values, that the buffer stays where it is."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer)
    return buffer


_CMAI_LAYERS: dict[type, type] = {
    DynamicLayer: CmaiDynamicLayer,
    DynamicSlidingWindowLayer: CmaiDynamicSlidingWindowLayer,
    StaticLayer: CmaiStaticLayer,
    StaticSlidingWindowLayer: CmaiStaticSlidingWindowLayer,
}


def prepare_cache(cache: Cache, text_config: PreTrainedConfig) -> None:
    """
    Makes an empty cache keep what CMAI needs: its layers become those of this file.

    Raises:
        `ValueError`: The cache was filled without CMAI, or its layers are of a kind that is not supported.
    """
    if not cache.layers:  # a cache that makes its layers lazily
        cache.layers = list(DynamicCache(config=text_config).layers)
    layer: Any
    for layer in cache.layers:
        # By name: the package and the remote code of a checkpoint may both define these classes.
        if type(layer).__name__.startswith("Cmai"):
            continue
        if type(layer) not in _CMAI_LAYERS:
            supported = ", ".join(kind.__name__ for kind in _CMAI_LAYERS)
            raise ValueError(
                f"CMAI does not support caches with a {type(layer).__name__}, only with {supported}. Use the dynamic or the "
                "static cache, or `use_cmai=False`."
            )
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise ValueError(
                f"The cache holds {layer.get_seq_length()} columns that were computed without CMAI, so it lacks the text-to-"
                "image attention of earlier tokens. Start with an empty cache while `use_cmai` is on."
            )
        layer.__class__ = _CMAI_LAYERS[type(layer)]


def cmai_layer(cache: Cache, layer_idx: int) -> CmaiLayerMixin:
    """A layer of a cache that `prepare_cache` has prepared."""
    return cast(CmaiLayerMixin, cache.layers[layer_idx])
