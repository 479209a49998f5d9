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
What a checkpoint of unknown origin may not do: have its weights read from pickles, which can run code, or from files that
are not its own, and ask for sizes that no model has, which fill the memory before anything is found wrong.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, has_file


# Several times those of the largest models there are. Names of other kinds of config are looked up by these.
_LARGEST_SIZES = {
    "num_hidden_layers": 1_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 100_000,
    "vocab_size": 10_000_000,
    "image_size": 100_000,
}


def check_sizes(name: str, config: Any) -> None:
    """
    Checks what a `config.json` says about a part of a model, before its config is made, which may fill the memory already.

    Args:
        name (`str`): The part, for the message.
        config (`dict`): Its fields, parts of the part included. What is no `dict` was made in Python, and passes.

    Raises:
        `ValueError`: A size is larger than any model's.
    """
    if not isinstance(config, dict):
        return
    model_type = config.get("model_type")
    other_names = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    for field, largest in _LARGEST_SIZES.items():
        for key in {field, other_names.get(field, field)}:
            value = config.get(key)
            if isinstance(value, (int, float)) and value > largest:
                raise ValueError(
                    f"`{key}` of `{name}` is {value}, but no model has more than {largest}. Is the config damaged?"
                )
    for key, value in config.items():
        check_sizes(f"{name}.{key}", value)


def read_safetensors(from_pretrained: Callable, source: Any, *args: Any, **kwargs: Any) -> Any:
    """
    `from_pretrained(source, *args, **kwargs)` of a model, which reads safetensors in the folder of the checkpoint only.

    Raises:
        `ValueError`: The weights are pickles, or files outside of that folder; the message says how to convert them.
    """
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("`use_safetensors` is False, but only safetensors are read: pickles can run code.")
    if source is not None:
        _check_shards(Path(source, kwargs.get("subfolder") or ""))
    try:
        return from_pretrained(source, *args, use_safetensors=True, **kwargs)
    except OSError as error:
        location = {
            key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs
        }
        pickles = _find_pickles(source, **location)
        if pickles is None:
            raise
        raise ValueError(
            f"The weights of {source} are pickles ({pickles}), which can run code when they are read. Only safetensors are "
            "read; convert each file once: `safetensors.torch.save_file({key: value.clone() for key, value in "
            f"torch.load({WEIGHTS_NAME!r}, weights_only=True).items()}}, {SAFE_WEIGHTS_NAME!r}, {{'format': 'pt'}})`."
        ) from error


class SafetensorsMixin:
    """For models, before `PreTrainedModel` among the bases: `from_pretrained` by [`read_safetensors`]."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As that of [`~transformers.PreTrainedModel`], with the errors of [`read_safetensors`]."""
        return read_safetensors(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        # Here come the files that an index of a Hub repo names, and those of adapters.
        for file in checkpoint_files or ():
            _check_ending(file)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)


def _find_pickles(source: Any, **location: Any) -> str | None:
    """Name of the file of weights that are pickles, if a folder or Hub repo has one."""
    for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        try:
            if has_file(source, name, **location):
                return name
        except (OSError, ValueError):  # no such repo, or no access to it
            return None
    return None


def _check_shards(folder: Path) -> None:
    """Raises unless the indices of weights in a local folder name safetensors inside of it."""
    for index in folder.glob(f"{SAFE_WEIGHTS_NAME}.index*.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights.") from error
        for shard in shards:
            _check_ending(shard)
            # Not resolved: the files of a folder may be links to where they are stored.
            if os.path.relpath(folder / shard, folder).startswith(os.pardir):
                raise ValueError(f"{index} names {shard!r}, which is outside of its folder.")


def _check_ending(file: Any) -> None:
    if not str(file).endswith(".safetensors"):
        raise ValueError(
            f"The weights in {str(file)!r} are no safetensors, and only those are read: pickles can run code."
        )


__all__ = ["SafetensorsMixin", "check_sizes", "read_safetensors"]
