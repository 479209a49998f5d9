"""TA-LLaVA for Transformers. Importing the package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_ta_llava import TaLlavaConfig
from .modeling_ta_llava import TaLlavaForConditionalGeneration, TaLlavaModel


AutoConfig.register(TaLlavaConfig.model_type, TaLlavaConfig, exist_ok=True)
AutoModel.register(TaLlavaConfig, TaLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(TaLlavaConfig, TaLlavaForConditionalGeneration, exist_ok=True)
