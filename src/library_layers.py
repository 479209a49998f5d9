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
"""Extends layers of the library: by subclasses, and by attention functions of their own."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class RoutedConfig:
    """
    The config of a model as its attention modules see it: some implementations of attention have another name there. The
    config itself, which everyone else reads, keeps what the user has set, and it may change later.

    Args:
        config (`PreTrainedConfig`): The config of the model.
        routes (`dict[str, str]`): Names of implementations, and what each is replaced by.
    """

    def __init__(self, config: PreTrainedConfig, routes: dict[str, str]):
        self._config, self._routes = config, routes

    @property
    def _attn_implementation(self) -> str | None:
        implementation = self._config._attn_implementation
        return self._routes.get(implementation, implementation)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_config", "_routes"):
            super().__setattr__(name, value)
        else:
            setattr(self._config, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy or an unpickled object is asked for these before it has a config
            raise AttributeError(name)
        return getattr(self._config, name)


def route_attention(part: nn.Module, routes: dict[str, str]) -> None:
    """Makes the attention modules in `part` of a model use other implementations than their config names."""
    module: Any
    for module in part.modules():
        # The library itself finds them by name, too.
        if "Attention" in type(module).__name__ and isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = RoutedConfig(module.config, routes)


def pass_as_parent(subclass: Any, factory: Any) -> Any:
    """
    Gives a class that `factory(parent)` has made the name of its parent, because device placement and sharding find layers
    by name. Its instances can be pickled, though the class has no name of its own.
    """
    parent = subclass.__base__
    subclass.__name__, subclass.__qualname__ = parent.__name__, parent.__qualname__
    subclass.__reduce_ex__ = lambda self, protocol: (_new_instance, (factory, parent), self.__getstate__())
    return subclass


def _new_instance(factory: Any, parent: Any) -> nn.Module:
    return factory(parent).__new__(factory(parent))
