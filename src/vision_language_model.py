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
"""What the models of both systems have in common: a vision tower, a language model, and a repo on the Hub."""

import os
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from .library_versions import soft_caps_attention
from .safe_loading import SafetensorsMixin
from .vmtc import VisualBudgetMixin


def kept_columns(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """The columns that `logits_to_keep` asks for: the last `logits_to_keep`, all if it is 0, or the given indices."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def is_compiled(module: Any) -> bool:
    """Whether calls of a module are compiled, by `module.compile()` or `module.forward = torch.compile(module.forward)`."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    forward = getattr(module, "forward", None)
    is_disabled = getattr(forward, "_torchdynamo_disable", False)  # by `torch.compiler.disable`
    return hasattr(forward, "_torchdynamo_orig_callable") and not is_disabled


class VisionLanguageModelMixin(VisualBudgetMixin, SafetensorsMixin):
    """
    For models with a `vision_tower` and a `language_model`, before `PreTrainedModel` among the bases.

    auto_map (`dict[str, str]`): The auto classes that load the model, its config and its processor from its own code.
    """

    auto_map: ClassVar[dict[str, str]]
    _static_cache: Cache | None = None
    _static_keys: torch.Tensor | None = None

    def initialize_weights(self: Any) -> None:
        # In code outside of the library, it skips containers without parameters of their own. Some of its models initialise
        # through these, so the sub-models do their own part first.
        self.base_model.vision_tower.initialize_weights()
        self.base_model.language_model.initialize_weights()
        super().initialize_weights()  # type: ignore[misc]

    def set_attn_implementation(self: Any, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """
        Sets the attention of the whole model or of its parts (`{"text_config": ..., "vision_config": ...}`), as in the
        library. SDPA cannot soft-cap: if you ask for it, a language model that soft-caps (Gemma-2) gets eager attention.
        """
        # CODEPATH: Gemma-2 caps its attention scores, other language models do not.
        if soft_caps_attention(self.config.text_config):
            if attn_implementation == "sdpa":
                attn_implementation = dict.fromkeys(("", *self.config.sub_configs), "sdpa")
            if isinstance(attn_implementation, dict) and attn_implementation.get("text_config") in (
                "sdpa",
                {"": "sdpa"},
            ):
                attn_implementation = {**attn_implementation, "text_config": "eager"}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        if self._auto_class is not None:
            # The library writes only the entry of one auto class.
            self.config.auto_map = dict(self.auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @torch.compiler.assume_constant_result
    def _install_hooks(self: Any) -> bool:
        """
        Installs the hooks that capture hidden states of the tower. The library does so at the first call that asks for them,
        behind a lock that cannot be compiled. Here it is done while a graph is being made or before, not in it.
        """
        # In some towers a part has the hooks.
        if not any(getattr(part, "_output_capturing_hooks_installed", False) for part in self.vision_tower.modules()):
            output_capturing.maybe_install_capturing_hooks(self.vision_tower)
        return True

    def _prepare_static_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        """
        The static cache of `generate()`. A compiled model uses the same one again, emptied, as long as it fits: the graphs
        find it at the same addresses. It is allocated here, since what a CUDA graph allocates does not outlive the graph.
        """
        cache: Any = super()._prepare_static_cache(*args, **kwargs)  # type: ignore[misc]
        device, dtype = self.base_model.language_model.device, self.base_model.language_model.dtype
        if not is_compiled(self) or torch.is_autocast_enabled(device.type):  # autocast decides the dtype of the keys
            return cache
        shape = self._get_static_cache_init_shape()
        if shape is None or cache.offloading:
            return cache
        kept, batch_size = self._static_cache, kwargs["batch_size"]
        fits = kept is not None and _states_of(kept) == _states_of(cache, batch_size, dtype, device)
        if fits and kept.layers[0].keys is self._static_keys:  # beams replace the keys by copies
            kept.reset()
            return kept
        self._static_cache = self._static_keys = None  # frees it before the next is allocated
        cache.early_initialization(batch_size, *shape, dtype=dtype, device=device)
        self._static_cache, self._static_keys = cache, cache.layers[0].keys
        return cache

    def _check_whole_prefill(self: Any, input_ids: torch.Tensor, generation_config: Any, reason: str) -> None:
        """Raises `ValueError` if `generate()` is asked to prefill a prompt with images in chunks."""
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is not None and self._columns_of_token(self.config.image_token_id, input_ids, None).any():
            raise ValueError(
                f"A prompt with images cannot be prefilled in chunks of {chunk_size} tokens: {reason}. Pass "
                "`prefill_chunk_size=None`."
            )

    def _columns_of_token(
        self: Any, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Which columns `(B, S)` hold a token: by its id or, where there are no ids, by its embedding."""
        if input_ids is not None:
            return input_ids == token_id
        if inputs_embeds is None:
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        embedding = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == embedding.to(inputs_embeds.dtype)).all(dim=-1)

    def _predict(self: Any, hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Logits `(B, columns, vocabulary)` of `hidden_states` `(B, S, d)`, soft-capped where the language model does so."""
        logits = self.lm_head(hidden_states[:, kept_columns(logits_to_keep), :])
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is not None:  # Gemma-2; stock LLaVA leaves it out
            logits = torch.tanh(logits / softcap) * softcap
        return logits


def _states_of(cache: Any, *states: Any) -> list[Any]:
    """
    What two static caches of a model have in common if one can take the place of the other: for each layer its kind and its
    length, then the batch size, dtype and device of its keys, and whether they were made in inference mode. `states` are
    those of a cache that has no keys yet.
    """
    if not states:
        keys = cache.layers[0].keys
        states = len(keys), keys.dtype, keys.device, keys.is_inference()
    else:
        states = *states, torch.is_inference_mode_enabled()
    return [*states, *((layer.is_sliding, layer.max_cache_len) for layer in cache.layers)]
