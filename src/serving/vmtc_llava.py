"""LLaVA with VMTC as a model of vLLM: its own LLaVA, whose vision tower compresses in the stages of VMTC."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..vision_towers import TowerCompression
from ..vmtc import count_visual_tokens, plan_stages, spatial_downsample
from ..vmtc_cmai_patch import VmtcCmaiLlavaProcessor
from .media import RgbImageParser
from .suppressed_tokens import suppress, suppressed_tokens


class VmtcLlavaProcessingInfo(LlavaProcessingInfo):
    def get_hf_processor(self, **kwargs: object) -> Any:
        # It loads the processor of a stock LLaVA too. vLLM uses it for the images alone.
        return self.ctx.get_hf_processor(VmtcCmaiLlavaProcessor, **kwargs)

    def get_data_parser(self) -> RgbImageParser:
        return RgbImageParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Placeholders of an image. All images have one size when the tower gets them."""
        config: Any = self.get_hf_config()
        count = count_visual_tokens(config, self.get_vision_encoder_info().get_patch_grid_length() ** 2)
        count += config.vision_config.model_type == "clip_vision_model"  # its class token
        return count - (config.vision_feature_select_strategy == "default")


class VmtcLlavaMultiModalProcessor(LlavaMultiModalProcessor):
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        if "num_visual_tokens" in hf_processor_mm_kwargs:
            raise ValueError(
                "On vLLM a request cannot change the number of visual tokens: `num_visual_tokens` is "
                f"{hf_processor_mm_kwargs['num_visual_tokens']}. Set it for the engine: "
                "`--hf-overrides '{\"vmtc_num_visual_tokens\": ...}'`."
            )
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        num_images = len(mm_prompt_updates.get("image", ()))
        num_places = token_ids.count(self.info.get_hf_config().image_token_id)
        if num_places < num_images:
            raise ValueError(
                f"The prompt has {num_places} `<image>` for {num_images} images. Write one for each image, and raise "
                "`truncate_prompt_tokens` if it cuts them off."
            )
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)


@cache
def compressing_block_class(block_class: Any) -> type[nn.Module]:
    """Subclass of vLLM's block of CLIP or SigLIP that compresses between attention and MLP."""

    class CompressingBlock(block_class):
        compression: TowerCompression
        block_index: int

        def forward(self, hidden_states: torch.Tensor) -> Any:
            attention = self.self_attn
            query, key, value = attention.qkv_proj(self.layer_norm1(hidden_states))[0].chunk(3, dim=-1)
            attended, _ = attention.out_proj(attention.attn(query, key, value))
            query, key = (states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for states in (query, key))
            stage = self.compression.stages[self.block_index]
            # The mean over heads, of which tensor parallel gives each process some.
            row = self.compression.attention_row(query, key, attention.scale, stage).mean(dim=1, keepdim=True)
            if attention.tp_size > 1:
                row = tensor_model_parallel_all_reduce(row) / attention.tp_size
            hidden_states = self.compression(hidden_states + attended, row, stage)
            self.compression.trace.clear()
            hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
            return (hidden_states, None) if "Siglip" in block_class.__name__ else hidden_states

    return CompressingBlock


@MULTIMODAL_REGISTRY.register_processor(
    VmtcLlavaMultiModalProcessor, info=VmtcLlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VllmVmtcLlava(LlavaForConditionalGeneration):
    # Since 5.23, transformers saves the names of a tower without `vision_model.`, which is in the names of vLLM.
    hf_to_vllm_mapper = (
        WeightsMapper(
            orig_to_new_regex={
                re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."
            }
        )
        | LlavaForConditionalGeneration.hf_to_vllm_mapper
    )

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.register_buffer("suppressed", suppressed_tokens(vllm_config.model_config), persistent=False)
        config, tower = self.config, self.vision_tower.vision_model
        if not config.use_vmtc:
            return
        blocks = tower.encoder.layers  # up to the one whose output is used
        compression = TowerCompression(
            plan_stages(config, tower.embeddings.num_patches, len(blocks)),
            config.vmtc_merge_weights,
            has_class_token=hasattr(tower.embeddings, "class_embedding"),
            kept_tokens=config.vmtc_kept_tokens,
        )
        for index in compression.stages:
            block = blocks[index]
            block_class: Any = type(block)
            block.__class__ = compressing_block_class(block_class)
            block.compression, block.block_index = compression, index

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Any) -> Any:
        features = super()._image_pixels_to_features(vision_tower, pixel_values)
        if self.config.spd_factor == 1:
            return features
        side = math.isqrt(features.shape[1])
        return spatial_downsample(features, (side, side), self.config.spd_factor)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return suppress(super().compute_logits(hidden_states), self.suppressed)
