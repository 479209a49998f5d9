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
"""
Cross-Modality Attention Inhibition (CMAI), of "Enhancing Instruction-Following Capability of Visual-Language Models by
Reducing Image Redundancy". It lets each text token focus on the image tokens that are most relevant to it. The relevance
depends on the text token's own attention, and on the attention of the text tokens that it attends to.

A layer of the language model does this:

1. It averages the attention scores of its heads: A_s (`head_averaged_scores`). With `cmai_attention="weights"` it averages
   the attention weights instead (`attention_weights`).
2. It takes two parts from the rows of the text tokens (`split`): the text-to-image attention A_t2i, whose keys are image
   tokens, and the text-to-text attention A_t2t, whose keys are text tokens.
3. Equation 9: the neighborhood text-to-text attention A_t2n is A_t2t without the token itself and those after it (`split`).
   In the variants of Table 5, `focus_weights` gives other weights instead of A_t2n.
4. Equations 10 and 11: the neighborhood text-to-image attention is A_n2i = A_t2n A_t2i, and the text-to-image focus is
   F = A_n2i + A_t2i (`focus_scores`).
5. The threshold of a text token is the gamma-quantile of its row of F (`threshold_rank`). The inhibition ratio gamma grows
   from layer to layer (`inhibition_ratio`).
6. The pairs of a text token and an image token whose focus is below the threshold are inhibited (`inhibited_pairs`): they
   get negative infinity in the causal mask (`mask`, `Inhibition.attend`).

`Inhibition.inhibited_images` puts steps 2 to 6 together. Where the tokens stand decides how `split` and `mask` are done:
by slices (`_AlignedKeys`) if all rows are alike, as a prompt alone is, or by indices (`_ScatteredKeys`). A step of the
decoding needs the rows of A_t2i of all earlier text tokens, which the cache keeps (`cmai_cache.py`).

Conventions of this file. B: batch, S: columns of this call, q: text queries among them, T: text tokens so far (cached ones
and those of this call), n: image tokens of a row, K: keys. A column is an index into the whole sequence, padding and cached
tokens included, unlike a position id; -1 means none. The averaged attention, the focus and the threshold are float32. The
scores that a decoding step averages have the dtype of the keys (`_attend_decoding_step`).
"""

import math
import sys
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.generic import maybe_autocast

from .attention_masks import as_boolean_mask
from .cmai_cache import cmai_layer
from .library_layers import route_attention


# --- the maths -----------------------------------------------------------------------------------------------------


def inhibition_ratio(layer_idx: int, num_layers: int, max_ratio: float) -> float:
    """The inhibition ratio gamma of a layer: it grows linearly from 0 in the first layer to `max_ratio` in the last."""
    return max_ratio * layer_idx / max(num_layers - 1, 1)


def head_averaged_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    The average attention score A_s: scaled q.k, averaged over heads. One product computes it for all heads; query heads
    that share keys are added up first.

    Args:
        query (`torch.FloatTensor` of shape `(B, heads, q, head_dim)`), key (`(B, kv_heads, K, head_dim)`):
            With rotary positions.

    Returns:
        `torch.FloatTensor` of shape `(B, q, K)`, float32.
    """
    by_column = query.transpose(1, 2).unflatten(2, (key.shape[1], -1))
    folded = by_column.sum(dim=3, dtype=torch.float32) if by_column.shape[3] > 1 else by_column.float()
    key = key.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return scaled_product(folded.flatten(2), key.flatten(2).mT, scaling / query.shape[1])


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """The product `(B, q, K)` of matrices `(B, q, d)` and `(B, d, K)`, times `scaling`, in one operation."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, scaling: float, allowed: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """
    The attention weights: softmax of scaled q.k over the keys that are allowed.

    Args:
        query, key: As in `head_averaged_scores`.
        allowed (`torch.BoolTensor` of shape `(B, q, K)`): Each query has at least one allowed key.
        softcap (`float`, *optional*): Soft-capping of the scores (Gemma-2).

    Returns:
        `torch.FloatTensor` of shape `(B, heads, q, K)`, float32.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)


def focus_weights(
    neighbors: torch.Tensor, hidden: torch.Tensor, distance: torch.Tensor | None, focus: str, discount: float
) -> torch.Tensor:
    """
    How much the text tokens before another one count in its focus: A_t2n, or what Table 5 puts in its place.

    Args:
        neighbors (`torch.FloatTensor` of shape `(B, q, T - 1)`): Rows of A_t2n, equation 9; 0 where `hidden`.
        hidden (`torch.BoolTensor` of shape `(B, q, T - 1)`): Where a text token is masked or not earlier.
        distance (`torch.LongTensor` of shape `(B, q, T - 1)`): How many text tokens earlier it is; `None` for `"sum"`.
        focus (`str`): `"focus"`: A_t2n. `"sum"`: 1. `"discounted_sum"`: `discount ** distance`.
    """
    if focus == "focus":
        return neighbors
    weights: torch.Tensor = torch.ones_like(neighbors) if distance is None else discount ** distance.clamp(min=0)
    return weights.to(neighbors.dtype).masked_fill(hidden, 0)


def focus_scores(
    text_to_image: torch.Tensor, weights: torch.Tensor, earlier_text_to_image: torch.Tensor
) -> torch.Tensor:
    """
    The text-to-image focus F of some text tokens, equations 10 and 11: their own attention to the image tokens, plus that
    of the text tokens before them.

    Args:
        text_to_image (`torch.FloatTensor` of shape `(B, q, n)`): Their rows of A_t2i; 0 where they cannot attend.
        weights (`torch.FloatTensor` of shape `(B, q, T - 1)`): How much each text token counts for them (`focus_weights`).
        earlier_text_to_image (`torch.FloatTensor` of shape `(B, T - 1, n)`): A_t2i of all text tokens but the last, which
            is earlier than none.

    Returns:
        `torch.FloatTensor` of shape `(B, q, n)`.
    """
    return torch.baddbmm(text_to_image, weights, earlier_text_to_image)  # F = A_t2i + A_t2n A_t2i


def threshold_rank(num_seen: Any, ratio: Any) -> Any:
    """
    Rank, from 0, of the smallest value that is not below the `ratio`-quantile of `num_seen` values. To compare with that
    value gives the same result as to compare with the quantile that `torch.quantile` interpolates linearly. The position of
    the quantile is rounded down if it is at most 1e-3 above an integer, so that rounding errors do not raise the rank.

    Args:
        num_seen (`int` or `torch.LongTensor`): Number of values; 0 gives the rank 0.
        ratio (`float` or `torch.FloatTensor`): In [0, 1]; a number if `num_seen` is one.
    """
    rank = (num_seen - 1) * ratio - 1e-3
    if isinstance(rank, torch.Tensor):
        return rank.ceil().clamp(min=0).long()
    return max(math.ceil(rank), 0)


def inhibited_pairs(focus: torch.Tensor, num_lowest: int, rank: torch.Tensor | None = None) -> torch.Tensor:
    """
    Which image tokens have less focus than the image token of a given rank.

    Args:
        focus (`torch.FloatTensor` of shape `(B, q, n)`): Infinite where the text token cannot attend.
        num_lowest (`int`): Number of lowest values to sort. It is above every rank and at most n.
        rank (`torch.LongTensor` of shape `(B, q, 1)`, *optional*): `threshold_rank` of each text token. If it is `None`,
            every text token has the rank `num_lowest - 1`.

    Returns:
        `torch.BoolTensor` of shape `(B, q, n)`.
    """
    lowest = focus.topk(num_lowest, largest=False).values
    return focus < (lowest[..., -1:] if rank is None else lowest.gather(-1, rank))


# --- one forward pass ----------------------------------------------------------------------------------------------


class Inhibition:
    """
    The state of CMAI in one forward pass. The model creates it and passes it to every attention layer as the keyword
    argument `cmai`.

    Args:
        config ([`VmtcCmaiLlavaConfig`]): The fields that start with `cmai_`.
        is_image (`torch.BoolTensor` of shape `(B, S)`, *optional*): Which columns of this call hold image tokens.
        is_text (`torch.BoolTensor` of shape `(B, S)`): Which columns hold text; padding is neither.
        past_length (`int` or `torch.Tensor`): Columns in the cache.
        cache (`Cache`, *optional*): Prepared by `prepare_cache`.
        max_ratio (`float`, *optional*): Replaces the config's `cmai_max_ratio`.

    The attributes that are not arguments:
        columns (`torch.LongTensor` of shape `(S,)`): The columns of this call.
        query_slots (`torch.LongTensor` of shape `(B, q)`, *optional*): Which of them are text queries; `None` if all are.
        query_columns (`torch.LongTensor` of shape `(B, q)`), is_query (`torch.BoolTensor` of shape `(B, q)`):
            The columns of the text queries; in a row that has fewer of them, the rest are fillers, `False` in `is_query`.
        text_columns (`torch.LongTensor` of shape `(B, T)`), image_columns (`(B, n)`): Those of the whole sequence so far.
        row_positions (`torch.LongTensor` of shape `(q,)`): Indices of the queries among the T text tokens.
        aligned_images (`slice`, *optional*): The columns of the image tokens, if they are the same in all rows and if text
            alone follows them in the whole sequence so far. See `_AlignedKeys`.
        ratios (`list[float]`): gamma of each layer; 0 where nothing is inhibited.
    """

    def __init__(
        self,
        config: Any,
        is_image: torch.Tensor | None,
        is_text: torch.Tensor,
        past_length: Any,
        cache: Cache | None,
        max_ratio: float | None = None,
    ):
        self.cache, self.num_calls = cache, 0
        self.attention, self.focus, self.discount = config.cmai_attention, config.cmai_focus, config.cmai_discount
        num_columns = is_text.shape[1]
        self.num_seen = past_length + num_columns
        if isinstance(past_length, int):
            self.columns = torch.arange(past_length, self.num_seen, device=is_text.device)
        else:
            self.columns = torch.arange(num_columns, device=is_text.device) + past_length

        self.query_slots: torch.Tensor | None = None
        self.query_columns, self.is_query = self.columns.expand_as(is_text), is_text
        image_columns = self.query_columns[:, :0]
        self.aligned_images: slice | None = None
        if is_image is not None:
            image_columns = self._find_images_and_queries(is_image, is_text, past_length)
        elif cache is not None and not torch.compiler.is_compiling():
            self.aligned_images = cmai_layer(cache, 0).aligned_images
        self.has_row_per_column = self.query_slots is None
        self.text_columns, self.image_columns = self._add_to_cache(image_columns)

        num_layers = config.text_config.num_hidden_layers
        max_ratio = config.cmai_max_ratio if max_ratio is None else max_ratio
        max_ratio = 0.0 if self.focus == "none" or self.image_columns.shape[1] == 0 else max_ratio
        self.ratios = [inhibition_ratio(layer_idx, num_layers, max_ratio) for layer_idx in range(num_layers)]
        self._visible_keys: dict[Any, Any] = {}

    def _find_images_and_queries(
        self, is_image: torch.Tensor, is_text: torch.Tensor, past_length: Any
    ) -> torch.Tensor:
        """
        Returns the columns `(B, n)` of the image tokens of this call, -1 where a row has fewer. If there are any, it limits
        the queries (`query_slots`, `query_columns`, `is_query`) to the text tokens. Sets `aligned_images`.
        """
        is_first_call = isinstance(past_length, int) and past_length == 0
        num_images = num_texts = is_text.shape[1]
        if torch.compiler.is_compiling():  # a graph must not wait for numbers
            num_images, num_texts = self._reserved_counts() or (num_images, num_texts)
        else:
            images, texts = torch.stack([is_image, is_text]).cpu().numpy()
            if is_first_call:
                texts = texts & (images.cumsum(axis=1) > 0)
            num_images, num_texts = int(images.sum(axis=1).max()), int(texts.sum(axis=1).max())
            self.aligned_images = self._find_aligned_images(images, texts, is_first_call)
        if self.aligned_images is not None and is_first_call:
            first_text = self.aligned_images.stop
            self.query_slots = self.query_columns = self.query_columns[:, first_text:]
            self.is_query = is_text[:, first_text:]
            return self.columns[self.aligned_images].expand(len(is_text), -1)

        if is_first_call:  # text before the first image sees none, and counts for nothing
            is_text = is_text & (is_image.cumsum(dim=-1) > 0)
        if num_images > 0:
            self.query_slots = _first_true(is_text, max(num_texts, 1))
            self.query_columns, self.is_query = self.columns[self.query_slots], is_text.gather(1, self.query_slots)
        order = _first_true(is_image, num_images)
        return torch.where(is_image.gather(1, order), self.columns[order], -1)

    def _reserved_counts(self) -> tuple[int, int] | None:
        """How many image tokens and text tokens a row of a prefill has at most, if `reserve_state` has counted them."""
        layer: Any = None if self.cache is None else cmai_layer(self.cache, 0)
        return None if layer is None or layer.reserved_counts is None or not layer.is_empty else layer.reserved_counts

    def _find_aligned_images(self, images: np.ndarray, texts: np.ndarray, is_first_call: bool) -> slice | None:
        """`aligned_images`, from where this call has image tokens and text that counts, `(B, S)` each."""
        if not is_first_call:
            if self.cache is None or images.any() or not texts.all():
                return None
            return cmai_layer(self.cache, 0).aligned_images
        start, num_images = int(images[0].argmax()), int(images[0].sum())
        columns = np.arange(images.shape[1])
        is_image, is_text = (columns >= start) & (columns < start + num_images), columns >= start + num_images
        alike = num_images > 0 and is_text.any() and (images == is_image).all() and (texts == is_text).all()
        return slice(start, start + num_images) if alike else None

    def _add_to_cache(self, image_columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the columns of this call to those that the cache keeps. Returns `text_columns` and `image_columns`."""
        text_columns = torch.where(self.is_query, self.query_columns, -1)
        if self.cache is None:
            self.row_positions = torch.arange(text_columns.shape[1], device=text_columns.device)
            return text_columns, image_columns
        first = cmai_layer(self.cache, 0)
        first.aligned_images = self.aligned_images
        self.row_positions = first.update_columns(
            text_columns, image_columns, self.has_row_per_column, len(self.columns), self.cache.get_max_length()
        )
        return first.columns_so_far()

    def attend(
        self,
        attention: Any,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention with inhibition. `attention` is one of the library's attention functions; the other arguments and the
        results are those of such a function.
        """
        self.num_calls += 1
        layer_idx = module.layer_idx
        if self.ratios[layer_idx] > 0 or self._keeps_rows(layer_idx):
            visible = self._look_up_visible_keys(attention_mask, key)
            is_plain = attention is ALL_ATTENTION_FUNCTIONS["sdpa"] and dropout == 0 and self.attention == "scores"
            with maybe_autocast(query.device.type, enabled=False):
                if self.ratios[layer_idx] > 0 and query.shape[2] == 1 and is_plain:
                    return self._attend_decoding_step(visible, layer_idx, query, key, value, scaling)
                averaged = self._average_heads(visible, query, key, scaling, kwargs.get("softcap"))
                if self.ratios[layer_idx] > 0:
                    attention_mask = visible.mask(self.inhibited_images(visible, layer_idx, averaged), query.dtype)
                else:  # later calls need the rows
                    self._update_text_to_image(layer_idx, visible.split(averaged)[0])
        return attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    def _keeps_rows(self, layer_idx: int) -> bool:
        """
        Whether a layer that inhibits nothing in this call keeps its rows of A_t2i all the same: later tokens in the cache
        may have another ratio. In the first layer gamma is 0 for every ratio.
        """
        is_used = self.cache is not None and self.focus not in ("none", "tia")
        return is_used and layer_idx > 0 and self.image_columns.shape[1] > 0

    def _average_heads(
        self, visible: "_VisibleKeys", query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None
    ) -> torch.Tensor:
        """The head-averaged attention `(B, q, K)` of the text queries: scores, or weights if the config says so."""
        text_query = visible.text_rows(query.detach().transpose(1, 2)).transpose(1, 2)
        if self.attention == "weights":
            return attention_weights(text_query, key.detach(), scaling, visible.allowed(), softcap).mean(dim=1)
        return head_averaged_scores(text_query, key.detach(), scaling)

    def _attend_decoding_step(
        self,
        visible: "_VisibleKeys",
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, None]:
        """
        `attend` in a decoding step. The scores of the single query are computed once, for both the focus and the attention.
        They have the dtype of the keys, since a float32 copy of the keys would cost more than all else.
        """
        batch_size, num_heads, _, head_dim = query.shape
        # One product over rows and heads is faster than a nested one.
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        scores = scaled_product(query.reshape(len(key), -1, head_dim), key.mT, scaling)
        scores_by_row = scores.view(batch_size, num_heads, -1)
        averaged = scores_by_row.detach().mean(dim=1, keepdim=True, dtype=torch.float32)
        visible.hide_keys(scores_by_row, self.inhibited_images(visible, layer_idx, averaged))
        output = scores.softmax(dim=-1).to(value.dtype) @ value
        return output.view(batch_size, 1, num_heads, head_dim), None

    def inhibited_images(self, visible: "_VisibleKeys", layer_idx: int, averaged: torch.Tensor) -> torch.Tensor:
        """
        Which image tokens `(B, q, n)` each text query stops attending to in a layer.

        Args:
            averaged (`torch.FloatTensor` of shape `(B, q, K)`): A_s, the head-averaged attention of the text queries.
        """
        text_to_image, neighbors = visible.split(averaged)
        focus = text_to_image
        if self.focus != "tia":
            weights = visible.neighbor_weights(neighbors)
            rows = self._update_text_to_image(layer_idx, text_to_image)
            focus = focus_scores(text_to_image, weights, rows[:, :-1])
        return inhibited_pairs(visible.seen_focus(focus), *visible.ranks[layer_idx])

    def _update_text_to_image(self, layer_idx: int, text_to_image: torch.Tensor) -> torch.Tensor:
        """Adds the rows `(B, q, n)` of A_t2i of this call to the cache, if there is one. Returns all rows, `(B, T, n)`."""
        if self.cache is None:
            return text_to_image
        num_rows = self.text_columns.shape[1]
        return cmai_layer(self.cache, layer_idx).update_rows(
            text_to_image, self.has_row_per_column, self.row_positions, num_rows
        )

    def _look_up_visible_keys(self, attention_mask: torch.Tensor | None, key: torch.Tensor) -> "_VisibleKeys":
        """The layers that share a mask and a device share these too."""
        is_method = self.attention == "scores" and self.focus == "focus"
        is_aligned = self.aligned_images is not None and attention_mask is None and key.shape[2] == self.num_seen
        kind = _AlignedKeys if is_method and is_aligned else _ScatteredKeys
        if torch.compiler.is_compiling():
            return kind(self, attention_mask, key)
        name = (id(attention_mask), key.shape[2], key.device)
        if name not in self._visible_keys:  # the mask is kept too, and so its id
            self._visible_keys[name] = attention_mask, kind(self, attention_mask, key)
        return self._visible_keys[name][1]


class _VisibleKeys(ABC):
    """
    Which keys the columns of a call see under an attention mask, and where the text queries find image keys and text keys.

    hidden_images (`torch.BoolTensor` of shape `(B, q, n)`, *optional*): Image keys that a text query cannot attend to,
        because they are masked or later; `None` if it can attend to all.
    ranks (`list[tuple[int, torch.LongTensor | None]]`): For each layer, the last arguments of `inhibited_pairs`.
    """

    hidden_images: torch.Tensor | None = None
    ranks: list[tuple[int, torch.Tensor | None]]

    @abstractmethod
    def text_rows(self, states: torch.Tensor) -> torch.Tensor:
        """The rows `(B, q, ...)` of the text queries in `states` `(B, S, ...)`."""

    @abstractmethod
    def split(self, averaged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        A_t2i `(B, q, n)` and A_t2n `(B, q, T - 1)`, equation 9, out of A_s `(B, q, K)`; 0 where a key is not seen. The last
        text token is earlier than none, so A_t2n has no column for it.
        """

    @abstractmethod
    def neighbor_weights(self, neighbors: torch.Tensor) -> torch.Tensor:
        """The weights of `focus_weights`, from A_t2n."""

    @abstractmethod
    def seen_focus(self, focus: torch.Tensor) -> torch.Tensor:
        """The focus `(B, q, n)`, infinite where an image key is not seen."""

    @abstractmethod
    def mask(self, inhibited: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The additive mask `(B, 1, S, K)` under which the image keys `inhibited` `(B, q, n)` are not seen either."""

    @abstractmethod
    def hide_keys(self, scores: torch.Tensor, inhibited: torch.Tensor) -> None:
        """Writes negative infinity to the `scores` `(B, heads, K)` of a single query where `mask` would have it."""

    def allowed(self) -> torch.Tensor:
        """Which keys `(B, q, K)` the text queries see. `cmai_attention="weights"` needs it, with `_ScatteredKeys` alone."""
        raise NotImplementedError


class _AlignedKeys(_VisibleKeys):
    """
    The keys if all rows are alike (a prompt alone, or prompts of one length): the same columns hold the image tokens, text
    alone follows them, and the mask is the causal one. So every text query sees all image tokens, and slices replace the
    index operations of `_ScatteredKeys`, which launches fewer GPU kernels.
    """

    def __init__(self, call: Inhibition, attention_mask: torch.Tensor | None, key: torch.Tensor):
        self._images = cast(slice, call.aligned_images)
        num_columns = len(call.columns)
        self._first_column, self._num_columns = call.num_seen - num_columns, num_columns
        self._first_query = max(self._images.stop - self._first_column, 0)
        self._batch_size, self._device = len(key), key.device
        self._causal_mask: torch.Tensor | None = None
        num_images = self._images.stop - self._images.start
        self.ranks = [(min(threshold_rank(num_images, ratio) + 1, num_images), None) for ratio in call.ratios]

    def text_rows(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, self._first_query :]

    def split(self, averaged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        neighbors = averaged[..., self._images.stop : -1]
        num_queries, num_neighbors = neighbors.shape[1:]
        if num_queries > 1:  # equation 9; to the last token all others are earlier
            neighbors = neighbors.tril(num_neighbors - num_queries)
        return averaged[..., self._images], neighbors

    def neighbor_weights(self, neighbors: torch.Tensor) -> torch.Tensor:
        return neighbors

    def seen_focus(self, focus: torch.Tensor) -> torch.Tensor:
        return focus

    def mask(self, inhibited: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        num_keys = self._first_column + self._num_columns
        if self._causal_mask is None:
            shape = (self._num_columns, _aligned_width(num_keys))
            causal = torch.full(shape, -torch.inf, dtype=dtype, device=self._device).triu(self._first_column + 1)
            self._causal_mask = causal.expand(self._batch_size, -1, -1)
        mask = self._causal_mask.clone(memory_format=torch.contiguous_format)
        mask[:, self._first_query :, self._images].masked_fill_(inhibited, -torch.inf)
        return mask[:, None, :, :num_keys]

    def hide_keys(self, scores: torch.Tensor, inhibited: torch.Tensor) -> None:
        scores[..., self._images].masked_fill_(inhibited, -torch.inf)


class _ScatteredKeys(_VisibleKeys):
    """The keys wherever they are: under any mask, with padding, with several images in a prompt."""

    def __init__(self, call: Inhibition, attention_mask: torch.Tensor | None, key: torch.Tensor):
        device, num_keys = key.device, key.shape[2]
        query_columns, is_query = call.query_columns.to(device), call.is_query.to(device)
        # A sliding window has dropped the first keys. A static cache has more keys than columns so far.
        num_dropped = call.num_seen - num_keys
        num_dropped = (
            num_dropped.to(device).clamp(min=0) if isinstance(num_dropped, torch.Tensor) else max(num_dropped, 0)
        )

        # Keys that each column must not attend to
        if attention_mask is None:
            allowed = torch.arange(num_keys, device=device) + num_dropped <= call.columns.to(device)[:, None]
            allowed = allowed.expand(len(query_columns), -1, -1)
        else:
            allowed = as_boolean_mask(attention_mask[:, 0]).expand(len(query_columns), -1, -1)
        # The softmax of a row without any key (padding) is NaN. Such a row gets all keys; nothing reads its output.
        blocked = ~allowed & allowed.any(dim=-1, keepdim=True)
        self._num_keys = num_keys
        self._blocked = nn.functional.pad(blocked, (0, _aligned_width(num_keys) - num_keys))

        # Indices of the text queries in the flattened (B * S) columns
        self._rows: torch.Tensor | None = None
        if call.query_slots is not None:
            starts = torch.arange(len(query_columns), device=device)[:, None] * blocked.shape[1]
            self._rows = (starts + call.query_slots.to(device)).flatten()
        self._text_blocked = self.text_rows(self._blocked)

        # Index of each image and text token among the keys, and whether a query can attend to it (only if it is earlier)
        key_columns = torch.cat([call.image_columns, call.text_columns], dim=1).to(device)
        key_index = key_columns - num_dropped
        is_key = ((key_columns >= 0) & (key_index >= 0))[:, None]
        self._key_index = key_index.clamp(0, num_keys - 1)[:, None].expand(-1, query_columns.shape[1], -1)
        is_earlier = is_key & is_query[..., None] & (key_columns[:, None] < query_columns[..., None])
        self._hidden = ~is_earlier | self._text_blocked.gather(2, self._key_index)
        self._num_images = num_images = call.image_columns.shape[1]
        self.hidden_images, self._hidden_texts = self._hidden[..., :num_images], self._hidden[..., num_images:-1]
        # Keys that are masked already must stay so. Their index is that of a spare column, which `mask` cuts off.
        self._image_index = self._key_index[..., :num_images].masked_fill(self.hidden_images, num_keys)

        # Distances between text tokens
        self._focus, self._discount = call.focus, call.discount
        self._distance: torch.Tensor | None = None  # (B, q, T - 1): how many text tokens a key is earlier than a query
        if call.focus == "discounted_sum":
            order = (call.text_columns.to(device) >= 0).cumsum(dim=-1)
            self._distance = order[:, call.row_positions.to(device)][..., None] - order[:, None, :-1]

        # Rank of the threshold in each layer
        num_seen = (~self.hidden_images).sum(dim=-1)
        if torch.compiler.is_compiling():  # no CUDA graph may use a tensor of numbers, which begins on the CPU
            ranks = [threshold_rank(num_seen, ratio)[..., None] for ratio in call.ratios]
        else:
            ratios = torch.tensor(call.ratios, device=device)
            ranks = threshold_rank(num_seen, ratios[:, None, None])[..., None].unbind()
        # `ranks` are computed in float32, so one may be higher by one than the same rank in Python's float64.
        num_sorted = [threshold_rank(num_images, ratio) + 2 for ratio in call.ratios]
        self.ranks = [(min(number, num_images), rank) for rank, number in zip(ranks, num_sorted)]
        self._mask: torch.Tensor | None = None

    def text_rows(self, states: torch.Tensor) -> torch.Tensor:
        if self._rows is None:
            return states
        return states.flatten(0, 1).index_select(0, self._rows).unflatten(0, (len(states), -1))

    def split(self, averaged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Equation 9: the token itself and later ones are hidden
        attention = averaged.gather(2, self._key_index).masked_fill(self._hidden, 0)
        return attention[..., : self._num_images], attention[..., self._num_images : -1]

    def neighbor_weights(self, neighbors: torch.Tensor) -> torch.Tensor:
        return focus_weights(neighbors, self._hidden_texts, self._distance, self._focus, self._discount)

    def seen_focus(self, focus: torch.Tensor) -> torch.Tensor:
        return focus.masked_fill(cast(torch.Tensor, self.hidden_images), torch.inf)

    def mask(self, inhibited: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._mask is None:
            self._mask = torch.zeros(self._blocked.shape, dtype=dtype, device=self._blocked.device)
            self._mask = self._mask.masked_fill(self._blocked, -torch.inf)
            self._text_mask = self.text_rows(self._mask)
            self._nothing_inhibited = torch.zeros(inhibited.shape, dtype=dtype, device=inhibited.device)
        mask = self._text_mask.scatter(
            2, self._image_index, self._nothing_inhibited.masked_fill(inhibited, -torch.inf)
        )
        if self._rows is not None:
            mask = self._mask.flatten(0, 1).index_copy(0, self._rows, mask.flatten(0, 1)).view_as(self._mask)
        return mask[:, None, :, : self._num_keys]

    def hide_keys(self, scores: torch.Tensor, inhibited: torch.Tensor) -> None:
        blocked = self._text_blocked.scatter(2, self._image_index, inhibited)
        scores.masked_fill_(blocked[..., : self._num_keys], -torch.inf)

    def allowed(self) -> torch.Tensor:
        return ~self._text_blocked[..., : self._num_keys]


def _aligned_width(num_keys: int) -> int:
    """Width of a mask with at least one column behind the last key, whose rows start where a GPU's kernels want them."""
    return (num_keys // 8 + 1) * 8


def _first_true(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `(B, count)` of the columns where `mask` `(B, S)` is True, in order, then of any others."""
    return (~mask).int().sort(dim=-1, stable=True).indices[:, :count]


# --- attention -----------------------------------------------------------------------------------------------------


def cmai_attention_forward(
    implementation: str, module: Any, *args, cmai: Inhibition | None = None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of the library, with inhibition if `cmai` is given. Registered as `cmai_<implementation>`."""
    if implementation == "eager":  # each model has its own, in the file of the attention's class
        attention = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attention = ALL_ATTENTION_FUNCTIONS[implementation]
    if cmai is None:
        return attention(module, *args, **kwargs)
    return cmai.attend(attention, module, *args, **kwargs)


_ROUTES = {implementation: f"cmai_{implementation}" for implementation in ("eager", "sdpa")}
for _implementation, _name in _ROUTES.items():
    AttentionInterface.register(_name, partial(cmai_attention_forward, _implementation))


def make_inhibitable(language_model: nn.Module) -> None:
    """Lets the attention of a language model take a keyword argument `cmai`; without one nothing changes."""
    route_attention(language_model, _ROUTES)


def check_attention(text_config: Any) -> None:
    """
    Checks that the language model's attention can inhibit.

    Raises:
        `ValueError`: It is set to an implementation that takes no such mask.
    """
    implementation = text_config._attn_implementation
    if implementation is not None and implementation not in _ROUTES:  # None: not chosen yet
        raise ValueError(
            f'CMAI does not work with `attn_implementation="{implementation}"` in the language model, which cannot hide '
            'single image tokens from single text tokens. Choose "sdpa" or "eager" for it (e.g. '
            '`attn_implementation={"text_config": "sdpa"}`), or `use_cmai=False`.'
        )
