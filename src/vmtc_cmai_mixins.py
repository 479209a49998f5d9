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
What VMTC and CMAI add to a LLaVA: mixins for the configs, models, heads and processors of the library's families. A family's
own file (`vmtc_cmai_patch.py` for LLaVA itself) holds only what differs. Nothing of the library is patched.

1. `make_compressible` prepares the blocks of the vision tower, `make_inhibitable` the attention of the language model
   (`VmtcCmaiModelMixin.__init__`).
2. `get_image_features` of the family runs the tower with the stages of VMTC (`compression_of_call`), and projects what is
   left.
3. `VmtcCmaiModelMixin.forward` replaces the placeholders by these visual tokens, as LLaVA does, and passes an `Inhibition`
   through the language model to its attention.
4. The processor writes as many placeholders as VMTC leaves visual tokens (`count_visual_tokens`).
"""

from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict, validated_field
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.cache_utils import Cache, DynamicCache
from transformers.feature_extraction_utils import BatchFeature
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging

from .attention_masks import non_padding_columns
from .chat_messages import TypedPlaceholdersMixin
from .cmai import Inhibition, check_attention, make_inhibitable
from .cmai_cache import prepare_cache, reserve_state
from .image_loading import open_images, resize_first
from .library_versions import CACHE, PROCESSING_DEFAULTS, cache_of_call, soft_caps_attention
from .safe_loading import check_sizes
from .vision_language_model import is_compiled
from .vision_towers import blank_image, compression_of_call, make_compressible
from .vmtc import VisualBudgetMixin, VmtcConfig, share_above_0


logger = logging.get_logger(__name__)


def from_0_to_1(value: float) -> None:
    """Validator of a config field, which also runs when the field is set later."""
    if not 0 <= value <= 1:
        raise ValueError(f"must be from 0 to 1, got {value}.")


# A saved `config.json` has this section for the stock class of the family, which reads the section whose model type is its
# own. Without it, stock LLaVA would load the checkpoint with only a warning: without VMTC and CMAI, and with a random head,
# because the names of weights are converted by model type. If VMTC and CMAI are off, the section describes the stock model.
# Otherwise a field that stock LLaVA validates holds the message below: it refuses the checkpoint and prints the message.
_STOCK_SECTION = "stock_{}"
_STOCK_ERROR = (
    "VMTC or CMAI is on. Load the model with AutoModelForImageTextToText and the processor with AutoProcessor, with "
    "trust_remote_code=True or after `import ta_llava`."
)


@strict
class VmtcCmaiConfig(VmtcConfig):
    r"""
    The fields of CMAI, and what the configs of all families share. It stands before the family's own config among the bases.

    stock_config (`type`): The config of the library that the family extends.
    example (`str`): A checkpoint of it, for messages.

    Args:
        use_cmai (`bool`, *optional*, defaults to `False`):
            Inhibit the attention of text tokens to image tokens in the language model.
        cmai_max_ratio (`float`, *optional*, defaults to 0.6):
            Share of the image tokens that a text token stops attending to in the last layer, in [0, 1]. It grows
            linearly from 0 in the first layer.
        cmai_focus (`str`, *optional*, defaults to `"focus"`):
            How the focus of a text token on the image tokens is measured (Table 5 of the paper). `"focus"` is the method
            (equations 9 to 11), `"tia"` takes the token's own attention alone, `"sum"` and `"discounted_sum"` add up the
            attention of all text tokens up to it, and `"none"` inhibits nothing.
        cmai_attention (`str`, *optional*, defaults to `"scores"`):
            What is averaged over heads: the `"scores"` before the softmax, as in the paper, or the `"weights"` after it.
        cmai_discount (`float`, *optional*, defaults to 0.9):
            Factor of `"discounted_sum"` for each text token in between, in (0, 1].
    """

    stock_config: ClassVar[type[PreTrainedConfig]]
    example: ClassVar[str]

    use_cmai: bool = False
    cmai_max_ratio: float | int = validated_field(from_0_to_1, default=0.6)
    cmai_focus: Literal["none", "tia", "sum", "discounted_sum", "focus"] = "focus"
    cmai_attention: Literal["scores", "weights"] = "scores"
    cmai_discount: float | int = validated_field(share_above_0, default=0.9)

    def __post_init__(self: Any, **kwargs):
        check_sizes("vision_config", self.vision_config)
        check_sizes("text_config", self.text_config)
        kwargs.pop(_STOCK_SECTION.format(self.stock_config.model_type), None)
        super().__post_init__(**kwargs)

    def is_stock(self) -> bool:
        """Whether the stock class would give the same outputs."""
        return not self.use_vmtc and not self.use_cmai

    def to_diff_dict(self) -> dict[str, Any]:
        """The dictionary that is saved. The stock class loads it if `is_stock()`, and refuses it otherwise."""
        config_dict = super().to_diff_dict()
        stock = {"vision_feature_select_strategy": _STOCK_ERROR}
        if self.is_stock():
            added = {field.name for field in fields(self)} - {field.name for field in fields(self.stock_config)}
            stock = {
                key: value for key, value in config_dict.items() if key not in {*added, "architectures", "auto_map"}
            }
        model_type = self.stock_config.model_type
        return {**config_dict, _STOCK_SECTION.format(model_type): {**stock, "model_type": model_type}}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type, stock_type = config_dict.get("model_type"), cls.stock_config.model_type
        if model_type not in (cls.model_type, stock_type, None):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {model_type!r} model; VMTC and CMAI work on {stock_type!r} and "
                f"{cls.model_type!r} checkpoints here, such as {cls.example}."
            )
        return {**config_dict, "model_type": cls.model_type}, kwargs


def auto_map_of(file: str, prefix: str) -> dict[str, str]:
    """The `auto_map` of a family whose classes, called `prefix...`, are in a file."""
    return {
        "AutoConfig": f"{file}.{prefix}Config",
        "AutoModel": f"{file}.{prefix}Model",
        "AutoModelForImageTextToText": f"{file}.{prefix}ForConditionalGeneration",
        "AutoModelForMultimodalLM": f"{file}.{prefix}ForConditionalGeneration",
        "AutoProcessor": f"{file}.{prefix}Processor",
    }


def _check_config(config: VmtcCmaiConfig) -> None:
    """Raises, before anything is built, if fields do not go together or the attention cannot inhibit."""
    config.validate()  # arguments of `from_pretrained` were set after the config was made
    # CODEPATH: stock LLaVA checkpoints do not use CMAI.
    if config.use_cmai:
        check_attention(config.text_config)


class VmtcCmaiModelMixin:
    """
    What the models without a head share. It stands first among the bases, before the pretrained model of the family and the
    library's model.

    image_arguments (`tuple[str, ...]`): Further arguments of `forward` that `get_image_features` takes.
    """

    image_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self: Any, config: VmtcCmaiConfig):
        _check_config(config)
        super().__init__(config)  # type: ignore[call-arg]
        make_compressible(self.vision_tower)
        make_inhibitable(self.language_model)
        text_config = self.language_model.config
        # trf-ignore: TRF051 (SDPA cannot soft-cap)
        if soft_caps_attention(text_config) and "sdpa" in text_config._attn_implementation:
            self.language_model.set_attn_implementation("eager")

    def get_vision_features(self: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The features of images before the projector, compressed if the config says so. A frozen vision tower needs to compute
        them only once. Pass them to `forward` or `generate()` as `vision_features`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, 3, H, W)`):
                Normalised images.

        Returns:
            `torch.FloatTensor` of shape `(N, M, vision width)`. The widths of several feature layers add up.
        """
        config = self.config
        feature_layer = config.vision_feature_layer
        if pixel_values.dim() == 5:  # (B, I, 3, H, W)
            pixel_values = pixel_values.flatten(0, 1)
        kwargs = self._compression_arguments(pixel_values, feature_layer)
        features = self._run_vision_tower(
            pixel_values, feature_layer, config.vision_feature_select_strategy, **kwargs
        )[1]
        # The next replay of a CUDA graph would write over what the caller keeps.
        return features.clone() if is_compiled(self.vision_tower) else features

    def _compression_arguments(
        self: Any, pixel_values: torch.Tensor, feature_layer: Any, num_visual_tokens: int | None = None
    ) -> dict[str, Any]:
        """The keyword arguments with which the vision tower compresses images `(N, 3, H, W)`."""
        compression = compression_of_call(
            self.config, self.vision_tower, pixel_values, feature_layer, num_visual_tokens
        )
        if torch.compiler.is_compiling() or is_compiled(self.vision_tower):
            self._install_hooks()
        return {} if compression is None else {"compression": compression}

    def _run_vision_tower(
        self: Any, pixel_values: torch.Tensor, feature_layer: Any, select_strategy: str, **kwargs
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """The outputs of the vision tower, and the selected features `(N, M, vision width)`."""
        layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
        kwargs["output_hidden_states"] = True
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        return outputs, features[:, 1:] if select_strategy == "default" else features

    def _project(self: Any, vision_features: torch.Tensor) -> BaseModelOutputWithPooling:
        """The result of `get_image_features`, from that of `get_vision_features`."""
        layers = self.config.vision_feature_layer
        vision_config: Any = self.config.vision_config
        width = vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        if vision_features.dim() != 3 or vision_features.shape[-1] != width:
            raise ValueError(
                f"`vision_features` has shape {tuple(vision_features.shape)}, expected (images, visual tokens, {width}). "
                "Make them with `get_vision_features`."
            )
        embeddings: Any = self.get_input_embeddings()
        features: Any = list(self.multi_modal_projector(vision_features.to(embeddings.weight.dtype)))
        return BaseModelOutputWithPooling(pooler_output=features)

    def get_placeholder_mask(self: Any, input_ids: Any, inputs_embeds: Any, image_features: Any) -> torch.Tensor:
        """Which columns `(B, S, 1)` hold placeholders."""
        if not torch.compiler.is_compiling():
            return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)  # type: ignore[misc]
        # Without the library's check of their number, which torch 2.9 cannot compile.
        is_image = self._columns_of_token(self.config.image_token_id, input_ids, inputs_embeds)
        return is_image[..., None].to(inputs_embeds.device)

    def _check_placeholders(self: Any, is_image: torch.Tensor, features: list[torch.Tensor]) -> None:
        """Raises unless there are as many placeholders (True in `is_image` `(B, S)`) as visual tokens."""
        if torch.compiler.is_compiling():
            return
        found, lengths = int(is_image.sum()), [len(tokens) for tokens in features]
        if found == sum(lengths):
            return
        fewest, most = min(lengths), max(lengths)
        each = f"{len(lengths)} images of {most if fewest == most else f'{fewest} to {most}'}"
        remedy = (
            "Write `<image>` into the prompt before it goes to the processor. If the text was truncated (`max_length`), "
            "allow more tokens."
        )
        if found > 0:
            ours = type(self.config).__name__.removesuffix("Config") + "Processor"
            remedy = (
                f"That is {found / len(features):g} per image. Processor and model must have the same budget: pass "
                "the same `num_visual_tokens` to both calls, or call `set_visual_budget` on both. Without VMTC both have "
                f"`use_vmtc=False`. A stock processor has no budget: load a `{ours}`. "
                "`AutoProcessor` does so from a folder of `ta-llava compress`. If the text was truncated (`max_length`), "
                "allow more tokens."
            )
        raise ValueError(
            f"The text has {found} image placeholders (id {self.config.image_token_id}), but there are "
            f"{sum(lengths)} visual tokens ({each}). {remedy}"
        )

    @can_return_tuple
    def forward(  # type: ignore[misc]  # the library lists `position_ids` among the keyword arguments too
        self: Any,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_visual_tokens: int | None = None,
        vision_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        cmai_max_ratio: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        r"""
        The forward pass of the library's model, such as [`~transformers.LlavaModel`], with these arguments of its own:

        Args:
            num_visual_tokens (`int`, *optional*):
                Visual tokens per image in this call. It replaces that of the config. Call the processor with the same
                number. Images that come as `mm_encoder_outputs` are compressed already.
            vision_features (`torch.FloatTensor` of shape `(N, M, vision width)`, *optional*):
                Replaces `pixel_values`: the result of `get_vision_features`.
            cmai_max_ratio (`float`, *optional*):
                Share of the image tokens that CMAI inhibits in the last layer in this call, in [0, 1]. It replaces that of
                the config. The tokens that follow in a cache may have another one.

        Raises:
            `ValueError`: The placeholders do not match the visual tokens; images are given twice or have a wrong shape;
                `num_visual_tokens` comes with `vision_features`; the cache was filled without CMAI; or `cmai_max_ratio` is
                not in [0, 1], or is given while `use_cmai` is off.
        """
        cache = cache_of_call(past_key_values, cache)
        if cmai_max_ratio is not None:
            self._check_ratio(cmai_max_ratio)
        image_arguments = {name: kwargs.pop(name) for name in self.image_arguments if name in kwargs}
        _check_given_once(
            pixel_values=pixel_values, vision_features=vision_features, mm_encoder_outputs=mm_encoder_outputs
        )
        if vision_features is not None:
            _check_not_compressed_again(num_visual_tokens)
            mm_encoder_outputs = {**(mm_encoder_outputs or {}), "image": self._project(vision_features)}
        elif pixel_values is not None:
            features = self.get_image_features(
                pixel_values=pixel_values,
                image_sizes=image_sizes,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                num_visual_tokens=num_visual_tokens,
                **image_arguments,
            )
            mm_encoder_outputs = {**(mm_encoder_outputs or {}), "image": features}

        # Check the placeholders; a training batch without images runs a blank one
        images: Any = (mm_encoder_outputs or {}).get("image")
        if images is not None:
            is_image = self._columns_of_token(self.config.image_token_id, input_ids, inputs_embeds)
            self._check_placeholders(is_image, images.pooler_output)
        elif self.training and torch.is_grad_enabled():
            input_ids, inputs_embeds = None, self._embed_with_blank_image(input_ids, inputs_embeds)

        # Prepare CMAI
        if use_cache is not None:
            kwargs["use_cache"] = use_cache
        # CODEPATH: stock LLaVA checkpoints do not use CMAI.
        if self.config.use_cmai:
            cache, kwargs["cmai"] = self._prepare_inhibition(
                input_ids, inputs_embeds, attention_mask, cache, use_cache, images is not None, cmai_max_ratio
            )

        # The library's own forward
        outputs = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        if self.config.use_cmai and kwargs["cmai"].num_calls == 0:
            raise ValueError(
                f"The attention of {type(self.language_model).__name__} does not pass on its keyword arguments, so CMAI "
                "does not reach it. Use another language model, or `use_cmai=False`."
            )
        return outputs

    def _blank_image(self: Any) -> dict[str, Any]:
        """The arguments of `get_image_features` for an image without content."""
        return {"pixel_values": blank_image(self.config, self.vision_tower)}

    def _embed_with_blank_image(
        self: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """
        The embeddings `(B, S, d)` of a training batch without images. The tower and the projector run on a blank image (see
        `blank_image`), and the sum of an empty slice of its features is added: exactly 0, even if they are not finite, but
        it connects their parameters to the loss.
        """
        # Tower and projector first, as with images: other processes wait for the same weights in the same order.
        blank = self.get_image_features(**self._blank_image())
        zero = blank.pooler_output[0][:0].sum()
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        return inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype)

    def _check_ratio(self: Any, cmai_max_ratio: float) -> None:
        """Raises unless CMAI is on and the ratio for one call is in [0, 1]."""
        if not self.config.use_cmai:
            raise ValueError(
                f"`cmai_max_ratio` is {cmai_max_ratio}, but `use_cmai` is off. Turn it on first: "
                "`model.config.use_cmai = True`."
            )
        is_number = isinstance(cmai_max_ratio, (int, float)) and not isinstance(cmai_max_ratio, bool)
        if not is_number or not 0 <= cmai_max_ratio <= 1:
            raise ValueError(f"`cmai_max_ratio` must be a number from 0 to 1, got {cmai_max_ratio!r}.")

    def _image_columns(self: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Which columns `(B, S)` hold image tokens, for CMAI."""
        return self._columns_of_token(self.config.image_token_id, input_ids, inputs_embeds)

    def _prepare_inhibition(
        self: Any,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        cache: Cache | None,
        use_cache: bool | None,
        has_images: bool,
        max_ratio: float | None,
    ) -> tuple[Cache | None, Inhibition]:
        """The cache, which is made if the call has none and wants one, and the `Inhibition` of this call."""
        check_attention(self.config.text_config)
        checkpointing = self.training and getattr(self.language_model, "gradient_checkpointing", False)
        text_config: Any = self.config.text_config
        use_cache = text_config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not checkpointing:
            cache = DynamicCache(config=text_config)
        cmai_cache = None if checkpointing else cache  # a recomputed layer would write its rows twice
        past_length: Any = 0
        if cmai_cache is not None:
            prepare_cache(cmai_cache, text_config)
            past_length = cmai_cache.get_seq_length()
        columns: Any = input_ids if inputs_embeds is None else inputs_embeds
        batch_size, num_columns = columns.shape[:2]
        is_image: torch.Tensor | None = None
        is_text = torch.ones(batch_size, num_columns, dtype=torch.bool, device=columns.device)
        # A single column without images is a decoding step. Its token counts as text, even if it is a placeholder.
        if num_columns > 1 or has_images:
            tokens = non_padding_columns(attention_mask, batch_size, num_columns, columns.device, past_length)
            is_image = self._image_columns(input_ids, columns).to(columns.device)
            is_text = ~is_image if tokens is None else tokens & ~is_image
        return cache, Inhibition(self.config, is_image, is_text, past_length, cmai_cache, max_ratio)


def _check_given_once(**images: Any) -> None:
    """Raises if more than one of these arguments holds images."""
    if images.get("mm_encoder_outputs") is not None:
        images["mm_encoder_outputs"] = images["mm_encoder_outputs"].get("image")
    given = [f"`{name}`" for name, value in images.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give {' or '.join(given)}, not both.")


def _check_not_compressed_again(num_visual_tokens: int | None) -> None:
    """Raises if a call that is given `vision_features` has a budget too."""
    if num_visual_tokens is not None:
        raise ValueError(
            f"`num_visual_tokens` is {num_visual_tokens}, but `vision_features` are compressed already. Leave it out, or "
            "give `pixel_values`."
        )


class VmtcCmaiHeadMixin:
    """
    What the models with a language modelling head share. It stands first among the bases, before the pretrained model of the
    family, the library's head and `GenerationMixin`.

    model_class (`type`): The model without a head.
    output_class (`type`): What `forward` returns.
    """

    model_class: ClassVar[Any]
    output_class: ClassVar[Any]

    def __init__(self: Any, config: VmtcCmaiConfig):
        _check_config(config)
        PreTrainedModel.__init__(self, config)  # that of the stock head would build the stock model
        self.model = self.model_class(config)
        text_config: Any = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def generate(self: Any, inputs=None, generation_config=None, *args, **kwargs):
        r"""
        Answers prompts. It takes the outputs of the processor (`**inputs`), the arguments of
        [`~transformers.GenerationMixin.generate`], such as `max_new_tokens`, `do_sample`, `num_beams` or `streamer`, and:

        Args:
            num_visual_tokens (`int`, *optional*):
                Visual tokens per image in this call. It replaces that of the config and needs `use_vmtc`. Call the processor
                with the same number.
            cmai_max_ratio (`float`, *optional*):
                Share of the image tokens that CMAI inhibits in the last layer, for all tokens of this call, in [0, 1]. It
                replaces that of the config and needs `use_cmai`.
            vision_features (`torch.FloatTensor` of shape `(N, M, vision width)`, *optional*):
                Replaces `pixel_values`: the result of `get_vision_features`. Only LLaVA itself takes it.

        Returns:
            `torch.LongTensor` of shape `(B, S + new tokens)`: The prompts and their answers. With
            `return_dict_in_generate=True`, an output that also has the scores and states you asked for.
        """
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def get_image_features(self: Any, pixel_values: torch.Tensor, *args, **kwargs) -> Any:
        """See that of the model without a head."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    def get_vision_features(self: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`VmtcCmaiModelMixin.get_vision_features`]."""
        return self.model.get_vision_features(pixel_values)

    def _prepare_multimodal_encoder_kwargs_for_generation(self: Any, model_kwargs):
        # `generate()` encodes the images here, once. From here on it knows how to repeat them for beams.
        vision_features = model_kwargs.pop("vision_features", None)
        if vision_features is not None:
            encoded, pixel_values = model_kwargs.get("mm_encoder_outputs"), model_kwargs.get("pixel_values")
            _check_given_once(pixel_values=pixel_values, vision_features=vision_features, mm_encoder_outputs=encoded)
            _check_not_compressed_again(model_kwargs.get("num_visual_tokens"))
            model_kwargs["mm_encoder_outputs"] = {**(encoded or {}), "image": self.model._project(vision_features)}
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)  # type: ignore[misc]

    def _prefill(self: Any, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache, inputs_embeds = model_kwargs.get(CACHE), model_kwargs.get("inputs_embeds")
        is_image = None
        if is_compiled(self):  # what a graph cannot do is done here
            ids = input_ids if inputs_embeds is None else None
            is_image = self.model._image_columns(ids, inputs_embeds)
            past_length = 0 if cache is None else int(cache.get_seq_length())
            if is_image.shape[1] > past_length:  # the images are those of the new columns
                is_image = is_image[:, past_length:]
            images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
            if images is not None:
                self.model._check_placeholders(is_image, images.pooler_output)
        # CODEPATH: stock LLaVA checkpoints do not use CMAI.
        if self.config.use_cmai:
            self._check_whole_prefill(input_ids, generation_config, "CMAI must see all of its text and image tokens")
            if cache is not None and is_image is not None:
                prepare_cache(cache, self.config.text_config)
                if cache is self._static_cache and cache.get_seq_length() == 0:
                    reserve_state(cache, is_image, self.config.cmai_focus)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self: Any, *args, **kwargs):
        """CMAI refuses continuous batching, which packs requests into one row: each must see its own image only."""
        if self.config.use_cmai:
            raise ValueError(
                "CMAI does not support continuous batching, which packs several requests into one row. Use `generate()` "
                "with a padded batch, or `use_cmai=False`."
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self: Any, *args, **kwargs):
        # Tokens that are looked up in the prompt must not be placeholders, since there is no image for them.
        suppress = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device)
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), suppress])
        # An assistant is called with the arguments of this model. Without CMAI it takes no ratio.
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not getattr(assistant.config, "use_cmai", False):
            kwargs["model_kwargs"] = {**kwargs["model_kwargs"], "cmai_max_ratio": None}
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]

    @can_return_tuple
    def forward(  # type: ignore[misc]  # the library lists `position_ids` among the keyword arguments too
        self: Any,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_visual_tokens: int | None = None,
        vision_features: torch.Tensor | None = None,
        cache: Cache | None = None,
        cmai_max_ratio: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`):
                Token ids, with one placeholder (`config.image_token_id`) for each visual token.
            pixel_values (`torch.FloatTensor` of shape `(N, 3, H, W)`, *optional*):
                Normalised images of all rows, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                1 for tokens, 0 for padding; or a mask as `generate()` prepares it.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Position of each token in its row.
            past_key_values, cache (`Cache`, *optional*):
                Keys and values of the columns before `input_ids`. The library calls it `cache` since 5.24.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, d)`, *optional*):
                Replaces `input_ids`.
            vision_feature_layer, vision_feature_select_strategy (*optional*):
                Replace those of the config.
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Token ids to predict, aligned with `input_ids`. -100 takes no loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits only for this number of last columns (0: for all), or for the given column indices.
            image_sizes (`torch.LongTensor` of shape `(N, 2)`, *optional*):
                Sizes of images that differ in size, for towers that take them (Pixtral). Not supported together with VMTC or
                `spd_factor`.
            mm_encoder_outputs (`dict`, *optional*):
                Replaces `pixel_values`: `{"image": model.get_image_features(...)}`.
            num_visual_tokens, vision_features, cmai_max_ratio (*optional*):
                See [`VmtcCmaiModelMixin.forward`].

        Raises:
            `ValueError`: See [`VmtcCmaiModelMixin.forward`].

        Example: see that of the class, such as [`VmtcCmaiLlavaForConditionalGeneration`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            num_visual_tokens=num_visual_tokens,
            vision_features=vision_features,
            cache=cache,
            cmai_max_ratio=cmai_max_ratio,
            **kwargs,
        )
        logits = self._predict(outputs.last_hidden_state, logits_to_keep)

        loss = None
        if labels is not None:
            if self.training and not is_tracing(labels) and (labels == self.config.image_token_id).any():
                logger.warning_once(
                    "`labels` hold placeholders of images. They count in the loss, as in stock LLaVA, but predicting them "
                    "is useless. Set them to -100: `labels[labels == model.config.image_token_id] = -100`."
                )
            text_config: Any = self.config.text_config
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        shared = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return self.output_class(loss=loss, logits=logits, **shared)


class VmtcCmaiImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    num_visual_tokens (`int`, *optional*):
        Visual tokens per image in this call. It replaces that of the processor. Call the model with the same number.
    """

    num_visual_tokens: int | None


class VmtcCmaiProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = PROCESSING_DEFAULTS  # type: ignore[misc]
    images_kwargs: VmtcCmaiImagesKwargs  # type: ignore[misc]


class VmtcCmaiProcessorMixin(TypedPlaceholdersMixin, VisualBudgetMixin):
    """
    What the processors share. It stands before the library's processor among the bases.

    has_rows_of_images (`bool`): Whether the image processor must know which images belong to one prompt.
    video_remedy (`str`): What a user who gives it a video can do.
    """

    has_rows_of_images: ClassVar[bool] = False
    video_remedy: ClassVar[str] = "Pass the frames of a video as `images`."

    valid_processor_kwargs: Any = VmtcCmaiProcessorKwargs

    def __call__(
        self: Any,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: Any = None,
        **kwargs: Unpack[VmtcCmaiProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepares images and text as the library's processor does, such as [`LlavaProcessor`], with these differences:

        Args:
            images (image, list of images, or list of lists of images, *optional*):
                An image is a path, a URL, a base64 string, bytes, an open file, a PIL image, an array or a tensor. Arrays
                and tensors stay as they are, as in stock LLaVA. All others become RGB in one way: transparency is laid on
                white, 16 bits are scaled to 8, the EXIF orientation is applied. A nested list has one list per prompt, which
                may be empty.
            num_visual_tokens (`int`, *optional*):
                Visual tokens per image in this call. Pass the same number to the model or `generate()`.

        Raises:
            `ValueError`: An image cannot be read, the numbers of images and of `<image>`s differ, or the budget is not
                possible.
        """
        if videos is not None:
            raise ValueError(f"{type(self).__name__} does not read `videos`. {self.video_remedy}")
        opened: Any = open_images(images)
        texts = [text] if isinstance(text, str) else text or []
        expected = [sample.count(self.image_token) for sample in texts]
        if isinstance(opened, list) and any(row is None or isinstance(row, list) for row in opened):
            # Each prompt has its own images, or none.
            rows: Any = [row if isinstance(row, list) else [] if row is None else [row] for row in opened]
            given = [row for row in rows if row]
            opened = (given if self.has_rows_of_images else [image for row in given for image in row]) or None
            counts = [len(row) for row in rows]
        else:
            expected = [sum(expected)]
            flat: Any = [] if opened is None else make_flat_list_of_images(opened)
            counts = [len(flat)]
        if text is not None and counts != expected:
            raise ValueError(
                f"The prompts have {', '.join(map(str, expected))} {self.image_token}, but got "
                f"{', '.join(map(str, counts))} images. Write one {self.image_token} per image into the text, or give "
                "the images in the messages of `apply_chat_template`."
            )
        return super().__call__(images=opened, text=text, **kwargs)  # type: ignore[misc]

    def _process_images(self: Any, images: ImageInput, num_visual_tokens: int | None = None, **kwargs):
        pixels, _ = super()._process_images(resize_first(images, self.image_processor, **kwargs), **kwargs)  # type: ignore[misc]
        count = len(pixels["pixel_values"])
        return pixels, [self.replace_image_token(pixels, index, num_visual_tokens) for index in range(count)]


def register_checkpoints(model_class: Any, head_class: Any) -> None:
    """
    Registers the classes of a family where the library looks for them. Without it, the library would not rename the keys of
    checkpoints for classes that are not its own, and the head would be random. `transformers serve` looks for models that
    take images.
    """
    config_class = head_class.config_class
    for one_class, name in (
        (head_class, config_class.stock_config.model_type),
        (model_class, model_class.__name__.removeprefix("VmtcCmai")),
    ):
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(name)
        conversion_mapping.register_checkpoint_conversion_mapping(one_class.__name__, mapping, overwrite=True)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = head_class.__name__


__all__ = ["VmtcCmaiConfig", "VmtcCmaiHeadMixin", "VmtcCmaiModelMixin", "VmtcCmaiProcessorMixin"]
