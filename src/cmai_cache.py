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
"""The cache of CMAI: beside keys and values, what earlier text tokens attended to."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


# --- the cache -----------------------------------------------------------------------------------------------------


class CmaiLayerMixin:
    """
    What a cache layer keeps beside keys and values, so that the focus of later tokens can be computed: the row of A_t2i
    of every text token. The first layer also keeps the columns of these text tokens and of the image tokens. It stays on
    the device when keys and values are offloaded: it is small, and the attention needs it after they have left.

    text_to_image (`torch.FloatTensor` of shape `(B, T, n)`, *optional*)
    text_columns (`torch.LongTensor` of shape `(B, T)`, *optional*): -1 for a row that is no text token.
    image_columns (`torch.LongTensor` of shape `(B, n)`, *optional*): -1 for none.
    """

    text_to_image: torch.Tensor | None = None
    text_columns: torch.Tensor | None = None
    image_columns: torch.Tensor | None = None
    _names = ("text_to_image", "text_columns", "image_columns")

    def _apply_to_state(self, function: Any) -> None:
        for name in self._names:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, function(value))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._apply_to_state(lambda value: value.index_select(0, beam_idx.to(value.device)))


# Rows that a buffer which gets longer has room for at least.
_LEAST_ROOM = 16


class CmaiDynamicMixin(CmaiLayerMixin):
    """
    The state of a layer that grows.

    room (`torch.FloatTensor` of shape `(B, T or more, n)`, *optional*): Holds `text_to_image`, and has room for rows to
        come, so that it is not copied in every step.
    block (`tuple[int, int]`, *optional*): See `Inhibition`; in the first layer.
    """

    room: torch.Tensor | None = None
    num_rows = 0
    block: tuple[int, int] | None = None
    num_single = 0  # the last so many columns have one row each; of those before, only text has
    _names = ("room", "text_columns", "image_columns")

    @property
    def text_to_image(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self.room is None else self.room[:, : self.num_rows]

    def update_columns(
        self, text: torch.Tensor, image: torch.Tensor, is_single: bool, num_columns: int, max_length: int
    ) -> None:
        """Appends the columns of the text `(B, t)` and the image tokens `(B, i)` of this call."""
        self.num_single = self.num_single + text.shape[1] if is_single else 0
        if self.text_columns is not None and self.image_columns is not None:
            text, image = torch.cat([self.text_columns, text], dim=1), torch.cat([self.image_columns, image], dim=1)
        self.text_columns, self.image_columns = text, image

    def update_rows(self, rows: torch.Tensor, is_single: bool, positions: Any, capacity: int) -> torch.Tensor:
        """Appends the `rows` `(B, t, n)` of this call and returns all, `(B, T, n)`; earlier ones saw no later image."""
        self.num_single = self.num_single + rows.shape[1] if is_single else 0
        batch_size, num_new, num_images = rows.shape
        room = self.room
        fits = room is not None and room.shape[1] >= capacity and room.shape[2] == num_images
        if room is None or not fits or (room.is_inference() and not torch.is_inference_mode_enabled()):
            # Text before the first image saw none.
            grown = rows.new_zeros(batch_size, capacity + max(_LEAST_ROOM, capacity // 8), num_images)
            if room is not None:
                grown[:, : self.num_rows, : room.shape[2]] = room[:, : self.num_rows]
            self.room = room = grown
        room[:, capacity - num_new : capacity] = rows
        self.num_rows = capacity
        return room[:, :capacity]

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()  # type: ignore[attr-defined]
        super().crop(tokens_to_remove)  # type: ignore[misc]
        after = self.get_seq_length()  # type: ignore[attr-defined]
        num_rows = min(before - after, self.num_single)
        self.num_single -= num_rows
        self.num_rows = max(self.num_rows - num_rows, 0)
        if before - after > num_rows:
            self.block = None
        if self.text_columns is not None and self.image_columns is not None:
            text = self.text_columns[:, : self.text_columns.shape[1] - num_rows]
            self.text_columns = text.masked_fill(text >= after, -1)
            self.image_columns = self.image_columns.masked_fill(self.image_columns >= after, -1)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._apply_to_state(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._apply_to_state(lambda value: value[indices, ...])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.room = self.text_columns = self.image_columns = self.block = None
        self.num_single = self.num_rows = 0


class CmaiStaticMixin(CmaiLayerMixin):
    """The state of a layer of fixed size: buffers that are written in place, so that decoding can be compiled."""

    num_rows: torch.Tensor | None = None  # so many rows of the buffers are in use; in the first layer
    max_columns = 0  # the buffers have room for a sequence of that length
    is_empty = True

    def update_columns(
        self, text: torch.Tensor, image: torch.Tensor, is_single: bool, num_columns: int, max_length: int
    ) -> torch.Tensor:
        """As in `CmaiDynamicMixin`, of a cache for `max_length` columns; returns where the rows are to be written."""
        seen = self.get_seq_length()  # type: ignore[attr-defined]
        if self.is_empty:
            # Where all layers have a sliding window, sequences may get longer than the cache; then the buffers grow.
            room = max(max_length - num_columns, _LEAST_ROOM)
            self.max_columns = num_columns + room
            shape = (text.shape[0], text.shape[1] + room)
            if self.text_columns is None or self.num_rows is None or self.text_columns.shape != shape:
                self.text_columns = _mark_static(text.new_full(shape, -1))
                self.num_rows = _mark_static(text.new_zeros(()))
            self.image_columns = image
        elif isinstance(seen, int) and seen + num_columns > self.max_columns:
            room = self.max_columns + num_columns
            self.max_columns += room
            grown = nn.functional.pad(self.text_columns, (0, room), value=-1)  # type: ignore[arg-type]
            self.text_columns = _mark_static(grown)
        if not self.is_empty and image.shape[1] > 0:
            self.image_columns = torch.cat([self.image_columns, image], dim=1)  # type: ignore[list-item]
        self.is_empty = False
        num_rows: Any = self.num_rows
        positions = torch.arange(text.shape[1], device=text.device) + num_rows
        self.text_columns.index_copy_(1, positions, text)  # type: ignore[union-attr]
        num_rows.add_(text.shape[1])
        return positions

    def update_rows(self, rows: torch.Tensor, is_single: bool, positions: torch.Tensor, capacity: int) -> torch.Tensor:
        """Writes the `rows` `(B, t, n)` of this call at `positions` and returns the buffer `(B, capacity, n)`."""
        shape = (rows.shape[0], capacity, rows.shape[2])
        if self.text_to_image is None or self.text_to_image.shape != shape:
            earlier, self.text_to_image = self.text_to_image, _mark_static(rows.new_zeros(shape))
            if earlier is not None and not self.is_empty:
                self.text_to_image[:, : earlier.shape[1], : earlier.shape[2]] = earlier
        self.is_empty = False
        self.text_to_image.index_copy_(1, positions.to(rows.device), rows)
        return self.text_to_image

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        for name, value in (("text_to_image", 0), ("text_columns", -1), ("num_rows", 0)):
            if (buffer := getattr(self, name)) is not None:
                buffer.fill_(value)
        self.image_columns, self.is_empty = None, True


def _mark_static(buffer: torch.Tensor) -> torch.Tensor:
    """Tells the compiler, as the library does for keys and values, that the buffer stays where it is."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer)
    return buffer


class CmaiDynamicLayer(CmaiDynamicMixin, DynamicLayer):
    pass


class CmaiDynamicSlidingWindowLayer(CmaiDynamicMixin, DynamicSlidingWindowLayer):
    pass


class CmaiStaticLayer(CmaiStaticMixin, StaticLayer):
    pass


class CmaiStaticSlidingWindowLayer(CmaiStaticMixin, StaticSlidingWindowLayer):
    pass


_CMAI_LAYERS: dict[type, type] = {
    DynamicLayer: CmaiDynamicLayer,
    DynamicSlidingWindowLayer: CmaiDynamicSlidingWindowLayer,
    StaticLayer: CmaiStaticLayer,
    StaticSlidingWindowLayer: CmaiStaticSlidingWindowLayer,
}


def prepare_cache(cache: Cache, text_config: Any) -> None:
    """
    Makes an empty cache keep what CMAI needs, by exchanging its layers.

    Raises:
        `ValueError`: The cache was filled without CMAI, or its layers are of a kind that is not supported.
    """
    if not cache.layers:  # a cache that makes its layers as it meets them
        cache.layers = list(DynamicCache(config=text_config).layers)
    for layer_idx, layer in enumerate(cache.layers):
        # By name: the same classes may have come twice, from the package and with a checkpoint.
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
                f"The cache holds {layer.get_seq_length()} columns that were computed without CMAI, so that the text-to-"
                "image attention of earlier tokens is not in it. Begin with an empty cache while `use_cmai` is on."
            )
        layer_class: Any = _CMAI_LAYERS[type(layer)]
        cache.layers[layer_idx] = layer_class.__new__(layer_class)
        cache.layers[layer_idx].__dict__.update(layer.__dict__)
