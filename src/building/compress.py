"""Turns a stock LLaVA checkpoint into a folder with VMTC and CMAI on, without loading its weights."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..common.errors import one_line, why_refused
from ..common.families import Family, family_of, has_views
from ..common.files import atomic_folder, check_new_folder
from ..common.loading import check_format
from ..common.sources import check_source
from ..configuration_ta_llava import TaLlavaConfig
from ..safe_loading import check_sizes
from ..vision_towers import has_class_token, patch_grid
from ..vmtc import TRAINING_FREE_VMTC, VmtcConfig, count_visual_tokens
from ..vmtc_cmai_mixins import VmtcCmaiConfig


# Settings of the paper, used if a call names none.
DEFAULT_KEEP_RATIO = 0.5
DEFAULT_CMAI_MAX_RATIO = 0.6

# Settings of VMTC for a model that was not trained with it, and those of the paper, for one that is.
VMTC_PRESETS = {
    "training-free": TRAINING_FREE_VMTC,
    "paper": {name: getattr(VmtcConfig, name) for name in TRAINING_FREE_VMTC},
}

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def compress_llava(
    source: str | Path,
    out: str | Path,
    num_visual_tokens: int | None = None,
    cmai_max_ratio: float | None = None,
    link: bool = True,
    progress: bool = False,
    preset: str | None = None,
    total_visual_tokens: int | None = None,
) -> VmtcCmaiConfig:
    """
    Copies a LLaVA, LLaVA-NeXT or LLaVA-OneVision from a folder or Hub repo to a new folder, from which the same weights load
    with VMTC and CMAI. The Auto classes and `pipeline` load it, with `trust_remote_code=True` also where this package is not
    installed. `out` appears when it is complete.

    Args:
        source (`str` or `Path`):
            A checkpoint of `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` or
            `LlavaOnevisionForConditionalGeneration`, or one that is compressed already.
        out (`str` or `Path`):
            New folder.
        num_visual_tokens (`int`, *optional*):
            Turns VMTC on and keeps this many visual tokens per image, from 1 to the number of patches. If the model cuts
            pictures into views, each view keeps as many.
        cmai_max_ratio (`float`, *optional*):
            Turns CMAI on and inhibits this share of the image tokens in the last layer, in (0, 1]; 0 turns it off. Settings
            you don't pass are unchanged. If you pass neither and the config has both off, both are turned on as in the
            paper: half of the patches and 0.6.
        link (`bool`):
            Give the weight files a second name instead of copying them, where the file system can. Both names then stand
            for one file: a program that writes into it, rather than replacing it, changes both.
        progress (`bool`):
            Show a progress bar.
        preset (`str`, *optional*):
            How VMTC works (`VMTC_PRESETS`). `"training-free"`: for weights that are used as they are. `"paper"`: for weights
            that you will train with VMTC. By default, a LLaVA whose VMTC was off gets `"training-free"`, and any other
            keeps its settings.
        total_visual_tokens (`int`, *optional*):
            In place of `num_visual_tokens`, for a model that cuts pictures into views: turns VMTC on and keeps this many
            visual tokens of a whole picture.

    Returns:
        [`VmtcCmaiConfig`]: The content of `config.json`.

    Raises:
        `ValueError`: `out` is not new; `source` is no LLaVA, is incomplete or damaged, or has no safetensors; or the number
            of tokens, the ratio or the preset is not possible.
    """
    out = Path(out)
    check_new_folder(out)
    folder, config, processor = compressed_parts(
        source, num_visual_tokens, cmai_max_ratio, preset, total_visual_tokens
    )
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
    source: str | Path,
    num_visual_tokens: int | None = None,
    cmai_max_ratio: float | None = None,
    preset: str | None = None,
    total_visual_tokens: int | None = None,
) -> tuple[Path, Any, Any]:
    """
    Prepares what `compress_llava` writes beside the weights. Arguments and errors are those of `compress_llava`.

    Returns:
        The folder of the checkpoint, which a Hub repo was downloaded to, and the config and processor with VMTC and CMAI.
    """
    if preset is not None and preset not in VMTC_PRESETS:
        raise ValueError(f"The preset must be one of {', '.join(VMTC_PRESETS)}, got {preset!r}.")
    flags = vmtc_cmai_flags(num_visual_tokens, cmai_max_ratio)
    if total_visual_tokens is not None:
        if num_visual_tokens is not None:
            raise ValueError(
                f"Give the visual tokens of each view ({num_visual_tokens}) or of a whole picture ({total_visual_tokens}), "
                "not both."
            )
        flags |= {"use_vmtc": True, "vmtc_total_visual_tokens": total_visual_tokens}
    folder = _find_source(source)
    config = _compressed_config(source, folder, flags, preset)
    if folder != Path(source):
        config.base_model_name_or_path = str(source)  # for the model card
    return folder, config, _compressed_processor(source, folder, config, num_visual_tokens)


def vmtc_cmai_flags(num_visual_tokens: int | None = None, cmai_max_ratio: float | None = None) -> dict[str, Any]:
    """
    The fields of a [`VmtcCmaiConfig`] that turn VMTC and CMAI on, or CMAI off with a ratio of 0. Settings you don't
    pass have no field.

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
) -> VmtcCmaiConfig:
    """
    The config of a LLaVA, with VMTC and CMAI turned on. Settings you don't pass are unchanged, but if VMTC was off, the
    training-free preset replaces fields that have their defaults.

    Args:
        config ([`VmtcCmaiConfig`], or a config of the library such as `LlavaConfig`): Config of the LLaVA.
        num_visual_tokens (`int`, *optional*): Turns VMTC on and keeps this many visual tokens per image, or per view.
        cmai_max_ratio (`float`, *optional*):
            Turns CMAI on and inhibits this share of the image tokens in the last layer; 0 turns it off.

    Raises:
        `ValueError`: The config belongs to a TA-LLaVA or to a family that is not known, or the ratio is not in [0, 1].
    """
    if config.model_type == TaLlavaConfig.model_type:
        raise ValueError("VMTC and CMAI are for a LLaVA, but this is a TA-LLaVA.")
    config_class = family_of(config.model_type).config
    flags = vmtc_cmai_flags(num_visual_tokens, cmai_max_ratio)
    if flags.get("use_vmtc"):
        flags |= training_free_fields(config.to_dict()) | _without_total(config_class)
    return config_class.from_dict({**config.to_dict(), "model_type": config_class.model_type, **flags})


def _without_total(config_class: Any) -> dict[str, Any]:
    """The field that makes room for a budget of each view."""
    return {"vmtc_total_visual_tokens": None} if hasattr(config_class, "vmtc_total_visual_tokens") else {}


def training_free_fields(fields: dict[str, Any]) -> dict[str, str]:
    """
    The fields of the training-free preset that a config gets which has these fields, and VMTC off: those with the paper's
    values.
    """
    if fields.get("use_vmtc"):
        return {}
    defaults = VMTC_PRESETS["paper"]
    return {
        name: value for name, value in TRAINING_FREE_VMTC.items() if fields.get(name, defaults[name]) == defaults[name]
    }


# --- the source ----------------------------------------------------------------------------------------------------


def _find_source(source: str | Path) -> Path:
    """The folder of a checkpoint. Everything but the weights of a Hub repo is downloaded."""
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
    except Exception as error:  # the network, the Hub, or a name that no repo has
        raise ValueError(
            f"There is no folder {str(repo)!r}, and no Hub repo could be downloaded: {one_line(error)}"
        ) from error


def _find_weights(source: str | Path, folder: Path) -> list[Path]:
    """
    The weight files, complete and readable. Those of a Hub repo are downloaded.

    Raises:
        `ValueError`: There are no weights, or a file is missing or damaged, or lacks tensors that the index names.
    """
    weight_map = _read_index(folder)
    names = sorted(set(weight_map.values())) or [_WEIGHTS]
    if folder != Path(source):
        folder = Path(_download(source, names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not weight_map:
        raise ValueError(
            f"{source} has no weights in the safetensors format. Write them once by "
            "`AutoModelForImageTextToText.from_pretrained(source).save_pretrained(folder)`, and the processor likewise."
        )
    if missing:
        raise ValueError(f"{source} is incomplete: {_INDEX} names {', '.join(missing)}, but there is no such file.")
    for name in names:
        _check_tensors(folder / name, [key for key, file in weight_map.items() if file == name])
    return [folder / name for name in names]


def _read_index(folder: Path) -> dict[str, str]:
    """The weight file of each tensor, if the weights are in several files."""
    if (folder / _WEIGHTS).is_file() or not (
        folder / _INDEX
    ).is_file():  # in this order, as the library looks for them
        return {}
    try:
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / _INDEX} is not an index of weights: {one_line(error)}") from error
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{folder / _INDEX} names no files of its own folder.")
    return weight_map


def _check_tensors(file: Path, wanted: list[str]) -> None:
    """Raises `ValueError` if a weight file cannot be read, or lacks one of the `wanted` tensors."""
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete ({one_line(error)}). Get this file again.") from error
    if absent := sorted(set(wanted) - keys):
        raise ValueError(f"{file} lacks {len(absent)} tensors that {_INDEX} names, such as {absent[0]!r}.")


def _link_or_copy(file: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(file.resolve(), target)  # resolved: the Hub's cache has symbolic links
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(file, target)


# --- config and processor ------------------------------------------------------------------------------------------


def _compressed_config(source: str | Path, folder: Path, flags: dict[str, Any], preset: str | None) -> Any:
    """
    The config with the `vmtc_cmai_flags` and the preset of VMTC. The number of visual tokens is set later, when the size of
    the images is known.

    Raises:
        `ValueError`: The config does not belong to a LLaVA, or not to one that VMTC can be used with.
    """
    if "use_vmtc" in flags:
        flags = {**flags, "vmtc_num_visual_tokens": None}
    try:
        stock = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check_format(stock)
        check_sizes("config", stock)
        if not flags and not stock.get("use_vmtc") and not stock.get("use_cmai"):
            flags |= {"use_vmtc": True, "vmtc_num_visual_tokens": None, "vmtc_keep_ratio": DEFAULT_KEEP_RATIO}
            flags |= {"use_cmai": True, "cmai_max_ratio": DEFAULT_CMAI_MAX_RATIO}
        family = family_of(stock.get("model_type"))
        if "vmtc_total_visual_tokens" in flags and not _without_total(family.config):
            raise ValueError(
                f"a {family.stock_type!r} model does not cut pictures into views, so it has no budget for all of them"
            )
        if flags.get("use_vmtc"):
            flags = _without_total(family.config) | flags
        if preset is not None:
            flags |= {"vmtc_layers": None, **VMTC_PRESETS[preset]}
        elif flags.get("use_vmtc") or stock.get("model_type") == family.stock_type:
            flags |= training_free_fields(stock)
        config = family.config.from_pretrained(folder, **flags)
    except StrictDataclassError as error:
        raise ValueError(f"{source}: {why_refused(error)}") from error
    except Exception as error:  # the file may be damaged in any way
        raise ValueError(f"The config.json of {source} cannot be used for VMTC and CMAI: {one_line(error)}") from error
    config.architectures = [family.head.__name__]
    config.auto_map = dict(family.head.auto_map)
    return config


def _compressed_processor(
    source: str | Path, folder: Path, config: VmtcCmaiConfig, num_visual_tokens: int | None
) -> Any:
    """
    The processor for `config`; both get the budget of `num_visual_tokens`. Old checkpoints do not say all that the
    processor must know about the vision tower. A run of the tower without weights tells it.

    Raises:
        `ValueError`: There is no processor, it is not one of the family or does not fit the model, or the budget does not
            fit its images.
    """
    family = family_of(config.model_type)
    processor, pixel_values = _load_processor(source, folder, family)
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"The tokenizer of {source} writes {processor.image_token!r} as {processor.image_token_id}, but the config says "
            f"`image_token_id={config.image_token_id}`. One of them belongs to another model."
        )
    num_patches = math.prod(patch_grid(config, pixel_values))
    if num_visual_tokens is not None:
        config.vmtc_num_visual_tokens = count_visual_tokens(config, num_patches, num_visual_tokens)
    for name in ("use_vmtc", "vmtc_num_visual_tokens", "vmtc_keep_ratio", "vmtc_total_visual_tokens", "spd_factor"):
        if hasattr(config, name):
            setattr(processor, name, getattr(config, name))
    config_of_tower: Any = config.vision_config  # type: ignore[attr-defined]
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy  # type: ignore[attr-defined]
    if has_views(config):
        _fit_processor_of_views(source, processor, config, pixel_values)
        return processor
    is_default = processor.vision_feature_select_strategy == "default"
    num_features = _count_features(source, family, config, pixel_values)
    processor.patch_size = config_of_tower.patch_size
    processor.num_additional_image_tokens = num_features - count_visual_tokens(config, num_patches) + is_default
    return processor


def _load_processor(source: str | Path, folder: Path, family: Family) -> tuple[Any, torch.Tensor]:
    """The processor of a LLaVA, and what it makes of an image: `(1, 3, H, W)`, or its views `(1, views, 3, H, W)`."""
    known = (family.stock_processor.__name__, family.processor.__name__)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            processor_class = settings.get("processor_class")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{folder / name} cannot be read: {one_line(error)}") from error
        if processor_class not in (None, *known):
            raise ValueError(
                f"{source} has a {processor_class}, but its model is a {family.stock_type!r}: VMTC and CMAI need images as "
                f"{known[0]} makes them."
            )
    try:
        processor = family.processor.from_pretrained(folder, trust_remote_code=False)
        black = Image.new("RGB", (64, 64))
        pixel_values = torch.as_tensor(processor.image_processor(black, return_tensors="pt")["pixel_values"])
    except Exception as error:  # files may be missing or damaged in any way
        raise ValueError(f"No processor could be loaded from {source}: {one_line(error)}") from error
    return processor, pixel_values


def _count_features(source: str | Path, family: Family, config: VmtcCmaiConfig, pixel_values: torch.Tensor) -> int:
    """Visual tokens of an image `(1, 3, H, W)`, counted by a run of the model without weights."""
    with _working(source), torch.device("meta"), torch.no_grad():
        model = family.head.model_class(deepcopy(config)).eval()
        return len(model.get_image_features(pixel_values.to("meta"), return_dict=True).pooler_output[0])


def _fit_processor_of_views(
    source: str | Path, processor: Any, config: VmtcCmaiConfig, pixel_values: torch.Tensor
) -> None:
    """Sets what the processor must know about views, and checks that the model cuts a picture into the same ones."""
    family, num_views = family_of(config.model_type), pixel_values.shape[1]
    settings: Any = config
    rows, columns = patch_grid(config, pixel_values)
    if hasattr(processor, "patch_size"):  # LLaVA-NeXT
        processor.patch_size = settings.vision_config.patch_size
    else:
        processor.num_image_tokens = rows * columns
    side = settings.vision_config.image_size
    if tuple(pixel_values.shape[-2:]) != (side, side):
        raise ValueError(
            f"The processor of {source} makes views of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels, but its "
            f"vision tower takes {side} x {side}. Set the `size` of the image processor to {side}."
        )
    pinpoints = [list(canvas) for canvas in processor.image_processor.image_grid_pinpoints]
    if pinpoints != [list(canvas) for canvas in settings.image_grid_pinpoints]:
        raise ValueError(
            f"The processor of {source} has other `image_grid_pinpoints` than its config.json, so they would cut pictures "
            "into different views. Make them equal."
        )
    with _working(source), torch.device("meta"), torch.no_grad():
        model = family.head.model_class(deepcopy(config)).eval()
        layouts = model._layouts([(64, 64)])
        if hasattr(processor, "patch_size"):
            processor.num_additional_image_tokens = int(has_class_token(model.vision_tower))
        canvases = [rows * columns for rows, columns in settings.image_grid_pinpoints]
        most = 1 + max(canvases) // settings.vision_config.image_size**2
        total = settings.vmtc_total_visual_tokens
        if config.use_vmtc and total is not None and total < most:
            raise ValueError(
                f"the budget of a picture is {total} visual tokens, but it has up to {most} views, and each keeps at least "
                f"one: set {most} or more"
            )
        if config.use_vmtc and total is not None and total > most * rows * columns:
            raise ValueError(
                f"the budget of a picture is {total} visual tokens, but its {most} views have {most * rows * columns} "
                "patches: set as many or fewer"
            )
        if config.use_vmtc:
            model._check_select_strategy(settings.vision_feature_select_strategy)
            views = pixel_values.new_empty(num_views, *pixel_values.shape[2:], device="meta")
            model._compression_of_views(views, layouts, settings.vision_feature_layer, None)


@contextmanager
def _working(source: str | Path) -> Iterator[None]:
    """Turns an error of a model without weights into a `ValueError` that names its checkpoint."""
    try:
        yield
    except Exception as error:  # the config may be damaged in any way
        raise ValueError(f"{source} does not work with these settings: {why_refused(error)}") from error
