"""
Both systems on vLLM. `register` is the plugin: vLLM calls it in each of its processes, by the entry point
`vllm.general_plugins`. Nothing else of the package imports this folder, and importing it does not import vLLM.
"""

import logging


def register() -> None:
    """
    Tells vLLM the two architectures, and Transformers their configs and processors. vLLM calls it wherever the package is
    installed, also for other models. So if vLLM is too old, it warns, and the other models start.
    """
    try:
        _register()
    except ImportError as error:
        # Under the name of vLLM, whose logging then shows it
        logging.getLogger(f"vllm.{__name__}").warning(
            "ta_llava needs vLLM 0.30 or newer, so its models are not registered: %s", error
        )


def _register() -> None:
    from transformers.models.pixtral import modeling_pixtral
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from .. import auto_classes  # noqa: F401 - registers configs and processors, so that no code of a checkpoint is run
    from .config_hooks import RENDERER, TaLlavaHook, VmtcLlavaHook

    # The LLaVA of vLLM 0.30 imports them for Pixtral towers. Transformers 5.17 has renamed them.
    for name in ("PixtralRotaryEmbedding", "position_ids_in_meshgrid"):
        vars(modeling_pixtral).setdefault(name, None)
    for architecture, module, name, hook in (
        ("VmtcCmaiLlavaForConditionalGeneration", "vmtc_llava", "VllmVmtcLlava", VmtcLlavaHook),
        ("TaLlavaForConditionalGeneration", "ta_llava", "VllmTaLlava", TaLlavaHook),
    ):
        ModelRegistry.register_model(architecture, f"{__name__}.{module}:{name}")
        MODELS_CONFIG_MAP[architecture] = hook
    if RENDERER not in RENDERER_REGISTRY.renderers:  # vLLM may call this several times
        # vLLM chooses renderer and tokenizer by one name. The tokenizer is its usual one.
        RENDERER_REGISTRY.register(RENDERER, f"{__name__}.renderer", "TaLlavaRenderer")
        TokenizerRegistry.register(RENDERER, "vllm.tokenizers.hf", "CachedHfTokenizer")
