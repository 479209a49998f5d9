"""
TA-LLaVA, and VMTC and CMAI for LLaVA. Importing the package registers its classes with the Auto classes of Transformers.

The command line is the exception: it answers `--help`, a mistyped option or a missing file before torch and transformers are
imported, which takes seconds. There the modules that load models register the classes.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

__all__ = [
    "TaLlavaConfig",
    "TaLlavaForConditionalGeneration",
    "TaLlavaModel",
    "TaLlavaProcessor",
    "VmtcCmaiLlavaConfig",
    "VmtcCmaiLlavaForConditionalGeneration",
    "VmtcCmaiLlavaModel",
    "VmtcCmaiLlavaNextConfig",
    "VmtcCmaiLlavaNextForConditionalGeneration",
    "VmtcCmaiLlavaNextModel",
    "VmtcCmaiLlavaNextProcessor",
    "VmtcCmaiLlavaOnevisionConfig",
    "VmtcCmaiLlavaOnevisionForConditionalGeneration",
    "VmtcCmaiLlavaOnevisionModel",
    "VmtcCmaiLlavaOnevisionProcessor",
    "VmtcCmaiLlavaProcessor",
]


def _is_command_line() -> bool:
    """Whether this process is `ta-llava`, or `python -m ta_llava.cli` on its way to that module."""
    if sys.argv[0] == "-m":
        return "ta_llava.cli" in sys.orig_argv
    return Path(sys.argv[0]).name in ("ta-llava", "ta-llava.exe")


if TYPE_CHECKING or not _is_command_line():
    from .auto_classes import (
        TaLlavaConfig,
        TaLlavaForConditionalGeneration,
        TaLlavaModel,
        TaLlavaProcessor,
        VmtcCmaiLlavaConfig,
        VmtcCmaiLlavaForConditionalGeneration,
        VmtcCmaiLlavaModel,
        VmtcCmaiLlavaNextConfig,
        VmtcCmaiLlavaNextForConditionalGeneration,
        VmtcCmaiLlavaNextModel,
        VmtcCmaiLlavaNextProcessor,
        VmtcCmaiLlavaOnevisionConfig,
        VmtcCmaiLlavaOnevisionForConditionalGeneration,
        VmtcCmaiLlavaOnevisionModel,
        VmtcCmaiLlavaOnevisionProcessor,
        VmtcCmaiLlavaProcessor,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import auto_classes

        return getattr(auto_classes, name)
