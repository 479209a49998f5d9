"""Adds LoRA to the language model of a model."""

from typing import Any

from .parts import modules_of
from .recipe import Recipe


# The linear layers of the language model, whatever its family calls them.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def add_lora(model: Any, recipe: Recipe) -> Any:
    """Wraps a model as a `PeftModel`. The language model is trained by LoRA, the other parts of the recipe fully."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if recipe.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    fully_trained = [name for part in recipe.train if part != "language_model" for name in modules_of(model, part)]
    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": LORA_TARGETS, **(recipe.lora or {})}
    return get_peft_model(model, LoraConfig(modules_to_save=fully_trained or None, **settings))
