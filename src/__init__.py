"""TA-LLaVA for Transformers. Importing the package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_ta_llava import TaLlavaConfig
from .modeling_ta_llava import TaLlavaForConditionalGeneration, TaLlavaModel
from .processing_ta_llava import TaLlavaProcessor


AutoConfig.register(TaLlavaConfig.model_type, TaLlavaConfig, exist_ok=True)
AutoModel.register(TaLlavaConfig, TaLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(TaLlavaConfig, TaLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(TaLlavaConfig, TaLlavaProcessor, exist_ok=True)

# What is saved carries its code and loads elsewhere with `trust_remote_code=True`, without this package.
TaLlavaConfig.register_for_auto_class()
TaLlavaModel.register_for_auto_class("AutoModel")
TaLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
TaLlavaProcessor.register_for_auto_class()

__all__ = ["TaLlavaConfig", "TaLlavaForConditionalGeneration", "TaLlavaModel", "TaLlavaProcessor"]
