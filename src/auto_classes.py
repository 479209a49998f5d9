"""Registers the classes of the package with the Auto classes of Transformers, and has saved models carry their code."""

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
from .vmtc_cmai_llava_next import (
    VmtcCmaiLlavaNextConfig,
    VmtcCmaiLlavaNextForConditionalGeneration,
    VmtcCmaiLlavaNextModel,
    VmtcCmaiLlavaNextProcessor,
)
from .vmtc_cmai_llava_onevision import (
    VmtcCmaiLlavaOnevisionConfig,
    VmtcCmaiLlavaOnevisionForConditionalGeneration,
    VmtcCmaiLlavaOnevisionModel,
    VmtcCmaiLlavaOnevisionProcessor,
)
from .vmtc_cmai_patch import (
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
    VmtcCmaiLlavaModel,
    VmtcCmaiLlavaProcessor,
)


for _config, _model, _head, _processor in (
    (TaLlavaConfig, TaLlavaModel, TaLlavaForConditionalGeneration, TaLlavaProcessor),
    (VmtcCmaiLlavaConfig, VmtcCmaiLlavaModel, VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor),
    (
        VmtcCmaiLlavaNextConfig,
        VmtcCmaiLlavaNextModel,
        VmtcCmaiLlavaNextForConditionalGeneration,
        VmtcCmaiLlavaNextProcessor,
    ),
    (
        VmtcCmaiLlavaOnevisionConfig,
        VmtcCmaiLlavaOnevisionModel,
        VmtcCmaiLlavaOnevisionForConditionalGeneration,
        VmtcCmaiLlavaOnevisionProcessor,
    ),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _head, exist_ok=True)
    AutoModelForMultimodalLM.register(_config, _head, exist_ok=True)  # for `transformers serve`
    AutoProcessor.register(_config, _processor, exist_ok=True)

    # A saved model carries its code and loads elsewhere with `trust_remote_code=True`, without this package.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _head.register_for_auto_class("AutoModelForImageTextToText")
    _processor.register_for_auto_class()
