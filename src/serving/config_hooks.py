"""What vLLM checks and sets in its configs before it builds a model of this package."""

from typing import Any

from transformers import LlavaConfig
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..vmtc import TRAINING_FREE_VMTC, single_feature_layer
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig
from .media import read_images_with_package


# Under the name of vLLM, whose logging then shows what is logged here.
logger = init_logger(f"vllm.{__name__}")

RENDERER = "ta_llava"  # its name in the registry of vLLM
TOWERS = ("clip_vision_model", "siglip_vision_model")
BACKBONES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")


class VmtcLlavaHook(VerifyAndUpdateConfig):
    """Hook of a LLaVA with VMTC, which may be a stock checkpoint."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """
        Gives a stock LLaVA that `hf_overrides` turn into one with VMTC the config of this package, and has this package read
        the images.

        Raises:
            `ValueError`: The config asks for CMAI, for several feature layers, or for a tower that vLLM cannot compress.
        """
        read_images_with_package(model_config)
        config = model_config.hf_config
        if config.model_type not in (LlavaConfig.model_type, VmtcCmaiLlavaConfig.model_type):
            raise ValueError(
                f"The checkpoint is a {config.model_type!r}, but natively vLLM serves VMTC on {LlavaConfig.model_type!r} "
                "alone. Write a folder by `ta-llava compress`, and serve it with `--model-impl transformers "
                "--trust-remote-code`."
            )
        if config.model_type != VmtcCmaiLlavaConfig.model_type:
            fields = {**TRAINING_FREE_VMTC, **config.to_dict(), "model_type": VmtcCmaiLlavaConfig.model_type}
            vmtc_config: Any = VmtcCmaiLlavaConfig.from_dict(fields)
            # vLLM holds the text config at a second place, and has already set fields of it.
            vmtc_config.text_config = config.text_config
            model_config.hf_config = config = vmtc_config
        if config.use_cmai:
            raise ValueError(
                "CMAI changes the attention scores of every layer, which the kernels of vLLM do not hand out. Serve the "
                "model without it, `--hf-overrides '{\"use_cmai\": false}'`, or answer with `generate()`."
            )
        if single_feature_layer(config.vision_feature_layer) is None:
            raise ValueError(
                f"`vision_feature_layer` is {config.vision_feature_layer}, but vLLM reads one layer of the tower only. Use "
                '`generate()`, or `model_impl="transformers"`.'
            )
        if config.vision_config.model_type not in TOWERS:
            raise ValueError(
                f"The vision tower is a {config.vision_config.model_type!r}. Here vLLM knows {', '.join(TOWERS)}. Use "
                '`model_impl="transformers"`.'
            )


class TaLlavaHook(VerifyAndUpdateConfig):
    """Hook of a TA-LLaVA, whose prefix must see the whole prompt in one step."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """
        Chooses the renderer of TA-LLaVA, and has this package read the images.

        Raises:
            `ValueError`: The language model is not one of `BACKBONES`.
        """
        read_images_with_package(model_config)
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = RENDERER
        text_config = model_config.hf_config.text_config
        if text_config.model_type not in BACKBONES:
            raise ValueError(
                f"The language model is a {text_config.model_type!r}. On vLLM, TA-LLaVA knows {', '.join(BACKBONES)}. Use "
                "`generate()`."
            )

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Turns chunked prefill and prefix caching off, also if you ask for them. A step can hold the longest prompt."""
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        if scheduler.enable_chunked_prefill or cache.enable_prefix_caching:
            logger.info(
                "TA-LLaVA: chunked prefill and prefix caching are off, because the prefix reads the whole instruction in "
                "one step."
            )
        scheduler.enable_chunked_prefill = False
        scheduler.disable_chunked_mm_input = True
        scheduler.long_prefill_token_threshold = 0
        scheduler.max_num_batched_tokens = max(
            scheduler.max_num_batched_tokens, vllm_config.model_config.max_model_len
        )
        cache.enable_prefix_caching = False


def check_whole_prompts(vllm_config: Any) -> None:
    """Raises `ValueError` if vLLM may split a prompt of a TA-LLaVA, because something has undone the hook's settings."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    settings = {
        "enable_chunked_prefill": scheduler.enable_chunked_prefill,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
    }
    if any(settings.values()) or scheduler.max_num_batched_tokens < vllm_config.model_config.max_model_len:
        raise ValueError(
            f"TA-LLaVA needs each prompt whole in one step, but the settings are {settings}, and a step holds "
            f"{scheduler.max_num_batched_tokens} tokens of a context of {vllm_config.model_config.max_model_len}. Set the "
            "first three to False or 0 and `max_num_batched_tokens` to the context."
        )


def split_graphs(vllm_config: Any, operator: str) -> None:
    """
    Has vLLM split its graphs at an operator that must run anew in every step. Call it before the language model is built.

    Raises:
        `ValueError`: Whole steps with prompts would be replayed as CUDA graphs, in which the operator does not run.
    """
    compilation = vllm_config.compilation_config
    if compilation.splitting_ops:
        compilation.splitting_ops.append(operator)
    mode = compilation.cudagraph_mode
    of_prompts = CUDAGraphMode.NONE if mode is None else mode.mixed_mode()
    if of_prompts == CUDAGraphMode.FULL or (of_prompts == CUDAGraphMode.PIECEWISE and not compilation.splitting_ops):
        raise ValueError(
            f"With `cudagraph_mode` {mode.name} and `splitting_ops` {compilation.splitting_ops}, a prompt would be "
            "replayed as one CUDA graph, in which its prefix does not read. Use the defaults of vLLM, or "
            "`-cc.cudagraph_mode=FULL_DECODE_ONLY`."
        )
