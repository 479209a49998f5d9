"""The parts of a model that a recipe may train."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..common.families import COMPRESSED_TYPES
from ..configuration_ta_llava import TaLlavaConfig


# Parts that a recipe may name under `train`, and their modules in the model without its head.
_LLAVA_PARTS = {
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", "lm_head"),
    "vision_tower": ("vision_tower",),
}
PARTS = {
    TaLlavaConfig.model_type: {
        "projector": ("multi_modal_projector",),
        "prefix": ("prefix_embedding", "image_index_embedding"),  # the latter only if the config has it on
        "adapters": ("text_adapter", "vision_adapter"),
        "language_model": ("language_model", "lm_head"),
        "vision_tower": ("vision_tower",),
    },
    **dict.fromkeys(COMPRESSED_TYPES, _LLAVA_PARTS),
}


def train_only(model: Any, parts: Sequence[str]) -> None:
    """Freezes all parts of a model except the named `PARTS`."""
    model.requires_grad_(False)
    for part in parts:
        for parameter in _parameters_of(model, part).values():
            parameter.requires_grad_(True)


def modules_of(model: Any, part: str) -> dict[str, nn.Module]:
    """The modules of a part by name, without those that the model does not have."""
    owners = {name: model if name == "lm_head" else model.model for name in PARTS[model.config.model_type][part]}
    return {name: getattr(owner, name) for name, owner in owners.items() if hasattr(owner, name)}


def _parameters_of(model: Any, part: str) -> dict[str, nn.Parameter]:
    """The parameters of a part by name."""
    parameters = {
        f"{module_name}.{name}": parameter
        for module_name, module in modules_of(model, part).items()
        for name, parameter in module.named_parameters()
    }
    newline = getattr(model.model, "image_newline", None) if part == "projector" else None
    return parameters if newline is None else {**parameters, "image_newline": newline}  # of pictures in views


def count_parameters(model: Any) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters of each part. Shared parameters (tied embeddings) count once."""
    seen: set[int] = set()
    counts = {}
    for part in PARTS[model.config.model_type]:
        trainable = frozen = 0
        for name, parameter in _parameters_of(model, part).items():
            # PEFT keeps the originals of fully trained modules.
            if id(parameter) not in seen and "original_module." not in name:
                seen.add(id(parameter))
                number = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves empty parameters
                if type(parameter).__name__ == "Params4bit":
                    number *= 2  # two of them are in a byte
                trainable += number * parameter.requires_grad
                frozen += number * (not parameter.requires_grad)
        counts[part] = (trainable, frozen)
    return counts


def describe_parameters(counts: dict[str, tuple[int, int]]) -> str:
    """The counts of [`count_parameters`] as a table."""
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}"]
    total = tuple(map(sum, zip(*counts.values())))
    for part, (trainable, frozen) in [*counts.items(), ("all", total)]:
        lines.append(f"{part:<16}{trainable:>16,}{frozen:>16,}")
    return "\n".join(lines)


def module_names(part: str) -> tuple[str, ...]:
    """Names of the modules of a part, in any model that has it."""
    return next((parts[part] for parts in PARTS.values() if part in parts), ())
