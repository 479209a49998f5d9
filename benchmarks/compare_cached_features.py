"""
Measures what `--cache-vision-features` saves in training. Steps of TA-LLaVA's phases 1 and 2 (which train projector, prefix
and adapters) with images and with cached features take turns in one run on one machine, with random weights.

    python benchmarks/compare_cached_features.py --output benchmarks/results/compare_cached_features.md
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from compare_with_llava import FIRST_WORD_ID, SETUPS, Setup, describe_machine
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoProcessor

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration
from ta_llava.common.shipped_models import DEFAULT_MODEL
from ta_llava.training.dataset import Collator
from ta_llava.training.parts import train_only
from ta_llava.training.vision_feature_cache import VisionFeatureCache


NUM_TEXT_TOKENS = 40


def build(setup: Setup) -> tuple[Any, Any]:
    """A model with the backbones of `setup`, and a processor for its images. The text is given as token ids."""
    config = TaLlavaConfig(
        vision_config=setup.vision_config,
        text_config=setup.text_config,
        num_prefix_tokens=setup.num_prefix_tokens,
        vision_feature_layer=setup.vision_feature_layer,
        image_token_id=6,
        response_marker_ids=[4, 5],
    )
    processor = AutoProcessor.from_pretrained(DEFAULT_MODEL)
    size = setup.vision_config["image_size"]
    processor.image_processor.size = {"height": size, "width": size}
    model = TaLlavaForConditionalGeneration(config)
    train_only(model, ["projector", "prefix", "adapters"])
    return model.train(), processor


def write_samples(folder: Path, count: int, setup: Setup) -> list[dict[str, Any]]:
    """Samples with JPEG images of a photograph's size, and random words, half of which are the answer."""
    generator = np.random.default_rng(0)
    samples = []
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        path = folder / f"{index}.jpg"
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path)
        words = generator.integers(FIRST_WORD_ID, setup.text_config["vocab_size"], NUM_TEXT_TOKENS).tolist()
        words[NUM_TEXT_TOKENS // 2 - 2 : NUM_TEXT_TOKENS // 2] = [4, 5]
        answer = words[NUM_TEXT_TOKENS // 2 :]
        ids = [6] * setup.num_prefix_tokens + words
        samples.append({"input_ids": ids, "labels": [-100] * (len(ids) - len(answer)) + answer, "images": [str(path)]})
    return samples


def seconds_of_step(model: Any, optimizer: torch.optim.Optimizer, collator: Collator, samples: list) -> float:
    """Seconds of one training step, including building the batch."""
    start = time.perf_counter()
    model(**collator(samples)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    setup = SETUPS["135M"]
    model, processor = build(setup)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        samples = write_samples(Path(folder), arguments.batch_size, setup)
        cache = VisionFeatureCache(Path(folder) / "features", model, processor)
        cache.fill(sample["images"][0] for sample in samples)
        collators = {"images": Collator(processor), "cached features": Collator(processor, cache)}
        seconds: dict[str, list[float]] = {name: [] for name in collators}
        for index in tqdm(range(arguments.repeats + 1)):
            for name, collator in collators.items():
                taken = seconds_of_step(model, optimizer, collator, samples)
                if index > 0:
                    seconds[name].append(taken)
    plain = median(seconds["images"])
    lines = [
        describe_machine(torch.float32),
        "",
        f"{setup.description}; batch {arguments.batch_size}, {NUM_TEXT_TOKENS} text tokens, median of {arguments.repeats} "
        "steps",
        "",
        "| a step with | seconds | times as fast |",
        "|---|---:|---:|",
        *(f"| {name} | {median(taken):.2f} | {plain / median(taken):.2f}x |" for name, taken in seconds.items()),
    ]
    print("\n".join(lines))
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
