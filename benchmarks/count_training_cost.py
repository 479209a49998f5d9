"""
Counts the cost of training at the papers' sizes: parameters, memory and floating point operations of each phase. The tensors
have no data, so this takes a minute and hardly any memory.

    python benchmarks/count_training_cost.py --output benchmarks/results/count_training_cost.md

Operations are those that `torch.utils.flop_counter` counts for one sample with one image of 336 x 336 pixels: a forward and
backward pass with gradient checkpointing in the language model. Activations are the tensors that the backward pass keeps of
that sample in bfloat16, with the layer that it computes again. Weights, gradients and Adam's two moments are in float32.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText

from ta_llava.analysis.cost import CPU_ATTENTION, full_size_config, run
from ta_llava.training.parts import count_parameters, train_only
from ta_llava.training.recipe import load_recipe


RECIPES = Path(__file__).parent.parent / "recipes"
CAPTIONS, INSTRUCTIONS = 558_128, 665_298  # samples of LLaVA-1.5's two mixtures
GIGA, TERA = 1e9, 1e12
# Assumed operations per second: a third of an A6000's peak in bfloat16, two fifths of an A100's.
SUSTAINED = {"an A6000": 50 * TERA, "an A100": 125 * TERA}


@dataclass
class Phase:
    """One recipe at the size of the paper. `text_tokens` counts question and answer."""

    model: str  # one of `FULL_SIZE`
    recipe: str
    num_samples: int
    text_tokens: int
    visual_tokens: int | None = None  # VMTC


PHASES = (
    Phase("ta-llava-gemma-2-2b", "ta_llava/phase1", CAPTIONS, 64),
    Phase("ta-llava-gemma-2-2b", "ta_llava/phase2", INSTRUCTIONS, 320),
    Phase("ta-llava-gemma-2-2b", "ta_llava/phase3", INSTRUCTIONS, 320),
    Phase("llava-1.5-7b", "llava/pretrain", CAPTIONS, 64),
    Phase("llava-1.5-7b", "llava/finetune", INSTRUCTIONS, 320),
    Phase("llava-1.5-7b", "llava/pretrain", CAPTIONS, 64, visual_tokens=64),
    Phase("llava-1.5-7b", "llava/finetune", INSTRUCTIONS, 320, visual_tokens=64),
)


def build_model(phase: Phase) -> Any:
    """The model of a phase in bfloat16, without data."""
    config = full_size_config(phase.model)
    if phase.visual_tokens is not None:
        config.use_vmtc, config.vmtc_num_visual_tokens = True, phase.visual_tokens
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    train_only(model, load_recipe(RECIPES / f"{phase.recipe}.yaml").train)
    return model.train()


def loss_of_a_sample(model: Any, text_tokens: int) -> torch.Tensor:
    """Loss of one sample with one image."""
    return run(model, torch.empty(1, 3, 336, 336, dtype=torch.bfloat16), text_tokens, labels=True).loss


def count_operations(model: Any, text_tokens: int) -> int:
    """Floating point operations of a forward and backward pass of one sample."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss_of_a_sample(model, text_tokens).backward()
    return counter.get_total_flops()


def count_activations(model: Any, text_tokens: int) -> int:
    """Bytes that the backward pass keeps of one sample. Each storage counts once, parameters do not count."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of_a_sample(model, text_tokens)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def format_row(phase: Phase) -> str:
    """The row of a phase. Call it in a `FakeTensorMode`."""
    model = build_model(phase)
    counts = count_parameters(model)
    trained, frozen = (sum(count[index] for count in counts.values()) for index in (0, 1))
    without = count_activations(model, phase.text_tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    operations = count_operations(model, phase.text_tokens)
    kept = count_activations(model, phase.text_tokens)
    # The layer that is computed again keeps as much as it would without checkpointing.
    num_layers = model.config.text_config.num_hidden_layers
    kept += (without - kept) // num_layers
    total = operations * phase.num_samples
    cells = [
        phase.model if phase.visual_tokens is None else f"{phase.model}, VMTC {phase.visual_tokens}",
        f"`{phase.recipe}`",
        f"{trained / 1e6:,.0f} M",
        f"{frozen / 1e6:,.0f} M",
        f"{4 * (trained + frozen) / GIGA:.1f} GB",
        f"{12 * trained / GIGA:.1f} GB",
        f"{phase.text_tokens}",
        f"{kept / GIGA:.2f} GB",
        f"{operations / TERA:.1f} TFLOP",
        f"{total / 1e18:.2f} EFLOP",
        *(f"{total / rate / 3600:,.0f}" for rate in SUSTAINED.values()),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the cost of training at the papers' sizes.")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    rates = " | ".join(f"hours of {name} at {rate / TERA:.0f} TFLOP/s" for name, rate in SUSTAINED.items())
    lines = [
        "| | recipe | trained | frozen | weights | gradients and moments | text tokens of a sample | its activations | "
        f"its operations | all samples | {rates} |",
        "|---|---|" + "---:|" * (8 + len(SUSTAINED)),
    ]
    with FakeTensorMode():
        lines += [format_row(phase) for phase in tqdm(PHASES, unit="phase")]
    table = "\n".join(lines)
    print(table)
    if arguments.output:
        arguments.output.write_text(f"{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
