"""TA-LLaVA, and VMTC and CMAI for LLaVA. Importing the package registers their classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_ta_llava import TaLlavaConfig
from .modeling_ta_llava import TaLlavaForConditionalGeneration, TaLlavaModel
from .processing_ta_llava import TaLlavaProcessor
from .vmtc_cmai_patch import (
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
    VmtcCmaiLlavaModel,
    VmtcCmaiLlavaProcessor,
)


__version__ = "0.1.0"

for _config, _model, _head, _processor in (
    (TaLlavaConfig, TaLlavaModel, TaLlavaForConditionalGeneration, TaLlavaProcessor),
    (VmtcCmaiLlavaConfig, VmtcCmaiLlavaModel, VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _head, exist_ok=True)
    AutoModelForMultimodalLM.register(_config, _head, exist_ok=True)  # for `transformers serve`
    AutoProcessor.register(_config, _processor, exist_ok=True)

    # What is saved carries its code and loads elsewhere with `trust_remote_code=True`, without this package.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _head.register_for_auto_class("AutoModelForImageTextToText")
    _processor.register_for_auto_class()

__all__ = [
    "TaLlavaConfig",
    "TaLlavaForConditionalGeneration",
    "TaLlavaModel",
    "TaLlavaProcessor",
    "VmtcCmaiLlavaConfig",
    "VmtcCmaiLlavaForConditionalGeneration",
    "VmtcCmaiLlavaModel",
    "VmtcCmaiLlavaProcessor",
]
