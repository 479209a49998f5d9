"""YAML in which the fields of a dataclass decide what a value without quotes is: `2024` is a text where a text belongs."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


_SIMPLE = (NoneType, bool, int, float, str)
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, repr=False)
class _Plain:
    """A value without quotes that YAML takes for a number or a truth value, and its text."""

    text: str
    value: Any

    def __repr__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    # A date stays a text.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        return {key.text if isinstance(key, _Plain) else key: value for key, value in mapping.items()}


# YAML 1.1 takes 1.0e-3 for a number, but not 1e-3.
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
for _name in ("bool", "int", "float"):
    _construct = yaml.SafeLoader.yaml_constructors[_TAG + _name]
    _Loader.add_constructor(
        _TAG + _name, lambda loader, node, construct=_construct: _Plain(node.value, construct(loader, node))
    )


def load_yaml(text: str) -> Any:
    """
    Reads YAML for [`typed_fields`]: numbers and truth values without quotes keep their text until their type is known.

    Raises:
        `yaml.YAMLError`: The text is no YAML.
    """
    return yaml.load(text, _Loader)


def typed_fields(settings_class: type, content: Any, where: str) -> dict[str, Any]:
    """
    Gives each value of a mapping the type that a dataclass declares for it.

    A text in quotes stays a text, except where a number is declared: `"1e-3"` is a number as well as `1e-3`. Anything
    without quotes is a text where only a text is declared, such as `2024` or `no`. Where nothing simple is declared, as in
    a `dict`, values are what YAML takes them for.

    Args:
        settings_class (`type`): The dataclass.
        content (`Any`): A mapping from [`load_yaml`], or one of plain values, which is then only checked.
        where (`str`): Names the mapping in messages.

    Raises:
        `ValueError`: The content is no mapping, has a key that is no field, or a value of another type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where[0].upper() + where[1:]} must be a mapping, got {content!r}.")
    kinds = get_type_hints(settings_class)
    if unknown := [key for key in content if key not in kinds]:
        nearest = difflib.get_close_matches(str(unknown[0]), kinds, n=3, cutoff=0)
        raise ValueError(f"Unknown key {unknown[0]!r} in {where}. The nearest are {', '.join(nearest)}.")
    values = {key: _typed(value, kinds[key]) for key, value in content.items()}
    for key, value in values.items():
        if not _fits(value, _members(kinds[key])):
            name = getattr(kinds[key], "__name__", str(kinds[key]))
            raise ValueError(f"`{key}` in {where} must be of type {name}, got {value!r}.")
    return values


def _members(kind: Any) -> list[Any]:
    """The types that a declared type allows: the members of a union, of a `Literal` the types of its values."""
    if get_origin(kind) in (Union, UnionType):
        return [member for argument in get_args(kind) for member in _members(argument)]
    if get_origin(kind) is Literal:
        return [type(value) for value in get_args(kind)]
    is_enum_of_texts = isinstance(kind, type) and issubclass(kind, str) and issubclass(kind, Enum)
    return [str if is_enum_of_texts else kind]


def _typed(value: Any, kind: Any) -> Any:
    """A value of YAML as the declared type has it. What does not fit is returned as YAML takes it."""
    kinds = _members(kind)
    if isinstance(value, Mapping):
        entry = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        return {key: _typed(each, entry) for key, each in value.items()}
    if isinstance(value, list):
        entry = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), Any)
        return [_typed(each, entry) for each in value]
    text = value
    if isinstance(value, _Plain):
        text, value = value.text, value.value
    if value is None or type(value) in kinds:
        return value
    if isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            return value
    is_number = float in kinds and isinstance(value, int)
    # `fsdp` is declared as a text, but is true or false.
    if str in kinds and not is_number and text.lower() not in ("true", "false"):
        return text
    return value


def _fits(value: Any, kinds: list[Any]) -> bool:
    if value is None or not set(kinds) <= set(_SIMPLE):
        return True
    if type(value) in kinds or (type(value) is int and float in kinds):
        return True
    return type(value) is bool and str in kinds and len(kinds) > 1  # see `fsdp` above
