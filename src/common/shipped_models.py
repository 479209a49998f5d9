"""Folders of the models that come with the package."""

from importlib.resources import files
from pathlib import Path


_SHIPPED = Path(str(files("ta_llava.checkpoints")))
DEFAULT_MODEL = _SHIPPED / "ta-llava-tiny"
DEFAULT_LLAVA = _SHIPPED / "llava-tiny"  # with VMTC and CMAI
