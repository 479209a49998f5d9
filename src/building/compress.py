"""Turns a stock LLaVA checkpoint into a folder with VMTC and CMAI on, without loading its weights."""

import json
import math
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import LlavaConfig, LlavaProcessor

from ..common.errors import one_line
from ..common.files import atomic_folder, check_new_folder
from ..common.loading import check_format
from ..common.sources import check_source
from ..configuration_ta_llava import TaLlavaConfig
from ..safe_loading import check_sizes
from ..vision_towers import patch_grid
from ..vmtc import count_visual_tokens
from ..vmtc_cmai_patch import (
    AUTO_MAP,
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
    VmtcCmaiLlavaModel,
    VmtcCmaiLlavaProcessor,
)


# The settings of the paper, for a call that names none.
DEFAULT_KEEP_RATIO = 0.5
DEFAULT_CMAI_MAX_RATIO = 0.6

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def compress_llava(
    source: str | Path,
    out: str | Path,
    num_visual_tokens: int | None = None,
    cmai_max_ratio: float | None = None,
    link: bool = True,
    progress: bool = False,
) -> VmtcCmaiLlavaConfig:
    """
    Copies a LLaVA, from a folder or Hub repo, to a folder from which the same weights load with VMTC and CMAI: by
    `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline`, with
    `trust_remote_code=True` also where this package is not installed. `out` appears when it is complete, not before.

    Args:
        source (`str` or `Path`):
            A checkpoint as `LlavaForConditionalGeneration` has it, or one that was compressed already.
        out (`str` or `Path`):
            New folder.
        num_visual_tokens (`int`, *optional*):
            Turns VMTC on, with so many visual tokens per image, from 1 to the number of patches.
        cmai_max_ratio (`float`, *optional*):
            Turns CMAI on, with this share of image tokens inhibited in the last layer, in (0, 1], or off with 0. What is
            not given stays as the config says. If neither is, and the config has both off, both are turned on as in the
            paper: half of the patches and 0.6.
        link (`bool`):
            Give the files of the weights a second name instead of copying them, where the file system can. They are then
            one file: what writes into one of them, rather than replacing it, changes both.
        progress (`bool`):
            Show a progress bar.

    Returns:
        [`VmtcCmaiLlavaConfig`]: what was written to `config.json`.

    Raises:
        `ValueError`: `out` is not new; `source` is no LLaVA, is incomplete or damaged, or has no safetensors; a budget or
            ratio that is not possible.
    """
    out = Path(out)
    check_new_folder(out)
    folder, config, processor = compressed_parts(source, num_visual_tokens, cmai_max_ratio)
    files = _find_weights(source, folder)

    with atomic_folder(out) as unfinished:
        processor.save_pretrained(unfinished)
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", unfinished / "generation_config.json")
        if [file.name for file in files] != [_WEIGHTS]:
            shutil.copyfile(folder / _INDEX, unfinished / _INDEX)
        for file in tqdm(files, unit="file", desc="weights", disable=None if progress else True):
            _link_or_copy(file, unfinished / file.name, link)
        config.save_pretrained(unfinished)  # the code too
    return config


def compressed_parts(
    source: str | Path, num_visual_tokens: int | None = None, cmai_max_ratio: float | None = None
) -> tuple[Path, VmtcCmaiLlavaConfig, VmtcCmaiLlavaProcessor]:
    """
    What `compress_llava` writes beside the weights: the folder of the checkpoint (of a Hub repo, where it was downloaded
    to), and the config and processor with VMTC and CMAI as asked for. Arguments and errors are those of `compress_llava`.
    """
    flags = vmtc_cmai_flags(num_visual_tokens, cmai_max_ratio)
    folder = _find_source(source)
    config = _compressed_config(source, folder, flags)
    if folder != Path(source):
        config.base_model_name_or_path = str(source)  # for the model card
    return folder, config, _compressed_processor(source, folder, config, num_visual_tokens)


def vmtc_cmai_flags(num_visual_tokens: int | None = None, cmai_max_ratio: float | None = None) -> dict[str, Any]:
    """
    The fields of a [`VmtcCmaiLlavaConfig`] that turn VMTC and CMAI on as asked for, or CMAI off with a ratio of 0. What is
    not given is not among them.

    Raises:
        `ValueError`: The ratio is not in [0, 1].
    """
    if cmai_max_ratio is not None and not 0 <= cmai_max_ratio <= 1:
        raise ValueError(f"The CMAI ratio must be from 0 to 1, got {cmai_max_ratio}.")
    flags: dict[str, Any] = {}
    if num_visual_tokens is not None:
        flags |= {"use_vmtc": True, "vmtc_num_visual_tokens": num_visual_tokens}
    if cmai_max_ratio is not None:
        flags |= {"use_cmai": True, "cmai_max_ratio": cmai_max_ratio} if cmai_max_ratio > 0 else {"use_cmai": False}
    return flags


def with_vmtc_and_cmai(
    config: Any, num_visual_tokens: int | None = None, cmai_max_ratio: float | None = None
) -> VmtcCmaiLlavaConfig:
    """
    The config of a LLaVA with VMTC and CMAI as asked for.

    Args:
        config ([`VmtcCmaiLlavaConfig`] or `LlavaConfig`): Of the LLaVA.
        num_visual_tokens (`int`, *optional*): Turns VMTC on, with so many visual tokens per image.
        cmai_max_ratio (`float`, *optional*):
            Turns CMAI on, with this share of image tokens inhibited in the last layer, or off with 0. What is not given
            stays as it is.

    Raises:
        `ValueError`: The config is of a TA-LLaVA, or the ratio is not in [0, 1].
    """
    if config.model_type == TaLlavaConfig.model_type:
        raise ValueError("VMTC and CMAI are counted of a LLaVA, but a TA-LLaVA was given.")
    flags = vmtc_cmai_flags(num_visual_tokens, cmai_max_ratio)
    return VmtcCmaiLlavaConfig.from_dict({**config.to_dict(), "model_type": VmtcCmaiLlavaConfig.model_type, **flags})


# --- what is there -------------------------------------------------------------------------------------------------


def _find_source(source: str | Path) -> Path:
    """The folder of a checkpoint; of a Hub repo everything but the weights is downloaded."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{source} is a file, not the folder of a checkpoint.")
        check_source(source)
        folder = Path(_download(source, ["*.json", "*.jinja", "*.model", "*.txt"]))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} has no config.json, so it is no checkpoint.")
    return folder


def _download(repo: str | Path, patterns: list[str]) -> str:
    try:
        return snapshot_download(str(repo), allow_patterns=patterns)
    except Exception as error:  # of the network, the Hub, or a name that cannot be one
        raise ValueError(
            f"There is no folder {str(repo)!r}, and no Hub repo could be downloaded: {one_line(error)}"
        ) from error


def _find_weights(source: str | Path, folder: Path) -> list[Path]:
    """
    Files of the weights, complete and readable; those of a Hub repo are downloaded.

    Raises:
        `ValueError`: There are none, one is missing or damaged, or lacks what the index says is in it.
    """
    weight_map, names = {}, [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file() and (folder / _INDEX).is_file():  # in this order, as the library has it
        try:
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX} is not an index of weights: {one_line(error)}") from error
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / _INDEX} names no files of its own folder.")
    if folder != Path(source):
        folder = Path(_download(source, names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not weight_map:
        raise ValueError(
            f"{source} has no weights in the safetensors format. Write them once by "
            "`LlavaForConditionalGeneration.from_pretrained(source).save_pretrained(folder)`, and the processor likewise."
        )
    if missing:
        raise ValueError(f"{source} is incomplete: {_INDEX} names {', '.join(missing)}, but there is no such file.")
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                keys = set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / name} is damaged or incomplete ({one_line(error)}). Get this file again."
            ) from error
        absent = sorted(key for key, file in weight_map.items() if file == name and key not in keys)
        if absent:
            raise ValueError(
                f"{folder / name} lacks {len(absent)} tensors that {_INDEX} names, such as {absent[0]!r}."
            )
    return [folder / name for name in names]


def _link_or_copy(file: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(file.resolve(), target)  # resolved: the Hub's cache has symbolic links
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(file, target)


# --- what it becomes -----------------------------------------------------------------------------------------------


def _compressed_config(source: str | Path, folder: Path, flags: dict[str, Any]) -> VmtcCmaiLlavaConfig:
    """
    The config with the `vmtc_cmai_flags`, but for the number of visual tokens.

    Raises:
        `ValueError`: No LLaVA, or one that cannot be used with VMTC.
    """
    if "use_vmtc" in flags:  # the number is set when the size of the images is known
        flags = {**flags, "vmtc_num_visual_tokens": None}
    try:
        stock = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check_format(stock)
        check_sizes("config", stock)
        if not flags and not stock.get("use_vmtc") and not stock.get("use_cmai"):
            flags |= {"use_vmtc": True, "vmtc_num_visual_tokens": None, "vmtc_keep_ratio": DEFAULT_KEEP_RATIO}
            flags |= {"use_cmai": True, "cmai_max_ratio": DEFAULT_CMAI_MAX_RATIO}
        if stock.get("model_type") == LlavaConfig.model_type:  # its weights have not seen merged tokens
            flags["vmtc_merge_weights"] = "normalized"
        config = VmtcCmaiLlavaConfig.from_pretrained(folder, **flags)
    except StrictDataclassError as error:
        raise ValueError(f"{source}: {one_line(error.__cause__ or error)}") from error
    except Exception as error:  # it may be damaged in any way
        reason = one_line(error).replace(f"{folder} is a", "it is a")
        raise ValueError(f"The config.json of {source} cannot be used for VMTC and CMAI: {reason}") from error
    config.architectures = [VmtcCmaiLlavaForConditionalGeneration.__name__]
    config.auto_map = dict(AUTO_MAP)
    return config


def _compressed_processor(
    source: str | Path, folder: Path, config: VmtcCmaiLlavaConfig, num_visual_tokens: int | None
) -> VmtcCmaiLlavaProcessor:
    """
    The processor that goes with `config`, both with a budget of `num_visual_tokens`. What it must know of the vision
    tower, and old checkpoints do not say, comes from a run of the tower without data.

    Raises:
        `ValueError`: There is none, it is not LLaVA's, it does not fit the model, or the budget not its images.
    """
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            processor_class = settings.get("processor_class")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{folder / name} cannot be read: {one_line(error)}") from error
        if processor_class not in (None, LlavaProcessor.__name__, VmtcCmaiLlavaProcessor.__name__):
            raise ValueError(
                f"{source} has a {processor_class}; VMTC and CMAI work with images of one size, as a LlavaProcessor makes."
            )
    try:
        processor = VmtcCmaiLlavaProcessor.from_pretrained(folder, trust_remote_code=False)
        black = Image.new("RGB", (64, 64))
        pixel_values = torch.as_tensor(processor.image_processor(black, return_tensors="pt")["pixel_values"])
    except Exception as error:  # files may be missing or damaged in any way
        raise ValueError(f"No processor could be loaded from {source}: {one_line(error)}") from error
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"The tokenizer of {source} writes {processor.image_token!r} as {processor.image_token_id}, but the config says "
            f"`image_token_id={config.image_token_id}`. One of them is not of this model."
        )
    num_patches = math.prod(patch_grid(config, pixel_values))
    if num_visual_tokens is not None:
        config.vmtc_num_visual_tokens = count_visual_tokens(config, num_patches, num_visual_tokens)
    is_default = config.vision_feature_select_strategy == "default"
    num_features = _count_features(source, config, pixel_values)
    processor.use_vmtc = config.use_vmtc
    processor.vmtc_num_visual_tokens = config.vmtc_num_visual_tokens
    processor.vmtc_keep_ratio = config.vmtc_keep_ratio
    processor.spd_factor = config.spd_factor
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = num_features - count_visual_tokens(config, num_patches) + is_default
    return processor


def _count_features(source: str | Path, config: VmtcCmaiLlavaConfig, pixel_values: torch.Tensor) -> int:
    """Visual tokens of an image such as `pixel_values` `(1, 3, H, W)`: the model is built and run without weights."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = VmtcCmaiLlavaModel(deepcopy(config)).eval()
            return len(model.get_image_features(pixel_values.to("meta"), return_dict=True).pooler_output[0])
    except Exception as error:  # its config may be damaged in any way
        raise ValueError(
            f"{source} does not work with these settings: {one_line(error.__cause__ or error)}"
        ) from error
