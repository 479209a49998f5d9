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
Reducing Image Redundancy": in every layer of the language model each text token stops attending to those image tokens
that it, and the text it attends to, have least to do with.

Conventions of this file. B: batch, q: text queries of this call, T: text tokens so far (cached ones and those of this
call), n: image tokens of a row, K: keys. A column is a place in the whole sequence; -1 stands for none. What decides
(the averaged attention, the focus, its quantile) is float32.
"""

import math
import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.generic import maybe_autocast

from .attention_masks import as_boolean_mask
from .library_layers import route_attention


# --- the maths -----------------------------------------------------------------------------------------------------


def inhibition_ratio(layer_idx: int, num_layers: int, max_ratio: float) -> float:
    """gamma of a layer: from 0 in the first, linearly, to `max_ratio` in the last."""
    return max_ratio * layer_idx / max(num_layers - 1, 1)


def head_averaged_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Scaled q.k, averaged over heads: one product of all heads, of which those that share keys are added up first.

    Args:
        query (`torch.FloatTensor` of shape `(B, heads, q, head_dim)`), key (`(B, kv_heads, K, head_dim)`): Rotated.

    Returns:
        `torch.FloatTensor` of shape `(B, q, K)`, float32.
    """
    folded = query.unflatten(1, (key.shape[1], -1)).sum(dim=2, dtype=torch.float32) * (scaling / query.shape[1])
    key = key.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return folded.transpose(1, 2).flatten(2) @ key.flatten(2).mT


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, scaling: float, allowed: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """
    Softmax of scaled q.k over the keys that are allowed.

    Args:
        query, key: As in `head_averaged_scores`.
        allowed (`torch.BoolTensor` of shape `(B, q, K)`): At least one key for each query.
        softcap (`float`, *optional*): Soft-capping of the scores (Gemma-2).

    Returns:
        `torch.FloatTensor` of shape `(B, heads, q, K)`, float32.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)


def focus_scores(own: torch.Tensor, weights: torch.Tensor, text_to_image: torch.Tensor) -> torch.Tensor:
    """
    Text-to-image focus F of some text tokens, equations 10 and 11: their own attention to the image tokens, and that of
    the text tokens before them.

    Args:
        own (`torch.FloatTensor` of shape `(B, q, n)`): Their rows of A_t2i; 0 where they cannot see.
        weights (`torch.FloatTensor` of shape `(B, q, T)`): What each text token counts for them (`focus_weights`).
        text_to_image (`torch.FloatTensor` of shape `(B, T, n)`): A_t2i of all text tokens.

    Returns:
        `torch.FloatTensor` of shape `(B, q, n)`.
    """
    return torch.baddbmm(own, weights, text_to_image)


def focus_weights(
    neighbours: torch.Tensor, hidden: torch.Tensor, distance: torch.Tensor | None, focus: str, discount: float
) -> torch.Tensor:
    """
    What the text tokens before another one count for its focus: A_t2n, or what Table 5 has in its place.

    Args:
        neighbours (`torch.FloatTensor` of shape `(B, q, T)`): Rows of A_t2n, equation 9; 0 where `hidden`.
        hidden (`torch.BoolTensor` of shape `(B, q, T)`): Where a text token is not seen or does not stand before.
        distance (`torch.LongTensor` of shape `(B, q, T)`): How many text tokens it stands before; `None` for `"sum"`.
        focus (`str`): `"focus"`: A_t2n. `"sum"`: 1. `"discounted_sum"`: `discount ** distance`.
    """
    if focus == "focus":
        return neighbours
    weights: torch.Tensor = torch.ones_like(neighbours) if distance is None else discount ** distance.clamp(min=0)
    return weights.to(neighbours.dtype).masked_fill(hidden, 0)


def threshold_rank(num_seen: Any, ratio: Any) -> Any:
    """
    Which of `num_seen` values, in ascending order from 0, is the first that does not lie below their `ratio`-quantile, as
    `torch.quantile` interpolates it linearly: what lies strictly below that value lies strictly below the quantile, and
    the other way round. The product of the two is taken for whole if it is so within 1e-3, so that its rounding does not
    count.

    Args:
        num_seen (`int` or `torch.LongTensor`): How many values there are; none counts as one.
        ratio (`float` or `torch.FloatTensor`): In [0, 1]; a number where the other is one.
    """
    rank = (num_seen - 1) * ratio - 1e-3
    if isinstance(rank, torch.Tensor):
        return rank.ceil().clamp(min=0).long()
    return max(math.ceil(rank), 0)


def inhibited_pairs(focus: torch.Tensor, rank: Any, num_lowest: int) -> torch.Tensor:
    """
    Which image tokens have less focus than the one of that `rank`.

    Args:
        focus (`torch.FloatTensor` of shape `(B, q, n)`): Infinite where the text token does not see.
        rank (`torch.LongTensor` of shape `(B, q, 1)`, *optional*): `threshold_rank` of each text token; `None` if all
            have the highest that is possible.
        num_lowest (`int`): One more than the highest rank that is possible, at most n.

    Returns:
        `torch.BoolTensor` of shape `(B, q, n)`.
    """
    if rank is None:
        return focus < focus.topk(num_lowest, largest=False, sorted=False).values.amax(dim=-1, keepdim=True)
    return focus < focus.topk(num_lowest, largest=False).values.gather(-1, rank)


# --- one forward pass ----------------------------------------------------------------------------------------------


class Inhibition:
    """
    CMAI in one forward pass: made by the model, handed through the language model to its attention as the keyword
    argument `cmai`.

    Args:
        config ([`VmtcCmaiLlavaConfig`]): The fields that start with `cmai_`.
        is_image (`torch.BoolTensor` of shape `(B, S)`, *optional*): Which columns of this call hold image tokens.
        is_text (`torch.BoolTensor` of shape `(B, S)`): Which hold text; padding is neither.
        past_length (`int` or `torch.Tensor`): Columns in the cache.
        cache (`Cache`, *optional*): Prepared by `prepare_cache`.
        max_ratio (`float`, *optional*): Instead of the config's `cmai_max_ratio`.

    block (`tuple[int, int]`, *optional*): The columns of the first image token and of the first text token after it, if
        all rows have their image tokens in that one block, and text alone from there to the end. Where nothing is padded
        either, slices take the place of indices (`_attend_block`).
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
        self.cache = cache
        self.attention, self.focus, self.discount = config.cmai_attention, config.cmai_focus, config.cmai_discount
        self.num_calls = 0
        self.block: tuple[int, int] | None = None
        num_columns = is_text.shape[1]
        columns = torch.arange(num_columns, device=is_text.device) + past_length
        self.columns, self.num_seen = columns, past_length + num_columns
        # Of a prompt with images, only the text becomes queries and rows.
        self.query_slots: torch.Tensor | None = None
        image_columns = columns.expand_as(is_text)[:, :0]
        self.query_columns = columns.expand_as(is_text)
        self.is_query = is_text
        if is_image is not None:
            num_images, num_texts, block = num_columns, num_columns, None
            if not torch.compiler.is_compiling():  # a graph must not wait for numbers, and takes all columns
                num_images, num_texts, block = _layout(is_image, is_text)
            if isinstance(past_length, int) and past_length == 0:
                self.block = block
            if self.block is not None:  # text before the block sees no image, and counts for nothing
                end = self.block[1]
                is_text = is_text & (torch.arange(num_columns, device=is_text.device) >= end)
                num_texts = num_columns - end
            if num_images > 0:
                order = _first_true(is_image, num_images)
                image_columns = torch.where(is_image.gather(1, order), columns[order], -1)
                self.query_slots = _first_true(is_text, max(num_texts, 1))
                self.query_columns = columns[self.query_slots]
                self.is_query = is_text.gather(1, self.query_slots)
        self.is_single = self.query_slots is None
        text_columns = torch.where(self.is_query, self.query_columns, -1)
        self.row_positions: torch.Tensor | None = None
        if cache is not None:
            first: Any = cache.layers[0]
            self.row_positions = first.update_columns(
                text_columns, image_columns, self.is_single, num_columns, cache.get_max_length()
            )
            text_columns, image_columns = first.text_columns, first.image_columns
            if self.is_single:
                self.block = first.block
            first.block = self.block
        self.text_columns, self.image_columns = text_columns, image_columns
        if self.row_positions is None:
            num_rows = text_columns.shape[1]
            self.row_positions = torch.arange(num_rows - self.query_columns.shape[1], num_rows, device=columns.device)
        # gamma of each layer; 0 where nothing is inhibited.
        num_layers = config.text_config.num_hidden_layers
        max_ratio = config.cmai_max_ratio if max_ratio is None else max_ratio
        max_ratio = 0.0 if self.focus == "none" or image_columns.shape[1] == 0 else max_ratio
        self.ratios = [inhibition_ratio(layer_idx, num_layers, max_ratio) for layer_idx in range(num_layers)]
        self._views: dict[Any, Any] = {}

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
        Attention with inhibition. Arguments and results are those of the library's attention functions, of which
        `attention` is the one to use.
        """
        self.num_calls += 1
        if self.ratios[module.layer_idx] == 0:
            return attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        is_sdpa = attention is ALL_ATTENTION_FUNCTIONS["sdpa"]
        is_whole = attention_mask is None and not torch.compiler.is_compiling() and key.shape[2] == self.num_seen
        if is_whole and is_sdpa and self.block is not None and self.attention == "scores" and dropout == 0:
            with maybe_autocast(query.device.type, enabled=False):
                return self._attend_block(attention, module, query, key, value, scaling, **kwargs)
        view = self._view(attention_mask, key)
        with maybe_autocast(query.device.type, enabled=False):
            if query.shape[2] == 1 and is_sdpa and self.attention == "scores" and dropout == 0:
                return self._attend_once(view, module.layer_idx, query, key, value, scaling)
            text_query = query.detach()
            if self.query_slots is not None:
                text_query = view.text_rows(text_query.transpose(1, 2)).transpose(1, 2)
            if self.attention == "weights":
                rows = view.blocked if self.query_slots is None else view.text_rows(view.blocked)
                softcap = kwargs.get("softcap")
                averaged = attention_weights(text_query, key.detach(), scaling, ~rows[..., :-1], softcap).mean(dim=1)
            else:
                averaged = head_averaged_scores(text_query, key.detach(), scaling)
            blocked = self._blocked_keys(view, module.layer_idx, averaged)
        mask = ~blocked[:, None]
        if not is_sdpa:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return attention(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)

    def _attend_block(
        self,
        attention: Any,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`attend` for the most frequent layout (`block`) with nothing padded: slices take the place of indices."""
        start, end = self.block  # type: ignore[misc]
        batch_size, num_heads, num_columns, head_dim = query.shape
        num_groups = key.shape[1]
        if self.query_slots is None:
            # A step of the decoding, see `_attend_once`. One product for all rows and heads is faster than a nested one.
            key, value = key.flatten(0, 1), value.flatten(0, 1)
            scores = query.reshape(len(key), -1, head_dim) * scaling @ key.mT
            by_row = scores.view(batch_size, num_heads, -1)
            averaged = by_row[..., start:].detach().mean(dim=1, dtype=torch.float32)[:, None]
            by_row[..., start:end].masked_fill_(self._inhibited_images(module.layer_idx, averaged), -torch.inf)
            return (scores.softmax(dim=-1).to(value.dtype) @ value).view(batch_size, 1, num_heads, head_dim), None

        text_query = query[:, :, end:]
        averaged = head_averaged_scores(text_query.detach(), key[:, :, start:].detach(), scaling)
        inhibited = self._inhibited_images(module.layer_idx, averaged)
        query, key = (
            query.to(value.dtype),
            key.to(value.dtype),
        )  # in autocast the rotary embedding has made them float32
        name = (query.dtype, query.device)
        if name not in self._views:
            bias = torch.full((num_columns - end, num_columns), -torch.inf, dtype=query.dtype, device=query.device)
            self._views[name] = bias.triu(end + 1).expand(batch_size, 1, num_heads // num_groups, -1, -1)
        bias = self._views[name].clone(memory_format=torch.contiguous_format)
        bias[..., start:end].masked_fill_(inhibited[:, None, None], -torch.inf)
        # The text is attended by itself. Heads that share keys become one head with more queries: no keys are repeated.
        text_output = nn.functional.scaled_dot_product_attention(
            query[:, :, end:].reshape(batch_size, num_groups, -1, head_dim),
            key,
            value,
            attn_mask=bias.flatten(2, 3),
            scale=scaling,
        )
        text_output = text_output.reshape(text_query.shape).transpose(1, 2)
        before = (states[:, :, :end] for states in (query, key, value))
        output, _ = attention(module, *before, None, scaling=scaling, **kwargs)
        return torch.cat([output, text_output], dim=1), None

    def _inhibited_images(self, layer_idx: int, averaged: torch.Tensor) -> torch.Tensor:
        """Which image tokens `(B, q, n)` are inhibited; `averaged` `(B, q, n + T)` ends with the queries themselves."""
        num_images = self.block[1] - self.block[0]  # type: ignore[index]
        focus = own = averaged[..., :num_images]
        if self.focus != "tia":
            weights, rows = averaged[..., num_images:], own
            num_queries, num_texts = weights.shape[1:]
            if self.cache is not None:
                layer: Any = self.cache.layers[layer_idx]
                rows = layer.update_rows(own, self.is_single, self.row_positions, num_texts)
            if self.focus != "focus":
                index = torch.arange(num_texts, device=own.device)
                distance = (index[-num_queries:, None] - index).expand_as(weights)
                discounted = distance if self.focus == "discounted_sum" else None
                weights = focus_weights(weights, distance <= 0, discounted, self.focus, self.discount)
            if num_queries == 1:  # what stands before
                weights, rows = weights[..., :-1], rows[:, :-1]
            else:
                weights = weights.tril(num_texts - num_queries - 1)
            focus = focus_scores(own, weights, rows)
        return inhibited_pairs(focus, None, threshold_rank(num_images, self.ratios[layer_idx]) + 1)

    def _attend_once(
        self,
        view: "_View",
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, None]:
        """
        A step of the decoding: with one query the scores of all heads are few, and serve the focus and the attention. They
        have the dtype of the keys, a copy of which in float32 would cost more than all else.
        """
        batch_size, num_heads, _, head_dim = query.shape
        scores = (query * scaling).reshape(batch_size, key.shape[1], -1, head_dim) @ key.mT
        averaged = scores.sum(dim=(1, 2), dtype=torch.float32)[:, None] / num_heads
        blocked = self._blocked_keys(view, layer_idx, averaged)
        weights = scores.masked_fill(blocked[:, None], -torch.inf).softmax(dim=-1, dtype=torch.float32)
        return (weights.to(value.dtype) @ value).reshape(batch_size, 1, num_heads, -1), None

    def _blocked_keys(self, view: "_View", layer_idx: int, averaged: torch.Tensor) -> torch.Tensor:
        """Which keys `(B, S, K)` the columns of this call do not attend to, by the text's mean attention `(B, q, K)`."""
        averaged = averaged.gather(2, view.index).masked_fill(view.hidden, 0)
        num_images = self.image_columns.shape[1]
        focus = own = averaged[..., :num_images]
        if self.focus != "tia":
            rows = own
            if self.cache is not None:
                rows = self.cache.layers[layer_idx].update_rows(
                    own, self.is_single, self.row_positions, self.text_columns.shape[1]
                )
            text_weights = focus_weights(
                averaged[..., num_images:],
                view.hidden[..., num_images:],
                view.distance,
                self.focus,
                self.discount,
            )
            focus = focus_scores(own, text_weights, rows)
        hidden = view.hidden[..., :num_images]
        inhibited = inhibited_pairs(focus.masked_fill(hidden, torch.inf), *view.ranks[layer_idx]) | hidden
        if self.query_slots is None:
            return view.blocked.scatter(2, view.image_place, inhibited)[..., :-1]
        rows = view.text_rows(view.blocked).scatter(2, view.image_place, inhibited)
        return view.blocked.flatten(0, 1).index_copy(0, view.rows, rows.flatten(0, 1)).view_as(view.blocked)[..., :-1]

    def _view(self, attention_mask: torch.Tensor | None, key: torch.Tensor) -> "_View":
        """What the text queries see of the keys at hand, once for the layers that share a mask and a device."""
        if torch.compiler.is_compiling():
            return _View(self, attention_mask, key)
        name = (id(attention_mask), key.shape[2], key.device)
        if name not in self._views:
            self._views[name] = attention_mask, _View(self, attention_mask, key)  # keeps the mask, and so its id
        return self._views[name][1]


class _View:
    """
    What the columns of a call see of the keys at hand, and the text queries among them of images and text.

    blocked (`(B, S, K + 1)`): Which keys they do not see; the last stands for none.
    rows (`(B * q)`): Where the text queries are among the `B * S` columns, if they are not all of them.
    image_place (`(B, q, n)`): Where the image keys are; K for none.
    index (`(B, q, n + T)`): Where the image keys and the text keys are, or any key.
    hidden (`(B, q, n + T)`): Which of them are not seen, or do not stand before.
    distance (`(B, q, T)`, *optional*): How many text tokens a text key stands before, for `"discounted_sum"`.
    ranks: Of each layer, the `threshold_rank` of each text query `(B, q, 1)`, and more than the highest possible.
    """

    def __init__(self, call: Inhibition, attention_mask: torch.Tensor | None, key: torch.Tensor):
        device, num_keys = key.device, key.shape[2]
        columns, is_query = call.query_columns.to(device), call.is_query.to(device)
        # The keys end with this call's, unless room is left for later ones; a sliding window has lost the first.
        lost = call.num_seen - num_keys
        lost = lost.to(device).clamp(min=0) if isinstance(lost, torch.Tensor) else max(lost, 0)
        if attention_mask is None:
            allowed = torch.arange(num_keys, device=device) + lost <= call.columns.to(device)[:, None]
            allowed = allowed.expand(len(columns), -1, -1)
        else:
            allowed = as_boolean_mask(attention_mask[:, 0]).expand(len(columns), -1, -1)
        # Padding sees nothing, and attention over no key is not a number: of no consequence, it sees all.
        blocked = ~allowed & allowed.any(dim=-1, keepdim=True)
        self.blocked = nn.functional.pad(blocked, (0, 1))
        if call.query_slots is not None:
            starts = torch.arange(len(columns), device=device)[:, None] * blocked.shape[1]
            self.rows = (starts + call.query_slots.to(device)).flatten()

        key_columns = torch.cat([call.image_columns, call.text_columns], dim=1).to(device)
        place = key_columns - lost
        is_key = ((key_columns >= 0) & (place >= 0))[:, None]
        self.index = place.clamp(0, num_keys - 1)[:, None].expand(-1, columns.shape[1], -1)
        blocked = self.blocked if call.query_slots is None else self.text_rows(self.blocked)
        seen = is_key & is_query[..., None] & (key_columns[:, None] < columns[..., None])
        self.hidden = ~seen | blocked.gather(2, self.index)
        num_images = call.image_columns.shape[1]
        # Rows that are no text stay as they are.
        self.image_place = torch.where(is_key & is_query[..., None], self.index, num_keys)[..., :num_images]

        self.distance: torch.Tensor | None = None
        if call.focus == "discounted_sum":
            rank = (call.text_columns.to(device) >= 0).cumsum(dim=-1)
            own_rank = rank[:, call.row_positions.to(device)]  # type: ignore[union-attr]
            self.distance = own_rank[..., None] - rank[:, None]
        ratios = torch.tensor(call.ratios, device=device)
        num_seen = (~self.hidden[..., :num_images]).sum(dim=-1)
        ranks = threshold_rank(num_seen, ratios[:, None, None])[..., None]
        highest = [threshold_rank(num_images, ratio) + 1 for ratio in call.ratios]  # computed differently
        self.ranks = [(rank, min(top + 1, num_images)) for rank, top in zip(ranks.unbind(), highest)]

    def text_rows(self, states: torch.Tensor) -> torch.Tensor:
        """Those rows of `states` `(B, S, ...)` that are the text queries, `(B, q, ...)`."""
        return states.flatten(0, 1).index_select(0, self.rows).unflatten(0, (len(states), -1))


def _layout(is_image: torch.Tensor, is_text: torch.Tensor) -> tuple[int, int, tuple[int, int] | None]:
    """The most image tokens and the most text tokens that a row has, and the `block` of [`Inhibition`], if there is one."""
    count = is_image.sum(dim=-1)
    start = is_image.int().argmax(dim=-1)
    index = torch.arange(is_image.shape[1], device=is_image.device)
    is_text_after = (is_text | (index < (start + count)[:, None])).all()
    numbers = [count.amax(), is_text.sum(dim=-1).amax(), count.amin(), start.amin(), start.amax()]
    num_images, num_texts, least, first, last, is_followed = map(int, torch.stack([*numbers, is_text_after]).tolist())
    end = first + num_images
    is_block = is_followed > 0 and num_images == least > 0 and first == last and end < is_image.shape[1]
    return num_images, num_texts, (first, end) if is_block else None


def _first_true(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `(B, count)` of the columns where `mask` `(B, S)` is True, in order, then of any others."""
    return (~mask).int().sort(dim=-1, stable=True).indices[:, :count]


# --- attention -----------------------------------------------------------------------------------------------------


def cmai_attention_forward(
    implementation: str, module: Any, *args, cmai: Inhibition | None = None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of the library, with inhibition if `cmai` says so. Registered as `cmai_<implementation>`."""
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
    """Lets the attention of a language model inhibit what an argument `cmai` says; without one it stays as it is."""
    route_attention(language_model, _ROUTES)


def check_attention(text_config: Any) -> None:
    """
    Checks that the language model's attention can inhibit.

    Raises:
        `ValueError`: It is set to an implementation that takes no mask of ours.
    """
    implementation = text_config._attn_implementation
    if implementation is not None and implementation not in _ROUTES:  # None: not chosen yet
        raise ValueError(
            f'CMAI does not work with `attn_implementation="{implementation}"` in the language model, which cannot hide '
            'single image tokens from single text tokens. Choose "sdpa" or "eager" for it (e.g. '
            '`attn_implementation={"text_config": "sdpa"}`), or `use_cmai=False`.'
        )
