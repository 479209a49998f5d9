"""
Measures how much accuracy the shipped models lose by quantisation, on all 9,673 questions of easy-VQA's official test split.
The weights are in float32, in bfloat16, or quantised; whatever is not quantised is then in bfloat16.

    python benchmarks/quantization.py --output benchmarks/results/quantization.md

Needs accelerate, bitsandbytes, easy-vqa and torchao. `--device cuda` measures the same with the kernels of a GPU.
"""

import argparse
import gc
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from compare_with_llava import cpu_name
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

from ta_llava import VmtcCmaiLlavaForConditionalGeneration
from ta_llava.building.compress import compressed_parts
from ta_llava.common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ta_llava.data.easy_vqa import load_easy_vqa
from ta_llava.inference import answer


@dataclass(frozen=True)
class Precision:
    """How to load weights. `dtype` is for whatever is not quantised."""

    name: str
    dtype: torch.dtype
    quantization: Callable[[], Any] = lambda: None


PRECISIONS = (
    Precision("float32", torch.float32),
    Precision("bfloat16", torch.bfloat16),
    Precision("torchao int8, weights only", torch.bfloat16, lambda: TorchAoConfig(Int8WeightOnlyConfig())),
    Precision("bitsandbytes int8", torch.bfloat16, lambda: BitsAndBytesConfig(load_in_8bit=True)),
    Precision(
        "bitsandbytes NF4",
        torch.bfloat16,
        lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    ),
)


@dataclass(frozen=True)
class Setup:
    """A shipped model. With a budget, VMTC and CMAI are on."""

    name: str
    folder: Path
    num_visual_tokens: int | None = None
    cmai_max_ratio: float | None = None

    def load(self, precision: Precision, device: str) -> tuple[Any, Any]:
        """Model and processor."""
        kwargs = {"dtype": precision.dtype, "quantization_config": precision.quantization(), "device_map": device}
        if self.num_visual_tokens is None:
            processor = AutoProcessor.from_pretrained(self.folder)
            return AutoModelForImageTextToText.from_pretrained(self.folder, **kwargs), processor
        _, config, processor = compressed_parts(self.folder, self.num_visual_tokens, self.cmai_max_ratio)
        model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(self.folder, config=config, **kwargs)
        return model, processor


SETUPS = (
    Setup("TA-LLaVA", DEFAULT_MODEL),
    Setup("LLaVA", DEFAULT_LLAVA),
    Setup("LLaVA, VMTC 16, CMAI 0.6", DEFAULT_LLAVA, num_visual_tokens=16, cmai_max_ratio=0.6),
)


def agreement(answers: list[str], others: list[str]) -> float:
    """Share of equal answers."""
    return fmean(one == other for one, other in zip(answers, others))


def megabytes(model: Any) -> float:
    """Size of the saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=1, help="ask one question in this many")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU.")
    if arguments.every < 1 or arguments.batch_size < 1:
        parser.error("--every and --batch-size must be at least 1.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs for every product that its inputs are cast

    samples = [(scene.path, *question) for scene in load_easy_vqa("test") for question in scene.questions]
    samples = samples[:: arguments.every]
    questions: list[tuple[list[Any], str]] = [([path], text) for path, text, _ in samples]
    expected = [right for _, _, right in samples]

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "torchao", "bitsandbytes"))
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name()
    lines = [
        f"{packages}; {machine}; {len(samples):,} questions in batches of {arguments.batch_size}.",
        "",
        "| | weights | accuracy | points lost | other answers than in float32 | size of the weights |",
        "|---|---|---:|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for setup in SETUPS:
        in_float32: list[str] = []
        for precision in PRECISIONS:
            model, processor = setup.load(precision, arguments.device)
            given = list(answer(model, processor, questions, arguments.batch_size, progress=True))
            in_float32 = in_float32 or given
            accuracy = agreement(given, expected)
            cells = [
                setup.name,
                precision.name,
                f"{accuracy:.2%}",
                f"{(agreement(in_float32, expected) - accuracy) * 100:.2f}",
                f"{1 - agreement(given, in_float32):.2%}",
                f"{megabytes(model):.2f} MB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            del model
            gc.collect()
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
