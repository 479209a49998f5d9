# Copyright 2026 The TA-LLaVA Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Loads checkpoints of unknown origin safely. Weights are not read from pickles, which can run code, nor from files outside of
the checkpoint. A config may not ask for sizes that no model has, or that its weights do not have: they would fill the memory
before anything is found wrong.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.image_utils import SizeDict
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    has_file,
    is_peft_available,
)
from transformers.utils.hub import cached_files


# Several times the sizes of the largest models there are. The `attribute_map` of a config class gives its names for them.
_LARGEST_SIZES = {
    "num_hidden_layers": 1_000,
    "layer_types": 1_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 100_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 100_000_000,
    "image_size": 100_000,
    "patch_size": 1_000,
    "num_channels": 1_000,
    "projection_dim": 100_000,
    "num_labels": 100_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
    "num_prefix_tokens": 10_000,
    "num_additional_image_tokens": 10_000,
}
# Limit for every other integer, unless its name has one of these in it: those fill no memory.
_LARGEST_INTEGER = 100_000_000
_MAY_BE_LARGER = ("theta", "base", "window", "max_length", "seed")
_LARGEST_IMAGE_SIDE = 10_000  # pixels, several times those of any vision tower
_IMAGE_SIZES = ("size", "crop_size", "pad_size")
_SIDES = ("height", "width", "shortest_edge", "longest_edge")


def load_config(source: str | Path, **kwargs: Any) -> Any:
    """
    Loads the config of a folder or Hub repo. Its sizes are checked before it is made, and its code is not run.

    Args:
        source (`str` or `Path`): Folder or Hub repo.
        kwargs: As for `AutoConfig.from_pretrained`.

    Raises:
        `ValueError`: See [`check_sizes`]. Also what `AutoConfig.from_pretrained` raises.
    """
    check_sizes("config", PreTrainedConfig.get_config_dict(source, **kwargs)[0])
    kwargs["trust_remote_code"] = False
    return AutoConfig.from_pretrained(source, **kwargs)


def check_sizes(name: str, config: Any, is_read: bool = True) -> None:
    """
    Checks what a `config.json` says about a part of a model. Call it before you make the config, which may already fill the
    memory.

    Args:
        name (`str`): Name of the part, for the message.
        config (`dict`): Its fields, including those of its own parts. A config that was made in Python is not checked.
        is_read (`bool`): Whether a config is made of the fields. If not, as for notes on the training, only fields with the
            name of a size are checked.

    Raises:
        `ValueError`: A size, or a list of sizes, is larger than in any model, or the config gives fields other names.
    """
    if isinstance(config, (list, tuple)):
        for value in config:
            check_sizes(name, value, is_read)
    if not isinstance(config, dict):
        return
    if "attribute_map" in config:
        raise ValueError(
            f"`{name}` has an `attribute_map`, but only code may give the fields of a config other names. Remove the field."
        )
    config_class = _class_of(config)
    is_read = is_read or config_class is not None
    other_names = getattr(config_class, "attribute_map", {})
    for field, largest in _LARGEST_SIZES.items():
        for key in {field, other_names.get(field, field)}:
            _check_size(name, key, config.get(key), largest)
    for key, value in config.items():
        is_field = is_read and (config_class is None or hasattr(config_class, str(other_names.get(key, key))))
        may_be_larger = any(part in str(key) for part in _MAY_BE_LARGER)
        if is_field and isinstance(value, int) and not may_be_larger:
            _check_size(name, key, value, _LARGEST_INTEGER)
        check_sizes(f"{name}.{key}", value, is_field and key != "quantization_config")


def check_image_size(image_processor: Any) -> None:
    """
    Checks the size that an image processor resizes images to, before it does so.

    Raises:
        `ValueError`: A side is longer than in any model.
    """
    for name in _IMAGE_SIZES:
        size = getattr(image_processor, name, None)
        sides = [dict(size).get(side) for side in _SIDES] if isinstance(size, (dict, SizeDict)) else size
        _check_size("image_processor", name, sides, _LARGEST_IMAGE_SIDE)


def _check_size(name: str, key: str, value: Any, largest: int) -> None:
    sizes = [len(value), *value] if isinstance(value, (list, tuple)) else [value]
    for size in sizes:
        if isinstance(size, (int, float)) and size > largest:
            what = "is" if size is value else "has"
            raise ValueError(
                f"`{key}` of `{name}` {what} {size}, but no model has more than {largest}. Is the config damaged?"
            )


def _class_of(config: dict[str, Any]) -> Any:
    """The class of a config, if the library knows its type."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:  # `get` would load nothing new
        return None
    return CONFIG_MAPPING[model_type]


def read_safetensors(from_pretrained: Callable, source: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Calls `from_pretrained(source, *args, **kwargs)` of a model, and makes it read only safetensors in the folder of the
    checkpoint, also for an adapter. The files are checked before they are read.

    Raises:
        `ValueError`: The weights are pickles (the message says how to convert them), are outside of that folder, or are far
            fewer than the config asks for. See also [`check_sizes`].
    """
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("`use_safetensors` is False, but only safetensors are read: pickles can run code.")
    if source is None:
        return from_pretrained(source, *args, **kwargs)
    location, variant = _location(kwargs), kwargs.get("variant")
    base = _check_adapter(source, location)
    is_gguf = kwargs.get("gguf_file") is not None
    if not is_gguf:
        config = _check_config(base, kwargs.get("config"), location)
        _check_amount(base, config, _check_shards(base, variant, location), location)
    try:
        return from_pretrained(source, *args, use_safetensors=True, **kwargs)
    except OSError as error:
        pickles = None if is_gguf else _find_pickles(base, variant, location)
        if pickles is None:
            raise
        raise ValueError(
            f"The weights of {base} are pickles ({pickles}), which can run code when they are read. Only safetensors are "
            f"read: {_how_to_convert('pytorch_model*.bin', SAFE_WEIGHTS_NAME)}"
        ) from error


class SafetensorsMixin:
    """
    Makes a model read its weights and adapters from safetensors only. It stands before `PreTrainedModel` among the bases.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Loads a model from safetensors. You can pass the settings of VMTC and CMAI as arguments too.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Folder, or repo on the Hub.
            kwargs:
                Those of [`~transformers.PreTrainedModel.from_pretrained`], such as `dtype`, `device_map`,
                `attn_implementation`, `quantization_config` or `revision`. Fields of the model's config replace what
                `config.json` says, for example `use_vmtc=True, vmtc_num_visual_tokens=64`. A model that was trained
                without VMTC also needs `vmtc_merge_weights="normalized"`. A LLaVA also takes `use_cmai=True,
                cmai_max_ratio=0.6`. Pass `use_vmtc`, `vmtc_num_visual_tokens`, `vmtc_keep_ratio` and `spd_factor` to
                LLaVA's processor as well.

        Raises:
            `ValueError`: See [`read_safetensors`]. Also for a setting that is not possible.

        Example:

        ```python
        >>> from ta_llava import VmtcCmaiLlavaForConditionalGeneration

        >>> model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(
        ...     "checkpoints/llava-tiny", use_vmtc=True, vmtc_num_visual_tokens=16, use_cmai=True, dtype="auto"
        ... )
        ```
        """
        from_pretrained = super().from_pretrained  # type: ignore[misc]
        loaded = read_safetensors(from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        # The library hands the fields of the config to the generation config too. There they would hide an argument of
        # `generate()` of the same name from the model.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        settings = getattr(model, "generation_config", None)  # only models that generate have one
        for name in kwargs.keys() & vars(settings).keys() if settings is not None else ():
            if hasattr(model.config, name) and not hasattr(GenerationConfig(), name):
                delattr(settings, name)
        return loaded

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.PreTrainedModel.load_adapter`]. Raises `ValueError` if the weights are pickles."""
        if peft_model_id is not None:
            given = getattr(kwargs.get("load_config"), "download_kwargs", None) or {}
            _check_adapter(peft_model_id, _location({**given, **(kwargs.get("adapter_kwargs") or {})}))
        return super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]


# --- what will be read ---------------------------------------------------------------------------------------------


def _location(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the files of a folder or Hub repo are."""
    names = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "proxies")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _first_of(source: Any, names: Sequence[str], variant: str | None, location: dict[str, Any]) -> str | None:
    """The name of the first of some files that a folder or Hub repo has."""
    elsewhere = dict(location)
    folder = PurePosixPath(elsewhere.pop("subfolder", ""))
    paths = [str(folder / _with_variant(name, variant)) for name in names]
    return next((path for path in paths if has_file(str(source), path, **elsewhere)), None)


def _check_adapter(source: Any, location: dict[str, Any]) -> Any:
    """
    Checks that the adapter in a folder or Hub repo, if there is one, has safetensors.

    Returns:
        The folder or repo of the model itself: `source`, or the one that its adapter is for.
    """
    if not is_peft_available() or os.path.isfile(source):
        return source
    settings = find_adapter_config_file(str(source), **location)
    if settings is None:
        return source
    if _first_of(source, [ADAPTER_SAFE_WEIGHTS_NAME], None, location) is None:
        raise ValueError(
            f"The adapter {source} has no {ADAPTER_SAFE_WEIGHTS_NAME}. Only safetensors are read, since pickles can run "
            f"code: {_how_to_convert(ADAPTER_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME)}"
        )
    if Path(source, CONFIG_NAME).exists():
        return source
    return json.loads(Path(settings).read_text(encoding="utf-8")).get("base_model_name_or_path") or source


def _check_config(source: Any, config: Any, location: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the config that the model will have, checked. `config` is the argument of `from_pretrained`."""
    if isinstance(config, PreTrainedConfig):
        config = config.to_dict()
    else:
        config, _ = PreTrainedConfig.get_config_dict(config or source, **location)
        if not config:  # the library would take the sizes of some model
            raise ValueError(f"{source} has no {CONFIG_NAME}, so it is not a checkpoint.")
    check_sizes("config", config)
    _check_named_weights("config", config)
    return config


def _check_named_weights(name: str, config: Any) -> None:
    """Checks that neither a config nor its parts name the file of the weights, which may be pickles."""
    if not isinstance(config, dict):
        return
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"`transformers_weights` of `{name}` names {config['transformers_weights']!r}, but only {SAFE_WEIGHTS_NAME} and "
            "the files of its index are read. Rename the file, and remove the field."
        )
    for key, value in config.items():
        _check_named_weights(f"{name}.{key}", value)


def _check_shards(source: Any, variant: str | None, location: dict[str, Any]) -> list[str]:
    """
    Checks that the index of the weights, if there is one, names only safetensors in its own folder.

    Returns:
        The files of the weights in that folder. There are none if it has no safetensors or `source` itself is a file.
    """
    if os.path.isfile(source):
        _check_ending(source)
        return []
    if _first_of(source, [SAFE_WEIGHTS_NAME], variant, location):
        return [_with_variant(SAFE_WEIGHTS_NAME, variant)]
    name = _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **location)
    if found is None:
        return []
    index = Path(found)
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # Not resolved: the files of a folder may be links to where they are stored.
        paths = {shard: Path(os.path.relpath(index.parent / shard, index.parent)) for shard in shards}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights.") from error
    for shard, path in paths.items():
        _check_ending(shard)
        if path.parts[0] == os.pardir:
            raise ValueError(f"{index} names {shard!r}, which is outside of its folder.")
    return sorted(shards)


def _check_amount(source: Any, config: dict[str, Any], names: list[str], location: dict[str, Any]) -> None:
    """Checks that files can hold the weights. Missing ones would be made, and fill the memory, before they are missed."""
    files = (
        cached_files(str(source), names, _raise_exceptions_for_missing_entries=False, **location) if names else None
    )
    num_bytes, num_weights = sum(os.path.getsize(file) for file in files or []), _least_weights(config)
    if files and num_weights > 8 * num_bytes:  # one bit for each weight, less than any quantisation leaves
        raise ValueError(
            f"The config of {source} asks for at least {num_weights} weights, but its files have {num_bytes} bytes: its "
            "weights are damaged or cut off, or its config.json is. Get its files again."
        )


def _least_weights(config: Any) -> int:
    """A lower bound of the weights of a model of this config: those of its largest part."""
    if isinstance(config, (list, tuple)):
        return max(map(_least_weights, config), default=0)
    if not isinstance(config, dict):
        return 0
    config_class = _class_of(config)
    other_names = getattr(config_class, "attribute_map", {})

    def size(field: str) -> int:
        name = other_names.get(field, field)
        value = config.get(name, config.get(field, getattr(config_class, name, 0)))
        return value if isinstance(value, int) else 0  # it may be a list, one for each layer

    rows = size("vocab_size") + size("num_hidden_layers") * (size("hidden_size") + size("intermediate_size"))
    if patch_size := size("patch_size"):
        rows += size("num_channels") * patch_size**2 + (size("image_size") // patch_size) ** 2
    return max([size("hidden_size") * rows, *map(_least_weights, config.values())])


def _check_ending(file: Any) -> None:
    if not str(file).endswith(".safetensors"):
        raise ValueError(
            f"The weights in {str(file)!r} are not safetensors. Only safetensors are read, since pickles can run code."
        )


def _find_pickles(source: Any, variant: str | None, location: dict[str, Any]) -> str | None:
    """The name of the pickles with the weights of a folder or Hub repo, if it has no safetensors."""
    try:
        if _first_of(source, [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME], variant, location):
            return None
        return _first_of(source, [WEIGHTS_NAME, WEIGHTS_INDEX_NAME], variant, location)
    except (OSError, ValueError):  # no such repo, or no access to it
        return None


def _with_variant(name: str, variant: str | None) -> str:
    """The name of a file as the library writes its variant: `model.fp16.safetensors`."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _how_to_convert(pickles: str, safetensors: str) -> str:
    return (
        "convert the weights once, in a copy of the folder: `safetensors.torch.save_file({key: value.clone().contiguous() "
        f"for file in glob.glob({pickles!r}) for key, value in torch.load(file, weights_only=True).items()}}, "
        f"{safetensors!r}, {{'format': 'pt'}})`."
    )


__all__ = ["SafetensorsMixin", "check_image_size", "check_sizes", "load_config", "read_safetensors"]
