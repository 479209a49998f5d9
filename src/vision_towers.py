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
"""Vision towers that compress their tokens: VMTC in the blocks of CLIP, SigLIP and DINOv2."""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.generic import maybe_autocast

from .library_layers import pass_as_parent, route_attention
from .vmtc import (
    VmtcStage,
    class_token_attention,
    compress_tokens,
    count_visual_tokens,
    importance_scores,
    mean_received_attention,
    plan_stages,
    single_feature_layer,
)


# --- the tower -----------------------------------------------------------------------------------------------------


@dataclass
class TowerCompression:
    """
    What the blocks of a tower do in one call. They get it as the keyword argument `compression`.

    Args:
        stages (`dict[int, VmtcStage]`): By index of the block.
        merge_weights, kept_tokens (`str`): See [`VmtcConfig`].
        has_class_token (`bool`): Whether the first token is a class token. Without one, importance is attention received.
        trace (`list`, *optional*): For each stage, which output token each patch token has become (`compress_tokens`).
    """

    stages: dict[int, VmtcStage]
    merge_weights: str
    has_class_token: bool
    kept_tokens: str = "importance"
    trace: list[torch.Tensor] = field(default_factory=list)

    def of_first_view(self) -> tuple[list[torch.Tensor], list[VmtcStage]]:
        """The trace and the stages of the first image, after the call."""
        return [becomes[0] for becomes in self.trace], [stage for _, stage in sorted(self.stages.items())]

    def stage_of(self, block_index: int, hidden_states: torch.Tensor) -> Any:
        """What a block does to `hidden_states` `(B, tokens, d)`; `None` if it does not compress."""
        return self.stages.get(block_index)

    def mask_of(self, block_index: int, hidden_states: torch.Tensor) -> Any:
        """The attention mask of a block. Images have no padding, and after a stage the tower's mask would be too long."""
        return None

    def attention_row(self, query: torch.Tensor, key: torch.Tensor, scaling: float, stage: Any = None) -> torch.Tensor:
        """The row of attention weights that the importance needs, `(B, heads, 1, tokens)`."""
        function = class_token_attention if self.has_class_token else mean_received_attention
        with maybe_autocast(query.device.type, enabled=False):
            return function(query, key, scaling, getattr(stage, "is_real", None))

    def complete_row(
        self, row: torch.Tensor | None, attention: Any, normed: torch.Tensor, stage: Any = None
    ) -> torch.Tensor:
        """
        Returns `row` if the attention has made an `attention_row`. If not, computes it from the projections of `attention`
        and its input `normed` `(B, tokens, d)`. The weights of eager attention are no such row: dropout and half precision
        have changed them.

        Raises:
            `ValueError`: Only some of the heads are in this process, so that each would keep other patches.
        """
        num_heads = attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads
        if row is None or row.shape[-2] != 1:
            scaling = attention.scale if hasattr(attention, "scale") else attention.scaling
            if hasattr(attention, "qkv_proj"):  # fused by vLLM's Transformers backend
                query, key, _ = attention.qkv_proj(normed).chunk(3, dim=-1)
                query = query[:, :1] if self.has_class_token else query
            else:
                query = attention.q_proj(normed[:, :1] if self.has_class_token else normed)
                key = attention.k_proj(normed)
            head_dim = normed.shape[-1] // num_heads
            query, key = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key))
            row = self.attention_row(query, key, scaling, stage)
        if row.shape[1] != num_heads:
            raise ValueError(
                f"VMTC needs all {num_heads} heads of the vision tower, but this process has {row.shape[1]}: tensor "
                "parallel has divided them. Use one process, or vLLM with the plugin of this package, which shares them."
            )
        return row

    def __call__(self, hidden_states: torch.Tensor, row: torch.Tensor, stage: VmtcStage) -> torch.Tensor:
        """Compresses `hidden_states` `(B, tokens, d)` by the `attention_row` `(B, heads, 1, tokens)`."""
        num_first = int(self.has_class_token)
        patches = hidden_states[:, num_first:]
        importance = importance_scores(row, patches.shape[1])
        with maybe_autocast(patches.device.type, enabled=False):
            patches, becomes = compress_tokens(
                patches, importance, stage.num_kept, stage.num_clusters, self.merge_weights, self.kept_tokens
            )
        self.trace.append(becomes)
        return torch.cat([hidden_states[:, :num_first], patches], dim=1)  # equation 8


def stage_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    compression: TowerCompression | None = None,
    stage: Any = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    SDPA, registered as `vmtc_sdpa`. In a block that compresses it also makes the `attention_row`, from the queries and keys
    that it has. Other implementations stay as they are; with them the block projects queries and keys once more.
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, weights = attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, weights if compression is None else compression.attention_row(query, key, scaling, stage)


AttentionInterface.register("vmtc_sdpa", stage_attention_forward)


@cache
def compressing_block_class(block_class: Any) -> type[nn.Module]:
    """
    Subclass of the block class of a tower (CLIP, SigLIP, DINOv2). A block compresses between attention and MLP if
    `compression` has a stage for it; if not, it is its parent. With `num_blocks`, the blocks from that index on return their
    input.
    """

    class CompressingBlock(block_class):
        block_index: int

        def forward(
            self,
            hidden_states,
            attention_mask=None,
            compression: TowerCompression | None = None,
            num_blocks: int | None = None,
            **kwargs,
        ):
            if num_blocks is not None and self.block_index >= num_blocks:
                return hidden_states
            if compression is None:
                return super().forward(hidden_states, attention_mask, **kwargs)
            stage = compression.stage_of(self.block_index, hidden_states)
            mask = compression.mask_of(self.block_index, hidden_states)
            if stage is None:
                return super().forward(hidden_states, mask, **kwargs)
            arguments = {"compression": compression, "stage": stage, **kwargs}
            if hasattr(self, "layer_norm1"):  # CLIP and SigLIP
                normed = self.layer_norm1(hidden_states)
                attended, row = self.self_attn(normed, mask, **arguments)
                row = compression.complete_row(row, self.self_attn, normed, stage)
                hidden_states = compression(hidden_states + attended, row, stage)
                return hidden_states + self.mlp(self.layer_norm2(hidden_states))
            normed = self.norm1(hidden_states)
            attended, row = self.attention(normed, mask, **arguments)
            row = compression.complete_row(row, self.attention, normed, stage)
            hidden_states = compression(self.drop_path(self.layer_scale1(attended)) + hidden_states, row, stage)
            return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states

    return pass_as_parent(CompressingBlock, compressing_block_class)


def make_compressible(tower: Any) -> None:
    """Lets the blocks of a vision tower compress when asked to. A tower of an unknown kind stays as it is."""
    for index, block in enumerate(blocks_of(tower)):
        block_class: Any = type(block)
        block.__class__ = compressing_block_class(block_class)
        block.block_index = index
        route_attention(block, {"sdpa": "vmtc_sdpa"})


def blocks_of(tower: Any) -> Any:
    """The blocks of a tower that is built like CLIP or DINOv2 (without registers); empty for any other tower."""
    encoder = getattr(tower, "encoder", None)
    blocks: Any = getattr(encoder, "layers", getattr(encoder, "layer", ()))
    layouts = (
        ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
        ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2"),
    )
    known = len(blocks) > 0 and any(all(hasattr(blocks[0], name) for name in layout) for layout in layouts)
    has_registers = getattr(tower.config, "num_register_tokens", 0) > 0
    return blocks if known and hasattr(tower, "embeddings") and not has_registers else ()


def compression_of_call(
    config: Any, tower: Any, pixel_values: torch.Tensor, feature_layer: Any, num_visual_tokens: int | None = None
) -> TowerCompression | None:
    """
    The argument of a call `tower(pixel_values, compression=...)`.

    Args:
        feature_layer (`int` or `list[int]`): Index of the hidden state that is used; a list may have only one.
        num_visual_tokens (`int`, *optional*): A budget for this call; it replaces that of the config.

    Returns:
        [`TowerCompression`], or `None` if nothing is compressed.

    Raises:
        `ValueError`: The images do not allow the budget, the list has several layers, or the tower is not built like CLIP,
            SigLIP or DINOv2.
    """
    if not config.use_vmtc and num_visual_tokens is None:
        return None
    num_patches = math.prod(patch_grid(config, pixel_values))
    if not config.use_vmtc:
        count_visual_tokens(config, num_patches, num_visual_tokens)  # a budget without VMTC is an error
        return None
    num_blocks = count_blocks(tower, feature_layer)
    stages = plan_stages(config, num_patches, num_blocks, num_visual_tokens)
    if not stages:
        return None
    return TowerCompression(
        stages, config.vmtc_merge_weights, has_class_token(tower), kept_tokens=config.vmtc_kept_tokens
    )


def count_blocks(tower: Any, feature_layer: Any) -> int:
    """How many blocks there are up to the one whose output is used. Raises as `compression_of_call` does."""
    layer = single_feature_layer(feature_layer)
    if layer is None:
        raise ValueError(f"VMTC works with one `vision_feature_layer`, got {feature_layer}.")
    blocks = blocks_of(tower)
    if not blocks:
        raise ValueError(
            f"VMTC does not know the blocks of {type(tower).__name__}: it works with CLIP, SigLIP and DINOv2 without "
            "registers. Set `use_vmtc=False`."
        )
    num_blocks = layer if layer >= 0 else len(blocks) + 1 + layer
    if not 1 <= num_blocks <= len(blocks):
        raise ValueError(
            f"`vision_feature_layer` is {feature_layer}, but the vision tower has {len(blocks)} blocks, and VMTC needs the "
            "output of one."
        )
    return num_blocks


def blank_image(config: Any, tower: Any) -> torch.Tensor:
    """
    Pixels `(1, 3, H, W)`, all zero, for a training batch without an image. The tower, the projector and what reads them run
    on it, and their result is thrown away. So every trained parameter gets a gradient of zero, for which data parallel
    processes wait. And every process gathers the same shards of weights in the same order (FSDP, ZeRO-3); it would not if
    zero times the parameters were added instead.
    """
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, config.vision_config.num_channels, height, width, device=tower.device, dtype=tower.dtype)


def has_class_token(tower: Any) -> bool:
    """Whether the first token of a vision tower stands for the whole image, as in CLIP and DINOv2; SigLIP has none."""
    embeddings = getattr(tower, "embeddings", None)
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


def patch_grid(config: Any, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches of images `(..., height, width)`."""
    size = config.vision_config.patch_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width
