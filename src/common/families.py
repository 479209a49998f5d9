"""The families of LLaVAs that VMTC and CMAI extend, by their `model_type`."""

from dataclasses import dataclass
from typing import Any

from transformers import LlavaNextProcessor, LlavaOnevisionProcessor, LlavaProcessor

from ..vmtc_cmai_llava_next import VmtcCmaiLlavaNextForConditionalGeneration, VmtcCmaiLlavaNextProcessor
from ..vmtc_cmai_llava_onevision import (
    VmtcCmaiLlavaOnevisionForConditionalGeneration,
    VmtcCmaiLlavaOnevisionProcessor,
)
from ..vmtc_cmai_patch import VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor


@dataclass(frozen=True)
class Family:
    """
    A family of LLaVAs.

    Args:
        head (`type`): The model with VMTC, CMAI and a language modelling head. It names its config and its base model.
        processor (`type`): Its processor.
        stock_processor (`type`): That of the library.
    """

    head: Any
    processor: Any
    stock_processor: Any

    @property
    def config(self) -> Any:
        return self.head.config_class

    @property
    def stock_type(self) -> str:
        """The `model_type` of the library's checkpoints."""
        return self.config.stock_config.model_type

    @property
    def types(self) -> tuple[str, str]:
        """The `model_type`s of checkpoints without VMTC and CMAI, and with them."""
        return self.stock_type, self.config.model_type


FAMILIES = (
    Family(VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor, LlavaProcessor),
    Family(VmtcCmaiLlavaNextForConditionalGeneration, VmtcCmaiLlavaNextProcessor, LlavaNextProcessor),
    Family(VmtcCmaiLlavaOnevisionForConditionalGeneration, VmtcCmaiLlavaOnevisionProcessor, LlavaOnevisionProcessor),
)
LLAVA_TYPES = tuple(model_type for family in FAMILIES for model_type in family.types)
VIEWS_TYPES = tuple(
    model_type for family in FAMILIES for model_type in family.types if hasattr(family.config, "image_grid_pinpoints")
)
COMPRESSED_TYPES = tuple(family.config.model_type for family in FAMILIES)


def family_of(model_type: str | None) -> Family:
    """
    The family of a `model_type`, stock or with VMTC and CMAI.

    Raises:
        `ValueError`: VMTC and CMAI do not work on it. The message lists the types that they work on.
    """
    for family in FAMILIES:
        if model_type in family.types:
            return family
    *first, last = (repr(family.stock_type) for family in FAMILIES)
    raise ValueError(
        f"it is a {model_type!r} model; VMTC and CMAI work on {', '.join(first)} and {last} checkpoints, such as "
        f"{', '.join(family.config.example for family in FAMILIES)}, and on those that `ta-llava compress` has made of them."
    )


def has_views(config: Any) -> bool:
    """Whether the pictures of a model are cut into views, as those of LLaVA-NeXT and LLaVA-OneVision."""
    return getattr(config, "image_grid_pinpoints", None) is not None
