"""The parts of a model that a recipe may train."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..configuration_ta_llava import TaLlavaConfig
from ..vmtc_cmai_patch import VmtcCmaiLlavaConfig


# Modules of the parts that a recipe may name under `train`, in the model without its head.
PARTS = {
    TaLlavaConfig.model_type: {
        "projector": ("multi_modal_projector",),
        "prefix": ("prefix_embedding", "image_index_embedding"),  # the latter only where the config asks for it
        "adapters": ("text_adapter", "vision_adapter"),
        "language_model": ("language_model", "lm_head"),
        "vision_tower": ("vision_tower",),
    },
    VmtcCmaiLlavaConfig.model_type: {
        "projector": ("multi_modal_projector",),
        "language_model": ("language_model", "lm_head"),
        "vision_tower": ("vision_tower",),
    },
}


# --- what is trained -----------------------------------------------------------------------------------------------


def train_only(model: Any, parts: Sequence[str]) -> None:
    """Freezes all of a model but the named `PARTS`."""
    model.requires_grad_(False)
    for part in parts:
        for module in modules_of(model, part).values():
            module.requires_grad_(True)


def modules_of(model: Any, part: str) -> dict[str, nn.Module]:
    """The modules of a part that the model has, by name."""
    owners = {name: model if name == "lm_head" else model.model for name in PARTS[model.config.model_type][part]}
    return {name: getattr(owner, name) for name, owner in owners.items() if hasattr(owner, name)}


def count_parameters(model: Any) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters of each part; those that parts share (tied embeddings) count once."""
    seen: set[int] = set()
    counts = {}
    for part in PARTS[model.config.model_type]:
        trainable = frozen = 0
        for module in modules_of(model, part).values():
            for name, parameter in module.named_parameters():
                # PEFT keeps the original of what it trains fully.
                if id(parameter) not in seen and "original_module." not in name:
                    seen.add(id(parameter))
                    number = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves nothing in its place
                    if type(parameter).__name__ == "Params4bit":
                        number *= 2  # in a byte
                    trainable += number * parameter.requires_grad
                    frozen += number * (not parameter.requires_grad)
        counts[part] = (trainable, frozen)
    return counts


def describe_parameters(counts: dict[str, tuple[int, int]]) -> str:
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}"]
    total = tuple(map(sum, zip(*counts.values())))
    for part, (trainable, frozen) in [*counts.items(), ("all", total)]:
        lines.append(f"{part:<16}{trainable:>16,}{frozen:>16,}")
    return "\n".join(lines)


def module_names(part: str) -> tuple[str, ...]:
    return next((parts[part] for parts in PARTS.values() if part in parts), ())
