"""Arguments of the Trainer that follow from a recipe."""

import warnings

import pytest
import torch

from ta_llava.training.arguments import build_training_arguments
from ta_llava.training.recipe import Recipe


@pytest.mark.parametrize(
    "capability, bf16, slow", [("AVX2", True, True), ("AVX2", False, False), ("AVX512", True, False)]
)
def test_bfloat16_on_a_cpu_that_is_slow_in_it_is_warned_of(tmp_path, monkeypatch, capability, bf16, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    recipe = Recipe(output_dir=str(tmp_path), training_arguments={"bf16": bf16, "use_cpu": True})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_training_arguments(recipe)
    assert any("training_arguments.bf16=false" in str(warning.message) for warning in caught) == slow
